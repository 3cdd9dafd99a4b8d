"""gRPC's own health client."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def health(grpc_target):
    with grpc.insecure_channel(grpc_target) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", ["", "lockstep.v1.InferenceService", "lockstep.v1.ModelService"])
def test_services_that_are_served_are_serving(health, service):
    request = health_pb2.HealthCheckRequest(service=service)
    assert health.Check(request, timeout=10).status == SERVING
    assert next(iter(health.Watch(request, timeout=10))).status == SERVING


def test_other_services_are_not_found(health):
    with pytest.raises(grpc.RpcError) as failure:
        health.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
    assert failure.value.code() == grpc.StatusCode.NOT_FOUND

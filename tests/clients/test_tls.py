"""A gateway that speaks TLS. `tests/tests/tls.rs` starts it, with a certificate of its own in LOCKSTEP_CERTIFICATE."""

import os
import ssl

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lockstep import Client


@pytest.fixture(scope="module")
def certificate():
    return os.environ["LOCKSTEP_CERTIFICATE"]


@pytest.fixture(scope="module")
def credentials(certificate):
    with open(certificate, "rb") as file:
        return grpc.ssl_channel_credentials(file.read())


def test_openai_streams(http_url, model, certificate):
    client = httpx.Client(verify=ssl.create_default_context(cafile=certificate))
    with openai.OpenAI(base_url=f"{http_url}/v1", api_key="none", http_client=client) as server:
        messages = [{"role": "user", "content": "the the the"}]
        stream = server.chat.completions.create(model=model, messages=messages, max_tokens=5, stream=True)
        pieces = list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"


def test_openai_refuses_a_stranger(http_url):
    with openai.OpenAI(base_url=f"{http_url}/v1", api_key="none", max_retries=0) as server:
        with pytest.raises(openai.APIConnectionError) as failure:
            server.models.list()
    assert "certificate verify failed" in str(failure.value.__cause__)


def test_health_by_grpc(grpc_target, credentials):
    with grpc.secure_channel(grpc_target, credentials) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_our_client(grpc_target, model, credentials):
    with Client(grpc_target, credentials=credentials) as client:
        assert [found.name for found in client.list_models()] == [model]


def test_plain_text_is_not_answered(grpc_target):
    with grpc.insecure_channel(grpc_target) as channel:
        with pytest.raises(grpc.RpcError) as failure:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert failure.value.code() == grpc.StatusCode.UNAVAILABLE

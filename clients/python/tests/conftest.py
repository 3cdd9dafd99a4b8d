"""Where the cluster under test answers; `tests/tests/clients.rs` starts one. Without it those tests are skipped."""

import os

import pytest


@pytest.fixture(scope="session")
def grpc_target():
    if "LOCKSTEP_GRPC" not in os.environ:
        pytest.skip("LOCKSTEP_GRPC names no cluster")
    return os.environ["LOCKSTEP_GRPC"]

"""Where the cluster under test answers. `tests/tests/clients.rs` starts it and runs these files; by hand:
LOCKSTEP_HTTP=http://127.0.0.1:8080 LOCKSTEP_GRPC=127.0.0.1:50051 LOCKSTEP_MODEL=NAME pytest tests/clients/test_openai.py
(`test_openapi.py` also needs LOCKSTEP_KEY, and a gateway with that key and the policy beside this file.)
"""

import os

import pytest


@pytest.fixture(scope="session")
def http_url():
    return os.environ["LOCKSTEP_HTTP"]


@pytest.fixture(scope="session")
def grpc_target():
    return os.environ["LOCKSTEP_GRPC"]


@pytest.fixture(scope="session")
def model():
    return os.environ["LOCKSTEP_MODEL"]

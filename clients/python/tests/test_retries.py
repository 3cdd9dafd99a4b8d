"""Retries, deadlines and cancellation, against a service that does as it is told."""

import asyncio
import threading
from concurrent import futures
from datetime import timedelta

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import lockstep
from lockstep.retries import PURSE, Attempts, Budget
from lockstep.v1 import inference_service_pb2 as messages
from lockstep.v1 import inference_service_pb2_grpc as services

CODES = {code.value[0]: code for code in grpc.StatusCode}
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Fake(services.InferenceServiceServicer):
    """Fails as often as `failures` says, then answers. A stream then waits, unless it is to end."""

    def __init__(self):
        self.failures = []
        self.fail_late = False
        self.calls = 0
        self.is_cut_off = False
        self.was_cancelled = threading.Event()

    def fail(self, context):
        self.calls += 1
        if self.failures:
            code, retry_after = self.failures.pop(0)
            status = status_pb2.Status(code=code.value[0], message="not now")
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="lockstep"))
            if retry_after is not None:
                retry = error_details_pb2.RetryInfo()
                retry.retry_delay.FromTimedelta(timedelta(seconds=retry_after))
                status.details.add().Pack(retry)
            context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
            context.abort(code, "not now")

    def CountTokens(self, request, context):
        self.fail(context)
        return messages.CountTokensResponse(token_count=3)

    def StreamChat(self, request, context):
        if not self.fail_late:
            self.fail(context)
        # Tells False where the call has ended already.
        context.add_callback(self.was_cancelled.set) or self.was_cancelled.set()
        yield messages.StreamChatResponse(start={"model": "m"})
        yield messages.StreamChatResponse(chunk={"text": "Hello"})
        if self.fail_late:
            self.fail(context)
        if self.is_cut_off:
            return
        if request.sampling.n == 2:
            self.was_cancelled.wait(30)
        yield messages.StreamChatResponse(finish={"usage": {"completion_tokens": 1}})


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def target(fake):
    server = grpc.server(futures.ThreadPoolExecutor(4))
    services.add_InferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


class Awaited:
    """An `AsyncClient` with the surface of `Client`."""

    def __init__(self, target, **options):
        self.loop = asyncio.new_event_loop()
        self.client = self.run(self.make(target, options))

    async def make(self, target, options):
        return lockstep.AsyncClient(target, **options)

    def run(self, future):
        return self.loop.run_until_complete(future)

    def count_tokens(self, **asked):
        return self.run(self.client.count_tokens(**asked))

    def read(self, *asked):
        async def read():
            stream = self.client.stream_chat(*asked)
            return [piece async for piece in stream], stream.finish

        return self.run(read())

    def read_one(self, *asked, **sampling):
        async def read():
            self.kept = self.client.stream_chat(*asked, **sampling)
            async with self.kept as stream:
                first = await anext(stream)
            return [first, *[piece async for piece in stream]]

        return self.run(read())

    def close(self):
        self.run(self.client.close())
        self.loop.close()


class Waiting(lockstep.Client):
    """A `Client` that reads its streams like `Awaited`."""

    def read(self, *asked):
        stream = self.stream_chat(*asked)
        return list(stream), stream.finish

    def read_one(self, *asked, **sampling):
        # Kept, since dropping it cancels the call, too.
        self.kept = self.stream_chat(*asked, **sampling)
        with self.kept as stream:
            first = next(stream)
        return [first, *stream]


@pytest.fixture(params=[Waiting, Awaited])
def connect(request, target):
    made = []

    def connect(**options):
        made.append(request.param(target, **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()


def test_a_call_comes_back_when_it_is_told(fake, connect):
    fake.failures = [(UNAVAILABLE, 0.01), (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.01)]
    assert connect(timeout=30).count_tokens(prompt="x") == 3
    assert fake.calls == 3


def test_tries_end(fake, connect):
    fake.failures = [(UNAVAILABLE, 0.01)] * 5
    with pytest.raises(lockstep.Error) as failure:
        connect(tries=2).count_tokens(prompt="x")
    assert fake.calls == 2
    assert (failure.value.reason, failure.value.code) == ("OVERLOADED", UNAVAILABLE)
    assert failure.value.retry_after == 0.01


@pytest.mark.parametrize("failure", [(UNAVAILABLE, None), (grpc.StatusCode.INTERNAL, 0.01)])
def test_nothing_else_is_tried_again(fake, connect, failure):
    fake.failures = [failure]
    with pytest.raises(lockstep.Error):
        connect().count_tokens(prompt="x")
    assert fake.calls == 1


def test_a_wait_that_the_deadline_would_end_is_not_begun(fake, connect):
    fake.failures = [(UNAVAILABLE, 3600)]
    with pytest.raises(lockstep.Error) as failure:
        connect(timeout=60).count_tokens(prompt="x")
    assert failure.value.retry_after == 3600
    assert fake.calls == 1


def test_a_stream_that_has_not_begun_is_tried_again(fake, connect):
    fake.failures = [(UNAVAILABLE, 0.01)]
    pieces, finish = connect(timeout=30).read("Hi")
    assert pieces == ["Hello"]
    assert finish.usage.completion_tokens == 1
    assert fake.calls == 2


def test_a_stream_that_has_begun_is_not(fake, connect):
    fake.failures = [(UNAVAILABLE, 0.01)]
    fake.fail_late = True
    with pytest.raises(lockstep.Error) as failure:
        connect().read("Hi")
    assert failure.value.reason == "OVERLOADED"
    assert fake.calls == 1


def test_a_stream_without_its_end_is_an_error(fake, connect):
    fake.is_cut_off = True
    with pytest.raises(lockstep.Error, match="cut off"):
        connect().read("Hi")


def test_closing_a_stream_cancels_its_call(fake, connect):
    assert connect().read_one("Hi", n=2) == ["Hello"]
    assert fake.was_cancelled.wait(30)


def test_dropping_a_stream_cancels_its_call(fake, target):
    with lockstep.Client(target) as client:
        for piece in client.stream_chat("Hi", n=2):
            assert piece == "Hello"
            break
        assert fake.was_cancelled.wait(30)


def test_retries_are_earned():
    budget = Budget()
    error = lockstep.Error("", UNAVAILABLE, retry_after=0.01)
    granted = sum(Attempts(budget, 2, None).pause_after(error) is not None for _ in range(1000))
    assert PURSE <= granted <= PURSE + 100


def test_clients_come_back_at_different_times():
    error = lockstep.Error("", UNAVAILABLE, retry_after=10)
    pauses = {Attempts(Budget(), 2, None).pause_after(error) for _ in range(10)}
    assert len(pauses) > 1 and all(10 <= pause <= 15 for pause in pauses)

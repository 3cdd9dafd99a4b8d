"""`tritonclient.grpc`, as its documentation and that of Triton's vLLM backend use it."""

import json
import queue

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

PROMPT = "The capital of France is"
PATIENCE = 60


@pytest.fixture(scope="module")
def client(grpc_target):
    with triton.InferenceServerClient(grpc_target) as client:
        yield client


def tensor(name, value):
    kind, dtype = ("BOOL", bool) if isinstance(value, bool) else ("BYTES", np.object_)
    data = np.array([value if isinstance(value, bool) else value.encode()], dtype=dtype)
    given = triton.InferInput(name, [1], kind)
    given.set_data_from_numpy(data)
    return given


def inputs(text=PROMPT, sampling=None, **flags):
    given = [tensor("text_input", text)] + [tensor(name, flag) for name, flag in flags.items()]
    return given + ([tensor("sampling_parameters", json.dumps(sampling))] if sampling else [])


def text_of(result):
    return b"".join(result.as_numpy("text_output")).decode()


class Stream:
    """What comes back on a stream, in order."""

    def __init__(self, client):
        self.client, self.answers = client, queue.Queue()

    def __enter__(self):
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))
        return self

    def __exit__(self, *_):
        self.client.stop_stream()

    def next(self):
        return self.answers.get(timeout=PATIENCE)

    def read(self, *ids):
        """All results by id, until each of these has its last."""
        results, open_ids = {id: [] for id in ids}, set(ids)
        while open_ids:
            result, error = self.next()
            assert error is None, error
            response = result.get_response()
            results[response.id].append(result)
            if response.parameters["triton_final_response"].bool_param:
                open_ids.remove(response.id)
        return results


def test_probes(client, grpc_target, model):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(model) and client.is_model_ready(model, "1")
    assert not client.is_model_ready(model, "2") and not client.is_model_ready("no-such-model")
    with grpc.insecure_channel(grpc_target) as channel:
        asked = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
        assert health_pb2_grpc.HealthStub(channel).Check(asked).status == health_pb2.HealthCheckResponse.SERVING


def test_metadata(client, model):
    assert client.get_server_metadata().name == "lockstep"
    metadata = client.get_model_metadata(model)
    assert (metadata.name, list(metadata.versions)) == (model, ["1"])
    assert ("text_input", "BYTES") in [(given.name, given.datatype) for given in metadata.inputs]
    assert ("text_output", "BYTES") in [(taken.name, taken.datatype) for taken in metadata.outputs]
    with pytest.raises(InferenceServerException) as failure:
        client.get_model_metadata("no-such-model")
    assert failure.value.status() == "StatusCode.NOT_FOUND"


def test_a_whole_answer_begins_with_the_prompt_unless_it_is_excluded(client, model):
    sampling = {"temperature": 0, "max_tokens": 8}
    full = client.infer(model, inputs(sampling=sampling), request_id="seven")
    assert text_of(full).startswith(f"{PROMPT} Paris")
    assert full.get_response().id == "seven"
    alone = client.infer(model, inputs(sampling=sampling, exclude_input_in_output=True))
    assert PROMPT + text_of(alone) == text_of(full)


def test_parameters_are_read_by_name_and_from_the_tensor(client, model):
    # The backend's own sample sends numbers as texts.
    by_tensor = client.infer(model, inputs(sampling={"temperature": "0.8", "seed": "7", "max_tokens": "12"}))
    by_name = client.infer(model, inputs(), parameters={"temperature": 0.8, "seed": 7, "max_new_tokens": 12})
    assert text_of(by_tensor) == text_of(by_name)
    stopped = client.infer(model, inputs("1, 2, 3, 4,", exclude_input_in_output=True), parameters={"temperature": 0.0, "stop": "7"})
    assert text_of(stopped) == " 5, 6, "


def test_outputs_that_are_asked_for(client, model):
    asked = inputs(
        sampling={"temperature": 0, "max_tokens": 3, "n": 2, "logprobs": 1},
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
        return_cumulative_logprob=True,
        return_logprobs=True,
    )
    result = client.infer(model, asked)
    assert list(result.as_numpy("finish_reason")) == [b"length"] * 2
    assert list(result.as_numpy("num_input_tokens")) == [5]
    assert list(result.as_numpy("num_output_tokens")) == [3, 3]
    for choice, total in zip(result.as_numpy("logprobs"), result.as_numpy("cumulative_logprob")):
        tokens = [next(iter(entries.values())) for entries in json.loads(choice)]
        assert "".join(token["decoded_token"] for token in tokens).startswith(" Paris")
        assert total == pytest.approx(sum(token["logprob"] for token in tokens))
    named = [triton.InferRequestedOutput("finish_reason")]
    only = client.infer(model, inputs(sampling={"max_tokens": 1}), outputs=named)
    assert only.as_numpy("finish_reason")[0] == b"length" and only.as_numpy("text_output") is None


def test_a_stream_says_what_the_whole_answer_says(client, model):
    parameters = {"temperature": 0.0, "max_tokens": 12}
    expected = text_of(client.infer(model, inputs(exclude_input_in_output=True), parameters=parameters))
    with Stream(client) as stream:
        client.async_stream_infer(
            model,
            inputs(stream=True, return_finish_reason=True),
            request_id="a",
            parameters=parameters,
            enable_empty_final_response=True,
        )
        pieces = stream.read("a")["a"]
    assert len(pieces) > 2
    assert "".join(map(text_of, pieces)) == expected
    assert [piece.as_numpy("finish_reason")[0] for piece in pieces[-2:]] == [b"None", b"length"]


def test_requests_share_a_stream(client, model):
    prompts = {f"r{n}": f"{n}, {n + 1}, {n + 2}," for n in range(40)}
    parameters = {"temperature": 0.0, "max_tokens": 4}
    with Stream(client) as stream:
        for id, prompt in prompts.items():
            given = inputs(prompt, stream=int(id[1:]) % 2 == 0, exclude_input_in_output=True)
            client.async_stream_infer(model, given, request_id=id, parameters=parameters)
        results = stream.read(*prompts)
    for id in ["r0", "r1", "r39"]:
        alone = client.infer(model, inputs(prompts[id], exclude_input_in_output=True), parameters=parameters)
        assert "".join(map(text_of, results[id])) == text_of(alone)


def test_a_request_that_fails_does_not_end_its_stream(client, model):
    with Stream(client) as stream:
        client.async_stream_infer(model, inputs(stream=True), request_id="bad", parameters={"top_p": 2.0})
        _, error = stream.next()
        assert error.message() == "top_p: 2 is not in (0, 1]"
        client.async_stream_infer("no-such-model", inputs(stream=True))
        _, error = stream.next()
        assert "no-such-model" in error.message()
        client.async_stream_infer(model, inputs(stream=True), request_id="good", parameters={"max_tokens": 2})
        assert stream.read("good")["good"]


def test_contents_in_the_message_itself(grpc_target, model):
    request = service_pb2.ModelInferRequest(model_name=model, id="x")
    given = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    given.contents.bytes_contents.append(PROMPT.encode())
    request.parameters["max_tokens"].int64_param = 1
    with grpc.insecure_channel(grpc_target) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert (response.id, response.model_version) == ("x", "1")
    assert response.raw_output_contents[0][4:].startswith(PROMPT.encode())


def test_what_is_wrong_is_named(client, model):
    two = triton.InferInput("text_input", [2], "BYTES")
    two.set_data_from_numpy(np.array([b"a", b"b"], dtype=np.object_))
    number = triton.InferInput("text_input", [1], "INT32")
    number.set_data_from_numpy(np.array([1], dtype=np.int32))
    for given, more, expected in [
        ([], {}, "inputs.text_input: it is missing"),
        ([two], {}, "inputs.text_input: shape [2] is not [1]"),
        ([number], {}, "inputs.text_input: its datatype is BYTES, not INT32"),
        (inputs(image=False), {}, "inputs.image: there is no such input"),
        (inputs(stream=True), {}, "inputs.stream: ModelStreamInfer is the call for streams"),
        (inputs(sampling={"top_p": 2}), {}, "top_p: 2 is not in (0, 1]"),
        (inputs(sampling={"lora_name": "x"}), {}, "lora_name: unknown field"),
        (inputs(), {"parameters": {"no_such_option": 1}}, "no_such_option: unknown field"),
        (inputs(), {"sequence_id": 7}, "sequence_"),
        (inputs(), {"priority": 1}, "priority: unknown field"),
        (inputs(), {"outputs": [triton.InferRequestedOutput("tokens")]}, "outputs.tokens: there is no such output"),
        (inputs("word " * 9000), {}, "inputs.text_input: the prompt's"),
    ]:
        with pytest.raises(InferenceServerException) as failure:
            client.infer(model, given, **more)
        assert failure.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert failure.value.message().startswith(expected)


def test_a_timeout_ends_an_answer(client, model):
    asked = inputs("Once upon a time", sampling={"max_tokens": 4000, "ignore_eos": True}, return_finish_reason=True)
    result = client.infer(model, asked, timeout=1_000_000)
    assert result.as_numpy("finish_reason")[0] == b"length"

"""The Shepherd Model Gateway (PyPI's smg) in front of our workers: what it answers is what our own gateway answers.
`tests/tests/smg.rs` starts both over the same two groups; LOCKSTEP_SMG is where smg listens, LOCKSTEP_WORKER a worker.
"""

import concurrent.futures
import json
import os
import time
import urllib.request

import grpc
import openai
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def smg(model):
    """Once it has found its workers."""
    client = openai.OpenAI(base_url=os.environ["LOCKSTEP_SMG"] + "/v1", api_key="none", max_retries=0)
    deadline = time.monotonic() + 60
    while True:
        try:
            client.completions.create(model=model, prompt="Hello", max_tokens=1)
            return client
        except (openai.APIConnectionError, openai.APIStatusError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture(scope="module")
def ours(http_url):
    return openai.OpenAI(base_url=http_url + "/v1", api_key="none", max_retries=0)


def chat(client, model, text, **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, temperature=0, **options)


def contract(descriptor):
    """What a .proto file says, without what its compiler adds."""
    file = FileDescriptorProto()
    descriptor.CopyToProto(file)
    for field in ("name", "dependency", "source_code_info"):
        file.ClearField(field)
    messages = list(file.message_type)
    while messages:
        message = messages.pop()
        messages.extend(message.nested_type)
        for field in message.field:
            field.ClearField("json_name")
    return file


def test_the_contract_is_the_published_one():
    channel = grpc.insecure_channel(os.environ["LOCKSTEP_WORKER"])
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    engine = pool.FindFileContainingSymbol("vllm.grpc.engine.VllmEngine")
    common = pool.FindFileContainingSymbol("smg.grpc.common.KvEventBatch")
    assert contract(engine) == contract(vllm_engine_pb2.DESCRIPTOR)
    assert contract(common) == contract(common_pb2.DESCRIPTOR)


def test_models(smg, model):
    assert model in [entry.id for entry in smg.models.list()]


@pytest.mark.parametrize("text", ["What is the capital of France?", "Name three colours.", "Grüße aus Köln! 42 + 17 = ?"])
def test_a_chat_is_the_same(smg, ours, model, text):
    theirs, own = (chat(client, model, text, max_completion_tokens=40) for client in (smg, ours))
    assert theirs.choices[0].message.content == own.choices[0].message.content
    assert theirs.choices[0].finish_reason == own.choices[0].finish_reason
    assert theirs.usage.completion_tokens == own.usage.completion_tokens
    assert theirs.usage.prompt_tokens == own.usage.prompt_tokens


def test_a_completion_is_the_same(smg, ours, model):
    ask = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    theirs, own = (client.completions.create(**ask) for client in (smg, ours))
    assert theirs.choices[0].text == own.choices[0].text
    assert theirs.choices[0].finish_reason == own.choices[0].finish_reason == "length"


def test_a_seed_gives_the_same_text(smg, ours, model):
    ask = {"model": model, "prompt": PROMPT, "temperature": 0.9, "seed": 7, "max_tokens": 24}
    theirs, own = (client.completions.create(**ask) for client in (smg, ours))
    assert theirs.choices[0].text == own.choices[0].text


def test_a_stream_is_the_whole_in_pieces(smg, model):
    ask = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    whole = smg.completions.create(**ask).choices[0].text
    pieces = [choice.text for chunk in smg.completions.create(**ask, stream=True) for choice in chunk.choices]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 10


def test_a_streamed_chat_counts_its_tokens(smg, model):
    whole = chat(smg, model, "Name three colours.", max_completion_tokens=24)
    text, usage = "", None
    stream = chat(smg, model, "Name three colours.", max_completion_tokens=24, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_string_ends_a_choice(smg, ours, model):
    ask = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 40, "stop": ["."]}
    theirs, own = (client.completions.create(**ask) for client in (smg, ours))
    assert theirs.choices[0].text == own.choices[0].text
    assert theirs.choices[0].finish_reason == own.choices[0].finish_reason == "stop"
    # The worker has ended it, too.
    assert theirs.usage.completion_tokens < 10


def test_choices_are_independent(smg, model):
    answer = smg.completions.create(model=model, prompt=PROMPT, temperature=1, seed=3, n=3, max_tokens=16)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1


def test_log_probabilities(smg, ours, model):
    theirs, own = (
        chat(client, model, "Hello", max_completion_tokens=4, logprobs=True, top_logprobs=2) for client in (smg, ours)
    )
    values = [[entry.logprob for entry in answer.choices[0].logprobs.content] for answer in (theirs, own)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_a_schema_is_held(smg, model):
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
    answer = chat(smg, model, "Is water wet?", max_completion_tokens=40, response_format=response_format)
    assert json.loads(answer.choices[0].message.content)["answer"] in ["yes", "no"]


def test_what_a_worker_refuses_is_the_clients_error(smg, model):
    with pytest.raises(openai.APIStatusError) as refused:
        chat(smg, model, "Hello", max_completion_tokens=4, extra_body={"ebnf": 'root ::= "a"'})
    assert 400 <= refused.value.status_code < 500, refused.value
    assert "sampling_params.grammar" in str(refused.value)


def test_many_at_once(smg, ours, model):
    texts = [f"Count from {n} to {n + 5}." for n in range(8)]
    ask = lambda client: [
        answer.choices[0].message.content
        for answer in concurrent.futures.ThreadPoolExecutor(8).map(
            lambda text: chat(client, model, text, max_completion_tokens=24), texts
        )
    ]
    assert ask(smg) == ask(ours)


def test_the_tokenizer_of_a_folder_comes_from_the_worker(smg, ours, model):
    """The model is a tiny one that says anything: its text is constrained to what every decoder writes alike."""
    ask = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    theirs = smg.completions.create(**ask, extra_body={"regex": "[a-z ]{12}"})
    own = ours.completions.create(**ask, extra_body={"structured_outputs": {"regex": "[a-z ]{12}"}})
    assert theirs.choices[0].text == own.choices[0].text and len(own.choices[0].text) == 12
    assert theirs.usage.prompt_tokens == own.usage.prompt_tokens


def test_prefix_cache_events_lead_a_prompt_to_the_group_that_has_it(smg, model):
    """With the policy cache_aware, which follows SubscribeKvEvents of every worker."""
    facts = ". ".join(f"The number of house {n} is {n * 37 % 101}" for n in range(12))
    ask = {"model": model, "temperature": 0, "max_tokens": 4}
    smg.completions.create(prompt=facts, **ask)
    for question in ("Which house", "How many", "Is there", "What", "Where", "When"):
        usage = smg.completions.create(prompt=f"{facts}. {question}", **ask).usage
        assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens // 2
    counts = {}
    for line in urllib.request.urlopen(os.environ["LOCKSTEP_SMG_METRICS"]).read().decode().splitlines():
        name, _, value = line.partition("} ")
        if name.startswith(("smg_kv_event_batches_total", "smg_kv_event_gaps_total", "smg_kv_event_blocks_total")):
            kind = name.split('"')[-2]
            counts[kind] = counts.get(kind, 0) + float(value)
    assert counts["snapshot"] >= 2 and counts["applied"] >= 1 and counts["stored"] >= 8, counts
    assert not any(counts.get(gap, 0) for gap in ("replay_requested", "unrecovered_cleared", "unrecovered_kept")), counts


def test_a_client_that_goes_away(smg, model):
    """What it leaves behind, the Rust side looks at."""
    stream = smg.completions.create(
        model=model, prompt=PROMPT, temperature=0, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _ in zip(range(3), stream):
        pass
    stream.close()

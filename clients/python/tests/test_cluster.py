"""Every call, against a cluster that serves the demo model."""

import asyncio

import grpc
import pytest

import lockstep

QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="module")
def client(grpc_target):
    with lockstep.Client(grpc_target, timeout=120) as client:
        yield client


def test_a_stream_says_what_the_whole_answer_says(client):
    answer = client.chat(QUESTION, max_new_tokens=24)
    assert "Paris" in lockstep.text(answer)
    stream = client.stream_chat(QUESTION, max_new_tokens=24)
    assert "".join(stream) == lockstep.text(answer)
    assert stream.finish.usage.completion_tokens == answer.usage.completion_tokens
    kinds = [type(event) for event in client.stream_chat(QUESTION, max_new_tokens=3).events()]
    assert kinds[0] is lockstep.Start and kinds[-1] is lockstep.Finish and set(kinds[1:-1]) == {lockstep.Chunk}


def test_answers_go_back_into_the_conversation(client):
    first = client.chat(QUESTION, max_new_tokens=16)
    second = client.chat([("user", QUESTION), first.choices[0].message, ("user", "Thanks.")], max_new_tokens=4)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens


def test_prompts_are_text_or_ids(client):
    asked = {"max_new_tokens": 4, "temperature": 0}
    whole = client.generate("The capital of France is", **asked)
    assert lockstep.text(whole).startswith(" Paris")
    assert "".join(client.stream_generate("The capital of France is", **asked)) == lockstep.text(whole)
    shown = client.render_chat("Hi")
    assert "Hi" in shown.prompt
    assert (
        client.count_tokens(messages="Hi") == client.count_tokens(prompt=list(shown.token_ids)) == len(shown.token_ids)
    )


def test_a_tool_is_called(client):
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    answer = client.chat("Weather in Paris?", tools=[tool], tool_choice="required", max_new_tokens=100)
    assert answer.choices[0].message.tool_calls[0].name == "weather"
    assert answer.choices[0].finish.reason == lockstep.FinishReason.FINISH_REASON_TOOL_CALLS


def test_embeddings_have_the_width_that_is_asked_for(client):
    [model] = client.list_models()
    answer = client.embed(["a cat", "a dog"])
    assert [len(embedding.values) for embedding in answer.embeddings] == [model.embedding_size] * 2
    short = client.embed(["a cat"], pooling=lockstep.Pooling.POOLING_LAST, dimensions=8)
    assert len(short.embeddings[0].values) == 8


def test_what_is_wrong_is_named(client):
    with pytest.raises(lockstep.Error) as failure:
        client.chat("Hi", top_p=2, stop=["a", ""])
    assert (failure.value.reason, failure.value.code) == ("INVALID_ARGUMENT", grpc.StatusCode.INVALID_ARGUMENT)
    assert sorted(failure.value.violations) == ["sampling.stop[1]", "sampling.top_p"]
    with pytest.raises(lockstep.Error) as failure:
        client.chat("Hi", model="no-such-model")
    assert failure.value.reason == "MODEL_NOT_FOUND"


def test_a_deadline_keeps_what_there_is(client):
    answer = client.chat(QUESTION, ignore_eos=True, timeout=2)
    assert answer.choices[0].finish.reason == lockstep.FinishReason.FINISH_REASON_DEADLINE
    assert lockstep.text(answer)


def test_the_same_calls_can_be_awaited(grpc_target, client):
    async def run():
        async with lockstep.AsyncClient(grpc_target, timeout=120) as waiting:
            stream = waiting.stream_chat(QUESTION, max_new_tokens=8)
            streamed = "".join([piece async for piece in stream])
            answer, names, count = await asyncio.gather(
                waiting.chat(QUESTION, max_new_tokens=8), waiting.list_models(), waiting.count_tokens(prompt="Hi")
            )
            assert streamed == lockstep.text(answer)
            return [model.name for model in names], count

    assert asyncio.run(run()) == ([model.name for model in client.list_models()], client.count_tokens(prompt="Hi"))

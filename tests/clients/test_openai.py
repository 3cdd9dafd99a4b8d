"""The `openai` SDK, as its documentation uses it."""

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI


@pytest.fixture(scope="module")
def client(http_url):
    return OpenAI(base_url=f"{http_url}/v1", api_key="none", max_retries=0)


def ask(text):
    return [{"role": "user", "content": text}]


def test_models_are_listed_and_described(client, model):
    assert [served.id for served in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as failure:
        client.models.retrieve("no-such-model")
    assert failure.value.code == "model_not_found"


def test_a_stream_says_what_the_whole_answer_says(client, model):
    wanted = dict(model=model, messages=ask("What is the capital of France? Answer in one sentence."), max_completion_tokens=24, temperature=0)
    whole = client.chat.completions.create(**wanted)
    assert "Paris" in whole.choices[0].message.content
    pieces = list(client.chat.completions.create(**wanted, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].choices == []
    assert pieces[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({piece.id for piece in pieces}) == 1


def test_the_streaming_helper_gathers_the_answer(client, model):
    wanted = dict(model=model, messages=ask("Name a colour."), stop=["."], max_completion_tokens=200, temperature=0)
    with client.chat.completions.stream(**wanted) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and kinds[-1] == "content.done"
    assert final.choices[0].message.content == client.chat.completions.create(**wanted).choices[0].message.content


def test_seeds_repeat_and_choices_differ(client, model):
    wanted = dict(model=model, messages=ask("Tell me a story."), max_completion_tokens=16, seed=7, n=3)
    first, second = (client.chat.completions.create(**wanted) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    assert first.system_fingerprint == second.system_fingerprint


def test_stop_strings_end_before_themselves(client, model):
    wanted = dict(model=model, prompt="1, 2, 3, 4,", temperature=0, max_tokens=32)
    answer = client.completions.create(**wanted, stop=["7", "9"])
    assert answer.choices[0].text == " 5, 6, "
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_of_chats(client, model):
    answer = client.chat.completions.create(
        model=model, messages=ask("Hello"), max_completion_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token


def test_log_probabilities_of_completions_and_echo(client, model):
    answer = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=2, temperature=0, logprobs=2, echo=True
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The capital of France is Paris")
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None and all(p <= 0 for p in choice.logprobs.token_logprobs[1:])
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset):
        assert choice.text[offset : offset + len(token)] == token


def test_several_prompts_have_choices_of_their_own(client, model):
    prompts = ["The capital of France is", "The capital of Italy is"]
    wanted = dict(model=model, max_tokens=4, temperature=0)
    together = client.completions.create(**wanted, prompt=prompts, n=2)
    alone = [client.completions.create(**wanted, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in together.choices] == [alone[0], alone[0], alone[1], alone[1]]
    streamed = [""] * 4
    for piece in client.completions.create(**wanted, prompt=prompts, n=2, stream=True):
        for choice in piece.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in together.choices]


def test_a_bias_forbids_a_token(client, model):
    wanted = dict(model=model, prompt="The capital of France is", max_tokens=1, temperature=0)
    paris = client.completions.create(**wanted, logprobs=0).choices[0].text
    assert paris == " Paris"
    token = client.completions.create(**wanted, extra_body={"stop_token_ids": []}).choices[0].text
    assert token == paris
    others = client.completions.create(**wanted, logit_bias={"7042": -100}).choices[0].text
    assert others != paris


def test_what_is_wrong_is_named(client, model):
    for wrong, param in [
        (dict(top_p=2), "top_p"),
        (dict(messages=[]), "messages"),
        (dict(messages=[{"role": "robot", "content": "x"}]), "messages[0].role"),
        (dict(max_completion_tokens=0), "max_completion_tokens"),
        (dict(top_logprobs=2), "top_logprobs"),
        (dict(extra_body={"no_such_option": 1}), "no_such_option"),
        (dict(stop=["x"] * 17), "stop"),
        (dict(logit_bias={"cat": 1}), "logit_bias.cat"),
    ]:
        with pytest.raises(openai.BadRequestError) as failure:
            client.chat.completions.create(**{"model": model, "messages": ask("x"), **wrong})
        assert failure.value.param == param, failure.value
        assert failure.value.type == "invalid_request_error"


def test_a_prompt_that_is_too_long_is_called_so(client, model):
    with pytest.raises(openai.BadRequestError) as failure:
        client.chat.completions.create(model=model, messages=ask("word " * 9000))
    assert failure.value.code == "context_length_exceeded"


def test_many_clients_at_once_and_one_that_leaves(http_url, model):
    async def run():
        async with AsyncOpenAI(base_url=f"{http_url}/v1", api_key="none", max_retries=0) as client:
            wanted = dict(model=model, messages=ask("Count to ten."), temperature=0)
            leaving = await client.chat.completions.create(**wanted, max_completion_tokens=2000, stream=True)
            async for _ in leaving:
                break
            await leaving.close()
            answers = [client.chat.completions.create(**wanted, max_completion_tokens=12) for _ in range(8)]
            return {answer.choices[0].message.content for answer in await asyncio.gather(*answers)}

    assert len(asyncio.run(run())) == 1

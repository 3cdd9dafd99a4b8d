"""The `openai` SDK, as its documentation uses it."""

import asyncio
import json
import re

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel


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


def test_prompts_are_scored_and_nothing_is_generated(client, model):
    prompts = ["The capital of France is Paris", "Grüße aus Köln: 日本 <|im_end|>", "Rome"]
    with httpx.Client(base_url=str(client.base_url).removesuffix("/v1/")) as plain:
        ids = [plain.post("/tokenize", json={"model": model, "prompt": prompt}).json()["tokens"] for prompt in prompts]
    wanted = dict(model=model, max_tokens=0, echo=True, logprobs=1, temperature=0, seed=1234)
    scored = client.completions.create(**wanted, prompt=ids)
    assert [choice.index for choice in scored.choices] == [0, 1, 2]
    assert scored.usage.completion_tokens == 0 and scored.usage.prompt_tokens == sum(map(len, ids))
    for choice, tokens, prompt in zip(scored.choices, ids, prompts):
        alone = client.completions.create(**wanted, prompt=prompt).choices[0]
        assert (choice.logprobs, choice.finish_reason) == (alone.logprobs, "length")
        assert alone.text == prompt
        lists = choice.logprobs
        assert {len(lists.tokens), len(lists.token_logprobs), len(lists.top_logprobs), len(lists.text_offset)} == {len(tokens)}
        assert lists.token_logprobs[0] is None and lists.top_logprobs[0] is None
        # As lm-evaluation-harness does it where one token must be generated, which it cuts off.
        longer = client.completions.create(**{**wanted, "max_tokens": 1}, prompt=[tokens]).choices[0]
        assert longer.logprobs.token_logprobs[:-1] == lists.token_logprobs
        assert longer.text.startswith(choice.text) and longer.logprobs.text_offset[:-1] == lists.text_offset
    likely = scored.choices[0].logprobs
    assert likely.token_logprobs[-1] == likely.top_logprobs[-1][" Paris"] > -1
    streamed = {index: ["", None, []] for index in range(3)}
    for piece in client.completions.create(**wanted, prompt=ids, stream=True):
        for choice in piece.choices:
            seen = streamed[choice.index]
            seen[0] += choice.text
            seen[1] = choice.finish_reason
            seen[2] += choice.logprobs.token_logprobs if choice.logprobs else []
    whole = [[choice.text, choice.finish_reason, choice.logprobs.token_logprobs] for choice in scored.choices]
    assert [streamed[index] for index in range(3)] == whole
    echoed = client.completions.create(model=model, prompt="Rome", max_tokens=0, echo=True, n=2)
    assert [choice.text for choice in echoed.choices] == ["Rome", "Rome"]
    with pytest.raises(openai.BadRequestError) as failure:
        client.completions.create(model=model, prompt="x", max_tokens=0)
    assert failure.value.param == "max_tokens"


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


class Capital(BaseModel):
    city: str
    country: str
    population_in_millions: int


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
        },
    },
}


def test_an_answer_is_parsed_into_a_type(client, model):
    answer = client.chat.completions.parse(
        model=model, messages=ask("What is the capital of France?"), response_format=Capital, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Capital)
    assert answer.choices[0].finish_reason == "stop"


def test_json_mode_answers_with_an_object(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=ask("Describe a cat in JSON."),
        response_format={"type": "json_object"},
        temperature=0,
        max_completion_tokens=300,
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    "outputs, pattern",
    [
        ({"choice": ["red", "green"]}, "red|green"),
        ({"regex": "[0-9]{3}-[0-9]{4}"}, "[0-9]{3}-[0-9]{4}"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"grammar": 'start: "left" | "right"'}, "left|right"),
    ],
)
def test_vllms_structured_outputs(client, model, outputs, pattern):
    answer = client.chat.completions.create(
        model=model, messages=ask("Which?"), temperature=0, extra_body={"structured_outputs": outputs}
    )
    assert re.fullmatch(pattern, answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"


def test_a_schema_that_cannot_be_held_is_refused_by_name(client, model):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError) as failure:
        client.chat.completions.create(model=model, messages=ask("x"), response_format=schema)
    assert failure.value.param.startswith("response_format")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_be_made_is_valid_whole_and_streamed(client, model, choice):
    wanted = dict(model=model, messages=ask("Is it hot in Rome?"), tools=[WEATHER], tool_choice=choice, temperature=0)
    whole = client.chat.completions.create(**wanted).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    (call,) = whole.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather" and arguments["city"] in ["Paris", "Rome", "Oslo"]
    assert arguments["unit"] in ["celsius", "fahrenheit"]
    with client.chat.completions.stream(**wanted) as stream:
        deltas = [e.arguments_delta for e in stream if e.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(deltas) == call.function.arguments and len(deltas) > 1
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    assert final.finish_reason == "tool_calls"


def test_results_of_calls_go_back_into_the_conversation(client, model):
    messages = ask("Is it hot in Rome?")
    wanted = dict(model=model, tools=[WEATHER], temperature=0)
    called = client.chat.completions.create(**wanted, messages=messages, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "31 degrees"}
    answer = client.chat.completions.create(
        **wanted, messages=[*messages, called, result], tool_choice="none", max_completion_tokens=40
    )
    assert answer.choices[0].message.content


def test_responses_whole_and_streamed(client, model):
    wanted = dict(model=model, instructions="Be short.", input="Name a colour.", temperature=0, max_output_tokens=20)
    whole = client.responses.create(**wanted, store=False)
    assert whole.output_text and whole.status in ("completed", "incomplete")
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    with client.responses.stream(**wanted) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_responses_call_tools_and_take_their_results(client, model):
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    wanted = dict(model=model, tools=[tool], temperature=0)
    question = {"role": "user", "content": "Is it hot in Rome?"}
    called = client.responses.create(**wanted, input=[question], tool_choice="required")
    (call,) = called.output
    assert call.type == "function_call" and json.loads(call.arguments)["city"]
    assert called.tools[0].strict
    with client.responses.stream(**wanted, input=[question], tool_choice="required") as stream:
        assert stream.get_final_response().output[0].arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "31 degrees"}
    answer = client.responses.create(**wanted, input=[question, call, result], tool_choice="none", max_output_tokens=40)
    assert answer.output_text


def test_responses_parse_into_a_type(client, model):
    answer = client.responses.parse(model=model, input="What is the capital of France?", text_format=Capital, temperature=0)
    assert isinstance(answer.output_parsed, Capital)


def test_tokens_are_shown_and_read_back(http_url, model):
    with httpx.Client(base_url=http_url) as plain:
        shown = plain.post("/tokenize", json={"model": model, "prompt": "Hello, world"}).raise_for_status().json()
        assert shown["count"] == len(shown["tokens"]) and shown["max_model_len"] == 8192
        text = plain.post("/detokenize", json={"model": model, "tokens": shown["tokens"]}).raise_for_status().json()
        assert text["prompt"] == "Hello, world"
        chat = plain.post("/tokenize", json={"messages": ask("Hello")}).raise_for_status().json()
        rendered = plain.post("/detokenize", json={"tokens": chat["tokens"]}).raise_for_status().json()
        texts = plain.post("/tokenize", json={"messages": ask("Hello"), "return_token_strs": True}).json()["token_strs"]
        assert "".join(texts) == rendered["prompt"] and len(texts) == chat["count"]
        assert rendered["prompt"].endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
        assert plain.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b))


def test_embeddings_in_every_form(client, model):
    texts = ["The capital of France is Paris.", "Paris is the capital city of France.", "Mix flour and eggs well."]
    answer = client.embeddings.create(model=model, input=texts)
    first, second, third = (entry.embedding for entry in answer.data)
    assert [entry.index for entry in answer.data] == [0, 1, 2] and len(first) == 576
    assert abs(cosine(first, first) - 1) < 1e-5
    assert cosine(first, second) > cosine(first, third)
    alone = client.embeddings.create(model=model, input=texts[1], encoding_format="float").data[0].embedding
    assert alone == pytest.approx(second, abs=1e-7)
    short = client.embeddings.create(model=model, input=texts[0], dimensions=64).data[0].embedding
    assert len(short) == 64 and abs(cosine(short, short) - 1) < 1e-5
    ids = client.embeddings.create(model=model, input=[[1, 2, 3], [4]])
    assert len(ids.data) == 2 and ids.usage.prompt_tokens == 4
    with pytest.raises(openai.BadRequestError) as failure:
        client.embeddings.create(model=model, input=["x", ""], dimensions=577)
    assert failure.value.param in ("dimensions", "input[1]")

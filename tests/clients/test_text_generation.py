"""`huggingface_hub.InferenceClient`, as its documentation uses it with Text Generation Inference."""

import asyncio
import json
import re
import urllib.error
import urllib.request

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def client(http_url):
    return InferenceClient(model=http_url)


def post(http_url, path, body):
    request = urllib.request.Request(
        http_url + path, data=json.dumps(body).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def test_the_endpoint_is_healthy_and_says_what_it_is(http_url, model):
    client = InferenceClient(model=http_url, provider="hf-inference")
    assert client.health_check()
    info = client.get_endpoint_info()
    assert (info["model_id"], info["model_pipeline_tag"]) == (model, "text-generation")
    assert info["max_total_tokens"] == info["max_input_tokens"] + 1


def test_the_full_text_begins_with_the_prompt(client):
    wanted = dict(max_new_tokens=8)
    alone = client.text_generation(PROMPT, **wanted, return_full_text=False)
    assert alone.startswith(" Paris")
    assert client.text_generation(PROMPT, **wanted, return_full_text=True) == PROMPT + alone
    assert client.text_generation(PROMPT, **wanted) == PROMPT + alone


def test_details(client):
    answer = client.text_generation(
        PROMPT, max_new_tokens=6, details=True, return_full_text=False, decoder_input_details=True, top_n_tokens=2
    )
    details = answer.details
    assert (details.finish_reason, details.generated_tokens, len(details.tokens)) == ("length", 6, 6)
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert details.prefill[0].logprob is None and all(token.logprob < 0 for token in details.prefill[1:])
    for token, top in zip(details.tokens, details.top_tokens):
        assert len(top) == 2 and top[0]["id"] == token.id
        assert top[0]["logprob"] == token.logprob >= top[1]["logprob"]
    repeated = client.text_generation(
        PROMPT, max_new_tokens=6, details=True, return_full_text=False, do_sample=True, seed=details.seed
    )
    assert repeated.details.seed == details.seed


def test_a_stream_says_what_the_whole_answer_says(client):
    wanted = dict(max_new_tokens=12, temperature=0.7, seed=7, return_full_text=False)
    whole = client.text_generation(PROMPT, **wanted)
    assert "".join(client.text_generation(PROMPT, **wanted, stream=True)) == whole
    events = list(client.text_generation(PROMPT, **wanted, stream=True, details=True))
    assert [event.index for event in events] == list(range(1, 13))
    assert all(event.generated_text is None and event.details is None for event in events[:-1])
    last = events[-1]
    assert last.generated_text == whole == "".join(event.token.text for event in events)
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 12)
    assert (last.details.input_length, last.details.seed) == (5, 7)


def test_ends(client):
    stopped = client.text_generation("1, 2, 3, 4,", max_new_tokens=64, stop=["7"], details=True, return_full_text=False)
    assert (stopped.generated_text, stopped.details.finish_reason) == (" 5, 6, 7", "stop_sequence")
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    events = list(client.text_generation(chat, max_new_tokens=200, stream=True, details=True, return_full_text=False))
    last = events[-1]
    assert last.details.finish_reason == "eos_token" and last.token.special
    assert last.generated_text == "".join(event.token.text for event in events if not event.token.special)
    assert last.details.generated_tokens == len(events)


def test_the_plain_paths(http_url):
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}
    whole = json.loads(post(http_url, "/generate", body))
    assert whole["generated_text"].startswith(" Paris") and "details" not in whole
    [full] = json.loads(post(http_url, "/", body))
    assert full["generated_text"] == PROMPT + whole["generated_text"]
    for path, more in [("/generate_stream", {}), ("/", {"stream": True})]:
        events = post(http_url, path, {**body, **more}).split("\n\n")
        pieces = [json.loads(event.removeprefix("data:")) for event in events if event]
        assert len(pieces) == 4 and set(pieces[0]) == {"index", "token", "generated_text", "details"}
        assert pieces[-1]["generated_text"].endswith(whole["generated_text"]) and pieces[-1]["details"] is None


def test_chats(client, model):
    question = "What is the capital of France? Answer in one sentence."
    wanted = dict(messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0)
    whole = client.chat_completion(**wanted)
    assert "Paris" in whole.choices[0].message.content
    assert whole.model == model
    pieces = list(client.chat_completion(**wanted, stream=True))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    named = client.chat.completions.create(model=model, **wanted)
    assert named.choices[0].message.content == whole.choices[0].message.content


def test_many_at_once(http_url):
    async def run():
        async with AsyncInferenceClient(model=http_url) as client:
            answers = [client.text_generation(PROMPT, max_new_tokens=8) for _ in range(8)]
            return set(await asyncio.gather(*answers))

    assert len(asyncio.run(run())) == 1


def test_what_is_wrong_is_named(client, http_url):
    for wrong, expected in [
        (dict(top_p=2.0), "parameters.top_p: 2 is not in (0, 1]"),
        (dict(top_k=-1), "parameters.top_k: "),
        (dict(best_of=2), "parameters.best_of: "),
        (dict(watermark=True), "parameters.watermark: "),
        (dict(truncate=5), "parameters.truncate: this is not supported"),
        (dict(max_new_tokens=0), "parameters.max_new_tokens: 0 is not in"),
        (dict(max_new_tokens=9000), "parameters.max_new_tokens: "),
        (dict(top_n_tokens=21, details=True), "parameters.top_n_tokens: 21 is over 20"),
        (dict(frequency_penalty=3.0), "parameters.frequency_penalty: "),
        (dict(stop=["x"] * 17), "parameters.stop: "),
        (dict(grammar={"type": "regex", "value": "("}), "parameters.grammar"),
        (dict(adapter_id="x"), "parameters.adapter_id: this is not supported"),
        (dict(stream=True, details=True, decoder_input_details=True), "parameters.decoder_input_details: "),
    ]:
        with pytest.raises(ValidationError) as failure:
            list(client.text_generation("x", **wrong))
        assert str(failure.value).startswith(expected), failure.value
    with pytest.raises(ValidationError) as failure:
        client.text_generation("word " * 9000)
    assert str(failure.value).startswith("inputs: the prompt's")
    for path, body, status, kind in [
        ("/generate", {"inputs": "x", "what": 1}, 422, "validation"),
        ("/generate", {"inputs": ""}, 422, "validation"),
        ("/generate_stream", {"parameters": {}}, 422, "validation"),
        ("/no-such-path", {}, 404, "request"),
        ("/info", {}, 405, "request"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as failure:
            post(http_url, path, body)
        answer = json.load(failure.value)
        assert (failure.value.code, answer["error_type"]) == (status, kind)
        assert set(answer) == {"error", "error_type"}


def test_a_grammar_is_held(client):
    wanted = dict(max_new_tokens=20, do_sample=False, return_full_text=False)
    number = client.text_generation("My number is", **wanted, grammar={"type": "regex", "value": "[0-9]{3}-[0-9]{4}"})
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", number)
    schema = {"properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "type": "object"}
    answer = client.text_generation("The capital of Italy:", **wanted, grammar={"type": "json", "value": schema})
    assert json.loads(answer)["city"] in ("Paris", "Rome")

"""Makes the reference files that the tests compare with: an independent float32 run of the demo model.

    python -m venv .venv && .venv/bin/pip install -r tests/reference/requirements.txt
    .venv/bin/python tests/reference/make_reference.py models/SmolLM2-135M-Instruct.Q4_1.gguf

The implementation is Hugging Face `transformers` (LlamaForCausalLM, eager attention) with torch on the CPU in float32.
The weights are those of the GGUF, dequantized to float32 by the `gguf` package, so that only arithmetic may differ, not
the model. The tokenizer is built from the GGUF's vocabulary with the pre-tokenizer that SmolLM2 was trained with
(digits one by one, then GPT-2's words). None of it shares code with Lockstep.

tests/data/smollm2_reference.json, per prompt:
    prompt_ids       the prompt, no BOS added
    ids              32 greedy ids; the end-of-turn token does not stop them
    logprobs         natural log-probability of each of `ids`, from one pass over prompt and ids without a KV cache
    top              per step the five likeliest [id, logprob], likeliest first
    gaps             per step the likeliest logprob minus the second

tests/data/perplexity.json: the first 8 * 512 ids of perplexity.txt, as 8 windows of 512 consecutive ids. Each window is
evaluated alone from position 0, with no BOS; its ids 1..511 are predicted from the ids before them in the window, so
there are 8 * 511 predictions. `mean_nll` is the mean of their negative log-likelihoods in nats, `perplexity` its
exponential, `window_nll` the mean of each window.

Tolerances, for whoever compares with these files
    - Another float32 or float64 implementation differs by rounding only. See `rounding` in the files: how far a float64
      run of the same code is from this float32 run.
    - An implementation that quantizes activations to int8 per block of 32 differs by more. See `int8_activations`: the
      same model with every linear layer's input rounded that way, once, in float32.
    - Greedy ids may part at a step whose gap is within the tolerance of logprobs; after that they cannot be compared.
      A test should therefore force the reference ids, compare logprobs, and require the same argmax wherever the gap
      exceeds twice the tolerance. A wrong kernel is off by far more than any tolerance here.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prompts import CHAT, LONG_N_TOKENS, RAW

N_GREEDY = 32
N_TOP = 5
N_WINDOWS = 8
WINDOW = 512
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type

HERE = Path(__file__).parent
DATA = HERE.parent / "data"


def load_tokenizer(path):
    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    assert fields["tokenizer.ggml.pre"].contents() == "smollm", "the pre-tokenizer below is SmolLM2's"
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types) if kind == CONTROL_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=fields["tokenizer.chat_template"].contents()
    )


def load_model(path):
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    assert all(weights.dtype == torch.float32 for weights in model.parameters())
    return model.eval()


def logprobs_of(model, ids):
    """Log-probabilities [len(ids), vocab] in float64, from one pass without a KV cache."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def greedy(model, prompt_ids):
    ids, past = [], None
    step = torch.tensor([prompt_ids])
    for _ in range(N_GREEDY):
        output = model(input_ids=step, past_key_values=past, use_cache=True)
        past = output.past_key_values
        ids.append(int(output.logits[0, -1].argmax()))
        step = torch.tensor([[ids[-1]]])
    return ids


def reference_of(model, name, prompt_ids, text):
    ids = greedy(model, prompt_ids)
    steps = logprobs_of(model, prompt_ids + ids)[len(prompt_ids) - 1 : -1]
    top = torch.topk(steps, N_TOP)
    assert ids == top.indices[:, 0].tolist(), f"{name}: with and without a KV cache the ids differ"
    return {
        "name": name,
        "text": text,
        "prompt_ids": prompt_ids,
        "ids": ids,
        "logprobs": [round(float(step[id]), 6) for step, id in zip(steps, ids)],
        "top": [
            [[id, round(logprob, 6)] for id, logprob in zip(*row)]
            for row in zip(top.indices.tolist(), top.values.tolist())
        ],
        "gaps": [round(float(values[0] - values[1]), 6) for values in top.values],
    }


def prompts_of(tokenizer, text_ids):
    for name, text in RAW.items():
        yield name, tokenizer.encode(text, add_special_tokens=False), text
    for name, messages in CHAT.items():
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        yield name, tokenizer.encode(text, add_special_tokens=False), text
    long_ids = text_ids[:LONG_N_TOKENS]
    yield "long", long_ids, tokenizer.decode(long_ids)


def window_nlls(model, ids):
    nlls = []
    for start in range(0, N_WINDOWS * WINDOW, WINDOW):
        window = ids[start : start + WINDOW]
        logprobs = logprobs_of(model, window)[:-1]
        nlls.append(-float(logprobs.gather(1, torch.tensor(window[1:])[:, None]).mean()))
    return nlls


def differences(model, references):
    """How far the log-probabilities of the greedy ids are from the references' when `model` scores them."""
    found = []
    for reference in references:
        prompt_ids, ids = reference["prompt_ids"], reference["ids"]
        steps = logprobs_of(model, prompt_ids + ids)[len(prompt_ids) - 1 : -1]
        found += [abs(float(step[id]) - logprob) for step, id, logprob in zip(steps, ids, reference["logprobs"])]
    return {"max": round(max(found), 6), "mean": round(sum(found) / len(found), 6)}


def round_inputs_to_int8(model):
    """Makes every linear layer round its input to int8 with one scale per row and block of 32."""

    def round_input(_, inputs):
        x = inputs[0]
        blocks = x.unflatten(-1, (-1, 32))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        return (torch.round(blocks / scale).mul(scale).flatten(-2),)

    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == 7 * model.config.num_hidden_layers + 1, "q k v o gate up down of each layer, and the output"
    return [layer.register_forward_pre_hook(round_input) for layer in layers]


def write(name, data):
    """One prompt or list a line: small, and readable in a diff."""
    lines = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace('{"name"', '\n{"name"')
    (DATA / name).write_text(lines + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the demo model's GGUF file")
    path = parser.parse_args().model
    torch.set_grad_enabled(False)

    tokenizer, model = load_tokenizer(path), load_model(path)
    text_ids = tokenizer.encode((HERE / "perplexity.txt").read_text(encoding="utf-8"), add_special_tokens=False)
    if len(text_ids) < N_WINDOWS * WINDOW:
        sys.exit(f"perplexity.txt has {len(text_ids)} tokens, {N_WINDOWS * WINDOW} are needed")
    text_ids = text_ids[: N_WINDOWS * WINDOW]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    references = [reference_of(model, name, ids, text) for name, ids, text in prompts_of(tokenizer, text_ids)]
    nlls = window_nlls(model, text_ids)

    hooks = round_inputs_to_int8(model)
    int8_differences, int8_nlls = differences(model, references), window_nlls(model, text_ids)
    for hook in hooks:
        hook.remove()
    model.double()
    f64_differences, f64_nlls = differences(model, references), window_nlls(model, text_ids)

    write("smollm2_reference.json", {
        "model_sha256": digest,
        "rounding": {"logprob_difference": f64_differences},
        "int8_activations": {"logprob_difference": int8_differences},
        "prompts": references,
    })

    def perplexity(nlls):
        return round(math.exp(sum(nlls) / len(nlls)), 6)

    write("perplexity.json", {
        "model_sha256": digest,
        "window": WINDOW,
        "mean_nll": round(sum(nlls) / len(nlls), 8),
        "perplexity": perplexity(nlls),
        "window_nll": [round(nll, 8) for nll in nlls],
        "rounding": {"perplexity": perplexity(f64_nlls)},
        "int8_activations": {"perplexity": perplexity(int8_nlls)},
        "ids": text_ids,
    })


if __name__ == "__main__":
    main()

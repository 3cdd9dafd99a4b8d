"""Writes tests/data/sampler_goldens.json: what `transformers` leaves of random logits under sampling parameters.

The list of processors and its order are the library's own (`GenerationMixin._get_logits_processor`), and so is the
arithmetic, in float32. OpenAI's presence and frequency penalties, which it lacks, are added here after its definition.

    pip install transformers==5.23.0 torch==2.15.0 && python tests/reference/make_sampler_goldens.py
"""

import json
import pathlib
import random
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.utils import GenerationMixin

OUTPUT = pathlib.Path(__file__).parents[2] / "tests/data/sampler_goldens.json"
VOCAB_SIZE = 96
N_MIXED_CASES = 40
OFF = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": [], "stop_token_ids": [], "min_new_tokens": 0,
}
SINGLE = [
    {}, {"temperature": 0.3}, {"temperature": 2.5}, {"top_k": 1}, {"top_k": 7}, {"top_k": 1000}, {"top_p": 0.1},
    {"top_p": 0.5}, {"top_p": 0.95}, {"min_p": 0.02}, {"min_p": 0.4}, {"typical_p": 0.2}, {"typical_p": 0.9},
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.5},
    {"logit_bias": [[3, 5.0], [40, -100.0]]}, {"stop_token_ids": [0, 17], "min_new_tokens": 100},
    {"stop_token_ids": [0, 17], "min_new_tokens": 1},
]


class OutputPenalties(LogitsProcessor):
    """OpenAI's: logit - count * frequency_penalty - (count > 0) * presence_penalty, over the output."""

    def __init__(self, params, n_prompt):
        self.params, self.n_prompt = params, n_prompt

    def __call__(self, input_ids, scores):
        counts = torch.bincount(input_ids[0, self.n_prompt:], minlength=scores.shape[-1])
        return scores - counts * self.params["frequency_penalty"] - (counts > 0) * self.params["presence_penalty"]


def processors(params, n_prompt):
    """The library's list for these parameters, in its order."""
    config = GenerationConfig(
        do_sample=True, temperature=params["temperature"], top_k=params["top_k"], top_p=params["top_p"],
        min_p=params["min_p"] or None, typical_p=params["typical_p"], repetition_penalty=params["repetition_penalty"],
        min_new_tokens=params["min_new_tokens"],
        sequence_bias={(token_id,): bias for token_id, bias in params["logit_bias"]} or None,
    )
    config._eos_token_tensor = torch.tensor(params["stop_token_ids"]) if params["stop_token_ids"] else None
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda own, custom: own + custom,
    )
    return GenerationMixin._get_logits_processor(
        model, config, input_ids_seq_length=n_prompt, logits_processor=[OutputPenalties(params, n_prompt)],
        device="cpu",
    )


def golden(params, rng):
    """One case: random logits and texts, and the distribution that the next token is drawn from."""
    params = OFF | params
    logits = [round(rng.gauss(0, 2.5), 5) for _ in range(VOCAB_SIZE)]
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))]
    emitted = [rng.randrange(VOCAB_SIZE // 3) for _ in range(rng.randint(0, 12))]
    input_ids = torch.tensor([prompt + emitted])
    scores = torch.tensor([logits])
    for processor in processors(params, len(prompt)):
        scores = processor(input_ids, scores)
    probabilities = torch.softmax(scores, dim=-1)[0]
    kept = [[i, float(f"{p:.7g}")] for i, p in enumerate(probabilities.tolist()) if scores[0, i] != -torch.inf]
    return {"params": params, "logits": logits, "prompt": prompt, "emitted": emitted, "kept": kept}


def mixed(rng):
    """Several parameters at once, each one on or off."""
    choices = {
        "temperature": rng.uniform(0.3, 2.0), "top_k": rng.randint(2, 60), "top_p": rng.uniform(0.3, 0.99),
        "min_p": rng.uniform(0.001, 0.2), "typical_p": rng.uniform(0.3, 0.99),
        "repetition_penalty": rng.uniform(0.8, 1.6), "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-1, 1), "min_new_tokens": rng.randint(0, 12),
        "logit_bias": [[i, round(rng.uniform(-6, 6), 3)] for i in rng.sample(range(VOCAB_SIZE), 4)],
    }
    params = {name: value for name, value in choices.items() if rng.random() < 0.6}
    params = {name: round(value, 3) if isinstance(value, float) else value for name, value in params.items()}
    return params | {"stop_token_ids": rng.sample(range(VOCAB_SIZE), 3)}


def main():
    rng = random.Random(2)
    cases = [golden(params, rng) for params in SINGLE + [mixed(rng) for _ in range(N_MIXED_CASES)]]
    OUTPUT.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")


if __name__ == "__main__":
    main()

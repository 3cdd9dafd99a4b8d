"""Decodes one sequence with transformers, in the shape of Llama-3-8B with random bf16 weights, and prints tokens a second.

The cache is static and the step compiled, as transformers' documentation advises for speed.
"""

import json
import time

import torch
import transformers

PROMPT, GENERATE = 1024, 128


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self):
        self.times = []

    def put(self, _tokens):
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self):
        pass


def main():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 128256, (1, PROMPT), device="cuda")

    def rate():
        clock = Clock()
        # With a static cache on a GPU, generate compiles the decode step by itself.
        model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, cache_implementation="static",
                       max_new_tokens=GENERATE, min_new_tokens=GENERATE, pad_token_id=0, streamer=clock)
        # The prompt, and the first token, which is prefill's.
        decoded = clock.times[1:]
        return (len(decoded) - 1) / (decoded[-1] - decoded[0])

    with torch.inference_mode():
        rate()
        rates = sorted(rate() for _ in range(3))
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__,
                      "decode_tokens_per_s": rates[1]}))


if __name__ == "__main__":
    main()

"""Makes tests/data/dequantized.json: two random blocks of every encoding and their values by the `gguf` package.

    .venv/bin/python tests/reference/make_dequantized.py

Per encoding: `bytes` in hexadecimal, and `values`, float32 numbers printed so that they read back exactly. Scales are
random half floats between 1/64 and 1/2 of either sign; all other bits are uniform. In float32 every product in these
formats is exact, so an implementation rounds at most once, where it adds the minimum, and may be compared bit for bit.
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

N_BLOCKS = 2
# Where the half floats lie in a block; the rest is integers.
HALVES = {
    "F16": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
    "IQ4_XS": [0],
}


def random_blocks(rng, name):
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (N_BLOCKS, block_bytes), dtype=np.uint8)
    for offset in HALVES[name]:
        scales = rng.uniform(1 / 64, 1 / 2, N_BLOCKS) * rng.choice([-1, 1], N_BLOCKS)
        blocks[:, offset : offset + 2] = scales.astype(np.float16).view(np.uint8).reshape(N_BLOCKS, 2)
    return blocks


def main():
    rng = np.random.default_rng(0)
    table = {}
    for name in HALVES:
        blocks = random_blocks(rng, name)
        values = dequantize(blocks, GGMLQuantizationType[name]).flatten()
        table[name] = {"bytes": blocks.tobytes().hex(), "values": [float(f"{value:.9g}") for value in values]}
    lines = json.dumps(table, separators=(",", ":")).replace('},"', '},\n"')
    Path(__file__).parents[1].joinpath("data", "dequantized.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

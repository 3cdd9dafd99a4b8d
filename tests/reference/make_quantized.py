"""Makes tests/data/quantized.json: a small matrix as the quantizers of Hugging Face folders leave it, and what they
themselves make of it again.

    python tests/reference/make_quantized.py

Needs, beside requirements.txt, `pip install bitsandbytes==0.50.2 gptqmodel==7.7.0`. A random Llama is quantized by each
tool in each way that Lockstep reads; of each result, one matrix is kept: its tensors byte for byte, the
`quantization_config`, and some rows' values by the tool's own dequantization, with scales widened to float32 first, so
that nothing is rounded on the way.
"""

import json
import os
import random
import tempfile
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MATRIX = "model.layers.0.self_attn.k_proj"
N_TOKENS = 64
# Rows of which the values are kept.
N_ROWS = 8
GPTQ = {
    "gptq 4": dict(bits=4, group_size=64),
    "gptq 4 asymmetric": dict(bits=4, group_size=32, sym=False),
    "gptq_v2 4 asymmetric": dict(bits=4, group_size=128, sym=False, format="gptq_v2"),
    "gptq 8": dict(bits=8, group_size=128),
    "gptq 8 asymmetric": dict(bits=8, group_size=64, sym=False),
}
AWQ = {"awq": dict(bits=4, group_size=128, sym=False, method="awq", format="gemm")}
FOUR_BIT = {"nf4": ("nf4", False), "nf4 nested": ("nf4", True), "fp4": ("fp4", False), "fp4 nested": ("fp4", True)}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.int8: "I8",
          torch.uint8: "U8"}


def save_float_model(folder):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=N_TOKENS, hidden_size=128, intermediate_size=128, num_hidden_layers=1,
                         num_attention_heads=8, num_key_value_heads=4, head_dim=16, max_position_embeddings=256,
                         initializer_range=0.05)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(N_TOKENS)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(bos_token="t0", eos_token="t2", pad_token="t1", unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def hexadecimal(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def sample(folder, dequantized):
    tensors = {name.removeprefix(MATRIX + "."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
               if name.startswith(MATRIX + ".")}
    described = {part: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "bytes": hexadecimal(tensor)}
                 for part, tensor in tensors.items()}
    values = dequantized(tensors)
    assert values.dtype == torch.float32
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config.pop("meta", None)
    return {"quantization_config": config, "tensors": described, "shape": list(values.shape),
            "values": hexadecimal(values[:N_ROWS])}


def gptq_sample(source, folder, settings):
    random.seed(0)
    texts = [" ".join(f"t{random.randrange(N_TOKENS)}" for _ in range(128)) for _ in range(32)]
    model = GPTQModel.load(str(source), QuantizeConfig(**settings))
    model.quantize(texts, batch_size=4)
    model.save(str(folder))

    def dequantized(tensors):
        module = GPTQModel.load(str(folder), backend=BACKEND.TORCH, device="cpu").model.get_submodule(MATRIX)
        module.scales.data = tensors["scales"].float()
        return module.dequantize_weight().T.float()

    def dequantized_awq(tensors):
        scales = tensors["scales"].float()
        return dequantize_gemm(tensors["qweight"], tensors["qzeros"], scales, settings["bits"], settings["group_size"]).T

    return sample(folder, dequantized_awq if settings.get("method") == "awq" else dequantized)


def bitsandbytes_sample(source, folder, config, dequantized):
    options = dict(quantization_config=config, device_map="cpu", dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(source, **options).save_pretrained(folder)
    return sample(folder, dequantized)


def dequantized_four_bit(tensors):
    parts = {part.removeprefix("weight."): tensor for part, tensor in tensors.items() if part != "weight"}
    return dequantize_4bit(tensors["weight"], QuantState.from_dict(parts, device=torch.device("cpu")))


def dequantized_eight_bit(tensors):
    return tensors["weight"].float() * (tensors["SCB"] / 127).unsqueeze(1)


def main():
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        source = scratch / "float"
        save_float_model(source)
        for name, settings in (GPTQ | AWQ).items():
            table[name] = gptq_sample(source, scratch / name, settings)
        for name, (kind, nested) in FOUR_BIT.items():
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
                                        bnb_4bit_compute_dtype=torch.float32)
            table[name] = bitsandbytes_sample(source, scratch / name, config, dequantized_four_bit)
        config = BitsAndBytesConfig(load_in_8bit=True)
        table["int8"] = bitsandbytes_sample(source, scratch / "int8", config, dequantized_eight_bit)
    lines = json.dumps(table, separators=(",", ":")).replace('},"', '},\n"')
    Path(__file__).parents[1].joinpath("data", "quantized.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes tests/data/tokenizer_corpus.json (texts) and tests/data/tokenizer_gold.json (their ids by Hugging Face's
`tokenizers`, the Python package, whose regex engine is not the one that the Rust crate uses here).

    .venv/bin/python tests/reference/make_tokenizer_corpus.py      after tests/fetch_tokenizers.py

Vocabularies that are at hand only as GGUF (SmolLM2, Llama 2, Phi-3) are put into the pipeline that the model's own
tokenizer.json has, written out below; the ids of Llama 2 and Phi-3 are also checked here against those that
llama.cpp's tests took from the original tokenizers. Up to 40 ids are written out, of longer lists the count and the
SHA-256 of the ids in decimal, joined by commas.
"""

import hashlib
import json
import sys
from pathlib import Path

import gguf
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent.parent
FETCHED = ROOT / "models" / "tokenizers"
DATA = ROOT / "tests" / "data"
WRITTEN_OUT = 40

TEXTS = {
    "empty": "",
    "one space": " ",
    "one letter": "a",
    "english": "The quick brown fox doesn't jump over the lazy dog's back; it'll walk, we've seen.",
    "capital contractions": "I'M SURE YOU'LL SAY IT'S WE'RE, THEY'VE, HE'D.",
    "curly quotes": "“It’s fine,” she said — ‘really’…",
    "german": "Fünf süße Öltröpfchen überquerten die Straße; Größe: 3,5 µm.",
    "french": "L'été dernier, où étiez-vous ? Çà et là, naïvement, cœur à cœur.",
    "polish": "Zażółć gęślą jaźń. Źdźbło trawy.",
    "turkish": "İstanbul'da ışıl ışıl bir gün, ğ ş ç.",
    "vietnamese": "Tôi yêu tiếng Việt; nghiêng ngả, quyển sách.",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "ukrainian": "Їжак і ґудзик під'їхали.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "hebrew": "שָׁלוֹם עולם, מה שלומך?",
    "arabic": "مرحبًا بالعالم، كيف حالُك؟ ١٢٣",
    "persian with joiners": "می‌خواهم کتاب‌ها را بخوانم.",
    "hindi": "नमस्ते दुनिया, क्षत्रिय और ज्ञान। १२३",
    "bengali": "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি।",
    "tamil": "தமிழ் மொழி மிகவும் பழமையானது.",
    "thai": "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "khmer": "សួស្តីពិភពលោក",
    "georgian": "გამარჯობა მსოფლიო",
    "armenian": "Բարեւ աշխարհ",
    "ethiopic": "ሰላም ለዓለም",
    "chinese": "你好，世界！今天天气不错。ＡＢＣ１２３",
    "traditional chinese": "臺灣的夜市裡有很多小吃。",
    "japanese": "こんにちは世界。カタカナとひらがな、漢字も｡ﾊﾝｶｸ",
    "korean": "안녕하세요 세계! 한글은 과학적이다.",
    "decomposed hangul": "한글",
    "rare cjk": "𠮷野家で𩸽を食べる 𪚥",
    "composed and decomposed": "é e\u0301 ñ n\u0303 Å A\u030a \u212b ǭ o\u0328\u0304",
    "stacked marks": "Z\u0351\u036b\u0343\u036a\u0302a\u0334\u0321l\u0353\u032bg\u033b\u0323o",
    "canonical order": "a\u0315\u0300\u05ae\u0301b q\u0307\u0323",
    "emoji": "😀 🎉 ❤️ ☃ ✈️ 🚀🚀",
    "emoji with joiners": "👨‍👩‍👧‍👦 🏳️‍🌈 👩🏽‍🚀 🧑‍💻",
    "flags and keycaps": "🇩🇪🇯🇵 1️⃣ #️⃣",
    "math": "∑ᵢ xᵢ² ≤ ∞ ⇒ ∂f/∂x ≈ 𝒜𝔹ℂ ½ ⅷ Ⅳ ² ³",
    "digits": "0 12 123 1234 12345 1234567890 3.14159 -1e-9 0x1F 1,000,000",
    "other digits": "٠١٢٣٤٥ ०१२३ ๐๑๒ １２３４ 𝟘𝟙𝟚 ①②③",
    "letters and digits": "a1b22c333 H2O CO₂ x86_64 v2.0.1-rc3",
    "unix lines": "one\ntwo\n\nthree\n\n\nfour\n",
    "windows lines": "one\r\ntwo\r\n\r\nthree\r\r\nfour\r",
    "blank lines with spaces": "a\n  \n \n\t\nb",
    "leading and trailing": "   three before, three after   ",
    "spaces then newline": "end   \n   start \n\n  x",
    "tabs": "\tone\t\ttwo\t \tthree",
    "other blanks": "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg\ufeffh\u1680i",
    "space runs": " ".join(["x" + " " * n for n in (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33)]),
    "controls": "\u0000\u0001\u0007\b\u000b\f\u001b[0m\u007f\u0080\u009f",
    "edges of unicode": "\u07ff\u0800\ud7ff\ue000\ufffd\uffff\U00010000\U0010ffff",
    "private and unassigned": "\ue123 \u0378 \U000e0041 \U0003fffd",
    "right to left": "abc \u202eCBA\u202c \u2067אב\u2069",
    "python": "def f(x: int) -> str:\n    \"\"\"Doc.\"\"\"\n    return f\"{x!r:>10}\"  # why\n\n\nprint(f(3))\n",
    "rust": "fn main() {\n    let v: Vec<u8> = (0..=255).map(|b| b ^ 0xFF).collect();\n\tprintln!(\"{v:?}\");\n}\n",
    "c": "#include <stdio.h>\nint main(void){for(int i=0;i<10;++i)printf(\"%d\\n\",i);return 0;}\n",
    "json": "{\"a\": [1, 2.5, -3e+10, null], \"b\\u00e9\": {\"c\": \"d\\\\\"}}",
    "html": "<p class=\"x\">A &amp; B<br/></p><!-- <|no|> -->",
    "markdown": "# T\n\n* a\n  * b\n\n```py\nx = 1\n```\n| a | b |\n|---|---|\n",
    "url": "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\Users\\x",
    "punctuation": "!!! ??? ... ,,, ;;; ((())) [[]] {{}} --- === *** ~~~ @@@ ### $$$ %%% ^^^ &&& ``` ''' \"\"\" \\\\\\ ///",
    "slashes after signs": "a/b //c /*d*/ ):/\n/\n;//",
    "apostrophes": "'s 'S 'll 'LL 'ſ don'T o'clock ''s '",
    "camel case": "getHTTPResponseCode XMLHttpRequest iPhone McDonald's ΑΒγΔ ǅ",
    "underscores": "__init__ _a_ snake_case_name",
    "meta blank": "▁a ▁▁b a▁b ▁",
    "byte names": "<0x0A> <0xFF> Ġ Ċ Ġa",
    "llama 3 turns": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml turns": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>!<|im_end|>\n<|im_start|>assistant\n",
    "mistral turns": "<s>[INST] Hi [/INST] Hello </s>[INST] more [/INST]",
    "phi 3 turns": "<s><|user|>\n Hi<|end|>  \n<|assistant|>\n\n x <|end|>\n<|endoftext|> \n</s>  \n end<unk> \n<s> \n a",
    "tool tokens": "<tool_call>\n{\"name\": \"f\"}\n</tool_call> <|fim_prefix|>x<tool_response>",
    "broken control tokens": "<|im_end|<|im_end|>|> <|im_ end|> <| im_end|> <|eot_id <|eot_id|>> </s <</s>> [INST",
    "control tokens run together": "</s></s><s><unk><|im_end|><|im_end|><|eot_id|><|eot_id|><|endoftext|><|endoftext|>",
    "control tokens and blanks": "a <|eot_id|> b  </s>  c\t<|im_end|>\td\n<|end|>\ne",
    "reserved tokens": "<|reserved_special_token_12|><SPECIAL_20><|placeholder3|><repo_name>[PAD151700]",
    "repeated letters": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa hhhhhhhhhhhh zzzzzz",
    "long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "genome": "ACGTTGCAACGTAGCTAGCTTAGGCTAACGTACGATCGATTTAGC",
    "base64": "TG9yZW0gaXBzdW0gZG9sb3Igc2l0IGFtZXQsIGNvbnNlY3RldHVyIGFkaXBpc2Npbmc=",
}

# A unit and how often it is repeated, so that the file stays small.
LONG = {
    "100 kB line": ("The year 2026 — naïve 🤖 текст，文本 and so on; ", 1700),
    "100 kB of one word": ("abcdefghij", 10000),
    "many spaces": (" ", 5000),
    "many spaces and a word": ("                                        x", 300),
    "many newlines": ("\n", 3000),
    "many turns": ("<|im_start|>user\nHi<|im_end|>\n<|eot_id|></s>", 300),
    "many signs": ("=-", 3000),
    "many emoji": ("👩🏽‍🚀", 800),
}


def corpus():
    plain = [{"name": name, "unit": text, "times": 1} for name, text in TEXTS.items()]
    return plain + [{"name": name, "unit": unit, "times": times} for name, (unit, times) in LONG.items()]


def field(reader, key):
    """A metadata array as a Python list."""
    entry = reader.fields[key]
    strings = entry.types[-1] == gguf.GGUFValueType.STRING
    return [bytes(entry.parts[i]).decode() if strings else entry.parts[i][0].item() for i in entry.data]


def control_tokens(tokens, types, rstrip_except=None):
    """Token types of the GGUF specification: 2 unknown, 3 control, 4 user defined."""
    for text, kind in zip(tokens, types):
        if kind in (2, 3, 4) and not text.startswith("[PAD"):
            rstrip = rstrip_except is not None and text not in rstrip_except
            yield AddedToken(text, special=kind != 4, normalized=False, rstrip=rstrip)


def smollm2():
    """As in the model's tokenizer.json: single digits, then GPT-2's words."""
    reader = gguf.GGUFReader(ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    pipeline = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_tokens(list(control_tokens(tokens, field(reader, "tokenizer.ggml.token_type"))))
    return pipeline


def sentencepiece(name, rstrip_except=None):
    """As in the tokenizer.json files of Llama 2 and Phi-3, with the merges in the order of `transformers`' converter."""
    reader = gguf.GGUFReader(FETCHED / "gguf" / f"{name}.gguf")
    tokens, scores = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.scores")
    ids = {text: i for i, text in enumerate(tokens)}
    merges = []
    for text, score in zip(tokens, scores):
        halves = [(text[:i], text[i:]) for i in range(1, len(text))]
        known = [(left, right, score) for left, right in halves if left in ids and right in ids]
        merges.extend(sorted(known, key=lambda way: (ids[way[0]], ids[way[1]])))
    merges.sort(key=lambda way: -way[2])
    merges = [(left, right) for left, right, _ in merges]
    pipeline = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    pipeline.decoder = decoders.Sequence(steps)
    pipeline.add_tokens(list(control_tokens(tokens, field(reader, "tokenizer.ggml.token_type"), rstrip_except)))
    pipeline.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    check_against_llama_cpp(name, pipeline)
    return pipeline


def check_against_llama_cpp(name, pipeline):
    """Its vocabularies come with texts and the ids that the original tokenizers gave."""
    texts = (FETCHED / "gguf" / f"{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (FETCHED / "gguf" / f"{name}.gguf.out").read_text().split("\n")
    for text, line in zip(texts, lines, strict=True):
        expected = [int(number) for number in line.split()]
        if pipeline.encode(text, add_special_tokens=False).ids != expected:
            sys.exit(f"{name} as built here differs from the original on {text!r}")


def gold(ids):
    if len(ids) <= WRITTEN_OUT:
        return ids
    return {"count": len(ids), "sha256": hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()}


def write(name, value):
    """One line for each entry of the outermost lists and maps."""
    path = DATA / name
    path.write_text(json.dumps(value, ensure_ascii=True, indent=None).replace('}, "', '},\n"').replace("}, {", "},\n{") + "\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def main():
    pipelines = {"smollm2": smollm2(), "llama-spm": sentencepiece("llama-spm")}
    pipelines["phi-3"] = sentencepiece("phi-3", rstrip_except={"<unk>", "<s>", "<|endoftext|>"})
    for name in ["llama3", "llama3_1", "qwen2_5", "mistral_v1", "mistral_nemo", "gpt2"]:
        pipelines[name] = Tokenizer.from_file(str(FETCHED / name / "tokenizer.json"))
    texts = corpus()
    encoded = {}
    for name, pipeline in pipelines.items():
        ids = [pipeline.encode(text["unit"] * text["times"]).ids for text in texts]
        encoded[name] = [gold(each) for each in ids]
    write("tokenizer_corpus.json", texts)
    write("tokenizer_gold.json", {"tokenizers": tokenizers.__version__, "ids": encoded})


if __name__ == "__main__":
    main()

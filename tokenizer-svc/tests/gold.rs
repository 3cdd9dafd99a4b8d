//! Ids and texts of real tokenizers, held to those of Hugging Face's Python package on a multilingual corpus
//! (`tests/reference/make_tokenizer_corpus.py`), and to llama.cpp's vectors for its vocabulary files.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{fs, path::PathBuf};

use lockstep_tokenizer_svc::{
    catalog::Model,
    detokenizer::decode,
    tokenizer::{Breaks, Tokenizer},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// A text of the corpus: a unit, and how often it is repeated.
#[derive(Deserialize)]
struct Text {
    name: String,
    unit: String,
    times: usize,
}

/// The ids of a text, or a digest of them.
#[derive(Deserialize, Debug, PartialEq)]
#[serde(untagged)]
enum Ids {
    Written(Vec<u32>),
    Digest { count: usize, sha256: String },
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn open(path: &str) -> Model {
    let path = root().join("models").join(path);
    assert!(path.exists(), "{} is missing: run tests/fetch_tokenizers.py", path.display());
    Model::open("test", &path).unwrap()
}

fn fetched(name: &str) -> Model {
    open(&format!("tokenizers/{name}"))
}

fn corpus() -> Vec<Text> {
    let file = fs::read(root().join("tests/data/tokenizer_corpus.json")).unwrap();
    serde_json::from_slice(&file).unwrap()
}

fn gold(name: &str) -> Vec<Ids> {
    let file = fs::read(root().join("tests/data/tokenizer_gold.json")).unwrap();
    let mut gold: serde_json::Value = serde_json::from_slice(&file).unwrap();
    serde_json::from_value(gold["ids"][name].take()).unwrap()
}

/// `ids` in the form that `expected` has.
fn digested(ids: &[u32], expected: &Ids) -> Ids {
    if matches!(expected, Ids::Written(_)) {
        return Ids::Written(ids.to_vec());
    }
    let decimal = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let sha256 = Sha256::digest(decimal).iter().map(|byte| format!("{byte:02x}")).collect();
    Ids::Digest { count: ids.len(), sha256 }
}

/// Encodes the corpus and compares with the gold of that name.
fn check(tokenizer: &Tokenizer, name: &str, add_special_tokens: bool) {
    let (corpus, gold) = (corpus(), gold(name));
    assert_eq!(corpus.len(), gold.len());
    assert!(corpus.len() > 80, "the corpus has shrunk");
    for (text, expected) in corpus.iter().zip(&gold) {
        let ids = tokenizer.encode(&text.unit.repeat(text.times), &Breaks::NONE, add_special_tokens).unwrap();
        assert_eq!(digested(&ids, expected), *expected, "{name}: {}", text.name);
    }
}

/// Compares with the vectors that lie beside a vocabulary file of llama.cpp.
fn check_vectors(name: &str) {
    let folder = root().join("models/tokenizers/gguf");
    let model = fetched(&format!("gguf/{name}.gguf"));
    let texts = fs::read_to_string(folder.join(format!("{name}.gguf.inp"))).unwrap();
    let lines = fs::read_to_string(folder.join(format!("{name}.gguf.out"))).unwrap();
    let texts: Vec<_> = texts.split("\n__ggml_vocab_test__\n").collect();
    let lines: Vec<_> = lines.split('\n').collect();
    assert_eq!(texts.len(), lines.len());
    for (text, line) in texts.iter().zip(lines) {
        let expected: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(model.tokenizer.encode(text, &Breaks::NONE, false).unwrap(), expected, "{name}: {text:?}");
    }
}

/// What was encoded decodes to itself, control tokens and all.
fn check_round_trip(tokenizer: &Tokenizer, name: &str) {
    for text in corpus() {
        let text = text.unit.repeat(text.times);
        let ids = tokenizer.encode(&text, &Breaks::NONE, false).unwrap();
        assert_eq!(decode(tokenizer, &ids, false).unwrap().text, text, "{name}");
    }
}

#[test]
fn smollm2_from_its_gguf_equals_hugging_face() {
    let model = open("SmolLM2-135M-Instruct.Q4_1.gguf");
    check(&model.tokenizer, "smollm2", true);
    check_round_trip(&model.tokenizer, "smollm2");
}

#[test]
fn llama_3_from_its_folder_equals_hugging_face() {
    let model = fetched("llama3");
    check(&model.tokenizer, "llama3", true);
    check_round_trip(&model.tokenizer, "llama3");
}

#[test]
fn llama_3_1_from_its_folder_equals_hugging_face() {
    check(&fetched("llama3_1").tokenizer, "llama3_1", true);
}

#[test]
fn llama_3_from_a_gguf_equals_its_folder() {
    let model = fetched("gguf/llama-bpe.gguf");
    check(&model.tokenizer, "llama3", false);
    // The file does not say that a text starts with a token; its pre-tokenizer's name does.
    check(&model.tokenizer, "llama3_1", true);
    check_vectors("llama-bpe");
}

#[test]
fn qwen_2_from_its_folder_equals_hugging_face() {
    check(&fetched("qwen2_5").tokenizer, "qwen2_5", true);
}

#[test]
fn qwen_2_from_a_gguf_equals_the_vectors() {
    check_vectors("qwen2");
}

#[test]
fn gpt_2_from_a_gguf_and_from_its_folder_equals_hugging_face() {
    check(&fetched("gpt2").tokenizer, "gpt2", true);
    check(&fetched("gguf/gpt-2.gguf").tokenizer, "gpt2", true);
    check_vectors("gpt-2");
}

#[test]
fn mistral_from_its_folder_equals_hugging_face() {
    check(&fetched("mistral_v1").tokenizer, "mistral_v1", true);
    check(&fetched("mistral_nemo").tokenizer, "mistral_nemo", true);
}

#[test]
fn llama_2_from_a_gguf_equals_hugging_face() {
    check(&fetched("gguf/llama-spm.gguf").tokenizer, "llama-spm", true);
    check_vectors("llama-spm");
}

#[test]
fn phi_3_from_a_gguf_equals_hugging_face() {
    check(&fetched("gguf/phi-3.gguf").tokenizer, "phi-3", true);
    check_vectors("phi-3");
}

#[test]
fn a_gguf_says_what_a_prompt_needs() {
    let model = open("SmolLM2-135M-Instruct.Q4_1.gguf");
    let (tokenizer, profile) = (&model.tokenizer, &model.profile);
    assert_eq!((tokenizer.vocab_size(), profile.context_length), (49152, 8192));
    assert_eq!((profile.bos_token_id, profile.eos_token_id), (Some(1), Some(2)));
    assert_eq!(profile.eos_token_ids, [2]);
    assert!(profile.chat_template.contains("<|im_start|>"));
    let special: Vec<_> = tokenizer.special_tokens().iter().map(|token| (token.id, token.text.as_str())).collect();
    assert_eq!(special[..3], [(0, "<|endoftext|>"), (1, "<|im_start|>"), (2, "<|im_end|>")]);
    assert_eq!(special.len(), 17);
    // Phi-3 ends texts with one token and turns with another.
    assert_eq!(fetched("gguf/phi-3.gguf").profile.eos_token_ids, [32000, 32007]);
    assert_eq!(fetched("gguf/llama-bpe.gguf").profile.eos_token_ids, [128_001, 128_009]);
}

#[test]
fn a_folder_says_what_a_prompt_needs() {
    let model = fetched("llama3");
    assert_eq!((model.profile.bos_token_id, model.profile.eos_token_id), (Some(128_000), Some(128_001)));
    assert_eq!(model.profile.eos_token_ids, [128_001, 128_009]);
    assert_eq!((model.tokenizer.vocab_size(), model.profile.context_length), (128_256, 0));
    assert!(model.profile.chat_template.contains("<|eot_id|>"));
    let qwen = fetched("qwen2_5");
    assert_eq!((qwen.profile.context_length, qwen.profile.bos_token_id), (131_072, None));
    assert_eq!(qwen.profile.eos_token_ids, [151_645]);
}

#[test]
fn a_fingerprint_belongs_to_a_vocabulary() {
    let (first, again, other) = (fetched("gpt2"), fetched("gpt2"), fetched("gguf/gpt-2.gguf"));
    assert_eq!(first.tokenizer.fingerprint(), again.tokenizer.fingerprint());
    assert_ne!(first.tokenizer.fingerprint(), other.tokenizer.fingerprint());
    assert_eq!(first.tokenizer.fingerprint().len(), 64);
}

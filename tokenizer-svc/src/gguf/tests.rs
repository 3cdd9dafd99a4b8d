//! Vocabularies as GGUF metadata holds them: real ones taken from their `tokenizer.json`, and broken ones.

use std::{collections::HashMap, sync::Arc};

use serde_json::Value;

use super::*;
use crate::{catalog::Model, fixtures, tokenizer::Breaks};

/// A vocabulary's own storage.
struct Stored {
    tokens: Vec<String>,
    types: Vec<TokenType>,
    merges: Vec<String>,
    scores: Vec<f32>,
}

const TEXTS: [&str; 9] = [
    "",
    "Hello, world! It's 12345 o'clock.",
    "  leading,   inner \r\n\r\n and trailing  \t ",
    "naïve Å e\u{301} ﬁ 中文字 हिन्दी ภาษาไทย עברית 한국어",
    "👩🏽‍🚀 🇩🇪 \u{0}\u{1}\u{7f}",
    "fn main() { println!(\"{:?}\", x); }\n\n\n    return;",
    "<s>a</s> b<|im_end|>\n<|eot_id|>  c <tool_call> <|endoftext|>",
    "▁ ▁▁ <0x0A> Ġ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// Takes the vocabulary of a fetched folder apart, as a converter to GGUF does.
fn stored(name: &str) -> (Arc<Model>, Stored) {
    let path = format!("{}/../models/tokenizers/{name}/tokenizer.json", env!("CARGO_MANIFEST_DIR"));
    let description: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let id = |id: &Value| usize::try_from(id.as_u64().unwrap()).unwrap();
    let vocab = description["model"]["vocab"].as_object().unwrap();
    let added = description["added_tokens"].as_array().unwrap();
    let n_tokens = vocab.values().chain(added.iter().map(|token| &token["id"])).map(id).max().unwrap() + 1;
    let mut tokens = vec![String::new(); n_tokens];
    let mut types = vec![TokenType::Normal; n_tokens];
    for (text, token_id) in vocab {
        tokens[id(token_id)] = text.clone();
    }
    for token in added {
        let control = token["special"].as_bool().unwrap();
        tokens[id(&token["id"])] = token["content"].as_str().unwrap().to_owned();
        types[id(&token["id"])] = if control { TokenType::Control } else { TokenType::UserDefined };
    }
    let merges: Vec<String> = description["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|merge| match merge {
            Value::String(merge) => merge.clone(),
            halves => format!("{} {}", halves[0].as_str().unwrap(), halves[1].as_str().unwrap()),
        })
        .collect();
    // SentencePiece's score of a token: the sooner it is made, the higher.
    let mut made = HashMap::new();
    for (rank, merge) in merges.iter().enumerate() {
        made.entry(merge.replace(' ', "")).or_insert(-(rank as f32));
    }
    let scores = tokens.iter().map(|token| made.get(token).copied().unwrap_or(-1e9)).collect();
    (fixtures::open(&format!("tokenizers/{name}")), Stored { tokens, types, merges, scores })
}

impl Stored {
    fn vocabulary(&self) -> Vocabulary<'_> {
        let Self { tokens, types, merges, scores } = self;
        Vocabulary { tokens, types: types.clone(), merges, scores, prepends_space: true, ..Vocabulary::default() }
    }
}

/// Compares a tokenizer built from metadata with the one of the folder it was taken from.
fn check_same(built: &Tokenizer, folder: &Tokenizer, name: &str) {
    for text in TEXTS {
        let ids = built.encode(text, &Breaks::NONE, false).unwrap();
        assert_eq!(ids, folder.encode(text, &Breaks::NONE, false).unwrap(), "{name}: {text:?}");
        let decode = |tokenizer| crate::detokenizer::decode(tokenizer, &ids, false).unwrap();
        assert_eq!(decode(built), decode(folder), "{name}: {text:?}");
    }
    assert_eq!(built.special_tokens(), folder.special_tokens(), "{name}");
}

#[test]
fn byte_level_vocabularies_encode_as_their_folders() {
    for (name, pre) in [("llama3", "llama-bpe"), ("qwen2_5", "qwen2"), ("gpt2", "gpt-2")] {
        let (folder, stored) = stored(name);
        let built = bpe::build(&stored.vocabulary(), pre).unwrap();
        check_same(&built, &folder.tokenizer, name);
    }
}

#[test]
fn a_sentencepiece_vocabulary_encodes_as_its_folder() {
    let (folder, stored) = stored("mistral_v1");
    let built = spm::build(&stored.vocabulary()).unwrap();
    check_same(&built, &folder.tokenizer, "mistral_v1");
}

#[test]
fn filler_rows_decode_to_nothing_and_match_nothing() {
    let model = fixtures::open("tokenizers/gguf/phi-3.gguf");
    let (tokenizer, filler) = (&model.tokenizer, 32_050);
    assert_eq!(tokenizer.vocab_size(), 32_064);
    assert_eq!(crate::detokenizer::decode(tokenizer, &[filler], false).unwrap().text, "");
    assert!(!tokenizer.encode("[PAD32050]", &Breaks::NONE, false).unwrap().contains(&filler));
}

/// A tiny sound vocabulary, of both kinds.
fn tiny() -> Stored {
    let tokens = ["<unk>", "▁", "a", "b", "ab"].map(String::from).to_vec();
    let types = vec![TokenType::Normal; tokens.len()];
    Stored { types, merges: vec!["a b".into()], scores: vec![0.0; tokens.len()], tokens }
}

/// Spoils the tiny vocabulary and checks what is said of it.
fn check_refused(pre: Option<&str>, spoil: impl FnOnce(&mut Stored), named: &str) {
    let mut stored = tiny();
    spoil(&mut stored);
    let vocabulary = stored.vocabulary();
    let built = contain(|| match pre {
        Some(pre) => bpe::build(&vocabulary, pre),
        None => spm::build(&vocabulary),
    });
    let refusal = built.unwrap_err().to_string();
    assert!(refusal.contains(named), "{refusal:?} does not say {named:?}");
}

#[test]
fn a_tiny_vocabulary_is_sound() {
    let stored = tiny();
    bpe::build(&stored.vocabulary(), "gpt-2").unwrap();
    assert_eq!(spm::build(&stored.vocabulary()).unwrap().encode("ab", &Breaks::NONE, false).unwrap(), [1, 4]);
}

#[test]
fn broken_vocabularies_are_refused_by_name() {
    let gpt_2 = Some("gpt-2");
    check_refused(Some("poro"), |_| (), "tokenizer.ggml.pre \"poro\"");
    check_refused(gpt_2, |stored| stored.merges = vec!["a".into()], "the merge \"a\" is not two tokens");
    check_refused(gpt_2, |stored| stored.merges = vec!["a  b".into()], "is not two tokens");
    check_refused(gpt_2, |stored| stored.merges = vec!["a c".into()], "Token `c` out of vocabulary");
    check_refused(gpt_2, |stored| stored.merges = vec!["b a".into()], "Token `ba` out of vocabulary");
    check_refused(gpt_2, |stored| stored.tokens[3] = "a".into(), "tokens 2 and 3 are both \"a\"");
    check_refused(gpt_2, |stored| stored.tokens[3] = "x".repeat(2000), "the length of a token (bytes) is 2000");
    check_refused(None, |stored| stored.scores.truncate(2), "tokenizer.ggml.scores has 2 entries for 5 tokens");
    check_refused(None, |stored| stored.scores[2] = f32::NAN, "the score of token 2 is not a number");
    check_refused(None, |stored| stored.tokens[2] = "y".repeat(300), "token 2 is longer than 256 bytes");
}

#[test]
fn token_types_are_counted_and_known() {
    let check = |numbers: &[i32], named: &str| {
        let refusal = token_types(Some(numbers), 2).unwrap_err().to_string();
        assert!(refusal.contains(named), "{refusal}");
    };
    check(&[1], "has 1 entries for 2 tokens");
    check(&[1, 9], "unknown type 9");
    assert_eq!(token_types(None, 2).unwrap(), [TokenType::Normal; 2]);
}

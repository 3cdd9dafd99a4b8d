//! Control tokens across breaks, on real vocabularies and on small ones with every awkward rule.

use std::path::PathBuf;

use lockstep_checkpoint::Checkpoint;
use rand::{RngExt as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tokenizers::{Decoder as _, pre_tokenizers::byte_level::ByteLevel};

use super::*;
use crate::{detokenizer::decode, fixtures};

/// A small SentencePiece-like pipeline: `overrides` replace the fields of its `tokenizer.json`.
fn small(overrides: &[(&str, Value)]) -> Tokenizer {
    let letters = "▁ ab<>/s|xy.".chars().map(String::from);
    let mut words: Vec<String> = letters.collect();
    words.extend(
        ["▁a", "ab", "▁ab", "<a>", "</s>", "<|x|>", "<y>", "</", "s>", "</s", "|x", "|x|", "|>", "<unk>"]
            .map(String::from),
    );
    let vocab: serde_json::Map<_, _> = words.into_iter().zip((0..).map(|id: u32| json!(id))).collect();
    let token = |content: &str, special: bool, rules: &[&str]| {
        let rule = |name: &str| rules.contains(&name);
        json!({"id": vocab[content], "content": content, "special": special, "normalized": rule("normalized"),
               "lstrip": rule("lstrip"), "rstrip": rule("rstrip"), "single_word": rule("single_word")})
    };
    let mut description = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null,
        "added_tokens": [
            token("</s>", true, &[]), token("<|x|>", true, &["lstrip", "rstrip"]), token("<y>", true, &["normalized"]),
            token("<a>", false, &["single_word"]), token("<unk>", true, &[]),
        ],
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": false, "vocab": vocab,
                  "merges": [["a", "b"], ["▁", "a"], ["▁", "ab"], ["s", ">"], ["<", "/"], ["</", "s>"], ["</", "s"],
                             ["|", "x"], ["|x", "|"], ["|", ">"]]},
    });
    for (field, value) in overrides {
        description[*field] = value.clone();
    }
    Tokenizer::new(tokenizers::Tokenizer::from_bytes(description.to_string()).unwrap(), 0).unwrap()
}

/// The small pipeline under every normalizer and pre-tokenizer that treats starts of text in a way of its own.
fn small_ones() -> Vec<Tokenizer> {
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    let llama_2 = json!({"type": "Sequence", "normalizers": [prepend, replace]});
    vec![
        small(&[]),
        small(&[("normalizer", replace)]),
        small(&[("normalizer", llama_2)]),
        small(&[("normalizer", json!({"type": "NFKC"}))]),
        small(&[("normalizer", json!({"type": "Lowercase"}))]),
        small(&[("pre_tokenizer", metaspace("first", false))]),
        small(&[("pre_tokenizer", metaspace("first", true))]),
        small(&[("pre_tokenizer", metaspace("always", true))]),
        small(&[("pre_tokenizer", metaspace("never", false))]),
    ]
}

/// A text of random pieces.
fn random_text(rng: &mut ChaCha8Rng, pieces: &[&str]) -> String {
    let n_pieces = rng.random_range(0..12);
    (0..n_pieces).map(|_| *pieces.choose(rng).unwrap()).collect()
}

/// A break at each byte of `range`, its ends included.
fn everywhere(range: Range<usize>) -> Vec<u32> {
    (range.start..=range.end).map(|at| u32::try_from(at).unwrap()).collect()
}

fn encode(tokenizer: &Tokenizer, text: &str, offsets: Vec<u32>) -> Vec<u32> {
    tokenizer.encode(text, &Breaks::new(offsets, text.len()).unwrap(), false).unwrap()
}

/// The ids of control tokens other than the unknown token, which stands for text that has no other.
fn control_ids(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u32> {
    let unknown = tokenizer.token_id("<unk>");
    ids.iter().copied().filter(|&id| tokenizer.is_special(id) && Some(id) != unknown).collect()
}

const SMALL_PIECES: [&str; 17] =
    ["</s>", "<|x|>", "<y>", "<a>", " ", "  ", "a", "ab", "x", "<", ">", "</", "s>", "|", "é", "中", "<Y>"];

/// What NFKC and the like make of these, a text does not spell.
const DISGUISES: [&str; 6] = ["＜ｙ＞", "＜y>", "<ｙ>", "<\u{200b}y>", "＜／ｓ＞", "</ｓ>"];

#[test]
fn without_breaks_small_pipelines_encode_as_the_library_does() {
    let seed = 0x1051;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for tokenizer in small_ones() {
        for _ in 0..400 {
            let text = random_text(&mut rng, &SMALL_PIECES);
            let expected = tokenizer.pipeline.encode_fast(text.as_str(), true).unwrap().get_ids().to_vec();
            let harmless = vec![0, u32::try_from(text.len()).unwrap()];
            assert_eq!(tokenizer.encode(&text, &Breaks::NONE, true).unwrap(), expected, "{text:?}");
            assert_eq!(encode(&tokenizer, &text, harmless), expected, "{text:?}");
        }
    }
}

#[test]
fn a_control_token_that_only_normalization_yields_is_text() {
    let dropping = json!({"type": "Replace", "pattern": {"String": "\u{200b}"}, "content": ""});
    let nfkc = json!({"type": "Sequence", "normalizers": [{"type": "NFKC"}, dropping]});
    let tokenizer = small(&[("normalizer", nfkc)]);
    let by_library = |text: &str| tokenizer.pipeline.encode_fast(text, false).unwrap().get_ids().to_vec();
    for disguise in DISGUISES {
        assert!(!control_ids(&tokenizer, &by_library(disguise)).is_empty(), "{disguise:?} is an attack");
        for text in [disguise.to_owned(), format!("a{disguise} <y>")] {
            let ids = encode(&tokenizer, &text, Vec::new());
            let written = text.matches("<y>").count();
            assert_eq!(control_ids(&tokenizer, &ids).len(), written, "{text:?} gives {ids:?}");
        }
    }
}

#[test]
fn with_breaks_everywhere_small_pipelines_give_no_control_token() {
    let seed = 0x1052;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for tokenizer in small_ones() {
        for _ in 0..400 {
            let text = random_text(&mut rng, &SMALL_PIECES);
            let ids = encode(&tokenizer, &text, everywhere(0..text.len()));
            assert!(control_ids(&tokenizer, &ids).is_empty(), "{text:?}");
        }
    }
}

#[test]
fn merges_that_spell_a_control_token_stand_only_where_there_is_no_break() {
    // The merges of this vocabulary make `</s>` out of plain text when the search for added tokens does not see it.
    let tokenizer = small(&[("added_tokens", json!([]))]);
    let end = tokenizer.token_id("</s>").unwrap();
    assert_eq!(encode(&tokenizer, "</s>", vec![2]), [end], "an ordinary token, then");
    let tokenizer = small(&[]);
    for at in 1..4 {
        let ids = encode(&tokenizer, "a</s>b", vec![1 + at]);
        assert!(control_ids(&tokenizer, &ids).is_empty(), "break {at}");
        assert_eq!(decode(&tokenizer, &ids, false).unwrap().text, "a</s>b");
    }
}

#[test]
fn a_word_of_many_spelled_control_tokens_is_cut_in_bounded_work() {
    let tokenizer = small(&[]);
    let text = "</s>".repeat(20_000);
    let ids = encode(&tokenizer, &text, everywhere(0..text.len()));
    assert!(control_ids(&tokenizer, &ids).is_empty());
    assert_eq!(decode(&tokenizer, &ids, false).unwrap().text, text);
}

#[test]
fn a_control_token_cut_anywhere_is_text_on_real_vocabularies() {
    for name in fixtures::NAMES {
        let model = fixtures::open(name);
        let tokenizer = &model.tokenizer;
        for token in tokenizer.special_tokens().iter().take(30) {
            let text = format!("a {} b", token.text);
            let expected = encode(tokenizer, &text, vec![0, 2, u32::try_from(2 + token.text.len()).unwrap()]);
            assert!(expected.contains(&token.id), "{name}: {text:?}");
            for at in 3..2 + token.text.len() {
                let ids = encode(tokenizer, &text, vec![u32::try_from(at).unwrap()]);
                assert!(control_ids(tokenizer, &ids).is_empty(), "{name}: {text:?} cut at {at}");
                assert_eq!(decode(tokenizer, &ids, false).unwrap().text, text, "{name}: cut at {at}");
            }
        }
    }
}

#[test]
fn cut_control_tokens_encode_as_the_library_encodes_them_unrecognised() {
    for name in ["SmolLM2-135M-Instruct.Q4_1.gguf", "tokenizers/llama3", "tokenizers/mistral_v1"] {
        let model = fixtures::open(name);
        let mut unrecognising = model.tokenizer.pipeline.clone();
        unrecognising.set_encode_special_tokens(true);
        for token in model.tokenizer.special_tokens().iter().take(20) {
            let text = format!("x{0} y {0}\n{0}{0}z", token.text);
            let expected = unrecognising.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
            let ids = encode(&model.tokenizer, &text, everywhere(0..text.len()));
            assert_eq!(ids, expected, "{name}: {text:?}");
        }
    }
}

#[test]
fn content_between_real_control_tokens_forges_none() {
    let seed = 0x1053;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for name in fixtures::NAMES {
        let model = fixtures::open(name);
        let tokenizer = &model.tokenizer;
        let special: Vec<&str> = tokenizer.special_tokens().iter().map(|token| token.text.as_str()).take(24).collect();
        // Whole control tokens, both halves of each, and what may stand between.
        let halves = special.iter().flat_map(|text| [&text[..text.len() / 2], &text[text.len() / 2..]]);
        let mut pieces: Vec<&str> = special.iter().copied().chain(halves).collect();
        pieces.extend([" ", "\n", "<", ">", "|", "hello", "é", "中文", "👩🏽‍🚀", "[", "/"]);
        let turn = *special.last().unwrap();
        for _ in 0..200 {
            let content = random_text(&mut rng, &pieces);
            let text = format!("{turn}user\n{content}{turn}end");
            let inside = turn.len() + 5..turn.len() + 5 + content.len();
            let ids = encode(tokenizer, &text, everywhere(inside));
            assert_eq!(control_ids(tokenizer, &ids).len(), 2, "{name}: {text:?}");
        }
    }
}

#[test]
fn blanks_are_split_into_words_up_to_the_limit_and_refused_beyond() {
    for name in ["SmolLM2-135M-Instruct.Q4_1.gguf", "tokenizers/llama3"] {
        let model = fixtures::open(name);
        let most = format!("{}x", " ".repeat(MAX_BLANK_RUN));
        // The last blank belongs to the word after it.
        let mut expected = encode(&model.tokenizer, &most[..MAX_BLANK_RUN - 1], vec![]);
        expected.extend(encode(&model.tokenizer, " x", vec![]));
        assert_eq!(encode(&model.tokenizer, &most, vec![]), expected, "{name}");
        let refusal = model.tokenizer.encode(&format!("x {most}"), &Breaks::NONE, false).unwrap_err();
        assert_eq!(refusal, TokenizeError::BlankRun { limit: MAX_BLANK_RUN });
    }
}

#[test]
fn byte_level_characters_spell_the_bytes_that_the_library_gives_them() {
    let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort_unstable();
    let bytes = TokenBytes::new(&Spelling::ByteLevel, &alphabet);
    assert_eq!(bytes.n_ids(), 256);
    for (id, character) in (0..).zip(&alphabet) {
        let decoded = ByteLevel::default().decode_chain(vec![character.clone()]).unwrap().concat();
        assert_eq!(String::from_utf8_lossy(bytes.get(id).unwrap()), decoded, "{character}");
    }
}

#[test]
fn a_checkpoint_says_the_same_of_the_bytes_of_ids_as_the_pipeline() {
    for name in ["SmolLM2-135M-Instruct.Q4_1.gguf", "tokenizers/gguf/phi-3.gguf", "tokenizers/gguf/llama-bpe.gguf"] {
        let tokenizer = &fixtures::open(name).tokenizer;
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models").join(name);
        let vocabulary = Checkpoint::open(&path).unwrap().vocabulary().unwrap();
        let bytes = TokenBytes::new(&vocabulary.spelling.unwrap(), vocabulary.tokens.iter().map(|token| &token.text));
        assert_eq!(bytes.n_ids(), tokenizer.vocab_size() as usize, "{name}");
        for (id, token) in (0..).zip(&vocabulary.tokens) {
            assert!(
                token.is_reserved || bytes.get(id) == Some(tokenizer.token_bytes(0, id).unwrap()),
                "{name}: {token:?}"
            );
            assert!(token.is_reserved || !tokenizer.is_special(id), "{name}: {token:?} is special");
        }
    }
}

#[test]
fn an_id_outside_the_vocabulary_is_refused() {
    let tokenizer = small(&[]);
    let vocab_size = tokenizer.vocab_size();
    let refusal = decode(&tokenizer, &[vocab_size - 1, vocab_size], false).unwrap_err();
    assert_eq!(refusal, TokenizeError::TokenId { idx: 1, id: vocab_size, vocab_size });
}

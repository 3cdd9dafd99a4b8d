//! The short way beside the library's pipeline, on texts made to tell them apart.

use rand::{RngExt as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::*;
use crate::{fixtures, tokenizer};

/// Every byte-level tokenizer at hand.
const REAL: [&str; 9] = [
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "tokenizers/gpt2",
    "tokenizers/gguf/gpt-2.gguf",
    "tokenizers/llama3",
    "tokenizers/llama3_1",
    "tokenizers/gguf/llama-bpe.gguf",
    "tokenizers/qwen2_5",
    "tokenizers/gguf/qwen2.gguf",
    "tokenizers/mistral_nemo",
];

/// What patterns, normalizers and added tokens treat in ways of their own.
const PIECES: [&str; 84] = [
    // Words, contractions in either case (one with a long s, which folds to s), names in code.
    "the",
    "Hello",
    "world",
    "I",
    "don't",
    "we'LL",
    "'s",
    "'ſ",
    "'",
    "ÉCOLE",
    "naïve",
    "Ǆ",
    "ŉ",
    "fooBar",
    "snake_case",
    "supercalifragilisticexpialidocious",
    "a",
    "b",
    // Digits, and what Unicode or Rust alone counts among them.
    "0",
    "7",
    "42",
    "1234567",
    "3.14",
    "٣٤",
    "½",
    "Ⅷ",
    "²",
    "一",
    "𝟘",
    "௧",
    "൘",
    // Blanks.
    " ",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\t",
    "\u{b}",
    "\u{c}",
    "\u{85}",
    "\u{a0}",
    "\u{2028}",
    "\u{3000}",
    "\u{1680}",
    "\u{200b}",
    "\u{feff}",
    "\u{1c}",
    // Signs and scripts.
    ".",
    ",",
    "!?",
    "://",
    "/",
    "{\"",
    "---",
    "<",
    "|",
    ">",
    "中文",
    "日本語",
    "가",
    "العربية",
    "हिन्दी",
    "ไทย",
    "👩🏽‍🚀",
    "🇨🇭",
    // Not composed: marks, letters that compose to others, and parts of a syllable.
    "e\u{301}",
    "\u{301}",
    "a\u{323}\u{307}",
    "\u{212b}",
    "\u{1100}\u{1161}",
    "q\u{307}\u{323}",
    "ﬁ",
    // Control characters and the like.
    "\0",
    "\u{1}",
    "\u{7f}",
    "\u{fffd}",
    "\u{e000}",
    "\u{10ffff}",
    "\u{378}",
    "\u{61c}",
    // Long.
    "################################################################",
];

/// A text of `n_pieces` pieces: those above, tokens of its own, runs of blanks, and any characters at all.
fn random_text(rng: &mut ChaCha8Rng, tokens: &[String], n_pieces: usize) -> String {
    let mut text = String::new();
    for _ in 0..n_pieces {
        match rng.random_range(0..20) {
            0 => text.push_str(tokens.choose(rng).map_or("", String::as_str)),
            1 => {
                let token = tokens.choose(rng).map_or("", String::as_str);
                let half = token.len() / 2;
                text.push_str(token.get(..half).or(token.get(half..)).unwrap_or_default());
            }
            2 => text.extend((0..rng.random_range(0..9)).map(|_| *[' ', '\n', '\t', '\u{3000}'].choose(rng).unwrap())),
            3 => text.extend(char::from_u32(rng.random_range(0..0x11_0000))),
            _ => text.push_str(PIECES.choose(rng).unwrap()),
        }
    }
    text
}

/// Some breaks, mostly none.
fn random_breaks(rng: &mut ChaCha8Rng, text: &str) -> Breaks {
    let n_breaks = rng.random_range(0..8_usize).saturating_sub(4);
    let mut offsets: Vec<_> = (0..n_breaks).map(|_| rng.random_range(0..=text.len() as u32)).collect();
    offsets.sort_unstable();
    Breaks::new(offsets, text.len()).unwrap()
}

/// Encodes random texts both ways. At least one in `one_in` goes the short way.
fn check(name: &str, tokenizer: &tokenizer::Tokenizer, n_texts: usize, one_in: usize) {
    let seed = 0x5707;
    println!("{name}: seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let encoder = tokenizer.word_encoder.as_ref().unwrap_or_else(|| panic!("{name} goes the long way"));
    let tokens = tokenizer.pipeline.get_added_tokens_decoder();
    let mut tokens: Vec<_> = tokens.iter().map(|(id, token)| (id, token.content.clone())).collect();
    tokens.sort_unstable();
    let tokens: Vec<_> = tokens.into_iter().map(|(_, token)| token).take(32).collect();
    let mut n_short = 0;
    for text_idx in 0..n_texts {
        let n_pieces = if text_idx % 500 == 499 { 4_000 } else { rng.random_range(0..16) };
        let text = random_text(&mut rng, &tokens, n_pieces);
        let breaks = random_breaks(&mut rng, &text);
        let add_special_tokens = rng.random();
        let expected = tokenizer.encode_by_library(&text, &breaks, add_special_tokens).unwrap();
        let ids = tokenizer.encode(&text, &breaks, add_special_tokens).unwrap();
        assert_eq!(ids, expected, "{name}: {text:?} with {breaks:?}, special tokens {add_special_tokens}");
        n_short +=
            usize::from(encoder.encode(&tokenizer.pipeline, &tokenizer.added, &text, &breaks).unwrap().is_some());
    }
    assert!(n_short * one_in >= n_texts, "{name}: only {n_short} of {n_texts} texts went the short way");
}

/// A small byte-level pipeline, with added tokens of every kind. Its merges spell two control tokens, one of them where a
/// text has a blank and a letter.
fn small(normalizer: Value, steps: Value) -> tokenizer::Tokenizer {
    let mut texts: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    texts.sort_unstable();
    texts.extend(["<y", "<y>", "Ġa", "he", "lo", "<|x|>", "<a>", "<é>", "Hello", "##", "<b>"].map(String::from));
    let vocab: serde_json::Map<_, _> = texts.into_iter().zip((0..).map(|id: u32| json!(id))).collect();
    let token = |content: &str, special: bool, rules: &[&str]| {
        let rule = |name: &str| rules.contains(&name);
        json!({"id": vocab[content], "content": content, "special": special, "normalized": rule("normalized"),
               "lstrip": rule("lstrip"), "rstrip": rule("rstrip"), "single_word": rule("single_word")})
    };
    let description = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": {"type": "RobertaProcessing", "sep": ["<y>", vocab["<y>"]], "cls": ["<b>", vocab["<b>"]],
                           "trim_offsets": true, "add_prefix_space": true},
        "added_tokens": [
            token("<|x|>", true, &["lstrip", "rstrip"]), token("<y>", true, &["normalized"]), token("Ġa", true, &[]),
            token("<a>", false, &["single_word"]), token("<b>", false, &["normalized", "rstrip"]),
            token("<é>", true, &["normalized", "lstrip"]), token("Hello", false, &["single_word", "normalized"]),
        ],
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "ignore_merges": false, "merges":
                  [["<", "y"], ["<y", ">"], ["Ġ", "a"], ["h", "e"], ["l", "o"], ["#", "#"]]},
    });
    tokenizer::Tokenizer::new(Tokenizer::from_bytes(description.to_string()).unwrap(), 0).unwrap()
}

#[test]
fn real_tokenizers_encode_as_the_library_does() {
    for name in REAL {
        check(name, &fixtures::open(name).tokenizer, 10_000, 4);
    }
}

#[test]
fn small_pipelines_encode_as_the_library_does() {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let digits = |each: bool| json!({"type": "Digits", "individual_digits": each});
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let all_steps = [
        json!([byte_level(false)]),
        json!([byte_level(true)]),
        json!([digits(true), byte_level(true)]),
        json!([digits(false), byte_level(false)]),
        // Of DeepSeek's, and one that leaves most of a text between its matches.
        json!([
            split(r"\p{N}{1,3}"),
            split(r"[一-龥぀-ゟ゠-ヿ]+"),
            split(r"[^\s\p{L}]+|\p{L}+|\s+(?!\S)|\s+"),
            byte_level(false)
        ]),
        json!([split(r"[ab]+\s+|o\b"), byte_level(true)]),
    ];
    for (steps_idx, steps) in all_steps.into_iter().enumerate() {
        for normalizer in [Value::Null, json!({"type": "NFC"})] {
            let name = format!("steps {steps_idx}, {normalizer}");
            check(&name, &small(normalizer, steps.clone()), 2_000, 10);
        }
    }
}

#[test]
fn other_normalizers_go_the_long_way() {
    let byte_level = json!([{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]);
    assert!(small(json!({"type": "NFC"}), byte_level.clone()).word_encoder.is_some());
    assert!(small(json!({"type": "NFKC"}), byte_level).word_encoder.is_none());
    assert!(fixtures::open("tokenizers/mistral_v1").tokenizer.word_encoder.is_none());
}

#[test]
fn a_bounded_number_of_short_words_is_remembered() {
    let known = KnownWords::new();
    let mut ids = Vec::new();
    for id in 0..100_000 {
        known.insert(&format!("word {id}"), [id, 1].into());
    }
    let n_known: usize = known.shards.iter().map(|shard| shard.lock().unwrap().len()).sum();
    assert_eq!(n_known, N_SHARDS * SHARD_WORDS.get());
    assert!(known.append("word 99999", &mut ids) && !known.append("word 0", &mut ids));
    assert_eq!(ids, [99_999, 1]);
    let longest = "x".repeat(MAX_KNOWN_BYTES);
    known.insert(&longest, [1].into());
    known.insert(&format!("{longest}x"), [1].into());
    assert!(known.append(&longest, &mut ids) && !known.append(&format!("{longest}x"), &mut ids));
}

//! Streams of random ids in random pieces, held to decoding all ids at once.

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::{fixtures, tokenizer::Breaks};

/// Ids of which many stand for single bytes, so that characters are often cut, broken and completed.
fn random_ids(rng: &mut ChaCha8Rng, tokenizer: &Tokenizer, n: usize) -> Vec<u32> {
    let vocab_size = tokenizer.vocab_size();
    let text = "é中👩🏽‍🚀 a\n  ß‍";
    let real = tokenizer.encode(text, &Breaks::NONE, false).unwrap();
    let id = |rng: &mut ChaCha8Rng| match rng.random_range(0..4) {
        0 => rng.random_range(0..vocab_size),
        1 => rng.random_range(0..vocab_size.min(300)),
        _ => real[rng.random_range(0..real.len())],
    };
    (0..n).map(|_| id(rng)).collect()
}

/// The text that a stream emits for `ids`, with where it ends after each.
fn stream(tokenizer: &Tokenizer, stream: &mut Detokenizer, ids: &[u32], text: &mut String) -> Vec<usize> {
    let push = |(idx, &id)| {
        let before = text.len();
        stream.push(tokenizer, idx, id, text).unwrap();
        assert!(stream.held_back.len() <= 3, "more than an unfinished character is held back");
        assert!(text.len() >= before);
        text.len()
    };
    ids.iter().enumerate().map(push).collect()
}

#[test]
fn a_stream_emits_what_decoding_all_at_once_gives() {
    let seed = 0x2051;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for name in fixtures::NAMES {
        let model = fixtures::open(name);
        let tokenizer = &model.tokenizer;
        for round in 0..300 {
            let skip = round % 2 == 0;
            let n_ids = rng.random_range(0..60);
            let ids = random_ids(&mut rng, tokenizer, n_ids);
            let whole = decode(tokenizer, &ids, skip).unwrap();
            assert_eq!(whole.text, String::from_utf8_lossy(&whole.raw), "{name}");

            let mut text = String::new();
            let mut detokenizer = Detokenizer::new(tokenizer, skip);
            let ends = stream(tokenizer, &mut detokenizer, &ids, &mut text);
            assert!(whole.text.starts_with(&text), "{name}: {ids:?}");
            assert!(ends.is_sorted() && ends.iter().all(|&end| text.is_char_boundary(end)));
            detokenizer.finish(&mut text);
            assert_eq!(text, whole.text, "{name}: {ids:?}");
        }
    }
}

#[test]
fn a_resumed_stream_goes_on_where_the_first_was() {
    let seed = 0x2052;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for name in fixtures::NAMES {
        let model = fixtures::open(name);
        let tokenizer = &model.tokenizer;
        for round in 0..300 {
            let skip = round % 2 == 0;
            let ids = random_ids(&mut rng, tokenizer, 40);
            let (before, after) = ids.split_at(rng.random_range(0..=ids.len()));
            let mut text = String::new();
            stream(tokenizer, &mut Detokenizer::new(tokenizer, skip), before, &mut text);
            let mut resumed = Detokenizer::resume(tokenizer, skip, before).unwrap();
            stream(tokenizer, &mut resumed, after, &mut text);
            resumed.finish(&mut text);
            assert_eq!(text, decode(tokenizer, &ids, skip).unwrap().text, "{name}: {before:?} {after:?}");
        }
    }
}

#[test]
fn whole_texts_decode_as_the_library_decodes_them() {
    let texts = ["Hello, world!", " two  blanks", "naïve 中文 👩🏽‍🚀\r\n\ttab", "", "<s>a</s> b<|im_end|>\n c<|eot_id|>"];
    for name in fixtures::NAMES {
        let model = fixtures::open(name);
        for text in texts {
            for skip in [false, true] {
                let ids = model.tokenizer.encode(text, &Breaks::NONE, true).unwrap();
                let expected = model.tokenizer.decode_by_library(&ids, skip);
                assert_eq!(decode(&model.tokenizer, &ids, skip).unwrap().text, expected, "{name}: {text:?} {skip}");
            }
        }
    }
}

#[test]
fn the_blank_that_encoding_put_first_is_dropped_once() {
    let model = fixtures::open("tokenizers/mistral_v1");
    let tokenizer = &model.tokenizer;
    let ids = tokenizer.encode("Hello Hello", &Breaks::NONE, true).unwrap();
    let check = |skip: bool, context: &[u32], ids: &[u32], expected: &str| {
        let mut text = String::new();
        let mut resumed = Detokenizer::resume(tokenizer, skip, context).unwrap();
        stream(tokenizer, &mut resumed, ids, &mut text);
        assert_eq!(text, expected, "{context:?}");
    };
    assert_eq!(ids.len(), 3, "<s> ▁Hello ▁Hello");
    check(true, &[], &ids, "Hello Hello");
    check(false, &[], &ids, "<s> Hello Hello");
    check(true, &ids[..1], &ids[1..], "Hello Hello");
    check(true, &ids[..2], &ids[2..], " Hello");
    check(false, &ids[..1], &ids[1..], " Hello Hello");
}

#[test]
fn an_unfinished_character_is_held_back_and_a_broken_one_replaced() {
    let check = |pieces: &[&[u8]], emitted: &[&str], held_back: &[u8]| {
        let (mut held, mut text) = (Vec::new(), String::new());
        for (piece, expected) in pieces.iter().zip(emitted) {
            held.extend_from_slice(piece);
            held = emit(&held, &mut text).to_vec();
            assert_eq!(text, *expected);
        }
        assert_eq!(held, held_back);
    };
    check(&[b"a\xf0", b"\x9f\x9a", b"\x80b"], &["a", "a", "a🚀b"], b"");
    check(&[b"\xf0\x9f", b"x"], &["", "\u{fffd}x"], b"");
    check(&[b"\xf0\x9f", b"\xf0\x9f"], &["", "\u{fffd}"], b"\xf0\x9f");
    check(&[b"\x80\x80"], &["\u{fffd}\u{fffd}"], b"");
    check(&[b"\xed\xa0\x80"], &["\u{fffd}\u{fffd}\u{fffd}"], b"");
    check(&[b"\xc3"], &[""], b"\xc3");
}

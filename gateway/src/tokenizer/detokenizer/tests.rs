//! Streams of random ids in random pieces, held to decoding all bytes at once.

use lockstep_proto::tokenizer::v1::{GetTokenizerResponse, GetVocabularyResponse, SpecialToken};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::tokenizer::Vocabulary;

/// Ids below 256 are bytes; then come a control token and tokens that cut characters in every way.
const CONTROL: u32 = 256;
const TOKENS: [&[u8]; 6] = [b"<|end|>", b" ", b" a", "中".as_bytes(), b"\xf0\x9f", b"\x9a\x80!"];

fn facts(strips_leading_space: bool) -> Facts {
    let mut raw: Vec<u8> = (0..=u8::MAX).collect();
    let mut ends: Vec<u32> = (1..=256).collect();
    for token in TOKENS {
        raw.extend_from_slice(token);
        ends.push(u32::try_from(raw.len()).unwrap());
    }
    let response = GetVocabularyResponse { raw, ends, strips_leading_space, ..GetVocabularyResponse::default() };
    let description = GetTokenizerResponse {
        special_tokens: vec![SpecialToken { id: CONTROL, text: "<|end|>".into() }],
        ..GetTokenizerResponse::default()
    };
    Facts::new("m", description, Vocabulary::new(response, 262).unwrap())
}

/// The text of all ids, decoded at once.
fn decode(facts: &Facts, ids: &[u32], skip: bool) -> String {
    let shown = ids.iter().filter(|&&id| !(skip && id == CONTROL));
    let raw: Vec<u8> = shown.flat_map(|&id| facts.vocabulary().bytes(id).unwrap()).copied().collect();
    let start = usize::from(facts.vocabulary().strips_leading_space() && raw.first() == Some(&b' '));
    String::from_utf8_lossy(&raw[start..]).into_owned()
}

fn random_ids(rng: &mut ChaCha8Rng) -> Vec<u32> {
    let n = rng.random_range(0..60);
    let id = |_| match rng.random_range(0..3) {
        0 => rng.random_range(0..CONTROL),
        _ => CONTROL + rng.random_range(0..6),
    };
    (0..n).map(id).collect()
}

fn push_all(facts: &Facts, stream: &mut Detokenizer, ids: &[u32], text: &mut String) {
    for &id in ids {
        stream.push(facts, id, text).unwrap();
        assert!(stream.held_back.len() <= 3, "more than an unfinished character is held back");
    }
}

#[test]
fn a_stream_emits_what_decoding_all_at_once_gives_wherever_it_was_cut() {
    let seed = 0x2051;
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for facts in [facts(false), facts(true)] {
        for round in 0..2_000 {
            let skip = round % 2 == 0;
            let ids = random_ids(&mut rng);
            let (before, after) = ids.split_at(rng.random_range(0..=ids.len()));
            let mut text = String::new();
            push_all(&facts, &mut Detokenizer::new(&facts, skip), before, &mut text);
            assert!(decode(&facts, &ids, skip).starts_with(&text), "{ids:?}");
            let mut resumed = Detokenizer::resume(&facts, skip, before).unwrap();
            push_all(&facts, &mut resumed, after, &mut text);
            text.push_str(&resumed.finish());
            assert_eq!(text, decode(&facts, &ids, skip), "{before:?} {after:?}");
        }
    }
}

#[test]
fn an_id_that_is_none_of_the_vocabulary_changes_nothing() {
    let facts = facts(false);
    let (mut stream, mut text) = (Detokenizer::new(&facts, true), String::new());
    stream.push(&facts, 0xc3, &mut text).unwrap();
    let unknown = UnknownToken { id: 262, n_ids: 262 };
    assert_eq!(stream.push(&facts, 262, &mut text), Err(unknown));
    stream.push(&facts, 0xa9, &mut text).unwrap();
    assert_eq!(text, "é");
    assert_eq!(Detokenizer::resume(&facts, true, &[262]).unwrap_err(), unknown);
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

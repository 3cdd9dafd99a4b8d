//! Texts of ids, held to what the library makes of them.

use super::*;
use crate::{fixtures, tokenizer::Breaks};

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
    let check = |skip: bool, ids: &[u32], expected: &str| {
        assert_eq!(decode(tokenizer, ids, skip).unwrap().text, expected, "{ids:?}");
    };
    assert_eq!(ids.len(), 3, "<s> ▁Hello ▁Hello");
    check(true, &ids, "Hello Hello");
    check(false, &ids, "<s> Hello Hello");
    let blank = tokenizer.token_id("▁").unwrap();
    check(true, &[blank, ids[1]], " Hello");
}

#[test]
fn what_is_no_utf8_is_replaced_in_the_text_alone() {
    let model = fixtures::open(fixtures::NAMES[0]);
    let rocket = model.tokenizer.encode("🚀", &Breaks::NONE, false).unwrap();
    let decoded = decode(&model.tokenizer, &rocket[..rocket.len() - 1], false).unwrap();
    assert_eq!(decoded.text, String::from_utf8_lossy(&decoded.raw));
    assert!(decoded.text.contains(char::REPLACEMENT_CHARACTER) && "🚀".as_bytes().starts_with(&decoded.raw));
}

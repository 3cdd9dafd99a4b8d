//! Which tokens a matcher allows, and when it says that a text is complete.

use lockstep_checkpoint::{Spelling, Token, Vocabulary};

use super::*;

/// Words of more than one byte, after the 256 bytes; the last two are control tokens.
const WORDS: [&str; 6] = ["ab", "true", "{\"", "\":", "<|call|>", "<|end|>"];
const CALL: u32 = 260;
const END: u32 = 261;
/// Rows of the model's embedding beyond its tokens.
const VOCAB_SIZE: usize = 264;

fn grammars() -> Grammars {
    let bytes = (0..=u8::MAX).map(|byte| Token { text: format!("<0x{byte:02X}>"), is_reserved: false });
    let words = WORDS.map(|text| Token { text: text.into(), is_reserved: text.starts_with("<|") });
    let spelling = Spelling::of_decoder(&serde_json::json!({ "type": "ByteFallback" }));
    Grammars::new(&Vocabulary { tokens: bytes.chain(words).collect(), spelling }, VOCAB_SIZE).unwrap()
}

fn json(schema: &str) -> Constraint {
    Constraint::JsonSchema(schema.into())
}

fn regex(regex: &str) -> Constraint {
    Constraint::Regex(regex.into())
}

fn lark(grammar: &str) -> Constraint {
    Constraint::Lark(grammar.into())
}

/// Takes in the bytes of a text one by one; what may follow.
#[track_caller]
fn after(constraint: &Constraint, text: &str) -> Next {
    let (mut matcher, mut next) = Matcher::new(&grammars(), constraint, &[END]).unwrap();
    for byte in text.bytes() {
        let Next::Tokens(mask) = &next else { panic!("{text:?} is complete before {:?}", char::from(byte)) };
        assert!(mask.allows(byte.into()), "{:?} of {text:?}", char::from(byte));
        next = matcher.advance(byte.into()).unwrap();
    }
    next
}

/// The tokens that may follow a text.
#[track_caller]
fn allowed(constraint: &Constraint, text: &str) -> Vec<u32> {
    match after(constraint, text) {
        Next::Tokens(mask) => (0..VOCAB_SIZE as u32 + 32).filter(|id| mask.allows(*id)).collect(),
        Next::Nothing => Vec::new(),
    }
}

fn refusal(constraint: &Constraint) -> String {
    Matcher::new(&grammars(), constraint, &[END]).unwrap_err()
}

#[test]
fn a_token_is_allowed_if_all_of_its_bytes_are() {
    let [a, b, ab] = [u32::from(b'a'), u32::from(b'b'), 256];
    assert_eq!(allowed(&regex("a(b|c)"), ""), [a, ab]);
    assert_eq!(allowed(&regex("ab"), "a"), [b]);
    assert_eq!(allowed(&regex("(a|b)*"), "a"), [a, b, ab, END]);
}

#[test]
fn a_turn_may_end_where_the_text_may_and_a_text_is_complete_where_it_must() {
    assert_eq!(allowed(&regex("[0-9]{1,2}"), "4"), (0x30..=0x39).chain([END]).collect::<Vec<_>>());
    assert_eq!(after(&regex("[0-9]{1,2}"), "42"), Next::Nothing);
    let (mut matcher, _) = Matcher::new(&grammars(), &regex("[0-9]{1,2}"), &[]).unwrap();
    let Next::Tokens(mask) = matcher.advance(0x34).unwrap() else { panic!("it may go on") };
    assert!(!mask.allows(END), "nothing ends the turn");
    assert_eq!(after(&json(r#"{ "enum": [true, null] }"#), "true"), Next::Nothing);
    assert_eq!(after(&json(r#"{ "const": { "a": 1 } }"#), r#"{"a":1}"#), Next::Nothing);
}

#[test]
fn schemas_are_held() {
    let schema = json(
        r#"{ "type": "object", "properties": { "n": { "type": "integer", "minimum": 10, "maximum": 12 } },
             "required": ["n"], "additionalProperties": false }"#,
    );
    assert_eq!(after(&schema, r#"{"n":11}"#), Next::Nothing);
    assert_eq!(after(&schema, "{ \"n\" :\n    11\n\n}"), Next::Nothing);
    assert!(!allowed(&schema, "{ ").contains(&u32::from(b' ')), "one is enough");
    assert_eq!(after(&json("true"), "[1, null]"), Next::Nothing);
    assert_eq!(allowed(&schema, r#"{"n":1"#), [u32::from(b'0'), u32::from(b'1'), u32::from(b'2')]);
}

#[test]
fn control_tokens_are_no_text_and_are_chosen_where_a_grammar_names_them() {
    let anything = allowed(&regex("(?s:.)*"), "");
    assert!(anything.contains(&256) && anything.contains(&END) && !anything.contains(&CALL), "{anything:?}");
    let call = lark("start: <|call|> \"a\"");
    let (mut matcher, next) = Matcher::new(&grammars(), &call, &[]).unwrap();
    let Next::Tokens(mask) = next else { panic!("it begins") };
    assert!(mask.allows(CALL) && !mask.allows(u32::from(b'<')));
    assert!(!allowed(&lark("start: <[260]>"), "").contains(&u32::from(b'<')));
    assert_eq!(
        allowed(&lark("start: <[260]> | <[256]> \"x\""), ""),
        [256, CALL],
        "they may be written by their ids, too"
    );
    assert!(matches!(matcher.advance(CALL).unwrap(), Next::Tokens(mask) if mask.allows(u32::from(b'a'))));
    assert_eq!(matcher.advance(u32::from(b'a')).unwrap(), Next::Nothing);
}

#[test]
fn what_compiles_for_a_vocabulary_compiles_on_trial() {
    let real = grammars();
    let trial = Grammars::of_bytes(real.n_ids(), real.control_tokens().to_vec()).unwrap();
    assert_eq!(trial.control_tokens(), [(CALL, "<|call|>".to_owned()), (END, "<|end|>".to_owned())]);
    for grammar in ["start: <|call|> \"a\"", "start: <[260]>", "start: <[263]>", "start: <[264]>", "start: <|other|>"] {
        let compiles = |grammars: &Grammars| grammars.compile(&lark(grammar)).is_ok();
        assert_eq!(compiles(&real), compiles(&trial), "{grammar}");
    }
}

#[test]
fn clones_go_on_independently() {
    let (mut first, _) = Matcher::new(&grammars(), &regex("ax|by"), &[]).unwrap();
    let mut second = first.clone();
    first.advance(u32::from(b'a')).unwrap();
    first.cancellation().cancel();
    assert!(matches!(second.advance(u32::from(b'b')).unwrap(), Next::Tokens(mask) if mask.allows(u32::from(b'y'))));
}

#[test]
fn what_does_not_compile_is_refused_in_one_line() {
    for (constraint, says) in [
        (json("{"), "no JSON: EOF"),
        (json("false"), "Unsatisfiable schema"),
        (json(r#"{ "not": { "type": "string" } }"#), r#"Unimplemented keys: ["not"]"#),
        (json(r##"{ "$ref": "#" }"##), "allows no text"),
        (json(&format!("{}{}", "[".repeat(1000), "]".repeat(1000))), "no JSON: recursion limit exceeded"),
        (regex("a("), "unclosed group"),
        (regex("a(?=b)"), "look-around"),
        (regex(""), "allows no text but the empty one"),
        (lark("start: <|nobody|>"), "unknown special token: \"<|nobody|>\""),
        (lark("begin: \"a\""), "start"),
        (lark(&format!("start: {}", "(".repeat(30_000))), "nested"),
    ] {
        let refusal = refusal(&constraint);
        assert!(refusal.contains(says) && !refusal.contains('\n') && refusal.len() < 1500, "{constraint:?}: {refusal}");
    }
}

#[test]
fn what_was_not_allowed_is_an_error() {
    let (mut matcher, _) = Matcher::new(&grammars(), &regex("ab"), &[]).unwrap();
    matcher.advance(u32::from(b'x')).unwrap_err();
}

#[test]
fn a_matcher_may_take_long_once_and_not_always() {
    let matcher = || Matcher::new(&grammars(), &regex("a*"), &[]).unwrap().0;
    let mut once = matcher();
    once.pay(TIME_BURST).unwrap();
    once.pay(TIME_PER_TOKEN + Duration::from_millis(1)).unwrap_err();
    let mut always = matcher();
    (0..1000).for_each(|_| always.pay(TIME_PER_TOKEN).unwrap());
    let mut too_long = matcher();
    let n_paid = (0..1000).take_while(|_| too_long.pay(2 * TIME_PER_TOKEN).is_ok()).count();
    assert_eq!(n_paid, 24, "each is 20 ms too many of 500, and nothing is saved up at the start");
}

//! What llguidance, by which workers hold answers, makes of the grammars.

use std::sync::Arc;

use llguidance::{Matcher, ParserFactory, api::TopLevelGrammar, toktrie::ApproximateTokEnv};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::tools::reader::{Reader, Rules};

/// The id of a control token in [`ApproximateTokEnv::single_byte`], whose ids below are bytes.
const MARK: u32 = 256;
/// What stands for the opening in the answers of these tests, be it a control token or text.
const OPENING: char = '¤';

const CONVENTIONS: [(Format, Option<u32>); 7] = [
    (Format::Llama, None),
    (Format::Llama, Some(MARK)),
    (Format::Hermes, None),
    (Format::Hermes, Some(MARK)),
    (Format::Mistral, None),
    (Format::Mistral, Some(MARK)),
    (Format::Json, None),
];

fn convention((format, mark): (Format, Option<u32>)) -> Convention {
    Convention { format, mark, shown_by_template: true }
}

/// `f` takes a digit, `g` nothing.
fn tools() -> [ValidTool; 2] {
    let tool = |name: &str, schema: Value| {
        let Value::Object(parameters) = schema else { panic!("a schema") };
        ValidTool { name: name.into(), description: String::new(), parameters, strict: true }
    };
    let digit = json!({ "properties": { "a": { "type": "integer", "minimum": 0, "maximum": 9 } }, "required": ["a"] });
    [tool("f", digit), tool("g", json!({ "properties": {} }))]
}

fn matcher(lark: &str) -> Matcher {
    let mut factory = ParserFactory::new_simple(&ApproximateTokEnv::single_byte_env()).unwrap();
    factory.quiet();
    Matcher::new(factory.create_parser(TopLevelGrammar::from_lark(lark.to_owned())))
}

fn ids(convention: &Convention, answer: &str) -> Vec<u32> {
    let bytes = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let opening = convention.mark.map(|id| vec![id]).or_else(|| convention.format.opening().map(bytes));
    let ids = answer.chars().map(|c| match (c, &opening) {
        (OPENING, Some(opening)) => opening.clone(),
        _ => bytes(&c.to_string()),
    });
    ids.collect::<Vec<_>>().concat()
}

const F: &str = r#"{"name": "f", "arguments": {"a": 1}}"#;
const G: &str = r#"{"name": "g", "arguments": {}}"#;
/// What no call may be.
const WRONG: [&str; 4] = [
    r#"{"name": "f", "arguments": {"a": 10}}"#,
    r#"{"name": "f", "arguments": {}}"#,
    r#"{"name": "h", "arguments": {}}"#,
    r#"{"name": "f", "arguments": {"a""#,
];

/// Answers in which `F` and `G` are calls of the tools and `W` is each wrong one, spelled as the format has them.
fn answers(format: Format, frame: &str) -> Vec<String> {
    let spelled = |call: &str| match format {
        Format::Llama => call.replace("arguments", "parameters"),
        Format::Hermes => format!("\n{call}\n</tool_call>"),
        Format::Mistral | Format::Json => call.to_owned(),
    };
    let frame = frame.replace('F', &spelled(F)).replace('G', &spelled(G));
    let wrong = if frame.contains('W') { &WRONG[..] } else { &WRONG[..1] };
    wrong.iter().map(|wrong| frame.replace('W', &spelled(wrong))).collect()
}

/// Checks which answers a grammar accepts from beginning to end.
#[track_caller]
fn check(convention: &Convention, lark: &str, accepted: &[&str], refused: &[&str]) {
    let grammar = matcher(lark);
    let accepts = |answer: &str| {
        let ids = ids(convention, answer);
        let mut matcher = grammar.deep_clone();
        matcher.try_consume_tokens(&ids).unwrap() == ids.len() && matcher.is_accepting().unwrap()
    };
    let all = |frames: &[&str]| frames.iter().flat_map(|frame| answers(convention.format, frame)).collect::<Vec<_>>();
    for answer in all(accepted) {
        assert!(accepts(&answer), "{convention:?}: {answer:?} is refused by\n{lark}");
    }
    for answer in all(refused) {
        assert!(!accepts(&answer), "{convention:?}: {answer:?} is accepted by\n{lark}");
    }
}

#[test]
fn calls_that_must_be_made_are_the_whole_answer() {
    let check = |format, several, accepted: &[&str], refused: &[&str]| {
        check(&convention((format, None)), &calls(format, &tools(), several), accepted, refused);
    };
    check(Format::Llama, false, &["F", "G"], &["", "x", "W", "F; G"]);
    check(Format::Llama, true, &["F", "F; G"], &["F; ", "F; W"]);
    check(Format::Mistral, false, &["[F]"], &["F", "[]", "[W]", "[F, G]"]);
    check(Format::Mistral, true, &["[F]", "[F, G]"], &["[F, W]"]);
    check(Format::Json, false, &["F"], &["[F]", "W"]);
    check(Format::Json, true, &["F", "[F]", "[F, G]"], &["[F, W]"]);
    check(Format::Hermes, false, &["¤F"], &["F", "x", "¤W", "¤F\n¤G"]);
    let [eight, nine] = [8, 9].map(|n| vec!["¤F"; n].join("\n"));
    check(Format::Hermes, true, &["¤F\n¤G", &eight], &["¤F\n¤W", &nine]);
}

#[test]
fn text_is_free_and_calls_are_held_to_schemas() {
    let free =
        ["", " ", "Hi!", " \n\n It is {\"a\": [1]}.\n", "grün \0 \u{1f600}", "</tool_call> <tool_cal [TOOL_CALLS"];
    let check = |known: (Format, Option<u32>), one: &[&str], several: &[&str], refused: &[&str]| {
        let convention = convention(known);
        let grammar = |is_several| text_or_calls(&convention, &tools(), is_several);
        check(&convention, &grammar(true), &[&free, one, several].concat(), refused);
        check(&convention, &grammar(false), &[&free, one].concat(), &[several, refused].concat());
    };
    for mark in [None, Some(MARK)] {
        let refused = ["¤", "¤x", "¤F", "¤[]", "¤[W]", "Hi ¤[W]", "¤[F, W]", "¤[F] ", "¤¤[F]"];
        check((Format::Mistral, mark), &["¤[F]", "Hi ¤[F]", "[F]"], &["¤[F, G]", "Hi\n¤[F, G]"], &refused);
        let refused = ["¤", "¤x", "¤W", "Hi ¤W", "¤F\n¤W", "¤F\n", "¤F Hi", "¤¤F", "¤¤"];
        check((Format::Hermes, mark), &["¤F", "Hi\n\n¤F", "F", "W"], &["¤F\n¤G", "Hi ¤F\n¤G"], &refused);
        let refused = ["¤", "¤x", "¤W", "Hi ¤W", "F; W", "F ", "¤¤F", "W", " W", "{", "\n{}", " {x"];
        check((Format::Llama, mark), &["F", " F", "¤F", "Hi ¤F", "[W"], &["F; G", "Hi ¤F; G"], &refused);
    }
    check((Format::Json, None), &["F", " F"], &[], &["W", " W", "{", "[", " [1]", "[F]", "F ", "F; G"]);
}

/// An answer as a model may write it that goes for words like these, and takes what it may where it may not go on.
fn random_answer(matcher: &mut Matcher, convention: &Convention, random: &mut ChaCha8Rng) -> Vec<u32> {
    let frames = ["F", "G", "W", "¤", "¤", "\n", "; ", ", ", "[", "]", " ", "Hi", "{\"", "<tool_", "}", "ü"];
    let mut answer = Vec::new();
    while !matcher.is_stopped() && (answer.len() < 300 || !matcher.is_accepting().unwrap()) {
        let words = answers(convention.format, frames[random.random_range(0..frames.len())]);
        for id in ids(convention, &words[random.random_range(0..words.len())]) {
            let n_taken = matcher.try_consume_tokens(&[id]).unwrap();
            answer.extend([id].iter().take(n_taken));
        }
        if random.random_ratio(1, 8) && !matcher.is_stopped() {
            let allowed = matcher.compute_mask().unwrap();
            let allowed: Vec<u32> = (0..=MARK).filter(|id| allowed.is_allowed(*id)).collect();
            if !allowed.is_empty() {
                let id = allowed[random.random_range(0..allowed.len())];
                matcher.consume_token(id).unwrap();
                answer.push(id);
            }
        }
    }
    answer
}

/// Calls as a reader finds them: name and arguments.
fn read(convention: &Convention, answer: &[u32], single: bool) -> Vec<(String, String)> {
    let names = Arc::new(["f", "g", "h"].map(str::to_owned).into());
    let mut reader = Reader::new(Rules { convention: convention.clone(), names, single, forced: false });
    let mut calls = Vec::new();
    let mut take = |read: crate::tools::reader::Read| {
        for piece in read.calls {
            if !piece.name.is_empty() {
                calls.push((piece.name, String::new()));
            }
            calls[piece.index as usize].1 += &piece.arguments_json;
        }
    };
    for (index, text) in answer.split(|&id| id == MARK).enumerate() {
        if index > 0 {
            take(reader.mark());
        }
        let bytes = text.iter().map(|&id| u8::try_from(id).unwrap()).collect();
        take(reader.push(&String::from_utf8(bytes).unwrap()));
    }
    take(reader.end());
    calls
}

#[test]
fn no_reader_finds_a_call_that_no_tool_takes() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for known in CONVENTIONS {
        let convention = convention(known);
        let mut n_calls = 0;
        for several in [false, true] {
            let grammar = matcher(&text_or_calls(&convention, &tools(), several));
            for _ in 0..200 {
                let answer = random_answer(&mut grammar.deep_clone(), &convention, &mut random);
                for (name, arguments) in read(&convention, &answer, !several) {
                    let takes = match name.as_str() {
                        "f" => (0..=9).any(|digit| arguments == format!(r#"{{"a": {digit}}}"#)),
                        "g" => arguments == "{}",
                        _ => false,
                    };
                    let answer: Vec<char> = answer.iter().map(|&id| char::from_u32(id).unwrap()).collect();
                    assert!(takes, "{convention:?}: {name} with {arguments}: {}", String::from_iter(answer));
                    n_calls += 1;
                }
            }
        }
        assert!(n_calls > 50, "{convention:?}: {n_calls} calls");
    }
}

//! A constraint says what the text of an answer must be.
//!
//! Workers hold three kinds of constraints: JSON Schemas, regular expressions and grammars in llguidance's form of Lark.
//! The other kinds of the contract become Lark here. Whether a constraint compiles is the worker's to say, which has the
//! vocabulary; what is checked here is its size, and that it can be rewritten.

use lockstep_proto::{
    v1::{ChoiceList, Constraint, constraint::Kind},
    worker::v1 as worker,
};

use serde_json::Value;

use super::gbnf;
use crate::request::Violations;

/// Longest constraint, as the contract states it. Unit: bytes.
pub(crate) const MAX_BYTES: usize = 65_536;
/// Most texts to choose from, as the contract states it.
pub(crate) const MAX_CHOICES: usize = 1_024;

/// The field that holds the constraint, as violations name it.
pub(super) fn path(wire: &Constraint) -> &'static str {
    match wire.kind {
        None => "sampling.constraint",
        Some(Kind::JsonSchema(_)) => "sampling.constraint.json_schema",
        Some(Kind::Regex(_)) => "sampling.constraint.regex",
        Some(Kind::Lark(_)) => "sampling.constraint.lark",
        Some(Kind::Gbnf(_)) => "sampling.constraint.gbnf",
        Some(Kind::Choices(_)) => "sampling.constraint.choices",
    }
}

/// The constraint as workers take it, noting what is wrong with it.
pub(super) fn read(wire: Option<&Constraint>, violations: &mut Violations) -> Option<worker::Constraint> {
    let wire = wire?;
    match rewrite(wire) {
        Ok(kind) => return Some(worker::Constraint { kind: Some(kind) }),
        Err(message) => violations.invalid(path(wire), message),
    }
    None
}

fn rewrite(wire: &Constraint) -> Result<worker::constraint::Kind, String> {
    use worker::constraint::Kind as Worker;
    match wire.kind.as_ref().ok_or("the constraint is not set")? {
        Kind::JsonSchema(schema) => check_size(schema.len()).map(|()| Worker::JsonSchema(schema.clone())),
        Kind::Regex(regex) => check_size(regex.len()).map(|()| Worker::Regex(regex.clone())),
        Kind::Lark(grammar) => check_size(grammar.len()).map(|()| Worker::Lark(grammar.clone())),
        Kind::Gbnf(grammar) => {
            check_size(grammar.len())?;
            fits(gbnf::to_lark(grammar)?)
        }
        Kind::Choices(choices) => fits(one_of(choices)?),
    }
}

/// Lark may be longer than what it was made of, and workers take as little of it as clients may send.
fn fits(lark: String) -> Result<worker::constraint::Kind, String> {
    match lark.len() {
        0..=MAX_BYTES => Ok(worker::constraint::Kind::Lark(lark)),
        n_bytes => Err(format!("as a Lark grammar it has {n_bytes} bytes, which are over {MAX_BYTES}")),
    }
}

fn check_size(n_bytes: usize) -> Result<(), String> {
    if n_bytes > MAX_BYTES { Err(format!("{n_bytes} bytes are over {MAX_BYTES}")) } else { Ok(()) }
}

/// A schema whose objects have no properties but those that it names, where it says nothing else: it accepts less, and a
/// small model does not make up one property after another. Schemas that combine others (`allOf`) are left as they are,
/// since parts that are closed would exclude each other.
pub(crate) fn closed(mut schema: Value) -> Value {
    if !mentions_all_of(&schema) {
        close(&mut schema);
    }
    schema
}

fn mentions_all_of(schema: &Value) -> bool {
    match schema {
        Value::Object(members) => members.contains_key("allOf") || members.values().any(mentions_all_of),
        Value::Array(items) => items.iter().any(mentions_all_of),
        _ => false,
    }
}

fn close(schema: &mut Value) {
    let Value::Object(members) = schema else { return };
    let is_object = members.contains_key("properties");
    if is_object && ["anyOf", "oneOf", "$ref"].iter().any(|name| members.contains_key(*name)) {
        // The same object is described in two places, as by `allOf`.
        return;
    }
    let says_more = ["additionalProperties", "patternProperties", "unevaluatedProperties"];
    if is_object && !says_more.iter().any(|name| members.contains_key(*name)) {
        members.insert("additionalProperties".into(), Value::Bool(false));
    }
    for name in ["properties", "$defs", "definitions"] {
        if let Some(Value::Object(schemas)) = members.get_mut(name) {
            schemas.values_mut().for_each(close);
        }
    }
    for name in ["anyOf", "oneOf", "prefixItems"] {
        if let Some(Value::Array(schemas)) = members.get_mut(name) {
            schemas.iter_mut().for_each(close);
        }
    }
    if let Some(items) = members.get_mut("items") {
        close(items);
    }
}

/// A grammar of one terminal, whose texts are these: of rules, the longer of two texts would hide the shorter one.
fn one_of(ChoiceList { choices }: &ChoiceList) -> Result<String, String> {
    if !(1..=MAX_CHOICES).contains(&choices.len()) {
        return Err(format!("{} choices are not in [1, {MAX_CHOICES}]", choices.len()));
    }
    if let Some(at) = choices.iter().position(String::is_empty) {
        return Err(format!("choice {at} is empty"));
    }
    check_size(choices.iter().map(String::len).sum())?;
    let texts: Vec<String> = choices.iter().map(|text| lark_string(text)).collect();
    Ok(format!("start: CHOICE\nCHOICE: {}\n", texts.join(" | ")))
}

/// A text as a string of Lark, which is JSON's but for DEL, which must be escaped.
pub(crate) fn lark_string(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read_kind(kind: Kind) -> Result<worker::constraint::Kind, String> {
        let mut violations = Violations::default();
        let read = read(Some(&Constraint { kind: Some(kind) }), &mut violations);
        violations.into_result().map_err(|error| error.to_string())?;
        Ok(read.and_then(|constraint| constraint.kind).expect("nothing is wrong with it"))
    }

    fn choices<const N: usize>(choices: [&str; N]) -> Kind {
        Kind::Choices(ChoiceList { choices: choices.map(str::to_owned).to_vec() })
    }

    #[test]
    fn what_workers_know_is_passed_on_as_it_is() {
        let read = read_kind(Kind::Regex("[0-9]+".into())).unwrap();
        assert_eq!(read, worker::constraint::Kind::Regex("[0-9]+".into()));
    }

    #[test]
    fn objects_are_closed_where_a_schema_says_nothing_else() {
        let open = json!({
            "properties": { "a": { "items": { "properties": {} } }, "b": { "properties": {}, "additionalProperties": true } },
            "$defs": { "c": { "anyOf": [{ "properties": {} }] } },
        });
        let expected = json!({
            "properties": {
                "a": { "items": { "properties": {}, "additionalProperties": false } },
                "b": { "properties": {}, "additionalProperties": true },
            },
            "$defs": { "c": { "anyOf": [{ "properties": {}, "additionalProperties": false }] } },
            "additionalProperties": false,
        });
        assert_eq!(closed(open), expected);
        let both = json!({ "properties": { "a": {} }, "oneOf": [{ "properties": { "b": {} } }] });
        assert_eq!(closed(both.clone()), both);
        let combined = json!({ "allOf": [{ "properties": {} }, { "properties": {} }] });
        assert_eq!(closed(combined.clone()), combined);
    }

    #[test]
    fn choices_are_one_terminal() {
        let read = read_kind(choices(["yes", "a \"b\"\n\u{7f}é"])).unwrap();
        let lark = "start: CHOICE\nCHOICE: \"yes\" | \"a \\\"b\\\"\\n\\u007fé\"\n";
        assert_eq!(read, worker::constraint::Kind::Lark(lark.into()));
    }

    #[test]
    fn what_is_wrong_is_said_of_the_field() {
        let refused = |kind| read_kind(kind).unwrap_err();
        let long = "x".repeat(MAX_BYTES + 1);
        for (kind, name) in [
            (Kind::JsonSchema(long.clone()), "json_schema"),
            (Kind::Regex(long.clone()), "regex"),
            (Kind::Lark(long.clone()), "lark"),
            (Kind::Gbnf(long.clone()), "gbnf"),
            (choices([&long]), "choices"),
        ] {
            assert_eq!(refused(kind), format!("sampling.constraint.{name}: 65537 bytes are over 65536"));
        }
        assert_eq!(refused(choices([])), "sampling.constraint.choices: 0 choices are not in [1, 1024]");
        assert_eq!(refused(choices(["x"; 1025])), "sampling.constraint.choices: 1025 choices are not in [1, 1024]");
        assert_eq!(refused(choices(["x", ""])), "sampling.constraint.choices: choice 1 is empty");
        let grown = refused(choices([&"\n".repeat(40_000)]));
        assert_eq!(grown, "sampling.constraint.choices: as a Lark grammar it has 80025 bytes, which are over 65536");
        let mut violations = Violations::default();
        read(Some(&Constraint { kind: None }), &mut violations);
        let unset = violations.into_result().unwrap_err().to_string();
        assert_eq!(unset, "sampling.constraint: the constraint is not set");
    }
}

//! The functions, filters and methods that `transformers` and Python give to a template, and the engine does not.

use std::{collections::HashSet, fmt::Write};

use chrono::NaiveDateTime;
use minijinja::{
    Environment, Error, ErrorKind, State, Value,
    value::{ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use super::{json, python};

/// What a template raises, apart from what goes wrong in it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Adds everything to an environment but [`strftime`], which depends on the time of the request.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("trim", trim);
    environment.add_filter("string", |value: &Value| text_of(value).unwrap_or_else(|| value.to_string()));
    environment.set_formatter(|output, state, value| match text_of(value) {
        Some(text) => output.write_str(&text).map_err(Error::from),
        None => minijinja::escape_formatter(output, state, value),
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", is_sequence);
    environment.add_test("lower", |state: &State<'_, '_>, text: &str| is_cased(state, text, char::is_uppercase));
    environment.add_test("upper", |state: &State<'_, '_>, text: &str| is_cased(state, text, char::is_lowercase));
    // No template for transformers can use these: it has no `debug`, and `pprint` writes nested values in a space that
    // grows with the square of their depth.
    environment.remove_global("debug");
    environment.remove_filter("pprint");
}

/// `strftime_now(format)` for one request: its time in Python's `strftime` notation.
pub(super) fn strftime(now: NaiveDateTime) -> Value {
    Value::from_function(move |format: &str| {
        let mut text = String::new();
        // chrono fails on what it cannot show, such as the offset of a time without a zone.
        write!(text, "{}", now.format(format)).map_err(|_| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot show the format `{format}`"))
        })?;
        Ok::<_, Error>(text)
    })
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

fn trim(text: &str, characters: Option<&str>) -> String {
    strip_both(text, characters).to_owned()
}

/// A number that Python writes otherwise than the engine: one with a fraction, very large or very small.
fn text_of(value: &Value) -> Option<String> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok()).flatten().map(python::float_str)
}

/// What Python can measure and index: texts and dictionaries too, and Jinja's undefined.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map)
}

/// Whether a text has letters, none of which is `of_other_case`. The engine's own tests take no fuel.
fn is_cased(state: &State<'_, '_>, text: &str, of_other_case: fn(char) -> bool) -> Result<bool, Error> {
    state.consume_fuel(text.len() as u64 / 64)?;
    Ok(text.chars().any(char::is_alphabetic) && !text.chars().any(of_other_case))
}

/// Python's methods: ours where white space decides, the engine's for the rest.
fn method(state: &mut State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    // The engine takes no fuel for the items that `count` visits, nor for the padding that `format` writes.
    if method == "count" {
        state.consume_fuel(value.len().unwrap_or(0) as u64)?;
    }
    if method == "format" && value.as_str().is_some_and(asks_for_wide_padding) {
        return Err(Error::new(ErrorKind::InvalidOperation, "the width of a format has more than four digits"));
    }
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str())
        && matches!(method, "strip" | "lstrip" | "rstrip")
    {
        let (characters,): (Option<&str>,) = from_args(args)?;
        return Ok(Value::from(match method {
            "lstrip" => strip_start(text, characters),
            "rstrip" => strip_end(text, characters),
            _ => strip_both(text, characters),
        }));
    }
    pycompat::unknown_method_callback(state, value, method, args)
}

fn asks_for_wide_padding(format: &str) -> bool {
    format.split(|character: char| !character.is_ascii_digit()).any(|digits| digits.len() > 4)
}

fn strip_both<'a>(text: &'a str, characters: Option<&str>) -> &'a str {
    strip_start(strip_end(text, characters), characters)
}

fn strip_start<'a>(text: &'a str, characters: Option<&str>) -> &'a str {
    match characters {
        Some(characters) => {
            let characters = set(characters);
            text.trim_start_matches(|character| characters.contains(&character))
        }
        None => python::lstrip(text),
    }
}

fn strip_end<'a>(text: &'a str, characters: Option<&str>) -> &'a str {
    match characters {
        Some(characters) => {
            let characters = set(characters);
            text.trim_end_matches(|character| characters.contains(&character))
        }
        None => python::rstrip(text),
    }
}

/// Both texts may be long, so neither is searched for each character of the other.
fn set(characters: &str) -> HashSet<char> {
    characters.chars().collect()
}

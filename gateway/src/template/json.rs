//! `tojson` is `json.dumps`, as `transformers` gives it to templates: no escapes for HTML, characters as they are.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, Rest, ValueKind},
};

use super::python;

/// Deepest nesting that is written. What requests hold is at most 128 deep; a template could nest without end.
const MAX_DEPTH: usize = 192;

/// The filter: `x | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(
    state: &State<'_, '_>,
    value: &Value,
    positional: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let option = |index: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = match positional.get(index) {
            Some(value) => Some(value.clone()),
            None => named.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|value| !value.is_none()))
    };
    let ensure_ascii = option(0, "ensure_ascii")?.is_some_and(|flag| flag.is_true());
    let indent = option(1, "indent")?.map(indent_unit).transpose()?;
    let (item_separator, key_separator) = separators(option(2, "separators")?, indent.is_some())?;
    let sort_keys = option(3, "sort_keys")?.is_some_and(|flag| flag.is_true());
    named.assert_all_used()?;
    let mut writer = Writer {
        state,
        text: String::new(),
        n_paid: 0,
        ensure_ascii,
        indent,
        item_separator,
        key_separator,
        sort_keys,
    };
    writer.value(value, 0)?;
    Ok(writer.text)
}

/// One level of indentation: a string, or a number of spaces.
fn indent_unit(indent: Value) -> Result<String, Error> {
    /// Widest indentation; a template that asks for more wants memory, not JSON.
    const MAX_INDENT: i64 = 64;
    if let Some(unit) = indent.as_str() {
        return Ok(unit.chars().take(MAX_INDENT as usize).collect());
    }
    let width = if let Ok(flag) = bool::try_from(indent.clone()) { i64::from(flag) } else { i64::try_from(indent)? };
    Ok(" ".repeat(width.clamp(0, MAX_INDENT) as usize))
}

fn separators(given: Option<Value>, is_indented: bool) -> Result<(String, String), Error> {
    let Some(given) = given else {
        let item = if is_indented { "," } else { ", " };
        return Ok((item.into(), ": ".into()));
    };
    let part = |index| {
        let part = given.get_item_by_index(index)?;
        let wrong = || Error::new(ErrorKind::InvalidOperation, "separators of tojson are two strings");
        part.as_str().map(str::to_owned).ok_or_else(wrong)
    };
    Ok((part(0)?, part(1)?))
}

struct Writer<'a> {
    state: &'a State<'a, 'a>,
    text: String,
    /// Bytes of `text` that fuel has been taken for.
    n_paid: usize,
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

// === impl Writer ===

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson of a value that is nested too deeply"));
        }
        self.pay()?;
        match value.kind() {
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.text.push_str(&scalar(value)),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            other => {
                let message = format!("{other} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn list(&mut self, list: &Value, depth: usize) -> Result<(), Error> {
        self.text.push('[');
        let mut is_empty = true;
        for item in list.try_iter()? {
            self.separate(is_empty, depth);
            self.value(&item, depth + 1)?;
            is_empty = false;
        }
        self.close(']', is_empty, depth);
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = map.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        self.text.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.separate(index == 0, depth);
            match key.as_str() {
                Some(text) => self.string(text),
                None => self.string(&scalar(key)),
            }
            self.text.push_str(&self.key_separator);
            self.value(&map.get_item(key)?, depth + 1)?;
        }
        self.close('}', keys.is_empty(), depth);
        Ok(())
    }

    fn separate(&mut self, is_first: bool, depth: usize) {
        if !is_first {
            self.text.push_str(&self.item_separator);
        }
        self.new_line(depth + 1);
    }

    fn close(&mut self, bracket: char, is_empty: bool, depth: usize) {
        if !is_empty {
            self.new_line(depth);
        }
        self.text.push(bracket);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(unit) = &self.indent {
            self.text.push('\n');
            for _ in 0..depth {
                self.text.push_str(unit);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                '\0'..='\u{1f}' => self.escape(character),
                ' '..='~' => self.text.push(character),
                _ if self.ensure_ascii => self.escape(character),
                _ => self.text.push(character),
            }
        }
        self.text.push('"');
    }

    /// Writes `\uXXXX`, twice for a character outside the basic plane.
    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            self.text.push_str(&format!("\\u{unit:04x}"));
        }
    }

    /// Takes fuel for what was written since the last call, so that output stays within the template's bound while it
    /// grows.
    fn pay(&mut self) -> Result<(), Error> {
        let n_new = self.text.len() - self.n_paid;
        self.n_paid = self.text.len();
        self.state.consume_fuel(1 + n_new as u64 / 64)
    }
}

/// A number, a truth value or none, in JSON. As a key each becomes a string, as `json.dumps` does.
fn scalar(value: &Value) -> String {
    if value.is_none() {
        return "null".into();
    }
    if let Ok(flag) = bool::try_from(value.clone())
        && value.kind() == ValueKind::Bool
    {
        return flag.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => python::float_json(float),
        _ => value.to_string(),
    }
}

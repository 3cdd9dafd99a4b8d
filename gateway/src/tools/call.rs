//! A call while it is being written: a JSON object with a name and arguments, read character by character, so that the
//! arguments can be passed on as they come.

use serde_json::{Map, Value};

/// Deepest nesting: what serde_json reads.
const MAX_DEPTH: u32 = 127;

/// An object that is read as it comes. Its members may stand in any order.
#[derive(Debug, Default)]
pub struct Scanner {
    /// Brackets that are open.
    depth: u32,
    /// Whether a string is open, and whether its next character is escaped.
    in_string: bool,
    escaped: bool,
    /// The member that is being read, so far; not that of arguments that are an object.
    member: String,
    in_arguments: bool,
    closed: bool,
    name: Option<String>,
    /// What is known of the arguments and was not taken yet; `None`: they have not begun.
    arguments: Option<String>,
}

/// Text that is no call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoCall;

// === impl Scanner ===

impl Scanner {
    /// Reads one character.
    ///
    /// # Errors
    /// When the text is no object, or one that is no call.
    pub fn read(&mut self, c: char) -> Result<(), NoCall> {
        if self.closed {
            return Err(NoCall);
        }
        if self.depth == 0 {
            self.depth = u32::from(c == '{');
            return if c == '{' { Ok(()) } else { Err(NoCall) };
        }
        let structural = !self.in_string;
        let quote = c == '"' && !self.escaped;
        self.escaped = self.in_string && !self.escaped && c == '\\';
        self.in_string ^= quote;
        match c {
            '{' | '[' if structural => self.open(c)?,
            '}' | ']' if structural => self.depth -= 1,
            _ => {}
        }
        if self.in_arguments {
            self.arguments.get_or_insert_default().push(c);
            self.in_arguments = self.depth > 1;
            return Ok(());
        }
        if structural && (self.depth == 0 || (self.depth == 1 && c == ',')) {
            return self.end_member(c);
        }
        self.member.push(c);
        Ok(())
    }

    /// Whether the object is complete.
    pub fn closed(&self) -> bool {
        self.closed
    }

    /// The tool's name, once it is known and the arguments have begun: from there on it is a call.
    pub fn called(&self) -> Option<&str> {
        self.name.as_deref().filter(|_| self.arguments.is_some())
    }

    /// Takes what is known of the arguments.
    pub fn take_arguments(&mut self) -> String {
        self.arguments.as_mut().map(std::mem::take).unwrap_or_default()
    }

    fn open(&mut self, c: char) -> Result<(), NoCall> {
        if self.depth == 1 {
            let key = self.member.trim().strip_suffix(':').ok_or(NoCall)?;
            let key: String = serde_json::from_str(key).map_err(|_| NoCall)?;
            if c != '{' || !is_arguments(&key) || self.arguments.is_some() {
                return Err(NoCall);
            }
            self.member.clear();
            self.in_arguments = true;
        }
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(NoCall) } else { Ok(()) }
    }

    /// A member has ended, and the object too unless `c` is a comma.
    fn end_member(&mut self, c: char) -> Result<(), NoCall> {
        let member = std::mem::take(&mut self.member);
        let members: Map<String, Value> = serde_json::from_str(&format!("{{{member}}}")).map_err(|_| NoCall)?;
        for (key, value) in members {
            match value {
                Value::String(name) if key == "name" => self.name = Some(name),
                // Some models write the object as a string.
                Value::String(object) if is_arguments(&key) && self.arguments.is_none() => {
                    serde_json::from_str::<Map<String, Value>>(&object).map_err(|_| NoCall)?;
                    self.arguments = Some(object);
                }
                Value::Null if is_arguments(&key) => {}
                _ if key == "id" || key == "type" => {}
                _ => return Err(NoCall),
            }
        }
        if c == ',' {
            return Ok(());
        }
        self.closed = c == '}' && self.name.is_some();
        self.arguments.get_or_insert_with(|| "{}".to_owned());
        if self.closed { Ok(()) } else { Err(NoCall) }
    }
}

fn is_arguments(key: &str) -> bool {
    key == "arguments" || key == "parameters"
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name and arguments of a call, and how much of the arguments was there before the object's end.
    fn read(text: &str) -> Result<(String, String, usize), NoCall> {
        let mut scanner = Scanner::default();
        let mut arguments = String::new();
        let mut early = 0;
        for c in text.chars() {
            early = arguments.len();
            scanner.read(c)?;
            if scanner.called().is_some() {
                arguments += &scanner.take_arguments();
            }
        }
        if !scanner.closed() {
            return Err(NoCall);
        }
        Ok((scanner.called().unwrap().to_owned(), arguments, early))
    }

    #[test]
    fn members_stand_in_any_order_and_arguments_come_early() {
        let call = |name: &str, arguments: &str, early| Ok((name.to_owned(), arguments.to_owned(), early));
        assert_eq!(read(r#"{"name": "f", "arguments": {"a": [1, "}"]}}"#), call("f", r#"{"a": [1, "}"]}"#, 15));
        assert_eq!(read(r#"{"parameters":{"a":"\"{"} , "name":"g"}"#), call("g", r#"{"a":"\"{"}"#, 0));
        assert_eq!(read(r#"{"type": "function", "name": "f", "id": 3}"#), call("f", "{}", 0));
        assert_eq!(read(r#"{"name": "f", "arguments": null}"#), call("f", "{}", 0));
        assert_eq!(read(r#"{"name": "f", "arguments": "{\"a\": 1}"}"#), call("f", r#"{"a": 1}"#, 0));
        assert_eq!(read(r#"{"name": "ü\\", "arguments": {}}"#), call("ü\\", "{}", 2));
    }

    #[test]
    fn other_text_is_no_call() {
        for text in [
            "",
            "x",
            "[]",
            "{}",
            r#"{"a": 1}"#,
            r#"{"name": 1}"#,
            r#"{"arguments": {}}"#,
            r#"{"name": "f", "arguments": [1]}"#,
            r#"{"name": "f", "arguments": "x"}"#,
            r#"{"name": "f", "arguments": {}, "arguments": {}}"#,
            r#"{"name": "f", "arguments": {} x}"#,
            r#"{"name": "f"]"#,
            r#"{"name": "f""#,
            r#"{"name": "f"} "#,
            r#"{{"name": "f"}}"#,
        ] {
            assert_eq!(read(text), Err(NoCall), "{text}");
        }
        assert_eq!(read(&format!(r#"{{"name": "f", "arguments": {}"#, r#"{"a":"#.repeat(200))), Err(NoCall));
    }
}

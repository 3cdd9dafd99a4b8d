//! What the text of an answer must be, in OpenAI's words (`response_format`) or vLLM's (`structured_outputs`).

use lockstep_proto::v1::{ChoiceList, Constraint, constraint::Kind};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{json::Unsupported, request::RequestError, sampling::closed};

/// `response_format`.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum ResponseFormat {
    Text {},
    JsonObject {},
    JsonSchema { json_schema: NamedSchema },
}

/// A schema, which is always held to: nothing is looser for `strict` being false.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NamedSchema {
    #[serde(rename = "name")]
    _name: Option<String>,
    #[serde(rename = "description")]
    _description: Option<String>,
    schema: Option<Value>,
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

// === impl NamedSchema ===

impl NamedSchema {
    /// A schema without a name.
    pub(super) fn of(schema: Option<Value>) -> Self {
        Self { _name: None, _description: None, schema, _strict: None }
    }
}

/// `structured_outputs`: one of these.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StructuredOutputs {
    json: Option<Value>,
    json_object: Option<bool>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    #[serde(rename = "structural_tag")]
    _structural_tag: Option<Unsupported>,
}

/// The constraint of a request, if there is one.
///
/// # Errors
/// Several of them.
pub(super) fn read(
    format: Option<ResponseFormat>,
    outputs: Option<StructuredOutputs>,
) -> Result<Option<Constraint>, RequestError> {
    let format = match format {
        None | Some(ResponseFormat::Text {}) => None,
        Some(ResponseFormat::JsonObject {}) => Some(any_object()),
        Some(ResponseFormat::JsonSchema { json_schema }) => Some(schema(json_schema.schema)),
    };
    let kind = match (format, outputs.map(StructuredOutputs::into_kind).transpose()?.flatten()) {
        (Some(_), Some(_)) => {
            return Err(RequestError::invalid("structured_outputs", "`response_format` is a constraint already"));
        }
        (format, outputs) => format.or(outputs),
    };
    Ok(kind.map(|kind| Constraint { kind: Some(kind) }))
}

fn any_object() -> Kind {
    Kind::JsonSchema(r#"{"type":"object"}"#.into())
}

fn schema(schema: Option<Value>) -> Kind {
    Kind::JsonSchema(closed(schema.unwrap_or(Value::Object(Map::new()))).to_string())
}

// === impl StructuredOutputs ===

impl StructuredOutputs {
    fn into_kind(self) -> Result<Option<Kind>, RequestError> {
        // vLLM takes both forms under one name; only GBNF has `::=`.
        let grammar = |text: String| if text.contains("::=") { Kind::Gbnf(text) } else { Kind::Lark(text) };
        let json = self.json.map(|json| match json {
            Value::String(text) => Kind::JsonSchema(text),
            json => schema(Some(json)),
        });
        let kinds = [
            json,
            self.json_object.filter(|&wanted| wanted).map(|_| any_object()),
            self.regex.map(Kind::Regex),
            self.choice.map(|choices| Kind::Choices(ChoiceList { choices })),
            self.grammar.map(grammar),
        ];
        let mut kinds = kinds.into_iter().flatten();
        let kind = kinds.next();
        match kinds.next() {
            None => Ok(kind),
            Some(_) => Err(RequestError::invalid("structured_outputs", "it has several constraints; one can be held")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn kind(format: &str, outputs: &str) -> Result<Option<Kind>, String> {
        let format = parse(format.as_bytes()).map_err(|error| error.to_string())?;
        let outputs = parse(outputs.as_bytes()).map_err(|error| error.to_string())?;
        let constraint = read(format, outputs).map_err(|error| error.to_string())?;
        Ok(constraint.and_then(|constraint| constraint.kind))
    }

    #[test]
    fn both_ways_to_say_it_are_read() {
        assert_eq!(kind("null", "null"), Ok(None));
        assert_eq!(kind(r#"{"type": "text"}"#, "{}"), Ok(None));
        assert_eq!(kind(r#"{"type": "json_object"}"#, "null"), Ok(Some(any_object())));
        let schema =
            r#"{"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": {"type": "null"}}}"#;
        assert_eq!(kind(schema, "null"), Ok(Some(Kind::JsonSchema(r#"{"type":"null"}"#.into()))));
        assert_eq!(kind("null", r#"{"regex": "a+"}"#), Ok(Some(Kind::Regex("a+".into()))));
        assert_eq!(kind("null", r#"{"grammar": "root ::= \"a\""}"#), Ok(Some(Kind::Gbnf("root ::= \"a\"".into()))));
        assert_eq!(kind("null", r#"{"grammar": "start: \"a\""}"#), Ok(Some(Kind::Lark("start: \"a\"".into()))));
        let choices = ChoiceList { choices: vec!["a".into(), "b".into()] };
        assert_eq!(kind("null", r#"{"choice": ["a", "b"]}"#), Ok(Some(Kind::Choices(choices))));
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(kind(r#"{"type": "json_object"}"#, r#"{"regex": "a"}"#).unwrap_err().starts_with("structured_outputs"));
        assert!(kind("null", r#"{"regex": "a", "choice": ["a"]}"#).unwrap_err().starts_with("structured_outputs"));
        assert!(kind(r#"{"type": "json_object", "schema": {}}"#, "null").unwrap_err().contains("schema"));
        assert!(kind(r#"{"type": "grammar"}"#, "null").unwrap_err().contains("unknown variant"));
    }
}

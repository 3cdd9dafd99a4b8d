//! What the text of an answer must be, in OpenAI's words (`response_format`) or vLLM's (`structured_outputs`).

use lockstep_proto::v1::{ChoiceList, Constraint, constraint::Kind};
use schemars::{JsonSchema, Schema};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    json::{Object, Unsupported},
    openapi::rules::{either, off, unset, where_set},
    request::RequestError,
    sampling::{
        closed,
        constraint::{MAX_BYTES, MAX_CHOICES},
    },
};

/// What an answer must be: any text, a JSON object, or JSON that a schema accepts.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum ResponseFormat {
    Text {},
    JsonObject {},
    JsonSchema { json_schema: Object<NamedSchema> },
}

/// A schema, which is always held to: nothing is looser for `strict` being false.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NamedSchema {
    /// For the client's own use.
    #[serde(rename = "name")]
    _name: Option<String>,
    /// For the client's own use.
    #[serde(rename = "description")]
    _description: Option<String>,
    /// The JSON Schema. Default: one that accepts everything.
    #[schemars(transform = json_schema_or_null)]
    schema: Option<Value>,
    /// Taken, and changes nothing.
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

/// What an answer must be: at most one of these.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = at_most_one)]
pub(super) struct StructuredOutputs {
    /// JSON that this JSON Schema accepts, which may also be the text of one.
    #[schemars(extend("type" = ["object", "boolean", "string", "null"]))]
    json: Option<Value>,
    /// A JSON object.
    json_object: Option<bool>,
    /// Matched as a whole by this regular expression.
    #[schemars(length(min = 1, max = MAX_BYTES), extend("format" = "regex"))]
    regex: Option<String>,
    /// One of these texts.
    #[schemars(length(min = 1, max = MAX_CHOICES), inner(length(min = 1)))]
    choice: Option<Vec<String>>,
    /// Derived by this grammar, in the form of llama.cpp (GBNF) or of llguidance (Lark).
    #[schemars(length(max = MAX_BYTES))]
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
        Some(ResponseFormat::JsonSchema { json_schema: Object(named) }) => Some(schema(named.schema)),
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

/// The schema of a field that holds a JSON Schema.
pub(super) fn json_schema_or_null(schema: &mut Schema) {
    schema.insert("type".into(), json!(["object", "boolean", "null"]));
}

/// The schema of `structured_outputs`: all of its constraints but one are left out or null.
fn at_most_one(outputs: &mut Schema) {
    let without_others =
        |kept| where_set(no_outputs().map(|(name, unset)| (name, if name == kept { json!({}) } else { unset })));
    either(outputs, no_outputs().map(|(name, _)| without_others(name)));
}

/// The constraints of `structured_outputs`, and the schemas of their absence.
pub(super) fn no_outputs() -> [(&'static str, Value); 5] {
    [("json", unset()), ("json_object", off()), ("regex", unset()), ("choice", unset()), ("grammar", unset())]
}

/// The rule that there is one constraint at most.
pub(super) fn one_constraint(request: &mut Schema) {
    let no_outputs = ("structured_outputs", where_set(no_outputs()));
    either(request, [where_set([("response_format", any_text())]), where_set([no_outputs])]);
}

/// The schema of a format that is no constraint.
pub(super) fn any_text() -> Value {
    where_set([("type", json!({ "const": "text" }))])
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

//! A rule is what a schema says about several fields of a request together, so that its document is as strict as we are.

use schemars::Schema;
use serde_json::{Map, Value, json};

/// Adds a rule: one of these schemas must fit.
pub(crate) fn either<const N: usize>(schema: &mut Schema, forms: [Value; N]) {
    let rules = schema.ensure_object().entry("allOf").or_insert_with(|| json!([]));
    if let Value::Array(rules) = rules {
        rules.push(json!({ "anyOf": forms.to_vec() }));
    }
}

/// A schema of objects in which these fields, where they are set, fit these schemas.
pub(crate) fn where_set<const N: usize>(fields: [(&str, Value); N]) -> Value {
    json!({ "properties": fields.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect::<Map<_, _>>() })
}

/// A schema of objects in which a field is set, and fits a schema.
pub(crate) fn set(field: &str, schema: Value) -> Value {
    json!({ "properties": { field: schema }, "required": [field] })
}

/// The schema of what is not set.
pub(crate) fn unset() -> Value {
    json!({ "type": "null" })
}

/// The schema of a flag that is not set.
pub(crate) fn off() -> Value {
    json!({ "enum": [false, null] })
}

/// Puts into the schema of a flag that it may not be set.
pub(crate) fn never(flag: &mut Schema) {
    flag.insert("enum".into(), json!([false, null]));
}

use std::collections::BTreeSet;

use serde_json::Value;

use super::*;
use crate::app::apis;

/// The document as it is served, where callers must show keys.
fn document() -> Value {
    serde_json::from_str(&document::of(&apis(), true).to_string()).unwrap()
}

fn object(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

/// Calls `see` with every object of a document, and where it is.
fn walk<'a>(value: &'a Value, path: &str, see: &mut impl FnMut(&'a Value, &str)) {
    see(value, path);
    for (name, value) in object(value) {
        walk(value, &format!("{path}/{}", name.replace('/', "~1")), see);
    }
    for (index, value) in value.as_array().into_iter().flatten().enumerate() {
        walk(value, &format!("{path}/{index}"), see);
    }
}

#[test]
fn what_is_routed_is_described_and_nothing_else() {
    let document = document();
    let described = object(&document["paths"])
        .flat_map(|(path, methods)| object(methods).map(move |(method, _)| format!("{method} {path}")));
    let routes = apis().into_iter().flat_map(|api| api.routes);
    let mut routed: BTreeSet<_> = routes.map(|route| format!("{} {}", route.method, route.path)).collect();
    routed.insert(format!("get {PATH}"));
    assert_eq!(described.map(|route| route.replace("{name}", "{*name}")).collect::<BTreeSet<_>>(), routed);
}

#[test]
fn every_reference_leads_to_a_schema_and_to_every_schema_leads_one() {
    let document = document();
    let mut references = BTreeSet::new();
    walk(&document, "", &mut |value, path| {
        if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
            let target = document.pointer(reference.trim_start_matches('#'));
            assert!(target.is_some_and(Value::is_object), "{path}: {reference}");
            references.insert(reference.to_owned());
        }
    });
    let schemas = object(&document["components"]["schemas"]);
    let schemas: BTreeSet<_> = schemas.map(|(name, _)| format!("#/components/schemas/{name}")).collect();
    assert_eq!(references, schemas);
    let counted = schemas.iter().find(|name| name.ends_with(|c: char| c.is_ascii_digit()));
    assert_eq!(counted, None, "two types have the same name");
}

#[test]
fn operations_and_the_fields_of_requests_are_explained() {
    let document = document();
    walk(&document["paths"], "", &mut |value, path| {
        let is_operation = value.get("responses").is_some();
        let is_parameter = value.get("in").is_some();
        if is_operation || is_parameter {
            assert!(value["description"].as_str().is_some_and(|text| text.ends_with('.')), "{path}: {value}");
        }
    });
    let mut requests = BTreeSet::new();
    for (_, operation) in object(&document["paths"]).flat_map(|(_, methods)| object(methods)) {
        add_schemas(&document, &operation["requestBody"], &mut requests);
    }
    assert!(requests.len() > 20, "{requests:?}");
    for name in requests {
        let schema = &document["components"]["schemas"][&name];
        walk(schema, &name, &mut |value, path| {
            // Rules speak of fields that are explained elsewhere.
            if path.contains("allOf") {
                return;
            }
            let is_tag = |field: &Value| field.get("const").is_some();
            for (field, schema) in object(&value["properties"]).filter(|(_, schema)| !is_tag(schema)) {
                let of_type = schema["$ref"].as_str().and_then(|reference| document.pointer(&reference[1..]));
                let explained = [Some(schema), of_type].into_iter().flatten().any(|at| at.get("description").is_some());
                assert!(explained, "{path}: {field} is not explained: {schema}");
            }
            if value.get("properties").is_some() {
                assert_eq!(value["additionalProperties"], false, "{path} refuses what it does not know");
            }
        });
    }
}

/// Adds the names of the schemas that a value is made of.
fn add_schemas(document: &Value, value: &Value, names: &mut BTreeSet<String>) {
    let mut found = Vec::new();
    walk(value, "", &mut |value, _| {
        let reference = value.get("$ref").and_then(Value::as_str);
        found.extend(reference.and_then(|reference| reference.strip_prefix("#/components/schemas/")));
    });
    for name in found {
        if names.insert(name.to_owned()) {
            add_schemas(document, &document["components"]["schemas"][name], names);
        }
    }
}

#[test]
fn a_key_is_asked_for_where_there_are_keys() {
    let (keyed, open) = (document::of(&apis(), true), document::of(&apis(), false));
    let security =
        |document: &Value, path: &str, method: &str| document["paths"][path][method].get("security").cloned();
    assert!(security(&keyed, "/v1/models", "get").is_some());
    assert!(security(&keyed, "/health", "get").is_none());
    assert!(security(&open, "/v1/models", "get").is_none());
    assert!(open["components"].get("securitySchemes").is_none());
}

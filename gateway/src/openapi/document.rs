//! How the document is put together.

use std::collections::BTreeMap;

use lockstep_proto::error::Reason;
use schemars::{Schema, SchemaGenerator, generate::SchemaSettings, json_schema, transform::RecursiveTransform};
use serde_json::{Map, Value, json};

use super::{Answer, Api, Operation, PATH, Route};

/// Schemas of what is read and of what is written: the same type may look different from both sides.
struct Schemas {
    read: SchemaGenerator,
    written: SchemaGenerator,
}

/// The document that describes these fronts.
pub(super) fn of(apis: &[Api], keyed: bool) -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    paths.insert(PATH.to_owned(), json!({ "get": itself() }));
    for api in apis {
        for route in &api.routes {
            let operation = operation(api, route, keyed, &mut schemas);
            let path = paths.entry(template(route.path)).or_insert_with(|| Value::Object(Map::new()));
            path[route.method] = operation;
        }
    }
    let tag = |api: &Api| json!({ "name": api.name, "description": api.description });
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Lockstep",
            "description": env!("CARGO_PKG_DESCRIPTION"),
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": env!("CARGO_PKG_LICENSE"), "identifier": env!("CARGO_PKG_LICENSE") },
        },
        "tags": apis.iter().map(tag).collect::<Vec<_>>(),
        "paths": paths,
        "components": { "schemas": schemas.into_components() },
    });
    if keyed {
        let key = json!({ "type": "http", "scheme": "bearer", "description": "One of the gateway's `api_keys`." });
        document["components"]["securitySchemes"] = json!({ "key": key });
    }
    document
}

/// The route of the document itself, which no front has.
fn itself() -> Value {
    json!({
        "operationId": "openapi",
        "description": "This document.",
        "responses": {
            "200": { "description": "The document.", "content": { "application/json": { "schema": { "type": "object" } } } },
        },
    })
}

/// A path in the words of the document, where a part that varies may not have slashes.
fn template(path: &str) -> String {
    path.replace("{*", "{")
}

fn operation(api: &Api, route: &Route, keyed: bool, schemas: &mut Schemas) -> Value {
    let Route { path, method, operation, .. } = route;
    let mut object = json!({
        "operationId": format!("{method}{}", path.replace(|c: char| !c.is_ascii_alphanumeric(), "_")),
        "tags": [api.name],
        "description": operation.description,
    });
    if let Some((name, description)) = operation.parameter {
        let schema = json!({ "type": "string", "minLength": 1 });
        let parameter =
            json!({ "name": name, "in": "path", "required": true, "description": description, "schema": schema });
        object["parameters"] = json!([parameter]);
    }
    if let Some(schema) = operation.request {
        let content = json!({ "application/json": { "schema": schema(&mut schemas.read) } });
        object["requestBody"] = json!({ "required": true, "content": content });
    }
    object["responses"] = responses(api, operation, schemas);
    if operation.needs_key && keyed {
        object["security"] = json!([{ "key": [] }]);
    }
    object
}

fn responses(api: &Api, operation: &Operation, schemas: &mut Schemas) -> Value {
    let error = (api.error)(&mut schemas.written);
    let mut content = Map::new();
    for answer in &operation.answers {
        let (media_type, schema) = match answer {
            Answer::Json(schema) => ("application/json", schema(&mut schemas.written)),
            Answer::Page => ("text/html", json_schema!({ "type": "string" })),
            Answer::Events(schema, end) => {
                let schema = schema(&mut schemas.written);
                ("text/event-stream", event(&schema, &error, *end))
            }
        };
        content.insert(media_type.to_owned(), json!({ "schema": schema }));
    }
    let mut success = json!({ "description": "The answer." });
    if !content.is_empty() {
        success["content"] = content.into();
    }
    let mut responses = Map::from_iter([("200".to_owned(), success)]);
    let mut by_status: BTreeMap<u16, Vec<Reason>> = BTreeMap::new();
    for &reason in &operation.reasons {
        by_status.entry((api.status)(reason).as_u16()).or_default().push(reason);
    }
    for (status, reasons) in by_status {
        responses.insert(status.to_string(), refusal(&reasons, &error));
    }
    responses.into()
}

/// The schema of each event of a stream.
fn event(object: &Schema, error: &Schema, end: Option<&str>) -> Schema {
    let json = json!({
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": { "anyOf": [object, error] },
    });
    let data = match end {
        Some(end) => json!({ "anyOf": [{ "const": end }, json] }),
        None => json,
    };
    json_schema!({ "type": "object", "properties": { "data": data }, "required": ["data"] })
}

/// A status other than 200, which some reasons share.
fn refusal(reasons: &[Reason], error: &Schema) -> Value {
    let meanings: Vec<_> = reasons.iter().map(|reason| reason.meaning()).collect();
    let mut refusal = json!({
        "description": meanings.join(" "),
        "content": { "application/json": { "schema": error } },
    });
    if reasons.contains(&Reason::Unauthenticated) {
        let challenge = json!({ "description": "`Bearer`.", "required": true, "schema": { "const": "Bearer" } });
        refusal["headers"]["WWW-Authenticate"] = challenge;
    }
    if reasons.iter().any(|reason| matches!(reason, Reason::Overloaded | Reason::Draining | Reason::GroupUnavailable)) {
        let delay = json!({
            "description": "When to come back, where that helps. Unit: seconds.",
            "schema": { "type": "integer", "minimum": 1 },
        });
        refusal["headers"]["Retry-After"] = delay;
    }
    refusal
}

// === impl Schemas ===

impl Schemas {
    fn new() -> Self {
        let settings = SchemaSettings::draft2020_12()
            .with(|settings| settings.definitions_path = "/components/schemas".into())
            .with_transform(RecursiveTransform(bound_integer));
        let written = settings.clone().for_serialize().into_generator();
        Self { read: settings.for_deserialize().into_generator(), written }
    }

    /// The schemas that others refer to, by name.
    fn into_components(mut self) -> Map<String, Value> {
        let mut components = self.read.take_definitions(true);
        for (name, schema) in self.written.take_definitions(true) {
            let other = components.insert(name, schema);
            assert!(other.is_none(), "what is both read and written must be marked `inline`: {other:?}");
        }
        components
    }
}

/// States the bounds that an integer's format has.
fn bound_integer(schema: &mut Schema) {
    let (low, high) = match schema.get("format").and_then(Value::as_str) {
        Some("uint32") => (json!(u32::MIN), json!(u32::MAX)),
        Some("uint64") => (json!(u64::MIN), json!(u64::MAX)),
        Some("int64") => (json!(i64::MIN), json!(i64::MAX)),
        _ => return,
    };
    let bounds = schema.ensure_object();
    bounds.entry("minimum").or_insert(low);
    bounds.entry("maximum").or_insert(high);
}

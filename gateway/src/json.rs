//! JSON from clients: read at once into types, with the path of what is wrong.

use std::{borrow::Cow, fmt, marker::PhantomData};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{
        self, DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Visitor,
        value::{MapAccessDeserializer, SeqAccessDeserializer},
    },
};

use crate::request::RequestError;

/// Reads JSON of a type.
///
/// # Errors
/// What is wrong, under the path of the value at fault.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RequestError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        // What is no JSON at all has no path.
        let path = if path.is_empty() || path == "." || path.ends_with('?') { "body".to_owned() } else { path };
        RequestError::invalid(path, shorten(&error.into_inner().to_string()))
    })?;
    deserializer.end().map_err(|error| RequestError::invalid("body", error.to_string()))?;
    Ok(value)
}

/// serde lists every field that it knows beside one that it does not, which tells a caller little.
fn shorten(message: &str) -> String {
    match message.split_once(", expected one of") {
        Some((head, _)) if head.starts_with("unknown field") => format!("{head} is not supported"),
        _ => message.to_owned(),
    }
}

/// A field that the protocol has and this server does not: only null is taken for it.
#[derive(Debug, Clone, Copy)]
pub struct Unsupported;

impl<'de> Deserialize<'de> for Unsupported {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer)?;
        Err(de::Error::custom("this is not supported"))
    }
}

impl JsonSchema for Unsupported {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Unsupported".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "null", "description": "Not supported: only null is taken for it." })
    }
}

/// An object. For a struct by itself serde also takes a list of its fields' values, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Members<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(members)).map(Object)
            }
        }
        deserializer.deserialize_map(Members(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for Object<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

/// A string, or a list.
#[derive(Debug, Clone, PartialEq)]
pub enum OneOrMany<T> {
    /// A string by itself.
    One(String),
    /// A list.
    Many(Vec<T>),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(OneOrMany::One(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Ok(OneOrMany::Many(Vec::deserialize(SeqAccessDeserializer::new(list))?))
            }
        }
        deserializer.deserialize_any(Either(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for OneOrMany<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("OneOrMany{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "string" }, generator.subschema_for::<Vec<T>>()] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Request {
        #[allow(dead_code, reason = "read by name")]
        stop: OneOrMany<String>,
        #[allow(dead_code, reason = "read by name")]
        audio: Option<Unsupported>,
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |text: &str, expected: &str| {
            let error = parse::<Request>(text.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        };
        check(r#"{"stop": 1}"#, "stop: invalid type: integer `1`, expected a string or a list");
        check(r#"{"stop": ["a", 1]}"#, "stop[1]: invalid type: integer `1`, expected a string");
        check(r#"{"stop": "a", "audio": {}}"#, "audio: this is not supported");
        check(r#"{"stop": "a", "what": 1}"#, "what: unknown field `what`");
        check(r#"{"stop": "a"} x"#, "body: trailing characters");
        check("", "body: EOF while parsing");
        check(&format!(r#"{{"stop": {}1{}}}"#, "[".repeat(500), "]".repeat(500)), "stop");
        assert!(parse::<Request>(b"{\"stop\": \"\xff\"}").is_err());
    }

    #[test]
    fn a_list_is_no_object() {
        assert!(parse::<Request>(br#"["a", null]"#).is_ok());
        let read = |text: &str| parse::<Object<Request>>(text.as_bytes()).map(|Object(request)| request.stop);
        assert_eq!(read(r#"{"stop": "a"}"#), Ok(OneOrMany::One("a".into())));
        let error = read(r#"["a", null]"#).unwrap_err().to_string();
        assert!(error.starts_with("body: invalid type: sequence, expected an object"), "{error}");
        let error = read(r#"{"stop": ["a", 1]}"#).unwrap_err().to_string();
        assert!(error.starts_with("stop[1]: invalid type"), "{error}");
    }

    #[test]
    fn both_forms_and_null_are_taken() {
        let read = |text: &str| parse::<Request>(text.as_bytes()).unwrap().stop;
        assert_eq!(read(r#"{"stop": "a", "audio": null}"#), OneOrMany::One("a".into()));
        assert_eq!(read(r#"{"stop": ["a", "b"]}"#), OneOrMany::Many(vec!["a".into(), "b".into()]));
    }
}

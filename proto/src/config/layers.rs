//! A [`Layer`] is what one source says: keys with values, each value knowing where it came from.
//!
//! Every layer is checked against the [`Schema`] as it is read, then all are merged by the `config` crate, whose
//! deserializer turns the strings of environment and flags into numbers. That conversion is generous (it rounds
//! floats and reads `yes` as 1), so [`merge`] compares the outcome with what was given.

use std::{collections::BTreeSet, ffi::OsString, fs, path::Path};

use config::{Config, File, FileFormat, Map, Source, Value, ValueKind};
use serde_json::Value as Json;

use super::{ConfigError, Key, Settings};

/// What a key takes, as far as the command line must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    List,
    Scalar,
}

/// All keys of a service with their kinds.
#[derive(Debug)]
pub(super) struct Schema {
    keys: Vec<(Key, Kind)>,
}

/// What one source says.
#[derive(Debug, Clone, Default)]
pub(super) struct Layer {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    key: String,
    value: Value,
    origin: String,
}

// === impl Schema ===

impl Schema {
    pub(super) fn of<S: Settings>() -> Self {
        let defaults = defaults::<S>();
        let kind = |key: &Key| match lookup(&defaults, key.path) {
            Some(Json::Bool(_)) => Kind::Bool,
            Some(Json::Array(_)) => Kind::List,
            _ => Kind::Scalar,
        };
        Self { keys: S::KEYS.iter().copied().flatten().map(|key| (*key, kind(key))).collect() }
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = (&Key, Kind)> {
        self.keys.iter().map(|(key, kind)| (key, *kind))
    }

    fn kind(&self, path: &str) -> Option<Kind> {
        self.keys().find(|(key, _)| key.path == path).map(|(_, kind)| kind)
    }

    /// Whether the path is a table that holds keys.
    fn is_table(&self, path: &str) -> bool {
        self.keys().any(|(key, _)| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
    }

    /// The key that a path into a value belongs to: `models` for `models[0].name`.
    fn key_of<'a>(&self, path: &'a str) -> Option<&'a str> {
        let ends = path.match_indices(['.', '[']).map(|(at, _)| at).chain([path.len()]);
        ends.filter_map(|end| path.get(..end)).rfind(|prefix| self.kind(prefix).is_some())
    }
}

// === impl Layer ===

impl Layer {
    fn of_defaults<S: Settings>() -> Self {
        let origin = "the defaults".to_owned();
        let entry = |(key, value)| Entry { key, value: from_json(value), origin: origin.clone() };
        Self { entries: leaves(defaults::<S>()).map(entry).collect() }
    }

    pub(super) fn from_file(path: &Path, schema: &Schema) -> Result<Self, ConfigError> {
        let failed = |cause: String| ConfigError::File { path: path.to_owned(), cause };
        let text = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        let file = File::from_str(&text, FileFormat::Toml);
        let table = file.collect().map_err(|error| failed(one_line(&error.to_string())))?;
        let mut layer = Self::default();
        layer.push_table("", table, schema, &format!("file {}", path.display()))?;
        Ok(layer)
    }

    pub(super) fn from_env(
        env: impl Iterator<Item = (OsString, OsString)>,
        service: &str,
        schema: &Schema,
    ) -> Result<Self, ConfigError> {
        let prefix = env_prefix(service);
        let mut layer = Self::default();
        for (name, text) in env {
            // A name that is not UTF-8 cannot have our prefix.
            let Some(name) = name.to_str() else { continue };
            let Some(rest) = name.strip_prefix(&prefix) else { continue };
            let key = rest.to_lowercase().replace("__", ".");
            let origin = format!("environment variable {name}");
            let Some(kind) = schema.kind(&key) else { return Err(ConfigError::UnknownKey { key, origin }) };
            let Some(text) = text.to_str() else {
                let value = text.to_string_lossy().into_owned();
                return Err(ConfigError::Invalid { key, value, origin, rule: "is not UTF-8".into() });
            };
            layer.push_text(&key, text, kind, origin);
        }
        Ok(layer)
    }

    /// Adds a value that is given as text; the elements of a list are separated by commas.
    pub(super) fn push_text(&mut self, key: &str, text: &str, kind: Kind, origin: String) {
        let string = |text: &str| Value::new(Some(&origin), text.to_owned());
        let value = match kind {
            Kind::List => {
                let elements = text.split(',').map(str::trim).filter(|element| !element.is_empty());
                Value::new(Some(&origin), elements.map(string).collect::<Vec<_>>())
            }
            Kind::Bool | Kind::Scalar => string(text),
        };
        self.entries.push(Entry { key: key.to_owned(), value, origin });
    }

    /// Adds the keys of a table, descending no further than the schema goes.
    fn push_table(
        &mut self,
        prefix: &str,
        table: Map<String, Value>,
        schema: &Schema,
        origin: &str,
    ) -> Result<(), ConfigError> {
        for (name, value) in table {
            let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            match value.kind {
                ValueKind::Table(inner) if schema.is_table(&key) => self.push_table(&key, inner, schema, origin)?,
                _ if schema.kind(&key).is_none() => {
                    return Err(ConfigError::UnknownKey { key, origin: origin.to_owned() });
                }
                kind => {
                    let origin = origin.to_owned();
                    self.entries.push(Entry { value: Value::new(Some(&origin), kind), key, origin });
                }
            }
        }
        Ok(())
    }
}

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self.entries.iter().map(|entry| (entry.key.clone(), entry.value.clone())).collect())
    }
}

/// The start of every environment variable of a service.
pub(super) fn env_prefix(service: &str) -> String {
    format!("LOCKSTEP_{}__", service.to_uppercase().replace('-', "_"))
}

/// The settings that the layers make, the last layer winning, over the defaults.
pub(super) fn merge<S: Settings>(layers: &[Layer], schema: &Schema) -> Result<S, ConfigError> {
    let unexpected = |error: config::ConfigError| ConfigError::Usage(one_line(&error.to_string()));
    let mut builder = Config::builder().add_source(Layer::of_defaults::<S>());
    for layer in layers {
        builder = builder.add_source(layer.clone());
    }
    let merged = builder.build().map_err(unexpected)?;
    let settings: S = merged.try_deserialize().map_err(|error| describe::<S>(&error, layers, schema))?;
    let effective = serde_json::to_value(&settings).unwrap_or_default();
    let mut settled = BTreeSet::new();
    for entry in layers.iter().rev().flat_map(|layer| &layer.entries) {
        let outcome = lookup(&effective, &entry.key);
        if settled.insert(&entry.key) && outcome.is_some_and(|outcome| !agrees(&entry.value, outcome)) {
            return Err(invalid(entry, "is of the wrong type"));
        }
    }
    Ok(settings)
}

/// The error of a rule, with the source that gave the value.
pub(super) fn with_origin(error: ConfigError, layers: &[Layer]) -> ConfigError {
    match error {
        ConfigError::Invalid { key, value, origin, rule } => {
            let origin = find(layers, &key).map_or(origin, |entry| entry.origin.clone());
            ConfigError::Invalid { key, value, origin, rule }
        }
        other => other,
    }
}

/// The paths of all fields that a default has.
pub(super) fn leaves_of_default<S: Settings>() -> Vec<String> {
    leaves(defaults::<S>()).map(|(path, _)| path).collect()
}

/// Everything in a tree that is no table, with its path.
fn leaves(root: Json) -> impl Iterator<Item = (String, Json)> {
    let mut pending = vec![(String::new(), root)];
    std::iter::from_fn(move || {
        loop {
            match pending.pop()? {
                (path, Json::Object(fields)) => pending.extend(fields.into_iter().map(|(name, value)| {
                    let path = if path.is_empty() { name } else { format!("{path}.{name}") };
                    (path, value)
                })),
                leaf => return Some(leaf),
            }
        }
    })
}

/// The same value for the `config` crate, whose own conversion from `Serialize` loses empty lists.
fn from_json(value: Json) -> Value {
    let kind = match value {
        Json::Null => ValueKind::Nil,
        Json::Bool(value) => ValueKind::Boolean(value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => ValueKind::I64(value),
            (None, Some(value)) => ValueKind::U64(value),
            (None, None) => ValueKind::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => ValueKind::String(text),
        Json::Array(values) => ValueKind::Array(values.into_iter().map(from_json).collect()),
        Json::Object(fields) => {
            ValueKind::Table(fields.into_iter().map(|(name, value)| (name, from_json(value))).collect())
        }
    };
    Value::new(None, kind)
}

fn defaults<S: Settings>() -> Json {
    serde_json::to_value(S::default()).expect("settings are plain data with string keys")
}

fn lookup<'a>(value: &'a Json, path: &str) -> Option<&'a Json> {
    path.split('.').try_fold(value, |value, name| value.get(name))
}

fn find<'a>(layers: &'a [Layer], key: &str) -> Option<&'a Entry> {
    layers.iter().rev().flat_map(|layer| layer.entries.iter().rev()).find(|entry| entry.key == key)
}

/// Whether a value became what it says: a number stays that number, a boolean that boolean.
fn agrees(given: &Value, outcome: &Json) -> bool {
    let text = given.to_string();
    match outcome {
        Json::Number(number) => {
            let (Ok(given), Some(outcome)) = (text.parse::<f64>(), number.as_f64()) else { return false };
            // A 32-bit float comes back with the digits of its 64-bit neighbour.
            let (given32, outcome32) = (given as f32, outcome as f32);
            given == outcome || (number.is_f64() && given32 == outcome32)
        }
        Json::Bool(outcome) => text == outcome.to_string(),
        Json::Null | Json::String(_) | Json::Array(_) | Json::Object(_) => true,
    }
}

/// An error of the `config` crate in our words: the key and its value instead of a path into nested errors.
fn describe<S: Settings>(error: &config::ConfigError, layers: &[Layer], schema: &Schema) -> ConfigError {
    let (path, rule) = match error {
        config::ConfigError::Type { key, expected, .. } => (key.clone(), format!("expected {expected}")),
        config::ConfigError::At { key, error, .. } => (key.clone(), one_line(&error.to_string())),
        other => (None, one_line(&other.to_string())),
    };
    let path = path.unwrap_or_default();
    match schema.key_of(&path).and_then(|key| find(layers, key)) {
        Some(entry) if entry.key == path => invalid(entry, &unknown_variant::<S>(entry).unwrap_or(rule)),
        Some(entry) => invalid(entry, &format!("{path}: {rule}")),
        None => ConfigError::Usage(format!("`{path}`: {rule}")),
    }
}

/// What serde says of a value that is none of those that there are: it lists them, which the `config` crate does not.
fn unknown_variant<S: Settings>(entry: &Entry) -> Option<String> {
    let mut settings = defaults::<S>();
    *settings.pointer_mut(&format!("/{}", entry.key.replace('.', "/")))? = Json::String(entry.value.to_string());
    let message = serde_json::from_value::<S>(settings).err()?.to_string();
    message.starts_with("unknown variant").then_some(message)
}

fn invalid(entry: &Entry, rule: &str) -> ConfigError {
    ConfigError::Invalid {
        key: entry.key.clone(),
        value: format!("`{}`", shown(&entry.value)),
        origin: entry.origin.clone(),
        rule: rule.to_owned(),
    }
}

/// A value as it was given; a list as the command line has it.
fn shown(value: &Value) -> String {
    match &value.kind {
        ValueKind::Array(elements) => elements.iter().map(shown).collect::<Vec<_>>().join(","),
        _ => value.to_string(),
    }
}

/// A parser's message without its picture of the source: the first line says where, the last one what.
fn one_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    match (lines.next(), lines.next_back()) {
        (Some(first), Some(last)) => format!("{first}: {last}"),
        (Some(only), None) => only.to_owned(),
        _ => "unreadable".to_owned(),
    }
}

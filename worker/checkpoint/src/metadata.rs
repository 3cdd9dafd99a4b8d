//! Metadata: the typed key-value pairs of a model file, such as `llama.block_count` or the vocabulary.
//!
//! Getters come in pairs: `u32(key)` for what a model must have, `opt_u32(key)` for what it may have. Both refuse a
//! value of another type by name. Integers are the one leniency: writers disagree about their width, so any integer
//! type whose value fits is taken.

use std::collections::BTreeMap;

use crate::error::CheckpointError;

/// What keys begin with that no GGUF file may have.
pub(crate) const RESERVED_PREFIX: &str = "lockstep.";

/// A truth value that no GGUF file has: whether rotary embedding turns the two halves of a head against each other, as
/// `transformers` does, rather than neighbours.
pub const ROPE_HALVES: &str = "lockstep.rope.halves";

/// A metadata value with the type that it has in the file.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are the types they hold")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// A metadata array: elements of one type, stored compactly.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are the element types they hold")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
    Array(Vec<Array>),
}

/// The key-value pairs of a model file.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    values: BTreeMap<String, Value>,
}

// === impl Value ===

impl Value {
    /// The type in words, for messages: `u32`, `string`, `array of f32`.
    pub fn kind(&self) -> String {
        match self {
            Value::U8(_) => "u8".into(),
            Value::I8(_) => "i8".into(),
            Value::U16(_) => "u16".into(),
            Value::I16(_) => "i16".into(),
            Value::U32(_) => "u32".into(),
            Value::I32(_) => "i32".into(),
            Value::U64(_) => "u64".into(),
            Value::I64(_) => "i64".into(),
            Value::F32(_) => "f32".into(),
            Value::F64(_) => "f64".into(),
            Value::Bool(_) => "bool".into(),
            Value::String(_) => "string".into(),
            Value::Array(array) => format!("array of {}", array.element_kind()),
        }
    }

    /// The value of any integer type, widened.
    fn integer(&self) -> Option<i128> {
        match *self {
            Value::U8(x) => Some(x.into()),
            Value::I8(x) => Some(x.into()),
            Value::U16(x) => Some(x.into()),
            Value::I16(x) => Some(x.into()),
            Value::U32(x) => Some(x.into()),
            Value::I32(x) => Some(x.into()),
            Value::U64(x) => Some(x.into()),
            Value::I64(x) => Some(x.into()),
            _ => None,
        }
    }
}

// === impl Array ===

impl Array {
    /// The type of the elements, in words.
    pub fn element_kind(&self) -> &'static str {
        match self {
            Array::U8(_) => "u8",
            Array::I8(_) => "i8",
            Array::U16(_) => "u16",
            Array::I16(_) => "i16",
            Array::U32(_) => "u32",
            Array::I32(_) => "i32",
            Array::U64(_) => "u64",
            Array::I64(_) => "i64",
            Array::F32(_) => "f32",
            Array::F64(_) => "f64",
            Array::Bool(_) => "bool",
            Array::String(_) => "string",
            Array::Array(_) => "array",
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(x) => x.len(),
            Array::I8(x) => x.len(),
            Array::U16(x) => x.len(),
            Array::I16(x) => x.len(),
            Array::U32(x) => x.len(),
            Array::I32(x) => x.len(),
            Array::U64(x) => x.len(),
            Array::I64(x) => x.len(),
            Array::F32(x) => x.len(),
            Array::F64(x) => x.len(),
            Array::Bool(x) => x.len(),
            Array::String(x) => x.len(),
            Array::Array(x) => x.len(),
        }
    }

    /// True if there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// === impl Metadata ===

/// Defines a getter for what must be there and one for what may be.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $opt:ident: $type:ty = $expected:literal, $cast:expr;)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Errors
            /// If the key is absent or holds another type.
            pub fn $name(&self, key: &str) -> Result<$type, CheckpointError> {
                self.$opt(key)?.ok_or_else(|| CheckpointError::MissingKey { key: key.to_owned() })
            }

            $(#[$doc])*
            /// `None` if the key is absent.
            ///
            /// # Errors
            /// If the key holds another type.
            pub fn $opt(&self, key: &str) -> Result<Option<$type>, CheckpointError> {
                self.typed(key, $expected, $cast)
            }
        )*
    };
}

impl Metadata {
    /// The value under `key`, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All pairs, ascending by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    getters! {
        /// An integer that fits `u32`, of any integer type.
        u32, opt_u32: u32 = "an integer from 0 to 4294967295", |value| value.integer()?.try_into().ok();
        /// An integer that fits `u64`, of any integer type.
        u64, opt_u64: u64 = "an integer of at least 0", |value| value.integer()?.try_into().ok();
        /// A single-precision number.
        f32, opt_f32: f32 = "f32", |value| if let Value::F32(x) = value { Some(*x) } else { None };
        /// A truth value.
        bool, opt_bool: bool = "bool", |value| if let Value::Bool(x) = value { Some(*x) } else { None };
        /// A text.
        str, opt_str: &str = "string", |value| if let Value::String(x) = value { Some(x.as_str()) } else { None };
        /// A list of texts.
        strings, opt_strings: &[String] = "array of string",
            |value| if let Value::Array(Array::String(x)) = value { Some(x.as_slice()) } else { None };
        /// A list of `i32`.
        i32s, opt_i32s: &[i32] = "array of i32",
            |value| if let Value::Array(Array::I32(x)) = value { Some(x.as_slice()) } else { None };
        /// A list of `u32`.
        u32s, opt_u32s: &[u32] = "array of u32",
            |value| if let Value::Array(Array::U32(x)) = value { Some(x.as_slice()) } else { None };
        /// A list of single-precision numbers.
        f32s, opt_f32s: &[f32] = "array of f32",
            |value| if let Value::Array(Array::F32(x)) = value { Some(x.as_slice()) } else { None };
    }

    /// Adds a pair; false, and no change, if the key is taken.
    pub(crate) fn insert(&mut self, key: String, value: Value) -> bool {
        match self.values.entry(key) {
            std::collections::btree_map::Entry::Occupied(_) => false,
            std::collections::btree_map::Entry::Vacant(vacant) => {
                vacant.insert(value);
                true
            }
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        cast: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        cast(value).map(Some).ok_or_else(|| {
            // An integer that does not fit is a wrong value rather than a wrong type, so the message shows it.
            let found = value.integer().map_or_else(|| value.kind(), |integer| format!("{} {integer}", value.kind()));
            CheckpointError::WrongType { key: key.to_owned(), expected, found }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Array, Metadata, Value};

    fn metadata() -> Metadata {
        let mut metadata = Metadata::default();
        for (key, value) in [
            ("small", Value::U8(7)),
            ("wide", Value::U64(1 << 40)),
            ("negative", Value::I32(-1)),
            ("scale", Value::F32(0.5)),
            ("flag", Value::Bool(true)),
            ("name", Value::String("llama".into())),
            ("tokens", Value::Array(Array::String(vec!["a".into(), "b".into()]))),
            ("types", Value::Array(Array::I32(vec![1, -3]))),
        ] {
            assert!(metadata.insert(key.into(), value));
        }
        metadata
    }

    #[test]
    fn getters_return_what_is_there() {
        let metadata = metadata();
        assert_eq!(metadata.u32("small").unwrap(), 7);
        assert_eq!(metadata.u64("wide").unwrap(), 1 << 40);
        assert_eq!(metadata.f32("scale").unwrap(), 0.5);
        assert!(metadata.bool("flag").unwrap());
        assert_eq!(metadata.str("name").unwrap(), "llama");
        assert_eq!(metadata.strings("tokens").unwrap(), ["a", "b"]);
        assert_eq!(metadata.i32s("types").unwrap(), [1, -3]);
        assert_eq!(metadata.opt_f32s("absent").unwrap(), None);
    }

    #[test]
    fn refusals_name_key_and_both_types() {
        let metadata = metadata();
        let check = |refusal: Result<(), String>, message: &str| assert_eq!(refusal, Err(message.to_owned()));
        check(metadata.u32("absent").map(drop).map_err(|e| e.to_string()), "the model's metadata has no \"absent\"");
        check(
            metadata.opt_u32("wide").map(drop).map_err(|e| e.to_string()),
            "the model's metadata \"wide\" is u64 1099511627776, expected an integer from 0 to 4294967295",
        );
        check(
            metadata.u32("negative").map(drop).map_err(|e| e.to_string()),
            "the model's metadata \"negative\" is i32 -1, expected an integer from 0 to 4294967295",
        );
        check(
            metadata.f32s("tokens").map(drop).map_err(|e| e.to_string()),
            "the model's metadata \"tokens\" is array of string, expected array of f32",
        );
        check(
            metadata.bool("name").map(drop).map_err(|e| e.to_string()),
            "the model's metadata \"name\" is string, expected bool",
        );
    }

    #[test]
    fn a_key_is_taken_once() {
        let mut metadata = metadata();
        assert!(!metadata.insert("small".into(), Value::U8(8)));
        assert_eq!(metadata.u32("small").unwrap(), 7);
    }
}

//! Metadata values as GGUF stores them: a type number, then the value.

use super::reader::{HEADER_BYTES_MAX, Reader};
use crate::error::{Fault, FormatError};
use crate::metadata::{Array, Value};

/// Arrays within arrays. The format allows any depth; real files have none, and each level costs a stack frame.
const ARRAY_DEPTH_MAX: u64 = 4;

/// Bytes of one string value. Chat templates, the longest in real files, stay under 64 KiB.
const STRING_BYTES_MAX: u64 = 4 << 20;

/// Elements of one array: more than the header could hold of the smallest.
const ARRAY_LEN_MAX: u64 = HEADER_BYTES_MAX as u64;

/// Bytes of the shortest string: its length.
const STRING_BYTES_MIN: u64 = 8;

/// Bytes of the shortest array: element type and count.
const ARRAY_BYTES_MIN: u64 = 12;

/// The type numbers of GGUF (specification, `gguf_metadata_value_type`).
#[derive(Clone, Copy)]
enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

/// Reads a value with the type number before it.
pub(super) fn value(reader: &mut Reader<'_>) -> Result<Value, FormatError> {
    Ok(match value_type(reader)? {
        ValueType::U8 => Value::U8(reader.number(u8::from_le_bytes)?),
        ValueType::I8 => Value::I8(reader.number(i8::from_le_bytes)?),
        ValueType::U16 => Value::U16(reader.number(u16::from_le_bytes)?),
        ValueType::I16 => Value::I16(reader.number(i16::from_le_bytes)?),
        ValueType::U32 => Value::U32(reader.number(u32::from_le_bytes)?),
        ValueType::I32 => Value::I32(reader.number(i32::from_le_bytes)?),
        ValueType::F32 => Value::F32(reader.number(f32::from_le_bytes)?),
        ValueType::Bool => Value::Bool(reader.bool()?),
        ValueType::String => Value::String(string(reader)?),
        ValueType::Array => Value::Array(array(reader, 1)?),
        ValueType::U64 => Value::U64(reader.number(u64::from_le_bytes)?),
        ValueType::I64 => Value::I64(reader.number(i64::from_le_bytes)?),
        ValueType::F64 => Value::F64(reader.number(f64::from_le_bytes)?),
    })
}

fn value_type(reader: &mut Reader<'_>) -> Result<ValueType, FormatError> {
    let offset = reader.offset();
    Ok(match reader.number(u32::from_le_bytes)? {
        0 => ValueType::U8,
        1 => ValueType::I8,
        2 => ValueType::U16,
        3 => ValueType::I16,
        4 => ValueType::U32,
        5 => ValueType::I32,
        6 => ValueType::F32,
        7 => ValueType::Bool,
        8 => ValueType::String,
        9 => ValueType::Array,
        10 => ValueType::U64,
        11 => ValueType::I64,
        12 => ValueType::F64,
        found => return Err(reader.error(offset, Fault::ValueType { found })),
    })
}

/// Reads an array, the `depth`-th around its elements.
fn array(reader: &mut Reader<'_>, depth: u64) -> Result<Array, FormatError> {
    let offset = reader.offset();
    if depth > ARRAY_DEPTH_MAX {
        let fault = Fault::OverLimit { what: "array nesting", found: depth, limit: ARRAY_DEPTH_MAX };
        return Err(reader.error(offset, fault));
    }
    let element_type = value_type(reader)?;
    let count = reader.count("array length", ARRAY_LEN_MAX, element_type.bytes_min())?;
    Ok(match element_type {
        ValueType::U8 => Array::U8(reader.numbers(count, u8::from_le_bytes)?),
        ValueType::I8 => Array::I8(reader.numbers(count, i8::from_le_bytes)?),
        ValueType::U16 => Array::U16(reader.numbers(count, u16::from_le_bytes)?),
        ValueType::I16 => Array::I16(reader.numbers(count, i16::from_le_bytes)?),
        ValueType::U32 => Array::U32(reader.numbers(count, u32::from_le_bytes)?),
        ValueType::I32 => Array::I32(reader.numbers(count, i32::from_le_bytes)?),
        ValueType::F32 => Array::F32(reader.numbers(count, f32::from_le_bytes)?),
        ValueType::Bool => Array::Bool(elements(reader, count, Reader::bool)?),
        ValueType::String => Array::String(elements(reader, count, string)?),
        ValueType::Array => Array::Array(elements(reader, count, |reader| array(reader, depth + 1))?),
        ValueType::U64 => Array::U64(reader.numbers(count, u64::from_le_bytes)?),
        ValueType::I64 => Array::I64(reader.numbers(count, i64::from_le_bytes)?),
        ValueType::F64 => Array::F64(reader.numbers(count, f64::from_le_bytes)?),
    })
}

fn elements<'a, T>(
    reader: &mut Reader<'a>,
    count: u64,
    element: impl Fn(&mut Reader<'a>) -> Result<T, FormatError>,
) -> Result<Vec<T>, FormatError> {
    (0..count).map(|_| element(reader)).collect()
}

fn string(reader: &mut Reader<'_>) -> Result<String, FormatError> {
    reader.string("string length", STRING_BYTES_MAX).map(str::to_owned)
}

// === impl ValueType ===

impl ValueType {
    /// Bytes that a value takes at least.
    fn bytes_min(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 => 8,
            ValueType::String => STRING_BYTES_MIN,
            ValueType::Array => ARRAY_BYTES_MIN,
        }
    }
}

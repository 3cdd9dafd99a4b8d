//! safetensors: the container of Hugging Face, little-endian, one file.
//!
//! ```text
//! length of the header (u64) | header: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...} as JSON | data
//! ```
//!
//! Offsets count from the end of the header. Format: README of the safetensors project. Bytes that no tensor claims are
//! ignored, and so is `__metadata__`. (The `safetensors` crate, at 0.8.0, adds up offsets before it has checked them,
//! which under our overflow checks is a panic, and does not name the tensor at fault.)

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Fault, FormatError};
use crate::tensor::{Piece, check_disjoint};

/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;

/// Largest header. A layer's tensors take about 2 kB, four times that where they are quantized. Unit: bytes.
const HEADER_BYTES_MAX: u64 = 64 << 20;

/// Bytes of a tensor's name; those of a Llama have up to 80.
const NAME_BYTES_MAX: usize = 256;

/// Dimensions of a tensor; those of a Llama have up to 2.
const DIMENSIONS_MAX: usize = 8;

/// A tensor as the file has it, its bytes within the file's bounds and as many as shape and type take.
#[derive(Debug)]
pub(super) struct RawTensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    /// Outermost first; a scalar has none.
    pub(super) shape: Vec<usize>,
    pub(super) piece: Piece,
}

/// Element types of the models that are read here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the format's names")]
pub(super) enum Dtype {
    F32,
    F16,
    BF16,
    I32,
    I8,
    U8,
}

/// The header: tensors by name, as often as they occur.
struct Header(Vec<(String, Description)>);

#[derive(Deserialize)]
struct Description {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// Reads the header of `file`, the `file_idx`-th of the model, and checks all of it against the file's size.
pub(super) fn parse(file: &[u8], file_idx: usize) -> Result<Vec<RawTensor>, FormatError> {
    let header = header(file)?;
    let data = &file[LENGTH_BYTES + header.len()..];
    let data_start = file.len() - data.len();
    let header: Header = serde_json::from_slice(header).map_err(|cause| {
        let fault = Fault::Header { why: cause.to_string() };
        FormatError { place: "header".to_owned(), offset: LENGTH_BYTES as u64, fault }
    })?;
    let mut tensors = Vec::with_capacity(header.0.len());
    for (name, description) in header.0 {
        let offset = data_start as u64;
        if name.len() > NAME_BYTES_MAX {
            let (found, limit) = (name.len() as u64, NAME_BYTES_MAX as u64);
            let fault = Fault::OverLimit { what: "length of a tensor's name", found, limit };
            return Err(FormatError { place: "header".to_owned(), offset: LENGTH_BYTES as u64, fault });
        }
        let (dtype, shape, range) = description.check(data.len()).map_err(|fault| FormatError {
            place: format!("tensor {name:?}"),
            offset,
            fault,
        })?;
        let range = data_start + range.start..data_start + range.end;
        tensors.push(RawTensor { name, dtype, shape, piece: Piece { file: file_idx, range } });
    }
    let ranges: Vec<(&str, Range<usize>)> =
        tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.piece.range.clone())).collect();
    check_disjoint(&ranges)?;
    Ok(tensors)
}

/// The bytes of the header.
fn header(file: &[u8]) -> Result<&[u8], FormatError> {
    let error = |offset, fault| FormatError { place: "header".to_owned(), offset, fault };
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        let fault = Fault::Truncated { needed: LENGTH_BYTES as u64, available: file.len() as u64 };
        return Err(error(0, fault));
    };
    let needed = u64::from_le_bytes(*length);
    if needed > HEADER_BYTES_MAX {
        let fault = Fault::OverLimit { what: "header size", found: needed, limit: HEADER_BYTES_MAX };
        return Err(error(0, fault));
    }
    let available = rest.len() as u64;
    rest.get(..needed as usize).ok_or_else(|| error(LENGTH_BYTES as u64, Fault::Truncated { needed, available }))
}

// === impl Description ===

impl Description {
    /// The type, the shape and where in `n_data_bytes` bytes of data the tensor lies.
    fn check(self, n_data_bytes: usize) -> Result<(Dtype, Vec<usize>, Range<usize>), Fault> {
        let Description { dtype: dtype_name, shape, data_offsets: [begin, end] } = self;
        let dtype = Dtype::named(&dtype_name).ok_or_else(|| Fault::Dtype { found: dtype_name.clone() })?;
        if shape.len() > DIMENSIONS_MAX {
            let (found, limit) = (shape.len() as u64, DIMENSIONS_MAX as u64);
            return Err(Fault::OverLimit { what: "number of dimensions", found, limit });
        }
        let size = shape.iter().try_fold(dtype.size_bytes(), |size, &dimension| size.checked_mul(dimension));
        let expected = size.ok_or_else(|| Fault::SizeOverflow { shape: shape.clone() })?;
        if begin > end || end > n_data_bytes as u64 {
            let (size, file_size) = (end.saturating_sub(begin), n_data_bytes as u64);
            return Err(Fault::BeyondFile { size, data_offset: begin, file_size });
        }
        if end - begin != expected {
            return Err(Fault::DataSize { found: end - begin, shape, dtype: dtype_name, expected });
        }
        // A dimension beside a zero may be any number.
        let dimensions = shape.iter().map(|&dimension| usize::try_from(dimension)).collect::<Result<Vec<_>, _>>();
        let shape = dimensions.map_err(|_| Fault::SizeOverflow { shape })?;
        Ok((dtype, shape, begin as usize..end as usize))
    }
}

// === impl Dtype ===

impl Dtype {
    fn named(name: &str) -> Option<Dtype> {
        Some(match name {
            "F32" => Dtype::F32,
            "F16" => Dtype::F16,
            "BF16" => Dtype::BF16,
            "I32" => Dtype::I32,
            "I8" => Dtype::I8,
            "U8" => Dtype::U8,
            _ => return None,
        })
    }

    /// Bytes of an element.
    fn size_bytes(self) -> u64 {
        match self {
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::I8 | Dtype::U8 => 1,
        }
    }
}

// === impl Header ===

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Not a map: a name that occurs twice is to be seen.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                tensors.push((name, map.next_value()?));
            }
        }
        Ok(Header(tensors))
    }
}

//! GGUF: the container of llama.cpp, versions 2 and 3, little-endian, one file.
//!
//! ```text
//! "GGUF"  version  n_tensors  n_pairs | pairs: key, type, value | tensors: name, dimensions, type, offset | padding | data
//! ```
//!
//! Tensor offsets count from the start of the data, which is the end of the descriptions rounded up to
//! `general.alignment`. Format: `docs/gguf.md` of the ggml project. Bytes that no tensor claims are ignored, and a
//! file without tensors (a vocabulary) is sound. Every number is checked against a limit and against the file's size
//! before it is used.

mod reader;
mod values;
pub(crate) mod writer;

use std::ops::Range;

use self::reader::Reader;
use crate::checkpoint::Contents;
use crate::encoding::Encoding;
use crate::error::{Fault, FormatError};
use crate::metadata::{Metadata, RESERVED_PREFIX, Value};
use crate::tensor::{Piece, Source, TensorEntry, TensorTable, check_disjoint};

/// Metadata pairs; real files have fewer than 100.
const PAIRS_MAX: u64 = 1 << 16;

/// Tensors; a 126-layer Llama has 1,138, expert models with a tensor for each expert some ten thousand.
const TENSORS_MAX: u64 = 1 << 16;

/// Bytes of a key. The specification allows 65,535, which no error message could show.
const KEY_BYTES_MAX: u64 = 1024;

/// Bytes of a tensor name, as in the specification.
const NAME_BYTES_MAX: u64 = 64;

/// Dimensions of a tensor, as in the specification.
const DIMENSIONS_MAX: u32 = 4;

/// Largest `general.alignment`; real files have 32 or the size of a page.
const ALIGNMENT_MAX: u64 = 1 << 16;

/// `general.alignment` of a file that does not give it.
const ALIGNMENT_DEFAULT: u64 = 32;

/// Bytes of the shortest pair: key length, one byte of key, type, one byte of value.
const PAIR_BYTES_MIN: u64 = 14;

/// Bytes of the shortest description: name length, one byte of name, dimension count, one dimension, type, offset.
const DESCRIPTION_BYTES_MIN: u64 = 33;

/// A tensor's description, whose data is yet to be placed in the file.
struct Description {
    name: String,
    /// Outermost first.
    shape: Vec<usize>,
    encoding: Encoding,
    size_bytes: usize,
    /// From the start of the data.
    data_offset: u64,
    /// Where the file gives `data_offset`.
    field_offset: usize,
}

/// Reads the header of `file` and checks all of it against the file's size.
pub(crate) fn parse(file: &[u8]) -> Result<Contents, FormatError> {
    let mut reader = Reader::new(file);
    check_magic_and_version(&mut reader)?;
    let n_tensors = reader.count("number of tensors", TENSORS_MAX, DESCRIPTION_BYTES_MIN)?;
    let n_pairs = reader.count("number of metadata entries", PAIRS_MAX, PAIR_BYTES_MIN)?;
    let metadata = read_metadata(&mut reader, n_pairs)?;
    let alignment = alignment(&reader, &metadata)?;
    let descriptions: Vec<Description> =
        (0..n_tensors).map(|index| read_description(&mut reader, index)).collect::<Result<_, _>>()?;

    let data_start = (reader.offset() as u64).next_multiple_of(alignment);
    let mut ranges = Vec::with_capacity(descriptions.len());
    for description in &descriptions {
        reader.enter(format!("tensor {:?}", description.name));
        let range = place(&reader, description, data_start, alignment, file.len())?;
        ranges.push((description.name.as_str(), range));
    }
    check_disjoint(&ranges)?;
    let ranges: Vec<Range<usize>> = ranges.into_iter().map(|(_, range)| range).collect();
    let entries = descriptions.into_iter().zip(ranges).map(|(Description { name, shape, encoding, .. }, range)| {
        TensorEntry { name, shape, encoding, source: Source::File(Piece { file: 0, range }) }
    });
    Ok(Contents { metadata, tensors: TensorTable::new(entries.collect())? })
}

fn check_magic_and_version(reader: &mut Reader<'_>) -> Result<(), FormatError> {
    let found = reader.number(|bytes: [u8; 4]| bytes)?;
    if &found != b"GGUF" {
        return Err(reader.error(0, Fault::Magic { found }));
    }
    let offset = reader.offset();
    match reader.number(u32::from_le_bytes)? {
        2 | 3 => Ok(()),
        found if matches!(found.swap_bytes(), 2 | 3) => Err(reader.error(offset, Fault::BigEndian)),
        found => Err(reader.error(offset, Fault::Version { found })),
    }
}

fn read_metadata(reader: &mut Reader<'_>, n_pairs: u64) -> Result<Metadata, FormatError> {
    let mut metadata = Metadata::default();
    for index in 0..n_pairs {
        reader.enter(format!("metadata entry {index}"));
        let offset = reader.offset();
        let key = reader.name("key length", KEY_BYTES_MAX)?;
        reader.enter(format!("metadata key {key:?}"));
        if key.starts_with(RESERVED_PREFIX) {
            return Err(reader.error(offset, Fault::ReservedKey { prefix: RESERVED_PREFIX }));
        }
        let value = values::value(reader)?;
        if !metadata.insert(key.to_owned(), value) {
            return Err(reader.error(offset, Fault::DuplicateName));
        }
    }
    Ok(metadata)
}

fn alignment(reader: &Reader<'_>, metadata: &Metadata) -> Result<u64, FormatError> {
    const KEY: &str = "general.alignment";
    let alignment = match metadata.get(KEY) {
        None => return Ok(ALIGNMENT_DEFAULT),
        Some(Value::U32(alignment)) => u64::from(*alignment),
        Some(other) => return Err(bad_alignment(reader, other.kind())),
    };
    // The specification asks for a multiple of 8, GGML for a power of two.
    if !alignment.is_power_of_two() || !(8..=ALIGNMENT_MAX).contains(&alignment) {
        return Err(bad_alignment(reader, alignment.to_string()));
    }
    Ok(alignment)
}

fn bad_alignment(reader: &Reader<'_>, found: String) -> FormatError {
    FormatError {
        place: "metadata key \"general.alignment\"".to_owned(),
        // The value is long read; the end of the metadata is where it is wanted.
        offset: reader.offset() as u64,
        fault: Fault::Alignment { found, limit: ALIGNMENT_MAX },
    }
}

fn read_description(reader: &mut Reader<'_>, index: u64) -> Result<Description, FormatError> {
    reader.enter(format!("tensor {index}"));
    let name = reader.name("name length", NAME_BYTES_MAX)?;
    reader.enter(format!("tensor {name:?}"));
    let shape_offset = reader.offset();
    let dimensions = read_dimensions(reader)?;
    let encoding = read_encoding(reader)?;
    let (shape, size_bytes) = layout(&dimensions, encoding).map_err(|fault| reader.error(shape_offset, fault))?;
    let field_offset = reader.offset();
    let data_offset = reader.number(u64::from_le_bytes)?;
    Ok(Description { name: name.to_owned(), shape, encoding, size_bytes, data_offset, field_offset })
}

/// The dimensions in the file's order, innermost first.
fn read_dimensions(reader: &mut Reader<'_>) -> Result<Vec<u64>, FormatError> {
    let offset = reader.offset();
    match reader.number(u32::from_le_bytes)? {
        0 => Err(reader.error(offset, Fault::NoDimensions)),
        count if count > DIMENSIONS_MAX => {
            let (found, limit) = (count.into(), DIMENSIONS_MAX.into());
            Err(reader.error(offset, Fault::OverLimit { what: "number of dimensions", found, limit }))
        }
        count => reader.numbers(count.into(), u64::from_le_bytes),
    }
}

/// Reads a type number of GGML.
fn read_encoding(reader: &mut Reader<'_>) -> Result<Encoding, FormatError> {
    let offset = reader.offset();
    let found = reader.number(u32::from_le_bytes)?;
    let encoding = Encoding::ALL.into_iter().find(|encoding| encoding.ggml_type() == Some(found));
    encoding.ok_or_else(|| reader.error(offset, Fault::TensorType { found }))
}

/// The shape, outermost first, and the size in bytes of a tensor of these dimensions (innermost first).
fn layout(dimensions: &[u64], encoding: Encoding) -> Result<(Vec<usize>, usize), Fault> {
    if let Some(index) = dimensions.iter().position(|&dimension| dimension == 0) {
        return Err(Fault::ZeroDimension { index });
    }
    let overflow = || Fault::SizeOverflow { shape: dimensions.to_vec() };
    let shape: Vec<usize> = dimensions
        .iter()
        .rev()
        .map(|&dimension| usize::try_from(dimension))
        .collect::<Result<_, _>>()
        .map_err(|_| overflow())?;
    let Some((&n_cols, outer)) = shape.split_last() else { return Err(Fault::NoDimensions) };
    if !n_cols.is_multiple_of(encoding.block_len()) {
        return Err(Fault::PartialBlock { n_cols, encoding });
    }
    let row_bytes = encoding.row_bytes(n_cols).ok_or_else(overflow)?;
    let size_bytes =
        outer.iter().try_fold(row_bytes, |size, &dimension| size.checked_mul(dimension)).ok_or_else(overflow)?;
    Ok((shape, size_bytes))
}

/// The bytes of the file that hold the tensor's data.
fn place(
    reader: &Reader<'_>,
    description: &Description,
    data_start: u64,
    alignment: u64,
    file_size: usize,
) -> Result<Range<usize>, FormatError> {
    let Description { data_offset, field_offset, size_bytes, .. } = *description;
    if !data_offset.is_multiple_of(alignment) {
        return Err(reader.error(field_offset, Fault::Misaligned { found: data_offset, alignment }));
    }
    let start = data_start.checked_add(data_offset).and_then(|start| usize::try_from(start).ok());
    let range = start.and_then(|start| Some(start..start.checked_add(size_bytes)?));
    range.filter(|range| range.end <= file_size).ok_or_else(|| {
        let (size, file_size) = (size_bytes as u64, file_size as u64);
        reader.error(field_offset, Fault::BeyondFile { size, data_offset, file_size })
    })
}

#[cfg(test)]
mod tests;

//! A tensor: a name, a shape, an encoding and the bytes that hold its values.
//!
//! [`TensorTable`] owns the descriptions that a container declared and enforces what holds between them: names are
//! distinct, byte ranges lie in the file and do not overlap.

use std::fmt;
use std::ops::Range;

use crate::encoding::Encoding;
use crate::error::{Fault, FormatError};

/// A checked view of one tensor in an open checkpoint.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    /// The name in the file, for example `blk.0.attn_q.weight`; never empty.
    pub name: &'a str,
    /// Row-major, outermost dimension first: a GGUF `[576, 49152]` is `[49152, 576]` here. Never empty, no zeros.
    pub shape: &'a [usize],
    /// How each row is stored.
    pub encoding: Encoding,
    /// Exactly `n_rows * row_bytes` bytes, rows one after another. No alignment is promised.
    pub bytes: &'a [u8],
}

/// One tensor as a container declares it, already checked on its own.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    /// Outermost first.
    pub(crate) shape: Vec<usize>,
    pub(crate) encoding: Encoding,
    /// Bytes of the file.
    pub(crate) range: Range<usize>,
}

/// All tensors of a checkpoint in file order, with lookup by name.
#[derive(Debug)]
pub(crate) struct TensorTable {
    entries: Vec<TensorEntry>,
    /// Indices into `entries`, ascending by name.
    by_name: Vec<usize>,
}

// === impl Tensor ===

impl Tensor<'_> {
    /// Rows: the product of all dimensions but the last. A one-dimensional tensor is one row.
    pub fn n_rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Values in a row: the last dimension.
    pub fn n_cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.bytes.len() / self.n_rows()
    }
}

impl fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not derived: `bytes` may be gigabytes.
        write!(f, "{} {} {:?}", self.name, self.encoding, self.shape)
    }
}

// === impl TensorEntry ===

impl TensorEntry {
    fn error(&self, fault: Fault) -> FormatError {
        FormatError { place: format!("tensor {:?}", self.name), offset: self.range.start as u64, fault }
    }
}

// === impl TensorTable ===

impl TensorTable {
    /// A table of `entries`, whose ranges the caller has checked against the file.
    pub(crate) fn new(entries: Vec<TensorEntry>) -> Result<Self, FormatError> {
        check_disjoint(&entries)?;
        let by_name = index_by_name(&entries)?;
        Ok(TensorTable { entries, by_name })
    }

    pub(crate) fn entries(&self) -> &[TensorEntry] {
        &self.entries
    }

    pub(crate) fn find(&self, name: &str) -> Option<&TensorEntry> {
        let found = self.by_name.binary_search_by_key(&name, |&index| &self.entries[index].name).ok()?;
        Some(&self.entries[self.by_name[found]])
    }
}

fn index_by_name(entries: &[TensorEntry]) -> Result<Vec<usize>, FormatError> {
    let mut by_name: Vec<usize> = (0..entries.len()).collect();
    by_name.sort_by_key(|&index| &entries[index].name);
    let duplicate = adjacent(&by_name).find(|&(a, b)| entries[a].name == entries[b].name);
    duplicate.map_or(Ok(()), |(_, second)| Err(entries[second].error(Fault::DuplicateName)))?;
    Ok(by_name)
}

fn check_disjoint(entries: &[TensorEntry]) -> Result<(), FormatError> {
    let mut by_start: Vec<usize> = (0..entries.len()).collect();
    by_start.sort_by_key(|&index| entries[index].range.start);
    let overlap = adjacent(&by_start).find(|&(a, b)| entries[b].range.start < entries[a].range.end);
    overlap.map_or(Ok(()), |(first, second)| {
        Err(entries[second].error(Fault::Overlap { other: entries[first].name.clone() }))
    })
}

fn adjacent(indices: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    indices.iter().copied().zip(indices.iter().copied().skip(1))
}

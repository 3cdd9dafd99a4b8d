//! A tensor: a name, a shape, an encoding and the bytes that hold its values.
//!
//! [`TensorTable`] owns the descriptions that a container declared and finds them by name.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use crate::encoding::Encoding;
use crate::error::{CheckpointError, Fault, FolderError, FormatError};
use crate::folder::Quantized;

/// A checked view of one tensor in an open checkpoint.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    /// The name that GGUF files have for it, for example `blk.0.attn_q.weight`; never empty.
    pub name: &'a str,
    /// Row-major, outermost dimension first: a GGUF `[576, 49152]` is `[49152, 576]` here. Never empty, no zeros.
    pub shape: &'a [usize],
    /// How each row is stored.
    pub encoding: Encoding,
    source: &'a Source,
    maps: &'a [Mmap],
    /// Of the model, for messages.
    path: &'a Path,
}

/// One tensor as a container declares it, already checked on its own.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    /// Outermost first.
    pub(crate) shape: Vec<usize>,
    pub(crate) encoding: Encoding,
    pub(crate) source: Source,
}

/// Where the bytes of a tensor come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// They lie in a file as they are.
    File(Piece),
    /// They follow from the model's settings.
    Derived(Vec<u8>),
    /// They are made, at each reading, of a quantizer's tensors.
    Quantized(Quantized),
}

/// Bytes of one of a checkpoint's files, within its bounds.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Index of the file.
    pub(crate) file: usize,
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

impl<'a> Tensor<'a> {
    pub(crate) fn new(entry: &'a TensorEntry, maps: &'a [Mmap], path: &'a Path) -> Self {
        let TensorEntry { name, shape, encoding, source } = entry;
        Tensor { name, shape, encoding: *encoding, source, maps, path }
    }

    /// Exactly [`size_bytes`](Self::size_bytes) bytes, rows one after another. No alignment is promised.
    ///
    /// Of a weight that its file has in another layout, they are made at each call, and as large as the weight.
    ///
    /// # Errors
    /// If the weight has scales that the encoding cannot hold.
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>, CheckpointError> {
        let Source::Quantized(quantized) = self.source else {
            return Ok(Cow::Borrowed(self.mapped().unwrap_or_default()));
        };
        quantized.reblock(self.maps).map(Cow::Owned).map_err(|why| {
            let cause = FolderError::Tensor { tensor: quantized.tensor.clone(), why };
            CheckpointError::Folder { path: self.path.to_owned(), cause: Box::new(cause) }
        })
    }

    /// The same bytes where they lie, if that is how the file has them: looking at a few rows touches no others.
    pub fn mapped(&self) -> Option<&'a [u8]> {
        match self.source {
            Source::File(piece) => Some(piece.of(self.maps)),
            Source::Derived(bytes) => Some(bytes),
            Source::Quantized(_) => None,
        }
    }

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
        self.n_cols() / self.encoding.block_len() * self.encoding.block_bytes()
    }

    /// Bytes of all rows, in their encoding.
    pub fn size_bytes(&self) -> usize {
        self.n_rows() * self.row_bytes()
    }
}

impl fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not derived: the files may be gigabytes.
        write!(f, "{} {} {:?}", self.name, self.encoding, self.shape)
    }
}

// === impl TensorEntry ===

impl TensorEntry {
    fn error(&self, fault: Fault) -> FormatError {
        let offset = self.pieces().next().map_or(0, |piece| piece.range.start as u64);
        FormatError { place: format!("tensor {:?}", self.name), offset, fault }
    }

    /// The parts of files that the tensor is made of.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = &Piece> {
        let pieces = match &self.source {
            Source::File(piece) => vec![piece],
            Source::Derived(_) => vec![],
            Source::Quantized(quantized) => quantized.pieces(),
        };
        pieces.into_iter()
    }
}

// === impl Piece ===

impl Piece {
    /// The bytes. In bounds: every container checks ranges against their files before it makes a piece of them.
    pub(crate) fn of<'a>(&self, maps: &'a [Mmap]) -> &'a [u8] {
        &maps[self.file][self.range.clone()]
    }
}

// === impl TensorTable ===

impl TensorTable {
    /// A table of `entries`, whose ranges the caller has checked against the files.
    pub(crate) fn new(entries: Vec<TensorEntry>) -> Result<Self, FormatError> {
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

/// Sees to it that no two tensors of a file, given by name and range, share bytes.
pub(crate) fn check_disjoint(tensors: &[(&str, Range<usize>)]) -> Result<(), FormatError> {
    let mut by_start: Vec<usize> = (0..tensors.len()).collect();
    // By the end, too: a tensor of no bytes may lie where another begins.
    by_start.sort_by_key(|&index| (tensors[index].1.start, tensors[index].1.end));
    let overlap = adjacent(&by_start).find(|&(a, b)| tensors[b].1.start < tensors[a].1.end);
    overlap.map_or(Ok(()), |(first, second)| {
        let (name, range) = &tensors[second];
        let fault = Fault::Overlap { other: tensors[first].0.to_owned() };
        Err(FormatError { place: format!("tensor {name:?}"), offset: range.start as u64, fault })
    })
}

fn adjacent(indices: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    indices.iter().copied().zip(indices.iter().copied().skip(1))
}

//! Errors: what can be wrong with the bytes or the sizes that a caller hands to this crate.
//!
//! Weights come from files that nobody has to trust, so everything about them is an error of this kind. Wrong lengths
//! of activations are a bug in the calling program; the ops assert them and say so under "Panics".

use lockstep_checkpoint::Encoding;
use thiserror::Error;

use crate::Isa;

/// Why weights, a table or a cache cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A row must be a whole number of blocks, and the matrix must fit the address space.
    #[error("{encoding} matrix of {n_rows} rows and {n_cols} columns: rows are no whole number of blocks of {block_len}, or too large", block_len = .encoding.block_len())]
    Shape {
        /// How the matrix is stored.
        encoding: Encoding,
        /// Rows asked for.
        n_rows: usize,
        /// Columns asked for.
        n_cols: usize,
    },
    /// The bytes given are not those of a matrix of this shape.
    #[error("{encoding} matrix of {n_rows} rows and {n_cols} columns: needs {expected} bytes, got {actual}")]
    Bytes {
        /// How the matrix is stored.
        encoding: Encoding,
        /// Rows asked for.
        n_rows: usize,
        /// Columns asked for.
        n_cols: usize,
        /// Bytes that the shape calls for.
        expected: usize,
        /// Bytes that were given.
        actual: usize,
    },
    /// A slice of a matrix lies outside of it, or cuts a block.
    #[error("{axis} {start}..{end} of a matrix of {len} {axis}: out of range, or not on a boundary of {align}")]
    Slice {
        /// "rows" or "columns".
        axis: &'static str,
        /// First index.
        start: usize,
        /// One past the last index.
        end: usize,
        /// Extent of the matrix along this axis.
        len: usize,
        /// What the boundaries must be a multiple of.
        align: usize,
    },
    /// The ends of the K-segments must ascend on boundaries of `align` up to the number of columns.
    #[error(
        "K-segments ending at {ends:?} do not divide {n_cols} columns on boundaries of {align}, or are over {limit}"
    )]
    Segments {
        /// The ends given.
        ends: Vec<usize>,
        /// Columns of the matrix.
        n_cols: usize,
        /// What every end must be a multiple of.
        align: usize,
        /// The most segments allowed.
        limit: usize,
    },
    /// The subtrees must cover the segments in order, without gap or overlap.
    #[error("subtrees {subtrees:?} do not cover {n_segments} K-segments in order")]
    Subtrees {
        /// The segment ranges given, as (start, end).
        subtrees: Vec<(usize, usize)>,
        /// Segments there are.
        n_segments: usize,
    },
    /// A rotation table with these sizes makes no sense or is over the limit.
    #[error("rotary table: {reason}")]
    RopeTable {
        /// What is wrong, with the numbers.
        reason: String,
    },
    /// A cache of this size makes no sense or cannot be addressed.
    #[error("KV cache: {reason}")]
    KvCache {
        /// What is wrong, with the numbers.
        reason: String,
    },
    /// This processor lacks the instructions asked for.
    #[error("this processor does not run {isa:?} kernels")]
    UnsupportedIsa {
        /// The instruction set asked for.
        isa: Isa,
    },
}

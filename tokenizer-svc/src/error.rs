//! What can be wrong with a tokenizer's files, or with a text or an id given to it.

use std::{io, path::PathBuf};

use lockstep_checkpoint::{CheckpointError, UnknownDecoder};

/// Why a tokenizer could not be loaded. The catalog adds which model it was.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The operating system refused to read a file.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is not what its name promises.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The model file could not be opened, or lacks a key.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Something is larger than we accept from a file that nobody vouches for.
    #[error("{what} is {found}, the limit is {limit}")]
    Limit {
        /// What was counted, with its unit.
        what: &'static str,
        /// Its size.
        found: u64,
        /// The largest accepted.
        limit: u64,
    },
    /// A sound file that asks for something this service does not do.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// Ids do not stand for fixed bytes.
    #[error(transparent)]
    Decoder(#[from] UnknownDecoder),
    /// The vocabulary contradicts itself.
    #[error("{0}")]
    Invalid(String),
    /// The tokenizers library panicked while it read the file.
    #[error("the tokenizer's description is malformed: {0}")]
    Panicked(String),
}

/// Why a text or a list of ids got no answer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenizeError {
    /// A break offset lies before its predecessor or outside the text.
    #[error("break offset {offset} is not between {at_least} and {at_most}")]
    BreakOffset {
        /// Its index among the break offsets.
        idx: usize,
        /// The offset. Unit: bytes.
        offset: u32,
        /// The offset before it.
        at_least: u32,
        /// The text's length.
        at_most: usize,
    },
    /// An id that no token of this vocabulary has.
    #[error("token id {id} is not below the vocabulary size {vocab_size}")]
    TokenId {
        /// Its index in the list.
        idx: usize,
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab_size: u32,
    },
    /// More blanks in a row than can be split into words.
    #[error("the text has more than {limit} blanks in a row")]
    BlankRun {
        /// The most allowed. Unit: characters.
        limit: usize,
    },
    /// The tokenizers library failed on the text.
    #[error("encoding failed: {0}")]
    Pipeline(String),
}

/// Refuses a size over its limit.
///
/// # Errors
/// [`LoadError::Limit`] if `found` is more than `limit`.
pub(crate) fn check_limit(what: &'static str, found: usize, limit: usize) -> Result<(), LoadError> {
    if found <= limit {
        return Ok(());
    }
    Err(LoadError::Limit { what, found: found as u64, limit: limit as u64 })
}

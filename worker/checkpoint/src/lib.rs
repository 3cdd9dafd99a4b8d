//! Checkpoints: model files on disk, seen as metadata, tensor names, shapes, encodings and byte ranges.
//!
//! There are no tensors and no devices here: a [`Tensor`] is a checked view of bytes as they lie in the mapped file.
//! Everything in the file is untrusted until [`Checkpoint::open`] has returned; after that every view is in bounds,
//! has the length that its shape and encoding call for, and overlaps no other.
//!
//! # Layout
//!
//! - `checkpoint`: the opened file, the only way in.
//! - `mmap`: the file as bytes; the crate's only `unsafe`.
//! - `gguf`: the GGUF container; its `gguf::parse` turns bytes into a `Contents`. Another container joins by
//!   giving the same `Contents` and one more arm in `checkpoint`. [`GgufHeader`] writes such files.
//! - `metadata`, `tensor`, `encoding`: what a container contains.
//! - `error`: everything that can be wrong with a file, in one line each.

mod checkpoint;
mod encoding;
mod error;
mod gguf;
mod metadata;
mod mmap;
mod tensor;

pub use checkpoint::Checkpoint;
pub use encoding::Encoding;
pub use error::{CheckpointError, Fault, FormatError};
pub use gguf::writer::{GgufData, GgufHeader};
pub use metadata::{Array, Metadata, Value};
pub use tensor::Tensor;

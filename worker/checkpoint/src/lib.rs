//! Checkpoints: model files on disk, seen as metadata, tensor names, shapes, encodings and byte ranges.
//!
//! There are no tensors and no devices here: a [`Tensor`] is a checked view of bytes as they lie in the mapped files.
//! Everything in them is untrusted until [`Checkpoint::open`] has returned; after that every view is in bounds,
//! has the length that its shape and encoding call for, and overlaps no other.
//!
//! # Layout
//!
//! - `checkpoint`: the opened model, the only way in.
//! - `mmap`: a file as bytes; the crate's only `unsafe`.
//! - `gguf`: the GGUF container; its `gguf::parse` turns bytes into a `Contents`. [`GgufHeader`] writes such files.
//! - `folder`: Hugging Face's, `config.json` and safetensors, turned into the same `Contents`: one vocabulary of keys and
//!   tensor names, that of GGUF, whatever the container.
//! - `metadata`, `vocabulary`, `special_tokens`, `tensor`, `encoding`: what a container contains.
//! - `error`: everything that can be wrong with a file, in one line each.

mod checkpoint;
mod encoding;
mod error;
mod folder;
mod gguf;
mod metadata;
mod mmap;
mod special_tokens;
mod tensor;
mod vocabulary;

pub use checkpoint::Checkpoint;
pub use encoding::Encoding;
pub use error::{CheckpointError, Fault, FolderError, FormatError};
pub use gguf::writer::{GgufData, GgufHeader};
pub use metadata::{Array, Metadata, ROPE_HALVES, Value};
pub use special_tokens::{END_OF_TURN, SpecialTokens};
pub use tensor::Tensor;
pub use vocabulary::{Spelling, Token, TokenBytes, UnknownDecoder, Vocabulary};

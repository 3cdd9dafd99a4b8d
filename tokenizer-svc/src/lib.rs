//! The tokenizer service: text to token ids and back, for every model in its catalog.
//!
//! # Layout, in the order a request meets it
//!
//! * [`tokenizer`]: a vocabulary with its rules; encoding. [`detokenizer`]: ids to text as they come.
//! * Where tokenizers come from: `hf` (a Hugging Face folder), `gguf` (a model file's own vocabulary), both read
//!   inside `containment`. [`profile`]: what the files say besides.
//! * [`error`]: what can be wrong.
#![forbid(unsafe_code)]

pub mod detokenizer;
pub mod error;
pub mod profile;
pub mod tokenizer;

mod containment;
mod gguf;
mod hf;

//! The tokenizer service: text to token ids and back, for every model in its catalog. Stateless: any instance with the
//! same catalog answers alike.
//!
//! # Layout, in the order a request meets it
//!
//! * [`config`], [`service`], `request` (what a valid request is), `status`, [`metrics`].
//! * `workers`: the bounded threads that encode.
//! * [`catalog`]: models by name. [`profile`]: what a model's files say besides how text becomes ids.
//! * [`tokenizer`]: a vocabulary with its rules; encoding. [`detokenizer`]: the text of ids.
//! * Where tokenizers come from: `hf` (a Hugging Face folder), `gguf` (a model file's own vocabulary), both read
//!   inside `containment`. [`error`]: what can be wrong with them.
#![forbid(unsafe_code)]

pub mod catalog;
pub mod config;
pub mod detokenizer;
pub mod error;
pub mod metrics;
pub mod profile;
pub mod service;
pub mod tokenizer;

mod containment;
#[cfg(test)]
mod fixtures;
mod gguf;
mod hf;
mod request;
mod status;
mod workers;

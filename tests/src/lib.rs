//! What the tests of the cluster share.
//!
//! # Layout
//!
//! - [`tiny_model`]: writes small random models in every shape and encoding.
//! - [`oracle`]: a Llama in `f64`, the standard for logits.
#![forbid(unsafe_code)]

pub mod oracle;
pub mod tiny_model;

//! What the tests of the cluster share.
//!
//! # Layout
//!
//! - [`oracle`]: a Llama in `f64`, the standard for logits.
#![forbid(unsafe_code)]

pub mod oracle;

//! Kernels: the arithmetic of a quantized transformer over plain slices, on the CPU.
//!
//! The crate keeps the *lockstep rule*: each output element depends only on its own row's inputs, is summed in one fixed
//! order, and is bit-identical for any number of rows in a call, any number of threads, any instruction set, and any
//! split of a layer over ranks at K-segment boundaries. Every op has a scalar twin in [`plain`] and is tested to equal
//! it bit for bit.
//!
//! # Layout
//!
//! - [`EncodedRows`]: a matrix as it lies in a model file; [`dequantize`]: what its bytes mean.
//! - [`PackedMatrix`]: the same weights in the run-time layout, for products that are summed by K-segments;
//!   [`SumTree`]: the order in which segment sums are added, on one rank or on many.
//! - [`Cpu`]: threads and an instruction set; all ops are its methods. Products in `cpu/matmul.rs`, their inputs
//!   ([`Activations`]) in `cpu/activations.rs`, attention in `cpu/attention.rs`, normalization in `cpu/elementwise.rs`,
//!   each written once over the vectors of `cpu/simd.rs`.
//! - [`KvCache`], [`RopeTable`]: what attention keeps and looks up.
//! - [`plain`]: the standard.
//! - [`read_bandwidth`]: the limit of what streams through memory.
//!
//! Wrong sizes of activations are bugs of the caller and panic; whatever comes from a file is checked and gives a
//! [`KernelError`].

mod bandwidth;
mod cpu;
pub mod cuda;
mod encoded;
mod error;
mod exp;
mod int8;
mod kv_cache;
mod memory;
mod packed;
pub mod plain;
mod quant;
mod rope;
mod segments;
mod sum_tree;

pub use bandwidth::read_bandwidth;
pub use cpu::{Activations, AttentionBatch, AttentionRow, Cpu, Forms, Isa, MAX_PRODUCTS, NewTokens, Product};
pub use encoded::EncodedRows;
pub use error::KernelError;
pub use kv_cache::{KvCache, KvEncoding, MAX_HEAD_DIM};
pub use packed::PackedMatrix;
pub use quant::dequantize;
pub use rope::{MAX_TABLE_BYTES, RopeStyle, RopeTable};
pub use sum_tree::{MAX_SEGMENTS, SumOrder, SumTree, Terms};

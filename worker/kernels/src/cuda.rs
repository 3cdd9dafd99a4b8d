//! CUDA: an NVIDIA GPU as a place to compute, without a toolkit at build time and without one where nothing is new.
//!
//! The libraries are opened at run time, so one program runs with and without them. The driver's, `libcuda`, is needed
//! for anything; `libnvrtc`, the compiler, only for kernels that the disk cache lacks.
//!
//! # Layout
//!
//! - [`unavailable`], [`Device`]: whether there is a GPU, and one that is open: a context and one stream, in whose order
//!   all work runs.
//! - [`Buffer`]: memory of a device; [`HostBuffer`]: memory of the host for copies that nobody waits for.
//! - [`Program`]: a kernel source of `worker/kernels/cuda` with its defines; [`variants`] lists all that are used.
//! - [`compile`]: a program to machine code, by NVRTC; [`Resources`]: what that takes; [`KernelCache`]: code on disk.
//! - [`Kernel`]: an entry point of a program that a device has loaded, and its launches; [`Graph`]: many of them as one.
//! - `blas`: NVIDIA's library for products of dense matrices, for those who ask for it.
//! - [`Event`]: how far a device is.
//! - `collective`: what a group of ranks needs of a device and its buffers.
//! - [`Gpu`]: the ops, all of them its methods, on [`GpuMatrix`] (packed as `packing` says), [`GpuTable`], [`GpuTensor`],
//!   [`GpuInput`], [`GpuTerms`], [`GpuVocab`] and [`GpuKvCache`]; `pool`: the memory that steps use in turn; `step`: how a
//!   step lies on the device, its queries cut into tiles; [`Recording`]: a step that is queued again as one; [`Answer`]:
//!   what a step brings to the host when it is done; `page`: the memory that words and answers are copied through.

mod architecture;
mod blas;
mod cache;
mod collective;
mod compiler;
mod device;
mod error;
mod event;
mod gpu;
mod graph;
mod host;
mod kernels;
mod library;
mod matrix;
mod memory;
mod packing;
mod page;
mod pool;
mod product;
mod program;
mod recording;
mod resources;
mod step;

pub use architecture::Architecture;
pub use blas::{BlasVersion, blas_version};
pub use cache::KernelCache;
pub use compiler::{Compiled, CompilerVersion, MachineCode, compile, compiler_version};
pub use device::{Device, DeviceInfo, DeviceLimits, devices, driver_version, unavailable};
pub use error::CudaError;
pub use event::Event;
use gpu::MAX_VOCAB;
pub use gpu::{
    Answer, ChoiceRule, Exchange, ExchangeError, ExchangeShape, Exchanges, Gpu, GpuHeads, GpuInput, GpuKvCache,
    GpuStep, GpuTable, GpuTensor, GpuTerms, GpuVocab, MAX_CHOICES, MAX_WEIGHTS, table_bits_per_weight,
};
pub use graph::Graph;
pub use host::HostBuffer;
pub use kernels::{Arg, Kernel};
pub use matrix::{GpuMatrix, RowParallelSum};
pub use memory::{Buffer, MemoryInfo};
pub use packing::bits_per_weight;
pub use program::{Program, Source, Variant, variants};
pub use recording::Recording;
pub use resources::Resources;
pub use step::{CHOSEN, RowChoice, StepRows, StepShape};

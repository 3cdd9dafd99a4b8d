//! Errors: what keeps a GPU from being used, with the facts needed to act.

use std::path::PathBuf;

use cudarc::{cublaslt::result::CublasError, driver::result::DriverError, nvrtc::result::NvrtcError};
use thiserror::Error;

use super::{Architecture, CompilerVersion, MemoryInfo, Program};

/// Why a GPU cannot do what it was asked for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A library is not installed, or not where the loader looks.
    #[error("{purpose} was not found: no {} in {searched}", .names.join(" or "))]
    MissingLibrary {
        /// The file names that were tried.
        names: &'static [&'static str],
        /// What the library is.
        purpose: &'static str,
        /// Where the loader looks.
        searched: String,
    },
    /// The driver is older than the functions that are called.
    #[error("the NVIDIA driver runs CUDA {major}.{minor}; {} or newer is needed", super::device::MIN_DRIVER)]
    OldDriver {
        /// Newest CUDA version that the driver runs.
        major: u32,
        /// Its second number.
        minor: u32,
    },
    /// There is no such device.
    #[error("there is no CUDA device {ordinal}: the driver sees {n_devices} (CUDA_VISIBLE_DEVICES hides some)")]
    NoDevice {
        /// The device asked for.
        ordinal: usize,
        /// How many there are.
        n_devices: usize,
    },
    /// The device lacks instructions that the kernels use.
    #[error("{name} has compute capability {major}.{minor}; kernels need 8.0 or newer")]
    OldDevice {
        /// The device's name.
        name: String,
        /// Compute capability.
        major: u32,
        /// Its second number.
        minor: u32,
    },
    /// An architecture that is not written as `sm_80` or `sm_90a`.
    #[error("`{text}` is no architecture of sm_80 or newer, such as sm_80 or sm_90a")]
    Architecture {
        /// What was given.
        text: String,
    },
    /// Attention of a shape that kernels cannot have.
    #[error("{n_heads} query heads and {n_kv_heads} KV heads of {head_dim}: a GPU needs heads of a multiple of 16")]
    Heads {
        /// Query heads.
        n_heads: usize,
        /// KV heads.
        n_kv_heads: usize,
        /// Width of a head.
        head_dim: usize,
    },
    /// A cache of a shape that kernels cannot have.
    #[error(
        "KV cache of {n_layers} layers, {n_blocks} blocks of {block_size}: none may be 0, blocks are multiples of 16"
    )]
    KvCache {
        /// Layers.
        n_layers: usize,
        /// Blocks.
        n_blocks: usize,
        /// Positions of a block.
        block_size: usize,
    },
    /// A step that points to what is not there: a bug of the caller.
    #[error("a step points to tokens, slots, blocks, positions or rows that are not there, or has another shape")]
    Step,
    /// More answers at once than there is memory for: a bug of the caller.
    #[error("{limit} answers of a kind are under way, no more are possible")]
    Answers {
        /// The most there are.
        limit: usize,
    },
    /// A step that chooses more tokens than there is room for.
    #[error("a step chooses {n_rows} tokens; the limit is {}", super::MAX_CHOICES)]
    Choices {
        /// Rows of logits.
        n_rows: usize,
    },
    /// Ends of ranks' ranges that cut no vocabulary.
    #[error("ranges of a vocabulary end at {ends:?}: they must ascend, up to {MAX_VOCAB}", MAX_VOCAB = super::MAX_VOCAB)]
    Vocab {
        /// What was given.
        ends: Vec<u32>,
    },
    /// The device has not done what it was given.
    #[error("the GPU has not done a step within {timeout:?}")]
    Stuck {
        /// How long was waited.
        timeout: std::time::Duration,
    },
    /// Weights that cannot be packed.
    #[error(transparent)]
    Weights(#[from] crate::KernelError),
    /// The driver reported an error. After some of them, such as a wild pointer in a kernel, nothing works any more in
    /// this process.
    #[error("{op}: {}", describe(.error))]
    Driver {
        /// The function called.
        op: &'static str,
        /// What it reported.
        error: DriverError,
    },
    /// Not enough device memory.
    #[error("{wanted} bytes of device memory are not to be had: {} of {} are free", .memory.free, .memory.total)]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// What the device has.
        memory: MemoryInfo,
    },
    /// More values than can be addressed.
    #[error("{len} values of {size} bytes are more than can be addressed")]
    TooLarge {
        /// Values asked for.
        len: usize,
        /// Bytes of each.
        size: usize,
    },
    /// A copy beyond a buffer's end.
    #[error("a copy of {len} values at {offset} does not fit into a buffer of {buffer_len}")]
    Range {
        /// First value.
        offset: usize,
        /// Values to copy.
        len: usize,
        /// Values of the buffer.
        buffer_len: usize,
    },
    /// The kernel source is wrong.
    #[error("{program} does not compile for {architecture}:\n{log}")]
    Compile {
        /// The program.
        program: Program,
        /// For which architecture.
        architecture: Architecture,
        /// What the compiler said.
        log: String,
    },
    /// The compiler reported another error.
    #[error("{op}: {error:?}")]
    Compiler {
        /// The function called.
        op: &'static str,
        /// What it reported.
        error: NvrtcError,
    },
    /// cuBLASLt reported an error.
    #[error("{op}: {:?}", .error.0)]
    Blas {
        /// The function called.
        op: &'static str,
        /// What it reported.
        error: CublasError,
    },
    /// The driver refused a compiled program.
    #[error(
        "{program}, compiled by NVRTC {compiler}, cannot be loaded by a driver for CUDA {}.{}: {}; NVRTC must not be of a \
         newer major version than the driver", .driver.0, .driver.1, describe(.error)
    )]
    Load {
        /// The program.
        program: Program,
        /// What compiled it.
        compiler: CompilerVersion,
        /// CUDA version of the driver.
        driver: (u32, u32),
        /// What the driver reported.
        error: DriverError,
    },
    /// A program lacks an entry point.
    #[error("{program} has no entry point `{name}`: {}", describe(.error))]
    NoEntry {
        /// The program.
        program: Program,
        /// The entry point asked for.
        name: String,
        /// What the driver reported.
        error: DriverError,
    },
    /// A launch with more arguments than any kernel takes.
    #[error("a launch with {n_args} arguments; no kernel takes over {limit}")]
    Arguments {
        /// Arguments given.
        n_args: usize,
        /// The most allowed.
        limit: usize,
    },
    /// The kernel cache's folder cannot be used.
    #[error("kernel cache {}: {error}", .path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What the system reported.
        error: std::io::Error,
    },
}

impl CudaError {
    /// For `map_err`: an error that `op` of the driver reported.
    pub(super) fn driver(op: &'static str) -> impl Fn(DriverError) -> Self {
        move |error| Self::Driver { op, error }
    }

    /// For `map_err`: an error that `op` of the compiler reported.
    pub(super) fn compiler(op: &'static str) -> impl Fn(NvrtcError) -> Self {
        move |error| Self::Compiler { op, error }
    }

    /// For `map_err`: an error that `op` of cuBLASLt reported.
    pub(super) fn blas(op: &'static str) -> impl Fn(CublasError) -> Self {
        move |error| Self::Blas { op, error }
    }
}

/// The driver's own words for its error. Only a loaded driver makes such errors, so it can be asked.
fn describe(error: &DriverError) -> String {
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    format!("{:?}: {}", error.0, text.unwrap_or_else(|_| "no description".into()))
}

//! The model: a Llama, cut into shards, and the one forward pass that every backend runs.
//!
//! # Layout
//!
//! * [`config`]: the shape of a model, read and checked once from a checkpoint.
//! * [`shard`]: which ranges of every weight a rank holds, and the fixed order of sums across ranks.
//! * [`ops`]: what a backend must be able to do; the only place that knows tensors and kernels.
//! * [`linear`], [`attention`], [`mlp`], [`llama`]: the layers, read top to bottom.
//! * [`batch`], [`output`]: the rows of one step as the layers see them, and what they give.
//! * [`embedding`]: the table of token embeddings, which stays in the file.
//! * [`load`]: from a checkpoint to a loaded shard.

pub mod attention;
pub mod batch;
pub mod config;
pub mod embedding;
pub mod linear;
pub mod llama;
pub mod load;
pub mod mlp;
pub mod ops;
pub mod output;
pub mod shard;

use std::path::PathBuf;

use lockstep_checkpoint::CheckpointError;
use lockstep_collectives::CollectiveError;
use lockstep_kernels::cuda::CudaError;

use crate::device::DeviceError;

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is damaged or lacks something.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The file is sound, but describes a model that Lockstep does not run.
    #[error("{what}: {why}")]
    Unsupported {
        /// The metadata key or the tensor.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The model cannot be cut into so many shards.
    #[error("world size {world_size} is not possible for this model: {why}")]
    WorldSize {
        /// What was asked for.
        world_size: usize,
        /// What stands against it.
        why: String,
    },
    /// Two models that are to speak of the same tokens do not.
    #[error("{} and {} have different vocabularies: {why}", path.display(), other.display())]
    Vocabulary {
        /// One file.
        path: PathBuf,
        /// The other.
        other: PathBuf,
        /// A difference, in the same order.
        why: String,
    },
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The weights fill the device.
    #[error(
        "no room for keys and values: weights take {weights_mib} MiB of a GPU of {memory_mib} MiB, of which \
         engine.gpu_memory_fraction = {fraction} may be used"
    )]
    NoKvRoom {
        /// The device's memory.
        memory_mib: usize,
        /// The part of it that may be used.
        fraction: f64,
        /// The weights of the rank that has most.
        weights_mib: usize,
    },
    /// A kernel refused a weight.
    #[error("tensor {tensor}")]
    Tensor {
        /// Its name in the checkpoint.
        tensor: String,
        /// Why.
        source: OpError,
    },
}

/// Why an operation on a backend failed.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// From our kernels.
    #[error(transparent)]
    Kernel(#[from] lockstep_kernels::KernelError),
    /// From a GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A row whose token is still to be chosen came to a backend that does not choose.
    #[error("a row's token is still to be chosen")]
    TokensUnknown,
    /// From candle.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
}

/// Why a step failed on this rank. See [`StepError::is_of_device`].
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Other ranks did not do their part.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The backend failed.
    #[error(transparent)]
    Op(#[from] OpError),
    /// The plan does not fit what this rank knows.
    #[error("step {step_id}: {why}")]
    Plan {
        /// The step.
        step_id: u64,
        /// What does not fit.
        why: String,
    },
}

// === impl StepError ===

impl StepError {
    /// Whether this rank's GPU reported it. After most of such errors a GPU does nothing more for the process, whatever it
    /// is asked, and it does not say after which.
    pub fn is_of_device(&self) -> bool {
        matches!(self, Self::Op(OpError::Cuda(CudaError::Driver { .. } | CudaError::Stuck { .. })))
    }
}

impl From<CudaError> for StepError {
    fn from(error: CudaError) -> Self {
        Self::Op(error.into())
    }
}

//! A recording: the launches of a step of one shape, queued again as one.
//!
//! All that changes from step to step lies in the step's words, which are sent anew. What the step computes on its way lies
//! in pieces of the pool, which come and go: others may have used them since, but not while the recording runs, since all
//! of it is in the order of one stream. The pool never gives memory back, so they are still there.

use super::{CudaError, Device, Gpu, GpuKvCache, GpuStep, GpuTensor, Graph, StepRows, StepShape, pool::Target};

/// The launches of a step of one shape.
#[derive(Debug)]
pub struct Recording {
    graph: Graph,
    shape: StepShape,
    step: GpuStep,
    result: RecordedResult,
}

/// What a recorded step ends in, until anything else is queued: its memory is the pool's again, like all between.
#[derive(Clone, Copy, Debug)]
pub(super) struct RecordedResult {
    pub(super) target: Target,
    pub(super) n_rows: usize,
    pub(super) width: usize,
}

impl Recording {
    /// Records what `compute` queues for a step of a shape that has begun, from [`Gpu::embed`] to its result, which it
    /// returns with the step. Nothing is done yet. A step of this shape must have been computed just before, so that kernels
    /// and memory are there.
    ///
    /// # Errors
    /// That of `compute`, or the driver's.
    pub fn new<E: From<CudaError>>(
        device: &Device,
        shape: StepShape,
        compute: impl FnOnce() -> Result<(GpuTensor, GpuStep), E>,
    ) -> Result<Self, E> {
        let mut computed = None;
        let graph = device.capture(|| {
            computed = Some(compute()?);
            Ok::<(), E>(())
        })?;
        let (result, step) = computed.expect("what was captured ended well");
        Ok(Self { graph, shape, step, result: result.recorded() })
    }

    pub(super) fn result(&self) -> RecordedResult {
        self.result
    }
}

impl Gpu {
    /// Computes a step of the recording's shape. `kv`, and the weights that were used when it was recorded, must still be
    /// there. As with [`Gpu::begin`], the step before may still run.
    ///
    /// # Errors
    /// As [`Gpu::begin`], or the driver's.
    pub fn replay(&mut self, recording: &mut Recording, rows: &StepRows<'_>, kv: &GpuKvCache) -> Result<(), CudaError> {
        self.send_again(&mut recording.step, rows, kv, recording.shape)?;
        // SAFETY: what was recorded were launches of ours with these addresses: the pool's, which live as long as this
        // Gpu, and those of weights and of the cache, which the caller keeps.
        unsafe { recording.graph.launch() }
    }
}

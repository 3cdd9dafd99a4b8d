//! A recording: the launches of a step of one shape, queued again as one.
//!
//! All that changes from step to step lies in the step's words and its first activations, which are sent anew. What the
//! step computes on its way lies in pieces of the pool, which come and go: others may have used them since, but not
//! while the recording runs, since all of it is in the order of one stream. The pool never gives memory back, so they are
//! still there.

use super::{CudaError, Device, Gpu, GpuKvCache, GpuStep, GpuTensor, Graph, StepRows, StepShape, pool::Target};

/// The launches of a step of one shape.
#[derive(Debug)]
pub struct Recording {
    graph: Graph,
    shape: StepShape,
    step: GpuStep,
    /// Where the first activations go.
    activations: Target,
    /// Where the last ones are.
    result: GpuTensor,
}

impl Recording {
    /// Records what `compute` queues for a step of a shape, from its first activations to its result, which it returns with
    /// the step. Nothing is done yet. A step of this shape must have been computed just before, so that kernels and memory
    /// are there.
    ///
    /// # Errors
    /// That of `compute`, or the driver's.
    pub fn new<E: From<CudaError>>(
        device: &Device,
        shape: StepShape,
        activations: GpuTensor,
        compute: impl FnOnce(GpuTensor) -> Result<(GpuTensor, GpuStep), E>,
    ) -> Result<Self, E> {
        let target = activations.target();
        let mut computed = None;
        let graph = device.capture(|| {
            computed = Some(compute(activations)?);
            Ok::<(), E>(())
        })?;
        let (result, step) = computed.expect("what was captured ended well");
        Ok(Self { graph, shape, step, activations: target, result })
    }
}

impl Gpu {
    /// Computes a step of the recording's shape: `activations` are those of its rows. `kv`, and the weights that were used
    /// when it was recorded, must still be there.
    ///
    /// # Errors
    /// As [`Gpu::begin`], or the driver's.
    ///
    /// # Panics
    /// If the step does not have the shape, or the activations are more than its rows have.
    pub fn replay<'a>(
        &mut self,
        recording: &'a mut Recording,
        rows: &StepRows<'_>,
        kv: &GpuKvCache,
        activations: &[f32],
    ) -> Result<&'a GpuTensor, CudaError> {
        assert_eq!(StepShape::of(rows), Some(recording.shape), "a step of the recorded shape");
        self.send_again(&mut recording.step, rows, kv, recording.shape)?;
        self.send_activations(recording.activations, activations)?;
        // SAFETY: what was recorded were launches of ours with these addresses: the pool's, which live as long as this
        // Gpu, and those of weights and of the cache, which the caller keeps.
        unsafe { recording.graph.launch()? };
        Ok(&recording.result)
    }
}

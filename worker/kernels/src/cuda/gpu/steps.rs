//! A step on the device, and how it gets there.

use std::time::Duration;

use bytemuck::Pod;

use super::{
    super::{
        CudaError, Device, Event, HostBuffer,
        pool::{Piece, Target},
        step::{Blocks, Layout, Part, StepData, StepRows, StepShape},
    },
    Gpu, GpuKvCache,
};

/// Longest time that a step may take. A device that is busy for longer hangs.
const MAX_STEP: Duration = Duration::from_secs(60);

/// The rows of a step, on the device.
#[derive(Debug)]
pub struct GpuStep {
    pub(super) words: Piece<u32>,
    pub(super) layout: Layout,
}

/// Host memory from which a step's words, or its first activations, are on their way to the device.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) host: HostBuffer<u8>,
    /// Marks the end of the copy.
    pub(super) sent: Event,
}

// === impl Gpu ===

impl Gpu {
    /// Brings the rows of a step to the device, filled up if it has a shape.
    ///
    /// # Errors
    /// A slot, a block or a position that is not there; or the driver's.
    pub fn begin(
        &mut self,
        step: &StepRows<'_>,
        kv: &GpuKvCache,
        shape: Option<StepShape>,
    ) -> Result<GpuStep, CudaError> {
        let StepData { words, layout } = self.lay_out(step, kv, shape)?;
        let piece = self.pool.take(words.len())?;
        self.words.send(&self.device, &words, piece.target())?;
        Ok(GpuStep { words: piece, layout })
    }

    /// Sends the words of another step of the same shape.
    pub(in crate::cuda) fn send_again(
        &mut self,
        to: &mut GpuStep,
        step: &StepRows<'_>,
        kv: &GpuKvCache,
        shape: StepShape,
    ) -> Result<(), CudaError> {
        let StepData { words, .. } = self.lay_out(step, kv, Some(shape))?;
        assert_eq!(words.len(), to.words.len(), "words of a shape");
        self.words.send(&self.device, &words, to.words.target())
    }

    /// Sends activations to where others of the same shape were.
    pub(in crate::cuda) fn send_activations(&mut self, to: Target, values: &[f32]) -> Result<(), CudaError> {
        self.activations.send(&self.device, values, to)
    }

    pub(super) fn lay_out(
        &self,
        step: &StepRows<'_>,
        kv: &GpuKvCache,
        shape: Option<StepShape>,
    ) -> Result<StepData, CudaError> {
        let blocks = kv.blocks();
        let Blocks { n_blocks, block_size } = blocks;
        let n_slots = n_blocks * block_size;
        let reaches = |row: &crate::AttentionRow| {
            let position = row.position as usize;
            position < self.rope.n_positions
                && step.tables.get(row.table).is_some_and(|table| position / block_size < table.len())
        };
        let is_sound = step.slots.len() == step.rows.len()
            && step.logits_rows.len() == step.logits_attention.len()
            && step.slots.iter().all(|slot| (*slot as usize) < n_slots)
            && step.logits_rows.iter().all(|row| (*row as usize) < step.slots.len())
            && step.rows.iter().chain(step.logits_attention).all(reaches)
            && step.tables.iter().flatten().all(|block| (*block as usize) < n_blocks);
        if !is_sound {
            return Err(CudaError::Step);
        }
        Ok(StepData::new(step, self.heads, blocks, shape))
    }
}

// === impl GpuStep ===

impl GpuStep {
    /// Where a part begins on the device.
    pub(super) fn at(&self, part: Part) -> u64 {
        self.words.pointer() + part.offset()
    }
}

// === impl Staging ===

impl Staging {
    pub(super) fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self { host: device.host_buffer(0)?, sent: device.event()? })
    }

    /// Queues that `values` go to the beginning of `to`. Waits until what it sent before has gone.
    pub(super) fn send<T: Pod>(&mut self, device: &Device, values: &[T], to: Target) -> Result<(), CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.sent.wait(MAX_STEP)?;
        if self.host.as_slice().len() < bytes.len() {
            self.host = device.host_buffer(bytes.len().next_power_of_two())?;
        }
        self.host.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: nobody touches the buffer before `sent` is reached.
        unsafe { to.queue_upload(device, &self.host, bytes.len())? };
        self.sent.record()
    }
}

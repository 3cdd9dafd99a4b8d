//! A step on the device, and how it gets there.

use std::{mem, sync::Arc};

use super::{
    super::{
        CudaError, Device,
        page::Page,
        pool::{Piece, Target},
        step::{Blocks, CHOSEN, Layout, Part, StepData, StepRows, StepShape},
    },
    Gpu, GpuKvCache, MAX_CHOICES,
};

/// Words of a step that there is room for from the start: 256 rows of sequences of 3,500 tokens in blocks of 16.
const WORDS: usize = 1 << 16;

/// The rows of a step, on the device.
#[derive(Debug)]
pub struct GpuStep {
    pub(super) words: Piece<u32>,
    pub(super) layout: Layout,
}

/// Where the words of two steps are on their way to the device, so that one can be queued while the other runs.
#[derive(Debug)]
pub(super) struct Staging {
    /// What the next step takes comes first.
    pages: [Page<u32>; 2],
    /// Words of the last step, for the vector to be used again.
    words: Vec<u32>,
}

// === impl Gpu ===

impl Gpu {
    /// Brings the rows of a step to the device, filled up if it has a shape. Does not wait for the step before, only for that
    /// before it to begin; and for all of the device if no step had so many words before.
    ///
    /// # Errors
    /// A token, a slot, a block or a position that is not there, or a step of another shape; more choices than
    /// [`MAX_CHOICES`]; or the driver's.
    pub fn begin(
        &mut self,
        step: &StepRows<'_>,
        kv: &GpuKvCache,
        shape: Option<StepShape>,
    ) -> Result<GpuStep, CudaError> {
        let StepData { words, layout } = self.lay_out(step, kv, shape)?;
        let piece = self.pool.take(words.len())?;
        self.send(words, piece.target())?;
        Ok(GpuStep { words: piece, layout })
    }

    /// Begins another step of the same shape in the place of the last.
    pub(in crate::cuda) fn send_again(
        &mut self,
        to: &mut GpuStep,
        step: &StepRows<'_>,
        kv: &GpuKvCache,
        shape: StepShape,
    ) -> Result<(), CudaError> {
        let StepData { words, .. } = self.lay_out(step, kv, Some(shape))?;
        assert_eq!(words.len(), to.words.len(), "words of a shape");
        self.send(words, to.words.target())
    }

    fn send(&mut self, words: Vec<u32>, to: Target) -> Result<(), CudaError> {
        self.staging.send(words, to)?;
        // Behind the copy, so that the host's own time before it does not count.
        self.begun = Arc::new(self.device.event()?);
        self.begun.record()
    }

    fn lay_out(
        &mut self,
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
        let is_there = |token: &u32| match token & CHOSEN {
            0 => self.table_rows.is_none_or(|n_rows| (*token as usize) < n_rows),
            _ => ((token ^ CHOSEN) as usize) < MAX_CHOICES,
        };
        let is_sound = step.slots.len() == step.rows.len()
            && step.tokens.len() == step.rows.len()
            && step.tokens.iter().all(is_there)
            && step.result_rows.len() == step.result_attention.len()
            && (step.choices.is_empty() || step.choices.len() <= step.result_rows.len())
            && step.slots.iter().all(|slot| (*slot as usize) < n_slots)
            && step.result_rows.iter().all(|row| (*row as usize) < step.slots.len())
            && step.rows.iter().chain(step.result_attention).all(reaches)
            && step.tables.iter().flatten().all(|block| (*block as usize) < n_blocks);
        if !is_sound {
            return Err(CudaError::Step);
        }
        if step.choices.len() > MAX_CHOICES {
            return Err(CudaError::Choices { n_rows: step.choices.len() });
        }
        let words = mem::take(&mut self.staging.words);
        StepData::new(words, step, self.heads, blocks, shape).ok_or(CudaError::Step)
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
        Ok(Self { pages: [Page::new(device, WORDS)?, Page::new(device, WORDS)?], words: Vec::new() })
    }

    /// Queues that `words` go to the beginning of `to`. Waits until what was sent before the last has gone.
    fn send(&mut self, words: Vec<u32>, to: Target) -> Result<(), CudaError> {
        self.pages[0].send(&words, to)?;
        self.pages.reverse();
        self.words = words;
        Ok(())
    }
}

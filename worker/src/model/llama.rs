//! Llama: the forward pass of one step, on one rank.

use std::{ops::Range, sync::Arc};

use lockstep_checkpoint::Checkpoint;
use lockstep_collectives::Collective;

use super::{
    OpError, StepError,
    attention::Attention,
    batch::{Batch, Rows},
    config::ModelConfig,
    linear::ColumnParallel,
    mlp::Mlp,
    ops::{Backend, StepRun},
};

/// One rank's shard of a model.
#[derive(Debug)]
pub struct Llama<B: Backend> {
    pub(super) config: ModelConfig,
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<Layer<B>>,
    pub(super) norm: B::Tensor,
    pub(super) output: ColumnParallel<B>,
    pub(super) vocab: Vec<Range<usize>>,
}

/// One transformer block.
#[derive(Debug)]
pub struct Layer<B: Backend> {
    pub(super) attention_norm: B::Tensor,
    pub(super) attention: Attention<B>,
    pub(super) mlp_norm: B::Tensor,
    pub(super) mlp: Mlp<B>,
}

/// What the layers of one step share.
#[derive(Debug)]
pub(super) struct Step<'a, B: Backend> {
    pub(super) ops: &'a mut B,
    pub(super) collective: &'a mut dyn Collective,
    pub(super) kv: &'a mut B::Kv,
    pub(super) batch: &'a Batch,
}

/// The logits of a step, and room to gather them in. Kept from step to step, so that their pages are.
#[derive(Debug, Default)]
pub struct LogitsRoom {
    /// See [`Llama::forward`].
    pub logits: Vec<f32>,
    /// Every rank's, one rank after the other.
    shards: Vec<f32>,
}

impl<B: Backend> Llama<B> {
    /// Token ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Computes the step's rows and stores their keys and values. On rank 0 `room.logits` becomes the logits of the rows
    /// that need them, `[n_logits_rows, vocab_size]`; on the others they are void.
    ///
    /// # Errors
    /// Another rank that fails or is gone, or the backend's own failure. The cache is then undefined.
    pub fn forward(
        &self,
        ops: &mut B,
        collective: &mut dyn Collective,
        kv: &mut B::Kv,
        batch: &Batch,
        room: &mut LogitsRoom,
    ) -> Result<(), StepError> {
        let embedded = self.embedding.rows(&batch.token_ids)?; // [n_rows, hidden_dim]
        let run = StepRun { collective: &mut *collective, kv, batch, logits: &mut room.logits };
        ops.run_step(embedded, self.config.hidden_dim, run, |ops, run, x| self.layers(ops, run, x))?;
        if batch.logits_rows.is_empty() {
            room.logits.clear();
            return Ok(());
        }
        self.gather_logits(collective, batch.logits_rows.len(), room)
    }

    /// From embedded tokens to this rank's part of the logits, `[n_logits_rows, vocab_size/world]`.
    fn layers(
        &self,
        ops: &mut B,
        run: &mut StepRun<'_, B::Kv>,
        mut x: B::Tensor, // [n_rows, hidden_dim]
    ) -> Result<(), StepError> {
        let StepRun { collective, kv, batch, logits } = run;
        let step = &mut Step { ops, collective: &mut **collective, kv, batch };
        let eps = self.config.rms_eps;
        let mut terms = None;
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = step.ops.rms_norm(&mut x, terms.take(), &layer.attention_norm, eps)?;
            let mut q = layer.attention.project(step, i, &normed)?;
            let mut rows = Rows::All;
            if i + 1 == self.layers.len() && batch.logits_rows.len() < batch.n_rows() {
                // Of the other rows nothing is needed any more.
                if batch.logits_rows.is_empty() {
                    return Ok(());
                }
                q = step.ops.logits_rows(q, batch)?;
                x = step.ops.logits_rows(x, batch)?; // [n_logits_rows, hidden_dim]
                rows = Rows::Logits;
            }
            let attended = layer.attention.mix(step, i, q, rows)?;
            let normed = step.ops.rms_norm(&mut x, Some(attended), &layer.mlp_norm, eps)?;
            terms = Some(layer.mlp.forward(step, &normed)?);
        }
        let normed = step.ops.rms_norm(&mut x, terms, &self.norm, eps)?;
        Ok(step.ops.logits(&self.output.weight, &normed, logits)?)
    }

    /// Brings every rank's columns together on rank 0: `[n_rows, vocab_size]`.
    fn gather_logits(
        &self,
        collective: &mut dyn Collective,
        n_rows: usize,
        room: &mut LogitsRoom,
    ) -> Result<(), StepError> {
        if collective.world_size() == 1 {
            return Ok(());
        }
        let LogitsRoom { logits, shards } = room;
        let lengths: Vec<usize> = self.vocab.iter().map(|range| range.len() * n_rows).collect();
        if collective.rank() != 0 {
            return Ok(collective.gather(0, logits, &lengths, None)?);
        }
        let vocab_size = self.config.vocab_size;
        shards.resize(n_rows * vocab_size, 0.0);
        collective.gather(0, logits, &lengths, Some(shards))?;
        logits.resize(n_rows * vocab_size, 0.0);
        let mut shard = shards.as_slice();
        for range in &self.vocab {
            let (rows, rest) = shard.split_at(range.len() * n_rows);
            for (row, values) in rows.chunks_exact(range.len()).enumerate() {
                logits[row * vocab_size..][range.clone()].copy_from_slice(values);
            }
            shard = rest;
        }
        Ok(())
    }
}

/// The embedding table, read from the mapped checkpoint row by row: every rank needs all of it, but only a few rows a
/// step, so no rank keeps a copy.
#[derive(Debug)]
pub(super) struct Embedding {
    checkpoint: Arc<Checkpoint>,
    hidden_dim: usize,
}

impl Embedding {
    pub(super) const TENSOR: &str = "token_embd.weight";

    /// `checkpoint` must have the table, `[vocab_size, hidden_dim]`.
    pub(super) fn new(checkpoint: Arc<Checkpoint>, hidden_dim: usize) -> Self {
        Self { checkpoint, hidden_dim }
    }

    /// `[n_ids, hidden_dim]`. Ids must be below the vocabulary's size, which the model runner has checked.
    fn rows(&self, ids: &[u32]) -> Result<Vec<f32>, OpError> {
        let table = self.checkpoint.tensor(Self::TENSOR).expect("it was there when the model was loaded");
        let bytes = table.mapped().expect("so were its bytes");
        let row_bytes = table.row_bytes();
        let mut out = vec![0.0; ids.len() * self.hidden_dim];
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.hidden_dim)) {
            let row = &bytes[id as usize * row_bytes..][..row_bytes];
            lockstep_kernels::dequantize(table.encoding, row, out);
        }
        Ok(out)
    }
}

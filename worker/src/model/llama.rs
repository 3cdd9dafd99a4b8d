//! Llama: the forward pass of one step, on one rank.

use std::ops::Range;

use lockstep_collectives::Collective;
use lockstep_kernels::plain;

use super::{
    StepError,
    attention::Attention,
    batch::{Batch, Rows},
    config::ModelConfig,
    linear::ColumnParallel,
    mlp::Mlp,
    ops::{Backend, StepResults, StepRun},
    output::StepOutput,
};

/// One rank's shard of a model.
#[derive(Debug)]
pub struct Llama<B: Backend> {
    pub(super) config: ModelConfig,
    pub(super) embedding: B::Table,
    pub(super) layers: Vec<Layer<B>>,
    pub(super) norm: B::Tensor,
    /// The same weights, for hidden states: these are normalized on the host.
    pub(super) host_norm: Vec<f32>,
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

impl<B: Backend> Llama<B> {
    /// Token ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Starts a step: its rows are computed, and their keys and values stored.
    ///
    /// # Errors
    /// Another rank that fails or is gone, or the backend's own failure. The cache is then undefined.
    pub fn start(
        &self,
        ops: &mut B,
        collective: &mut dyn Collective,
        kv: &mut B::Kv,
        batch: &Batch,
    ) -> Result<B::Started, StepError> {
        let run = StepRun { collective, kv, batch, vocab: &self.vocab };
        ops.start_step(run, |ops, run| self.layers(ops, run))
    }

    /// Waits for the oldest step that was started. What it gives is on rank 0 alone.
    ///
    /// # Errors
    /// As [`Llama::start`].
    pub fn finish(
        &self,
        ops: &mut B,
        started: B::Started,
        collective: &mut dyn Collective,
        out: &mut StepOutput,
    ) -> Result<(), StepError> {
        ops.finish_step(started, &self.vocab, collective, out)?;
        if !out.hidden.is_empty() {
            let before = out.hidden.clone();
            plain::rms_norm(&before, &self.host_norm, self.config.rms_eps, &mut out.hidden);
        }
        Ok(())
    }

    /// From token ids to the results of the rows that give some: this rank's part of the logits, and hidden states.
    fn layers(
        &self,
        ops: &mut B,
        run: &mut StepRun<'_, B::Kv>,
    ) -> Result<StepResults<B::Logits, B::Hidden>, StepError> {
        let StepRun { collective, kv, batch, .. } = run;
        let step = &mut Step { ops, collective: &mut **collective, kv, batch };
        let mut x = step.ops.embed(&self.embedding, batch)?; // [n_rows, hidden_dim]
        let eps = self.config.rms_eps;
        let mut terms = None;
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = step.ops.rms_norm(&mut x, terms.take(), &layer.attention_norm, eps)?;
            let mut q = layer.attention.project(step, i, &normed)?;
            let mut rows = Rows::All;
            if i + 1 == self.layers.len() && !batch.is_all_results() {
                // Of the other rows nothing is needed any more.
                if batch.result_rows.is_empty() {
                    return Ok(StepResults::default());
                }
                q = step.ops.result_rows(q, batch)?;
                x = step.ops.result_rows(x, batch)?; // [n_result_rows, hidden_dim]
                rows = Rows::Results;
            }
            let attended = layer.attention.mix(step, i, q, rows)?;
            let normed = step.ops.rms_norm(&mut x, Some(attended), &layer.mlp_norm, eps)?;
            terms = Some(layer.mlp.forward(step, &normed)?);
        }
        let mut normed = step.ops.rms_norm(&mut x, terms, &self.norm, eps)?;
        let mut results = StepResults::default();
        if batch.n_hidden_rows() > 0 {
            // As they are before the norm, whose results are rounded for products.
            results.hidden = Some(step.ops.take_hidden(&mut x, batch, step.collective.rank())?);
            if batch.n_logits_rows == 0 {
                return Ok(results);
            }
            normed = step.ops.rms_norm(&mut x, None, &self.norm, eps)?; // [n_logits_rows, hidden_dim]
        }
        results.logits = Some(step.ops.logits(&self.output.weight, &normed)?); // [n_logits_rows, vocab_size/world]
        Ok(results)
    }
}

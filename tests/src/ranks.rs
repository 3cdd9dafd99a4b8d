//! Ranks of one model as threads of the test, without servers.

use std::{path::Path, sync::Arc};

use anyhow::Result;
use lockstep_checkpoint::Checkpoint;
use lockstep_kernels::KvEncoding;
use lockstep_worker::{
    device::Device,
    local_group::LocalGroup,
    model::{load::Source, output::StepOutput},
    model_runner::{self, RunnerSettings},
    scheduler::plan::{BlockId, RowResults, SeqId, SequenceStep, StepPlan},
};

/// Positions in a block.
pub const BLOCK_SIZE: usize = 16;

/// A group of ranks.
#[derive(Debug)]
pub struct Ranks {
    /// Runs plans on every rank.
    pub group: LocalGroup,
    /// Token ids are below this.
    pub vocab_size: usize,
}

impl Ranks {
    /// Loads a model on `world_size` ranks of `threads` threads, with room for `n_tokens` tokens.
    ///
    /// # Errors
    /// A model that cannot be loaded.
    pub fn load(
        model: &Path,
        device: &Device,
        kv_encoding: KvEncoding,
        world_size: usize,
        threads: usize,
        n_tokens: usize,
    ) -> Result<Self> {
        let checkpoint = Arc::new(Checkpoint::open(model)?);
        let mut vocab_size = 0;
        let mut runners = Vec::new();
        for rank in 0..world_size {
            let source = Source::open(Arc::clone(&checkpoint), rank, world_size)?;
            vocab_size = source.config().vocab_size;
            let settings = RunnerSettings {
                device: device.clone(),
                threads,
                n_blocks: n_tokens.div_ceil(BLOCK_SIZE),
                block_size: BLOCK_SIZE,
                kv_encoding,
                context_length: source.config().context_length.min(n_tokens),
                deterministic: true,
            };
            runners.push(model_runner::build(&source, &settings)?);
        }
        Ok(Self { group: LocalGroup::start(runners)?, vocab_size })
    }

    /// The logits at every position of `ids`, computed in chunks of at most `chunk` rows: `[n_ids, vocab_size]`.
    ///
    /// # Errors
    /// A step that fails.
    pub fn logits(&mut self, ids: &[u32], chunk: usize) -> Result<Vec<f32>> {
        self.compute(ids, chunk, RowResults::AllLogits, |out| &out.logits)
    }

    /// The hidden states at every position of `ids`, computed in chunks of at most `chunk` rows: `[n_ids, hidden_dim]`.
    ///
    /// # Errors
    /// A step that fails.
    pub fn hidden(&mut self, ids: &[u32], chunk: usize) -> Result<Vec<f32>> {
        self.compute(ids, chunk, RowResults::AllHidden, |out| &out.hidden)
    }

    fn compute(
        &mut self,
        ids: &[u32],
        chunk: usize,
        results: RowResults,
        part: fn(&StepOutput) -> &[f32],
    ) -> Result<Vec<f32>> {
        self.group.reset();
        let mut found = Vec::new();
        let mut n_blocks = 0;
        let mut start = 0;
        for (step_id, ids) in (0..).zip(ids.chunks(chunk)) {
            let end = start + ids.len();
            let blocks = n_blocks..end.div_ceil(BLOCK_SIZE) as u32;
            n_blocks = blocks.end;
            let sequence = SequenceStep {
                id: SeqId(0),
                start_position: start as u32,
                token_ids: ids.to_vec(),
                new_blocks: blocks.map(BlockId).collect(),
                results,
            };
            let plan = StepPlan { step_id, sequences: vec![sequence], ..StepPlan::default() };
            found.extend(part(self.group.run(&plan)?));
            start = end;
        }
        Ok(found)
    }

    /// The log-probability of every token of a text that has one before it in its window, each window by itself.
    ///
    /// # Errors
    /// A step that fails.
    pub fn logprobs<'a>(&mut self, windows: impl Iterator<Item = &'a [u32]>) -> Result<Vec<f64>> {
        let mut found = Vec::new();
        for window in windows {
            let logits = self.logits(window, 128)?;
            let rows = logits.chunks_exact(self.vocab_size);
            found.extend(rows.zip(&window[1..]).map(|(row, &id)| logprob(row, id)));
        }
        Ok(found)
    }
}

/// The perplexity of a text whose tokens have these log-probabilities.
pub fn perplexity(logprobs: &[f64]) -> f64 {
    (-logprobs.iter().sum::<f64>() / logprobs.len() as f64).exp()
}

/// The likeliest token of a row of logits, the lowest id at a tie.
pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in row.iter().enumerate() {
        if *logit > row[best] {
            best = id;
        }
    }
    best as u32
}

/// The natural log-probability of a token.
pub fn logprob(row: &[f32], token: u32) -> f64 {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, logit| max.max(*logit));
    let total: f64 = row.iter().map(|logit| f64::from(logit - max).exp()).sum();
    f64::from(row[token as usize] - max) - total.ln()
}

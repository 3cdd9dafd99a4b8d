//! The draft model: a second, smaller model with the same vocabulary, on rank 0 alone, that guesses what the model that
//! is served says next.
//!
//! It drafts for all sequences of a step together: one step of it for each draft, which takes the tokens that a sequence
//! has got since, and gives the next draft. A draft is drawn as the sequence's own tokens are, with its parameters and
//! the random number of its position, so that two models that agree on the probabilities agree on the token.
//!
//! It stops where a further draft would hardly pay: where the probabilities that it gives its own drafts come to less
//! than what a draft costs ([`Draftable::min_chance`]). What its steps take is measured, beside those of the model that is
//! served, and smoothed ([`Pace`]).
//!
//! Should it fail, all goes on without it.
//!
//! # Nobody waits for it
//!
//! A sequence that it knows little of, such as one that has just got past its prompt, is first brought up to date:
//! [`MAX_CATCH_UP_ROWS`] rows for all sequences of a turn together, so that a step waits no longer than for these. Until
//! then the sequence goes on without drafts, and so does one for which its cache, which is as large as that of the model
//! that is served, has no blocks. That catching up is no part of the account that [`Draftable`] keeps: a draft model
//! costs, beside its drafts, what it takes to read every prompt once.

mod pace;
mod shadows;

use std::time::{Duration, Instant};

use lockstep_collectives::{Collective, local};

use self::{
    pace::Pace,
    shadows::{Rows, Shadows},
};
use crate::{
    model::{StepError, llama::LogitsRoom},
    model_runner::{RunStep, RunnerSettings, warm_up},
    sampler::{Sampler, SamplingParams},
    scheduler::{
        plan::{LogitsRows, SeqId, StepPlan},
        speculation::{Draftable, Drafts, MAX_ROWS},
    },
};

/// Rows of known tokens that are computed ahead of drafting in a turn, at most. A prompt of 2,000 tokens is read in 32
/// turns; more in a turn would be felt as a pause by whoever decodes.
const MAX_CATCH_UP_ROWS: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub struct DraftModel {
    runner: Box<dyn RunStep>,
    collective: Box<dyn Collective>,
    room: LogitsRoom,
    n_blocks: u32,
    block_size: usize,
    context_length: usize,
    shadows: Shadows,
    pace: Pace,
}

/// A sequence that drafts are asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) draftable: Draftable,
    pub(super) prompt: &'a [u32],
    pub(super) emitted: &'a [u32],
    pub(super) params: &'a SamplingParams,
    pub(super) choice: u32,
}

/// What has been found.
#[derive(Debug)]
pub(super) struct Found {
    /// For the sequences that drafts were sought for.
    pub(super) drafts: Vec<Drafts>,
    /// What it took, in steps of one row of the model that is served.
    pub(super) time: f64,
}

/// A sequence while it is drafted for.
#[derive(Debug)]
struct Drafting<'a> {
    asked: Asked<'a>,
    /// All of its tokens, then its drafts.
    token_ids: Vec<u32>,
    n_known: usize,
    /// Tokens that the draft model holds.
    n_held: usize,
    /// The probability that all drafts are right.
    chance: f64,
    is_done: bool,
}

impl DraftModel {
    /// A draft model on `runner`, which was built with `settings`.
    pub fn new(runner: Box<dyn RunStep>, settings: &RunnerSettings) -> Self {
        let RunnerSettings { n_blocks, block_size, context_length, .. } = *settings;
        let n_blocks = n_blocks as u32;
        Self {
            runner,
            collective: Box::new(local::solo()),
            room: LogitsRoom::default(),
            n_blocks,
            block_size,
            context_length,
            shadows: Shadows::new(n_blocks, block_size),
            pace: Pace::default(),
        }
    }

    /// Forgets every sequence, and sees to it that the first draft finds all warm.
    pub(super) fn reset(&mut self) -> Result<(), StepError> {
        self.shadows = Shadows::new(self.n_blocks, self.block_size);
        self.runner.reset();
        warm_up(self.runner.as_mut(), self.collective.as_mut())
    }

    /// Forgets the sequences that a plan no longer has.
    pub(super) fn release(&mut self, ids: &[SeqId]) {
        self.shadows.release(ids);
    }

    /// Takes note of how long the model that is served has taken for a step.
    pub(super) fn note_target_step(&mut self, n_rows: usize, took: Duration) {
        self.pace.note_target_step(n_rows, took);
    }

    /// How long a step is expected to take, in steps of one row of the model that is served.
    pub(super) fn step_time(&self) -> f64 {
        self.pace.draft_step_time()
    }

    /// Drafts for those of the sequences that it can draft for now.
    ///
    /// # Errors
    /// See [`RunStep::run`].
    pub(super) fn draft(&mut self, asked: &[Asked<'_>], sampler: &mut Sampler) -> Result<Found, StepError> {
        let mut drafting: Vec<Drafting<'_>> = asked.iter().filter_map(|asked| self.follow(*asked)).collect();
        self.catch_up(&mut drafting)?;
        drafting.retain(|drafting| drafting.n_behind() <= MAX_ROWS);
        let mut n_steps = 0;
        while drafting.iter().any(|drafting| !drafting.is_done) {
            self.step(&mut drafting, sampler)?;
            n_steps += 1;
        }
        let drafts = drafting.into_iter().map(Drafting::finish).collect();
        Ok(Found { drafts, time: f64::from(n_steps) * self.step_time() })
    }

    /// Begins to draft for a sequence, if there is room for it.
    fn follow<'a>(&mut self, mut asked: Asked<'a>) -> Option<Drafting<'a>> {
        let n_known = asked.prompt.len() + asked.emitted.len();
        let draftable = &mut asked.draftable;
        // The last draft is not computed.
        draftable.max_drafts = draftable.max_drafts.min((self.context_length + 1).saturating_sub(n_known));
        if draftable.max_drafts == 0 {
            return None;
        }
        let token_ids = [asked.prompt, asked.emitted].concat();
        let n_held = self.shadows.follow(draftable.id, &token_ids, draftable.max_drafts - 1)?;
        Some(Drafting { asked, token_ids, n_known, n_held, chance: 1.0, is_done: false })
    }

    /// Computes tokens of those who are far behind, up to their last one, oldest first.
    fn catch_up(&mut self, drafting: &mut [Drafting<'_>]) -> Result<(), StepError> {
        let mut room = MAX_CATCH_UP_ROWS;
        let mut rows = Vec::new();
        for drafting in drafting.iter_mut().filter(|drafting| drafting.n_behind() > MAX_ROWS) {
            let n_rows = (drafting.n_behind() - 1).min(room);
            room -= n_rows;
            if n_rows > 0 {
                let token_ids = &drafting.token_ids[drafting.n_held..][..n_rows];
                rows.push(Rows { id: drafting.asked.draftable.id, token_ids });
                drafting.n_held += n_rows;
            }
        }
        if !rows.is_empty() {
            let plan = self.shadows.plan(&rows, LogitsRows::None);
            self.run(&plan)?;
        }
        Ok(())
    }

    /// One more draft for everybody who is not done.
    fn step(&mut self, drafting: &mut [Drafting<'_>], sampler: &mut Sampler) -> Result<(), StepError> {
        let start = Instant::now();
        let mut drafting: Vec<_> = drafting.iter_mut().filter(|drafting| !drafting.is_done).collect();
        let rows: Vec<_> = drafting.iter().map(|drafting| drafting.rows()).collect();
        let plan = self.shadows.plan(&rows, LogitsRows::Last);
        let logits = self.run(&plan)?;
        for (drafting, logits) in drafting.iter_mut().zip(logits.chunks_exact(sampler.vocab_size())) {
            drafting.draw(logits, sampler);
        }
        self.pace.note_draft_step(start.elapsed());
        Ok(())
    }

    fn run(&mut self, plan: &StepPlan) -> Result<&[f32], StepError> {
        self.runner.run(plan, self.collective.as_mut(), &mut self.room)?;
        Ok(&self.room.logits)
    }
}

// === impl Drafting ===

impl Drafting<'_> {
    fn n_behind(&self) -> usize {
        self.token_ids.len() - self.n_held
    }

    /// The rows that give the next draft.
    fn rows(&self) -> Rows<'_> {
        Rows { id: self.asked.draftable.id, token_ids: &self.token_ids[self.n_held..] }
    }

    /// Takes the next draft from the logits that its rows gave.
    fn draw(&mut self, logits: &[f32], sampler: &mut Sampler) {
        let Asked { draftable, prompt, params, choice, .. } = self.asked;
        self.n_held = self.token_ids.len();
        let draft = sampler.sample(logits, params, prompt, &self.token_ids[prompt.len()..], choice);
        self.chance *= f64::from(sampler.logprobs(logits, draft, 0).token.logprob).exp();
        if self.chance < draftable.min_chance {
            self.is_done = true;
            return;
        }
        self.token_ids.push(draft);
        let n_drafts = self.token_ids.len() - self.n_known;
        self.is_done = n_drafts == draftable.max_drafts || params.stop_token_ids.contains(&draft);
    }

    fn finish(mut self) -> Drafts {
        Drafts { id: self.asked.draftable.id, token_ids: self.token_ids.split_off(self.n_known) }
    }
}

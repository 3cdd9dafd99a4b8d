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
//! that is served, has no blocks.
//!
//! Reading a prompt is no part of the account that the scheduler keeps of what drafts cost: a draft model costs, beside
//! them, what it takes to read every prompt once (and once more if the sequence was preempted). All that a sequence has
//! said since is paid for, by itself, as its drafts are. So a draft model that is wrong, and hence asked only now and then,
//! catches up less and less often the dearer it is to read with, and may in the end stay behind.

mod pace;
mod shadows;

use std::time::{Duration, Instant};

use lockstep_collectives::{Collective, local};

use self::{
    pace::Pace,
    shadows::{Rows, Shadows},
};
use crate::{
    model::{StepError, output::StepOutput},
    model_runner::{RunStep, RunnerSettings, warm_up},
    sampler::{Place, Sampler, SamplingParams},
    scheduler::{
        plan::{RowResults, SeqId, StepPlan},
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
    out: StepOutput,
    n_blocks: u32,
    block_size: usize,
    context_length: usize,
    shadows: Shadows,
    pace: Pace,
    clock: fn() -> Instant,
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
    /// What its drafts have taken so far, in steps of one row of the model that is served.
    time: f64,
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
            out: StepOutput::default(),
            n_blocks,
            block_size,
            context_length,
            shadows: Shadows::new(n_blocks, block_size),
            pace: Pace::default(),
            clock: Instant::now,
        }
    }

    /// Measures what drafts take by another clock.
    pub fn with_clock(self, clock: fn() -> Instant) -> Self {
        Self { clock, ..self }
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

    /// Drafts for those of the sequences that it can draft for now. Says of all that it has worked for what that took.
    ///
    /// # Errors
    /// See [`RunStep::run`].
    pub(super) fn draft(&mut self, asked: &[Asked<'_>], sampler: &mut Sampler) -> Result<Vec<Drafts>, StepError> {
        let mut drafting: Vec<Drafting<'_>> = asked.iter().filter_map(|asked| self.follow(*asked)).collect();
        self.catch_up(&mut drafting)?;
        drafting.iter_mut().for_each(|drafting| drafting.is_done = drafting.n_behind() > MAX_ROWS);
        while drafting.iter().any(|drafting| !drafting.is_done) {
            self.step(&mut drafting, sampler)?;
        }
        Ok(drafting.into_iter().map(Drafting::finish).collect())
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
        Some(Drafting { asked, token_ids, n_known, n_held, chance: 1.0, time: 0.0, is_done: false })
    }

    /// Computes tokens of those who are far behind, up to their last one, oldest first.
    fn catch_up(&mut self, drafting: &mut [Drafting<'_>]) -> Result<(), StepError> {
        let mut room = MAX_CATCH_UP_ROWS;
        let mut rows = Vec::new();
        let mut payers = Vec::new();
        for drafting in drafting.iter_mut().filter(|drafting| drafting.n_behind() > MAX_ROWS) {
            let n_rows = (drafting.n_behind() - 1).min(room);
            room -= n_rows;
            if n_rows > 0 {
                let token_ids = &drafting.token_ids[drafting.n_held..][..n_rows];
                rows.push(Rows { id: drafting.asked.draftable.id, token_ids });
                drafting.n_held += n_rows;
                let n_emitted = drafting.n_held.saturating_sub(drafting.asked.prompt.len()).min(n_rows);
                payers.push((&mut drafting.time, n_emitted));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let n_rows = MAX_CATCH_UP_ROWS - room;
        let plan = self.shadows.plan(&rows, RowResults::None);
        let start = (self.clock)();
        self.run(&plan)?;
        self.pace.note_catch_up(n_rows, (self.clock)() - start);
        let row_time = self.pace.catch_up_time(n_rows) / n_rows as f64;
        payers.into_iter().for_each(|(time, n_emitted)| *time += n_emitted as f64 * row_time);
        Ok(())
    }

    /// One more draft for everybody who is not done.
    fn step(&mut self, drafting: &mut [Drafting<'_>], sampler: &mut Sampler) -> Result<(), StepError> {
        let start = (self.clock)();
        let mut drafting: Vec<_> = drafting.iter_mut().filter(|drafting| !drafting.is_done).collect();
        let rows: Vec<_> = drafting.iter().map(|drafting| drafting.rows()).collect();
        let plan = self.shadows.plan(&rows, RowResults::LastLogits);
        let logits = self.run(&plan)?;
        for (drafting, logits) in drafting.iter_mut().zip(logits.chunks_exact(sampler.vocab_size())) {
            drafting.draw(logits, sampler);
        }
        self.pace.note_draft_step((self.clock)() - start);
        let share = self.step_time() / drafting.len() as f64;
        drafting.iter_mut().for_each(|drafting| drafting.time += share);
        Ok(())
    }

    fn run(&mut self, plan: &StepPlan) -> Result<&[f32], StepError> {
        self.runner.run(plan, self.collective.as_mut(), &mut self.out)?;
        Ok(&self.out.logits)
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
        let draft = sampler
            .sample(logits, Place { params, prompt, emitted: &self.token_ids[prompt.len()..], choice, mask: None });
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
        Drafts { id: self.asked.draftable.id, token_ids: self.token_ids.split_off(self.n_known), time: self.time }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use lockstep_kernels::{KvEncoding, cuda::ChoiceRule};

    use super::*;
    use crate::{
        device::Device,
        scheduler::{
            NewSequence, Sampled, Scheduler, SchedulerConfig,
            speculation::{Speculation, step_time},
        },
    };

    /// What the served model takes for a step of one row.
    const TARGET_STEP: Duration = Duration::from_millis(10);

    const BLOCK_SIZE: usize = 16;
    const VOCAB_SIZE: usize = 4;

    thread_local! {
        static NOW: Cell<Instant> = Cell::new(Instant::now());
    }

    fn now() -> Instant {
        NOW.get()
    }

    /// A model that is certain of one token, and takes its time.
    #[derive(Debug)]
    struct Stubborn {
        /// A step of one row, in those of the served model.
        step_time: f64,
        logits: Vec<f32>,
    }

    impl RunStep for Stubborn {
        fn runs_ahead(&self, _: &mut dyn Collective) -> bool {
            false
        }

        fn start(&mut self, plan: &StepPlan, _: &[ChoiceRule], _: &mut dyn Collective) -> Result<(), StepError> {
            NOW.set(now() + TARGET_STEP.mul_f64(self.step_time * step_time(plan.n_rows())));
            let row = [0.0, 30.0, 0.0, 0.0];
            let n_logits_rows = plan.sequences.iter().map(|step| step.n_logits_rows()).sum();
            self.logits = [row].repeat(n_logits_rows).concat();
            Ok(())
        }

        fn finish(&mut self, _: &mut dyn Collective, out: &mut StepOutput) -> Result<(), StepError> {
            out.logits = std::mem::take(&mut self.logits);
            Ok(())
        }

        fn reset(&mut self) {}

        fn vocab_size(&self) -> usize {
            VOCAB_SIZE
        }

        fn block_size(&self) -> usize {
            BLOCK_SIZE
        }
    }

    /// A scheduler and a draft model with room for so many sequences of so many tokens.
    fn with_room(n_sequences: usize, n_tokens: usize, draft_step_time: f64) -> (Scheduler, DraftModel) {
        let n_blocks = n_sequences * (n_tokens / BLOCK_SIZE + 1);
        let scheduler = Scheduler::new(SchedulerConfig {
            max_step_tokens: 16,
            max_prefill_chunk: 16,
            max_prompt_logits_rows: 1,
            max_running: n_sequences,
            max_waiting: n_sequences,
            n_blocks: n_blocks as u32,
            block_size: BLOCK_SIZE as u32,
            context_length: n_tokens as u32,
            speculation: Speculation::Ngram,
        });
        let settings = RunnerSettings {
            device: Device::Cpu,
            threads: 1,
            n_blocks,
            block_size: BLOCK_SIZE,
            kv_encoding: KvEncoding::F16,
            context_length: n_tokens,
            deterministic: true,
        };
        let runner = Box::new(Stubborn { step_time: draft_step_time, logits: Vec::new() });
        (scheduler.unwrap(), DraftModel { clock: now, ..DraftModel::new(runner, &settings) })
    }

    /// Sequences that a draft model is always wrong about. Returns what it took in so many steps, in steps without drafts,
    /// and the most that it took in one of them.
    fn be_wrong(n_sequences: usize, draft_step_time: f64, n_steps: usize) -> (f64, f64) {
        let (mut scheduler, mut draft_model) = with_room(n_sequences, 2 * n_steps, draft_step_time);
        let mut sampler = Sampler::new(VOCAB_SIZE);
        let params = SamplingParams::default();
        let prompt = vec![2];
        for _ in 0..n_sequences {
            let max_new_tokens = 2 * n_steps as u32;
            let new = NewSequence { prompt: prompt.clone(), max_new_tokens, ..NewSequence::default() };
            scheduler.add(new, now()).unwrap();
        }
        // They count, and so never say what they have said before.
        let emitted: Vec<u32> = (10..).take(n_steps).collect();
        let in_steps = |took: Duration| took.div_duration_f64(TARGET_STEP) / step_time(n_sequences);
        let (mut spent, mut most) = (0.0, 0.0_f64);
        for step in 0..n_steps {
            let mut plan = scheduler.schedule(now()).plan.unwrap();
            let draftable = scheduler.draftable(draft_model.step_time()).into_iter();
            let ask =
                |draftable| Asked { draftable, prompt: &prompt, emitted: &emitted[..step], params: &params, choice: 0 };
            let asked: Vec<_> = draftable.map(ask).collect();
            let start = now();
            let drafts = draft_model.draft(&asked, &mut sampler).unwrap();
            scheduler.add_drafts(&mut plan, drafts);
            let target_step = TARGET_STEP.mul_f64(step_time(plan.n_rows()));
            draft_model.note_target_step(plan.n_rows(), target_step);
            let extra = in_steps(now() - start + target_step) - 1.0;
            (spent, most) = (spent + extra, most.max(extra));
            let due: Vec<_> = scheduler.due().collect();
            let token = |id| Sampled { id, tokens: vec![emitted[step]], stop: false };
            scheduler.commit(&due.into_iter().map(token).collect::<Vec<_>>());
        }
        (spent, most)
    }

    #[test]
    fn a_draft_model_that_is_always_wrong_costs_two_percent_however_slow_it_is() {
        const N_STEPS: usize = 10_000;
        for n_sequences in [1, 2, 4] {
            for draft_step_time in [0.02, 0.2, 0.5, 1.0, 3.0] {
                let (spent, most) = be_wrong(n_sequences, draft_step_time, N_STEPS);
                let income = 0.02 * N_STEPS as f64;
                let case = format!("{spent} steps, {most} of them at once: {n_sequences}, {draft_step_time}");
                // Each may still owe what it was asked for last: its part of that makes all of them wait.
                assert!(spent <= 1.0 + income + n_sequences as f64 * most, "{case}");
                assert!(spent >= 0.5 * income, "it is asked now and then: {case}");
            }
        }
    }
}

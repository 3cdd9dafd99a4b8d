//! Speculation: a decoding sequence computes the rows of tokens that it has not sampled yet.
//!
//! *Drafts* are guesses at the next tokens. The rows of a sequence that drafts are its last token and then the drafts,
//! and all of them have logits. Rank 0 *verifies* them from the first on: it samples from a row as it would have without
//! drafts, and *accepts* the draft that follows if it is the token that it sampled. The first draft that is not ends it.
//! By the lockstep rule the rows up to there are those that plain decoding would have computed, so tokens,
//! log-probabilities and the end are the same, bit for bit; only steps are saved.
//!
//! Rejected drafts leave keys and values behind, at positions from the sequence's `n_computed` on. Nobody ever sees them: a
//! row attends to its own position and those before it, and the sequence's next step begins at `n_computed`, so that
//! each of these positions is written anew in the step, or a later one, that first attends to it. The prefix cache
//! gets blocks of computed, accepted tokens alone.
//!
//! # Where drafts come from
//!
//! First from what the sequence has said before ([`drafter`](super::drafter)), which costs nothing to find. Whoever has
//! none of these may have some from elsewhere: the driver asks which sequences are [`draftable`](Scheduler::draftable)
//! in the plan under way, has a draft model guess, and adds what it says ([`Scheduler::add_drafts`]) before the plan is
//! computed. What that takes comes as a number, in steps of one row of the model that is served: nothing here reads a
//! clock.
//!
//! # Nobody else pays
//!
//! Drafts come last: every other row of the step has been planned, and they take rows that are left. They take a block
//! only while nobody waits and every running sequence could have one, too; it is then part of a table that was to grow
//! into it. They pass neither the sequence's length nor the context. What they cost everybody is time, and that is
//! bounded: by [`MAX_ROWS`], and in the long run by each sequence's [`allowance`].

use serde::{Deserialize, Serialize};

use super::plan::{RowResults, SeqId, StepPlan};
use super::sequence::Sequence;
use super::{
    Scheduler,
    allowance::{self, Allowance},
};

/// Sequences that draft have so many rows of a step together at most, last tokens included, in equal shares: one alone
/// has 7 drafts, two have 3 each, four have 1, and more have none. Each row beyond would slow down all sequences of a
/// busy step for the sake of one, and the kernels compute eight rows at a time.
pub const MAX_ROWS: usize = 8;

/// What a row adds to the time of a step, in steps of one row.
///
/// With SmolLM2-135M on two Zen 4 cores, the most expensive rows measured, steps of 1, 2, 4 and 8 rows take 4.5, 5.6, 7.1
/// and 12.5 ms; of a larger model, more of the time goes into reading weights, once for all rows.
pub(super) const ROW_TIME: f64 = 0.25;

/// Whether tokens are drafted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speculation {
    /// One token of a sequence in a step.
    Off,
    /// What followed the sequence's last tokens when they occurred before; or else what a draft model says, if the
    /// driver has one.
    #[default]
    Ngram,
}

/// A decoding sequence of the plan under way that has no drafts and may have some.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Draftable {
    /// The sequence.
    pub id: SeqId,
    /// Drafts that it may have. At least 1.
    pub max_drafts: usize,
    /// A draft costs more than it saves if it is accepted with a smaller probability than this. May be above 1.
    pub min_chance: f64,
}

/// Drafts for one sequence.
#[derive(Clone, PartialEq, Debug)]
pub struct Drafts {
    /// A [`Draftable`] sequence.
    pub id: SeqId,
    /// Guesses at its next tokens. May be empty.
    pub token_ids: Vec<u32>,
    /// The sequence's part of the time that it took to find them. Unit: steps of one row.
    pub time: f64,
}

/// The time of a step with few rows, in steps of one row.
pub fn step_time(n_rows: usize) -> f64 {
    1.0 + ROW_TIME * (n_rows as f64 - 1.0)
}

impl Scheduler {
    /// The sequences of the plan under way, the only one, that a draft model may draft for, oldest first, if each of its steps
    /// takes `draft_step_time` and gives each of them a draft. Unit: steps of one row.
    pub fn draftable(&self, draft_step_time: f64) -> Vec<Draftable> {
        self.find_draftable(draft_step_time, Allowance::n_drafts)
    }

    /// Adds what a draft model says to the plan under way. The sequences pay for it, also those that it has found nothing
    /// for.
    ///
    /// # Panics
    /// If a sequence is not [`draftable`](Self::draftable), or has more drafts than it may have.
    pub fn add_drafts(&mut self, plan: &mut StepPlan, drafts: Vec<Drafts>) {
        drafts.into_iter().for_each(|drafts| self.put_into_plan(plan, drafts, Allowance::pay));
    }

    /// Drafts what sequences have said before.
    pub(super) fn draft_repeats(&mut self, plan: &mut StepPlan) {
        for Draftable { id, max_drafts, .. } in self.find_draftable(0.0, Allowance::n_repeats) {
            let token_ids = self.running.get_mut(&id).expect("who is draftable runs").repeat(max_drafts);
            self.put_into_plan(plan, Drafts { id, token_ids, time: 0.0 }, Allowance::pay_for_repeats);
        }
    }

    /// Those that have no drafts yet and may have some. `n_paid_for`: how many an allowance covers at a price.
    pub(super) fn find_draftable(
        &self,
        draft_step_time: f64,
        n_paid_for: fn(&Allowance, f64) -> usize,
    ) -> Vec<Draftable> {
        let n_decoding = self.decoding().count();
        if self.config.speculation == Speculation::Off || n_decoding == 0 {
            return Vec::new();
        }
        let share = (MAX_ROWS / n_decoding).saturating_sub(1);
        if share == 0 {
            return Vec::new();
        }
        let mut room = self.config.max_step_tokens - self.n_rows_in_flight();
        let mut found = Vec::new();
        for (id, sequence) in self.decoding().filter(|(id, _)| self.drafts(*id).is_empty()) {
            let n_slots = if self.may_grow_for_drafts() { usize::MAX } else { sequence.n_free_slots() };
            let max_drafts = share.min(room).min(n_slots).min(sequence.max_drafts());
            room -= max_drafts;
            if max_drafts > 0 {
                found.push((id, sequence, max_drafts));
            }
        }
        let price = allowance::price(ROW_TIME + draft_step_time / found.len() as f64, n_decoding);
        let paid_for = found.into_iter().map(|(id, sequence, max_drafts)| Draftable {
            id,
            max_drafts: max_drafts.min(n_paid_for(&sequence.allowance, price)),
            min_chance: price,
        });
        paid_for.filter(|draftable| draftable.max_drafts > 0).collect()
    }

    /// Adds one sequence's drafts to the plan under way, and has its allowance `pay` for them.
    fn put_into_plan(&mut self, plan: &mut StepPlan, drafts: Drafts, pay: fn(&mut Allowance, f64)) {
        let Drafts { id, token_ids: mut drafts, time } = drafts;
        assert!(self.n_rows_in_flight() + drafts.len() <= self.config.max_step_tokens, "{id:?} has no room");
        let n_decoding = self.decoding().count();
        self.grow_for_drafts(id, drafts.len());
        let sequence = self.running.get_mut(&id).expect("who is draftable runs");
        assert!(sequence.decodes() && drafts.len() <= sequence.max_drafts(), "{id:?} has {} drafts", drafts.len());
        drafts.truncate(sequence.n_free_slots());
        pay(&mut sequence.allowance, allowance::price(time + drafts.len() as f64 * ROW_TIME, n_decoding));
        let step = plan.sequences.iter_mut().find(|step| step.id == id).expect("it is in the plan");
        step.new_blocks.extend(sequence.take_new_blocks());
        if !drafts.is_empty() {
            step.token_ids.extend(&drafts);
            step.results = RowResults::AllLogits;
        }
        let chunk = self.in_flight.as_mut().and_then(|chunks| chunks.get_mut(&id)).expect("the plan is under way");
        chunk.drafts = drafts;
    }

    /// The sequences of the plan under way that need one row, oldest first.
    fn decoding(&self) -> impl Iterator<Item = (SeqId, &Sequence)> {
        let ids = self.in_flight.iter().flatten().map(|(id, _)| *id);
        ids.map(|id| (id, &self.running[&id])).filter(|(_, sequence)| sequence.decodes())
    }

    /// Whether a block may be taken for drafts.
    fn may_grow_for_drafts(&self) -> bool {
        self.waiting.is_empty() && self.kv.n_available() > self.running.len()
    }

    /// Gives a sequence the blocks that so many drafts need, as far as it may have them.
    fn grow_for_drafts(&mut self, id: SeqId, n_drafts: usize) {
        while self.running[&id].n_missing_blocks(n_drafts) > 0 && self.may_grow_for_drafts() {
            let block = self.kv.allocate().expect("one is available");
            self.running.get_mut(&id).expect("it runs").push_block(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::scheduler::{NewSequence, Sampled, SchedulerConfig};

    const N_STEPS: usize = 1_000;

    /// One sequence that never repeats itself and a draft model whose steps take so long. Returns how often the model is
    /// asked in so many steps, and the drafts that it is asked for in the last one.
    fn ask(n_steps: usize, draft_step_time: f64, is_right: bool) -> (usize, usize) {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            max_step_tokens: 16,
            max_prefill_chunk: 16,
            max_prompt_logits_rows: 1,
            max_running: 1,
            max_waiting: 1,
            n_blocks: 1_000,
            block_size: 16,
            context_length: 16_000,
            speculation: Speculation::Ngram,
        })
        .unwrap();
        let new = NewSequence { prompt: vec![0], max_new_tokens: 16_000, ..NewSequence::default() };
        let id = scheduler.add(new, Instant::now()).unwrap();
        let (mut n_asked, mut n_wanted, mut next) = (0, 0, 1);
        for _ in 0..n_steps {
            let mut plan = scheduler.schedule(Instant::now()).plan.unwrap();
            let draftable = scheduler.draftable(draft_step_time);
            n_asked += draftable.len();
            n_wanted = draftable.first().map_or(0, |draftable| draftable.max_drafts);
            let token_ids: Vec<u32> = (next..).take(n_wanted).map(|right| right + u32::from(!is_right)).collect();
            let time = n_wanted as f64 * draft_step_time;
            let drafts = draftable.iter().map(|_| Drafts { id, token_ids: token_ids.clone(), time }).collect();
            scheduler.add_drafts(&mut plan, drafts);
            let n_sampled = if is_right { 1 + n_wanted as u32 } else { 1 };
            let tokens = (next..next + n_sampled).collect();
            next += n_sampled;
            scheduler.commit(&[Sampled { id, tokens, stop: false }]);
            scheduler.check_integrity();
        }
        (n_asked, n_wanted)
    }

    #[test]
    fn a_draft_model_that_is_fast_and_right_is_asked_for_all_that_there_is_room_for() {
        assert_eq!(ask(N_STEPS, 0.03, true), (N_STEPS, MAX_ROWS - 1));
    }

    #[test]
    fn one_that_is_wrong_or_too_slow_is_asked_now_and_then() {
        for (draft_step_time, is_right) in [(0.03, false), (1.0, false), (1.0, true)] {
            let (n_asked, _) = ask(N_STEPS, draft_step_time, is_right);
            assert!((10..=100).contains(&n_asked), "{n_asked} of {N_STEPS} steps: {draft_step_time}, {is_right}");
        }
        let (n_asked, _) = ask(N_STEPS, 3.0, false);
        assert!((3..=10).contains(&n_asked), "{n_asked} of {N_STEPS} steps");
    }
}

//! Planning ahead: the next plan while one is under way, so that a device has its next step before it is through with
//! this one.
//!
//! The tokens that the plan under way gives are not known yet; a device that chooses them itself knows them in time. So a
//! plan ahead says [`PENDING`] where it means the token that the step before chooses for the sequence. It takes for
//! granted that nobody ends with that token. Whoever does after all is taken out of the plan under way when that is
//! known: its row was computed for nothing and has written to its blocks, of which nobody has had one since (see
//! [`Scheduler::abort`]).
//!
//! Only what is certain is planned ahead: the plan under way samples for everybody who runs, nobody could be admitted,
//! nobody repeats itself and would better have drafts, and there is a block for each who needs one. At any other time the
//! tokens are awaited first.

use std::collections::BTreeMap;

use super::{
    Scheduler,
    allowance::Allowance,
    plan::{RowResults, SeqId, SequenceStep, StepPlan},
    sequence::Chunk,
    speculation::Draftable,
};

/// Stands in a plan for the token that the step before chooses for the sequence. No token id is so high.
pub const PENDING: u32 = u32::MAX;

impl Scheduler {
    /// The plan after the one under way; `None` while that cannot be known.
    pub(super) fn plan_ahead(&mut self) -> Option<StepPlan> {
        if !self.is_steady() || self.somebody_repeats() {
            return None;
        }
        let ids: Vec<SeqId> = self.in_flight.iter().flatten().map(|(id, _)| *id).collect();
        let goes_on = |id: &SeqId| !self.running[id].ends_with_next();
        let ids: Vec<SeqId> = ids.into_iter().filter(goes_on).collect();
        if ids.is_empty() || !ids.iter().all(|id| self.grow_by_one(*id)) {
            return None;
        }
        let mut sequences = Vec::with_capacity(ids.len());
        for id in &ids {
            let sequence = self.running.get_mut(id).expect("what is in flight runs");
            sequences.push(SequenceStep {
                id: *id,
                // Below the context's length, which is a u32.
                start_position: sequence.n_known() as u32,
                token_ids: vec![PENDING],
                new_blocks: sequence.take_new_blocks(),
                results: RowResults::LastLogits,
            });
        }
        let one_row = Chunk { n_rows: 1, results: RowResults::LastLogits, samples: true, drafts: Vec::new() };
        let chunks: BTreeMap<_, _> = ids.into_iter().map(|id| (id, one_row.clone())).collect();
        self.ahead = Some(chunks);
        Some(self.number_plan(sequences))
    }

    /// Whether the plan under way gives everybody who runs a token, and the next one could admit nobody.
    fn is_steady(&self) -> bool {
        let Some(in_flight) = &self.in_flight else { return false };
        let gives_one =
            |chunk: &Chunk| chunk.samples && chunk.drafts.is_empty() && chunk.results == RowResults::LastLogits;
        let is_full = self.running.len() >= self.config.max_running || self.lacks_blocks;
        let nobody_comes = self.waiting.is_empty() || is_full;
        nobody_comes && in_flight.len() == self.running.len() && in_flight.values().all(gives_one)
    }

    /// Whether somebody's known tokens go on like some before them, and may be drafted.
    fn somebody_repeats(&mut self) -> bool {
        let draftable = self.find_draftable(0.0, Allowance::n_repeats);
        draftable.into_iter().any(|Draftable { id, max_drafts, .. }| {
            let sequence = self.running.get_mut(&id).expect("who is draftable runs");
            !sequence.repeat(max_drafts).is_empty()
        })
    }

    /// Gives a sequence the block for one token more, if it needs one. Whether it has it.
    fn grow_by_one(&mut self, id: SeqId) -> bool {
        let sequence = self.running.get_mut(&id).expect("what is in flight runs");
        if sequence.n_missing_blocks(1) == 0 {
            return true;
        }
        let Some(block) = self.kv.allocate() else { return false };
        sequence.push_block(block);
        true
    }
}

//! What can be seen of a scheduler, and what must always be true of it.

use std::collections::HashMap;

use super::Scheduler;
use super::plan::{BlockId, RowResults};
use crate::kv::prefix_cache::{BlockCounts, Change, Content};

/// A scheduler's load.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Sequences that wait, preempted ones among them.
    pub waiting: usize,
    /// Sequences that run.
    pub running: usize,
    /// Tokens still to be computed or generated for all of them, at most.
    pub outstanding_tokens: u64,
    /// KV blocks by state.
    pub blocks: BlockCounts,
}

impl Scheduler {
    /// The load now.
    pub fn stats(&self) -> Stats {
        let sequences = self.waiting.values().chain(self.running.values());
        Stats {
            waiting: self.waiting.len(),
            running: self.running.len(),
            outstanding_tokens: sequences.map(|sequence| sequence.n_outstanding() as u64).sum(),
            blocks: self.kv.counts(),
        }
    }

    /// Has changes of the prefix cache noted from now on. Returns what it holds, every block behind those before it.
    pub fn watch_cache(&mut self) -> Vec<Content> {
        self.kv.watch()
    }

    /// What has changed in the prefix cache since this was asked last, in order. None if nobody watches it.
    pub fn cache_changes(&mut self) -> Vec<Change> {
        self.kv.take_changes()
    }

    /// Has no more changes noted.
    pub fn unwatch_cache(&mut self) {
        self.kv.unwatch();
    }

    /// Asserts everything that must be true between two calls. Costs a look at every block: for tests and debugging.
    ///
    /// # Panics
    /// If something is not.
    pub fn check_integrity(&self) {
        self.kv.check_integrity();
        self.check_limits();
        self.check_sequences();
        self.check_block_tables();
    }

    fn check_limits(&self) {
        assert!(self.running.len() <= self.config.max_running);
        assert!(self.waiting.len() <= self.config.max_waiting + self.config.max_running);
        assert!(self.running.keys().all(|id| !self.waiting.contains_key(id)), "nobody both waits and runs");
        let in_flight = || self.in_flight.iter().flatten().map(|(_, chunk)| chunk);
        let n_rows = self.n_rows_in_flight();
        assert!(n_rows <= self.config.max_step_tokens, "{n_rows} rows");
        let prompts = in_flight().filter(|chunk| chunk.results == RowResults::AllLogits);
        let n_rows: usize = prompts.map(|chunk| chunk.n_rows).sum();
        assert!(n_rows <= self.config.max_prompt_logits_rows, "{n_rows} rows of prompt logits");
    }

    fn check_sequences(&self) {
        let mut n_deadlines = 0;
        for (id, sequence) in self.waiting.iter().chain(&self.running) {
            let is_full = !sequence.is_embedding() && sequence.is_at_max_len();
            assert!(sequence.n_remaining() > 0 && !is_full, "{id:?} should have ended");
            if let Some(deadline) = sequence.deadline {
                assert!(self.deadlines.contains(&(deadline, *id)), "{id:?}");
                n_deadlines += 1;
            }
        }
        assert_eq!(self.deadlines.len(), n_deadlines, "only the living have deadlines");
        for (id, sequence) in &self.waiting {
            assert!(sequence.blocks().is_empty() && sequence.n_computed() == 0, "{id:?} waits");
        }
        for id in self.in_flight.iter().chain(&self.ahead).flatten().map(|(id, _)| id) {
            assert!(self.running.contains_key(id), "{id:?} is in flight and does not run");
        }
        assert!(self.ahead.is_none() || self.in_flight.is_some(), "only what is under way has a plan ahead");
    }

    /// Reference counts are those of the tables, and whatever may still be written has one owner.
    fn check_block_tables(&self) {
        let block_size = self.config.block_size as usize;
        let mut ref_counts: HashMap<BlockId, u32> = HashMap::new();
        for (id, sequence) in &self.running {
            let n_full = sequence.n_computed() / block_size;
            assert!(sequence.blocks().len() * block_size > sequence.n_computed().saturating_sub(1), "{id:?}");
            for (block_idx, block) in sequence.blocks().iter().enumerate() {
                *ref_counts.entry(*block).or_default() += 1;
                if block_idx >= n_full {
                    assert_eq!(self.kv.ref_count(*block), 1, "{id:?} writes to {block:?}");
                    assert!(!self.kv.is_indexed(*block), "{id:?} writes to {block:?}, which is shared");
                }
            }
        }
        assert_eq!(ref_counts.len(), self.kv.counts().referenced);
        for (block, count) in ref_counts {
            assert_eq!(self.kv.ref_count(block), count, "{block:?}");
        }
    }
}

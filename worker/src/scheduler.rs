//! The scheduler: decides, step by step, which rows of which sequences the group computes.
//!
//! It is a state machine without IO, clock or threads. Its driver adds and aborts sequences, asks for the next plan
//! ([`Scheduler::schedule`]), has the group compute it, samples, and hands the tokens back ([`Scheduler::commit`]). It may
//! ask for one more plan in between ([`ahead`]).
//!
//! ```text
//!            add                      admitted            sampled its last token, embedded, aborted, expired
//!  (refused) <── request ──> waiting ─────────> running ─────────────────────────────────────────────────> gone
//!                               ^                  │
//!                               └──────────────────┘ preempted: blocks ran out
//! ```
//!
//! # What a step holds
//!
//! 1. One row for each running sequence that needs only one: decodes are never held up by prefills.
//! 2. Prefill chunks of running sequences, oldest first, of at most `max_prefill_chunk` rows each.
//! 3. Chunks of sequences that are admitted now, oldest first, while there are rows, places and blocks left.
//! 4. Drafts of the sequences that decode, while there are few of them ([`speculation`]).
//!
//! Logits take much more memory than anything else that a row leaves behind. Whoever samples needs one row of them, so
//! there are at most `max_running` of those. Prompts whose logits are asked for at every position share
//! `max_prompt_logits_rows` beside them, oldest first: a chunk is cut at what is left of that, and a sequence that finds
//! nothing left waits for a later step. By the lockstep rule no cut shows in the logits.
//!
//! An *embedding* is a sequence that is only prefilled: its rows give hidden states instead of logits, which take no more
//! memory than the step's other activations, and it ends when its prompt is computed.
//!
//! A sequence gets the blocks of all its known tokens when it is admitted, so a prefill that has begun never lacks
//! blocks; only decodes, with their drafts, grow a table. When one of them finds no block, the youngest running sequence
//! is preempted: it gives its blocks up, waits again, and computes its tokens anew later (what it had computed often still
//! is in the prefix cache). Sampled tokens are never lost, and by the lockstep rule the recomputed logits are the same bits.
//!
//! # Sharing
//!
//! A sequence is admitted on top of the full blocks that the prefix cache holds. If the next block is being computed by
//! a running sequence right now, it waits until that one has got past it or is gone: equal prompts (the choices of a
//! request, for example) are computed once. At least one token of a prompt is always computed, for its logits. A block
//! is shared only when it is full and computed, so nothing is ever copied on write. A sequence may also be told to wait
//! for another's prompt logits ([`NewSequence::after`]). Who wants a result of every position of its prompt, logits or hidden
//! states, takes nothing from the cache before all are delivered, and each is delivered once, whatever is preempted.
//!
//! # Nobody starves
//!
//! Age is the order of arrival. The oldest running sequence is in every step: it gets rows first and is never preempted.
//! While a sequence waits for places or blocks, nobody younger is admitted; only while it waits for another's prefill (its
//! blocks, or its share of prompt logits) may younger ones pass, and none of them takes the same share first. With M =
//! `max_running` and C one more than the longest that any sequence may grow (a place that is found free has been so for a
//! step that was planned ahead), the oldest sequence thus ends within (2M + 1)·C steps (at most M running sequences end
//! before it has a place, at most M have a prefill that it waits for, then it runs), and one that arrives behind `a` others
//! within (a + 1)(2M + 1)·C. The simulation holds it to that.

mod admission;
pub mod ahead;
mod allowance;
mod drafter;
mod integrity;
pub mod plan;
mod sequence;
#[cfg(test)]
mod simulation;
pub mod speculation;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

pub use integrity::Stats;
use plan::{SeqId, SequenceStep, StepPlan};
use sequence::{Chunk, Room, Sequence};
use speculation::Speculation;

use crate::kv::prefix_cache::PrefixCache;

/// Limits of a scheduler.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Rows of a step. Higher: faster prefills; lower: shorter gaps between the tokens of those who decode. At least
    /// `max_running`, so that every decode fits and a prefill always gets on.
    pub max_step_tokens: usize,
    /// Rows of one sequence in a step. Lower: a long prompt shares its steps with other prompts.
    pub max_prefill_chunk: usize,
    /// Rows of a step whose logits are asked for because they are a prompt's. Higher: prompts with log-probabilities get on
    /// faster; each takes a vocabulary of floats.
    pub max_prompt_logits_rows: usize,
    /// Sequences that run at a time. Higher: more throughput, slower streams.
    pub max_running: usize,
    /// Sequences that may wait; further ones are refused. (Preempted ones come on top: at most `max_running`.)
    pub max_waiting: usize,
    /// Blocks in the KV storage.
    pub n_blocks: u32,
    /// Positions in a block.
    pub block_size: u32,
    /// Longest prompt and output together. Unit: tokens.
    pub context_length: u32,
    /// Whether tokens are drafted.
    pub speculation: Speculation,
}

/// A configuration that no scheduler can work with.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidSchedulerConfig {
    /// A limit is 0.
    #[error("scheduler: {name} must be at least 1")]
    Zero {
        /// The limit.
        name: &'static str,
    },
    /// A step cannot hold one row for every running sequence.
    #[error("scheduler: max_step_tokens = {max_step_tokens} must be at least max_running = {max_running}")]
    StepTooSmall {
        /// As configured.
        max_step_tokens: usize,
        /// As configured.
        max_running: usize,
    },
}

/// How the hidden states of a prompt's tokens become one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pooling {
    /// Their mean. All of the prompt is computed: such a sequence does not start from the prefix cache.
    Mean,
    /// The last one.
    Last,
}

/// A sequence to be generated, or to be embedded. The default is an empty one, which is refused.
#[derive(Clone, Default, Debug)]
pub struct NewSequence {
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Ends with [`Ended::Length`] after this many tokens, or at the end of the context. At least 1, unless it is embedded.
    pub max_new_tokens: u32,
    /// Set for an embedding: no token is sampled. Chunks of the prompt give the hidden states that are pooled, each position
    /// once, in order, and the last of them ends it, with [`Ended::Embedded`].
    pub pooling: Option<Pooling>,
    /// Ends with what it has at this time; never starts after it.
    pub deadline: Option<Instant>,
    /// Whether the logits of every prompt position are needed. Such a sequence does not start from the prefix cache.
    /// Each position is delivered once, by a chunk with [`RowResults::AllLogits`](plan::RowResults): chunks that compute
    /// delivered positions again, after a preemption, do not deliver them again.
    pub prompt_logprobs: bool,
    /// Does not start before this sequence has delivered the logits of its prompt, or is gone. It must be older.
    pub after: Option<SeqId>,
    /// Whether it never has drafts.
    pub no_drafts: bool,
}

/// Why a sequence was not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// Too many wait.
    #[error("the queue is full: {limit} sequences wait")]
    QueueFull {
        /// How many may wait.
        limit: usize,
    },
    /// The context has no room for the prompt, or for the one more token that is to be generated.
    #[error("the prompt has {n_tokens} tokens; the context takes at most {limit}")]
    PromptTooLong {
        /// Tokens in the prompt.
        n_tokens: usize,
        /// The most that a prompt may have.
        limit: usize,
    },
    /// Prompt and output together need more blocks than there are.
    #[error("prompt and output need {n_needed} KV blocks; there are {n_blocks}")]
    NeverFits {
        /// Blocks that it needs at its longest.
        n_needed: usize,
        /// Blocks in the KV storage.
        n_blocks: usize,
    },
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// There is nothing to generate.
    #[error("max_new_tokens is 0")]
    NothingToGenerate,
    /// Its time was over before it came.
    #[error("the deadline has passed")]
    DeadlinePassed,
}

/// What [`Scheduler::schedule`] decided.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Scheduled {
    /// The next step. None only if no sequence is left, or if a plan is under way whose tokens must be known first.
    pub plan: Option<StepPlan>,
    /// Sequences whose deadline has passed, oldest first. They are gone: those that waited never start, those that ran
    /// end with what they have.
    pub expired: Vec<SeqId>,
}

/// The tokens that were sampled for a sequence in one step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sampled {
    /// The sequence.
    pub id: SeqId,
    /// Its next tokens, at least one. All but the last are [`drafts`](Scheduler::drafts) of the plan, from the first on.
    pub tokens: Vec<u32>,
    /// Whether the last of them ends it.
    pub stop: bool,
}

/// Why a sequence ended by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// [`Sampled::stop`].
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    /// All of an embedding's prompt is computed.
    Embedded,
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    kv: PrefixCache,
    /// By age. No blocks.
    waiting: BTreeMap<SeqId, Sequence>,
    /// By age. Every one has blocks for its known tokens and has been in a plan, except while `schedule` works.
    running: BTreeMap<SeqId, Sequence>,
    /// Of all sequences that have one.
    deadlines: BTreeSet<(Instant, SeqId)>,
    /// The plan that has been handed out and not committed, the older one of two. Sequences that end are taken out of it.
    in_flight: Option<BTreeMap<SeqId, Chunk>>,
    /// The plan after it, if that has been handed out, too.
    ahead: Option<BTreeMap<SeqId, Chunk>>,
    /// Whether one that waits lacked blocks, and nobody has given any back since.
    lacks_blocks: bool,
    /// For the next plan: sequences that stopped running. None of them is in a follower's table afterwards.
    released: Vec<SeqId>,
    next_id: u64,
    next_step_id: u64,
}

impl Scheduler {
    /// A scheduler with nothing to do.
    ///
    /// # Errors
    /// If the limits contradict one another.
    pub fn new(config: SchedulerConfig) -> Result<Self, InvalidSchedulerConfig> {
        let limits = [
            ("max_step_tokens", config.max_step_tokens),
            ("max_prefill_chunk", config.max_prefill_chunk),
            ("max_prompt_logits_rows", config.max_prompt_logits_rows),
            ("max_running", config.max_running),
            ("max_waiting", config.max_waiting),
            ("n_blocks", config.n_blocks as usize),
            ("block_size", config.block_size as usize),
            ("context_length", config.context_length as usize),
        ];
        if let Some((name, _)) = limits.into_iter().find(|(_, limit)| *limit == 0) {
            return Err(InvalidSchedulerConfig::Zero { name });
        }
        let SchedulerConfig { max_step_tokens, max_running, .. } = config;
        if max_step_tokens < max_running {
            return Err(InvalidSchedulerConfig::StepTooSmall { max_step_tokens, max_running });
        }
        Ok(Self {
            kv: PrefixCache::new(config.n_blocks),
            config,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            in_flight: None,
            ahead: None,
            lacks_blocks: false,
            released: Vec::new(),
            next_id: 0,
            next_step_id: 0,
        })
    }

    /// Takes a sequence into the queue.
    ///
    /// # Errors
    /// See [`Refusal`]. A refused sequence changes nothing.
    pub fn add(&mut self, new: NewSequence, now: Instant) -> Result<SeqId, Refusal> {
        let max_len = self.max_len(&new)?;
        if self.waiting.len() >= self.config.max_waiting {
            return Err(Refusal::QueueFull { limit: self.config.max_waiting });
        }
        if new.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Refusal::DeadlinePassed);
        }
        let block_size = self.config.block_size as usize;
        let mut sequence = match new.pooling {
            Some(pooling) => Sequence::embedding(new.prompt, pooling, block_size),
            None if new.prompt_logprobs => Sequence::new(new.prompt, max_len, block_size).with_prompt_results(),
            None => Sequence::new(new.prompt, max_len, block_size),
        };
        sequence.deadline = new.deadline;
        sequence.after = new.after;
        sequence.no_drafts = new.no_drafts;
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.deadlines.extend(new.deadline.map(|deadline| (deadline, id)));
        self.waiting.insert(id, sequence);
        Ok(id)
    }

    /// Ends a sequence; its blocks are free at once. One that is not there (it may just have ended) changes nothing.
    ///
    /// A step under way may still write to its blocks. That is harmless: whoever gets them next is in a later step, and every
    /// rank computes steps in their order.
    pub fn abort(&mut self, id: SeqId) {
        self.remove(id);
    }

    /// Decides what the next step computes. While a plan is under way, plans [`ahead`] of its tokens if it can.
    ///
    /// # Panics
    /// If two plans are under way.
    pub fn schedule(&mut self, now: Instant) -> Scheduled {
        assert!(self.ahead.is_none(), "two plans have not been committed");
        let expired = self.expire(now);
        let plan = if self.in_flight.is_some() { self.plan_ahead() } else { self.plan() };
        Scheduled { plan, expired }
    }

    /// The next plan, with all tokens known.
    fn plan(&mut self) -> Option<StepPlan> {
        let has_preempted = self.grow_tables();
        let mut chunks = BTreeMap::new();
        let mut room =
            Room { rows: self.config.max_step_tokens, prompt_logits_rows: self.config.max_prompt_logits_rows };
        self.plan_running(&mut chunks, &mut room);
        if !has_preempted {
            // Whoever was preempted just now would only come back to take the same blocks.
            self.admit(&mut chunks, &mut room);
        }
        let mut plan = self.make_plan(chunks)?;
        self.draft_repeats(&mut plan);
        Some(plan)
    }

    /// The older plan under way has been computed: takes what was sampled, once for each of [`due`](Self::due). Tokens of
    /// sequences that were aborted meanwhile are ignored. Returns the sequences that ended by themselves: embeddings, oldest
    /// first, then the others in the order of `sampled`. They are gone.
    ///
    /// # Panics
    /// If no plan is under way, a token is missing, a sequence was sampled twice, or what it accepted was not drafted.
    pub fn commit(&mut self, sampled: &[Sampled]) -> Vec<(SeqId, Ended)> {
        let mut in_flight = self.in_flight.take().expect("a plan is under way");
        self.in_flight = self.ahead.take();
        for (id, chunk) in &in_flight {
            let sequence = self.running.get_mut(id).expect("what is in flight runs");
            for (content, block) in sequence.advance(chunk) {
                self.kv.insert(content, block);
            }
        }
        let mut ended = self.take_embedded(&in_flight);
        for sampled in sampled {
            let Some(chunk) = in_flight.remove(&sampled.id) else {
                assert!(!self.running.contains_key(&sampled.id), "{:?} was sampled twice", sampled.id);
                continue;
            };
            assert!(chunk.samples, "{:?} has more tokens to compute", sampled.id);
            ended.extend(self.take_tokens(sampled, &chunk.drafts).map(|reason| (sampled.id, reason)));
        }
        assert!(!in_flight.values().any(|chunk| chunk.samples), "a token is missing");
        ended
    }

    /// Ends everything and forgets all blocks: the group was formed anew, and its KV storage holds nothing. Steps count
    /// from 0 again. Returns the sequences that ended, oldest first.
    pub fn reset(&mut self) -> Vec<SeqId> {
        let mut ended: Vec<_> = self.waiting.keys().chain(self.running.keys()).copied().collect();
        ended.sort_unstable();
        *self = Self {
            kv: self.kv.cleared(),
            config: self.config.clone(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            in_flight: None,
            ahead: None,
            lacks_blocks: false,
            released: Vec::new(),
            next_id: self.next_id,
            next_step_id: 0,
        };
        ended
    }

    /// The sequences of the older plan under way for which [`commit`](Self::commit) wants tokens, oldest first.
    pub fn due(&self) -> impl Iterator<Item = SeqId> {
        self.in_flight.iter().flatten().filter(|(_, chunk)| chunk.samples).map(|(id, _)| *id)
    }

    /// The drafts that the plan under way has for a sequence: the tokens of its last rows. The row before each of them
    /// is there to verify it, and the last one to sample what comes after all of them.
    pub fn drafts(&self, id: SeqId) -> &[u32] {
        let chunk = self.in_flight.as_ref().and_then(|chunks| chunks.get(&id));
        chunk.map(|chunk| chunk.drafts.as_slice()).unwrap_or_default()
    }

    /// Rows of the plan under way.
    fn n_rows_in_flight(&self) -> usize {
        self.in_flight.iter().flatten().map(|(_, chunk)| chunk.n_rows + chunk.drafts.len()).sum()
    }

    /// Prompt tokens that the prefix cache held when the sequence first ran. 0 before that, and once it is gone.
    pub fn cached_tokens(&self, id: SeqId) -> u32 {
        let sequence = self.running.get(&id).or_else(|| self.waiting.get(&id));
        // At most the context's length, which is a u32.
        sequence.map_or(0, |sequence| sequence.n_cached() as u32)
    }

    /// The length at which a sequence ends.
    fn max_len(&self, new: &NewSequence) -> Result<usize, Refusal> {
        let n_tokens = new.prompt.len();
        let context_length = self.config.context_length as usize;
        if n_tokens == 0 {
            return Err(Refusal::EmptyPrompt);
        }
        let embeds = new.pooling.is_some();
        if new.max_new_tokens == 0 && !embeds {
            return Err(Refusal::NothingToGenerate);
        }
        let limit = if embeds { context_length } else { context_length - 1 };
        if n_tokens > limit {
            return Err(Refusal::PromptTooLong { n_tokens, limit });
        }
        let n_new = if embeds { 0 } else { new.max_new_tokens as usize };
        let max_len = n_tokens.saturating_add(n_new).min(context_length);
        // The last token is sampled and never computed.
        let n_computed = if embeds { max_len } else { max_len - 1 };
        let n_needed = n_computed.div_ceil(self.config.block_size as usize);
        let n_blocks = self.config.n_blocks as usize;
        if n_needed > n_blocks {
            return Err(Refusal::NeverFits { n_needed, n_blocks });
        }
        Ok(max_len)
    }

    fn expire(&mut self, now: Instant) -> Vec<SeqId> {
        let mut expired = Vec::new();
        while let Some((deadline, id)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.remove(id);
            expired.push(id);
        }
        expired.sort_unstable();
        expired
    }

    /// Gives every running sequence, oldest first, the blocks that its known tokens need. Returns whether somebody had
    /// to be preempted for it.
    fn grow_tables(&mut self) -> bool {
        let mut has_preempted = false;
        let ids: Vec<_> = self.running.keys().copied().collect();
        for id in ids {
            while let Some(sequence) = self.running.get_mut(&id)
                && sequence.n_missing_blocks(0) > 0
            {
                if let Some(block) = self.kv.allocate() {
                    sequence.push_block(block);
                } else {
                    // It may be `id` itself, which then waits. The oldest never is: alone, it fits.
                    self.preempt_youngest();
                    has_preempted = true;
                }
            }
        }
        has_preempted
    }

    fn preempt_youngest(&mut self) {
        let (id, mut sequence) = self.running.pop_last().expect("blocks are short only while somebody runs");
        assert!(!self.running.is_empty(), "{id:?} was admitted although it does not fit alone");
        self.kv.release(&sequence.stop());
        self.lacks_blocks = false;
        self.released.push(id);
        self.waiting.insert(id, sequence);
    }

    /// Rows for running sequences: first those that need one, then prefills, oldest first.
    fn plan_running(&self, chunks: &mut BTreeMap<SeqId, Chunk>, room: &mut Room) {
        let (decodes, prefills): (Vec<_>, Vec<_>) = self.running.iter().partition(|(_, sequence)| sequence.decodes());
        for (id, sequence) in decodes.into_iter().chain(prefills) {
            // One that finds no room for its prompt's logits leaves the rows to others.
            let chunk = sequence.next_chunk(room.within(self.config.max_prefill_chunk));
            if let Some(chunk) = chunk {
                room.take(&chunk);
                chunks.insert(*id, chunk);
            }
        }
    }

    /// The plan of these chunks, oldest sequence first.
    fn make_plan(&mut self, chunks: BTreeMap<SeqId, Chunk>) -> Option<StepPlan> {
        if chunks.is_empty() {
            return None;
        }
        let mut sequences = Vec::with_capacity(chunks.len());
        for (id, chunk) in &chunks {
            let sequence = self.running.get_mut(id).expect("only running sequences have chunks");
            sequences.push(SequenceStep {
                id: *id,
                // Below the context's length, which is a u32.
                start_position: sequence.n_computed() as u32,
                token_ids: sequence.rows(chunk),
                new_blocks: sequence.take_new_blocks(),
                results: chunk.results,
            });
        }
        self.in_flight = Some(chunks);
        Some(self.number_plan(sequences))
    }

    fn number_plan(&mut self, sequences: Vec<SequenceStep>) -> StepPlan {
        let step_id = self.next_step_id;
        self.next_step_id += 1;
        StepPlan { step_id, released: std::mem::take(&mut self.released), sequences, chooses: false }
    }

    /// Forgets the embeddings of a plan that are all computed.
    fn take_embedded(&mut self, chunks: &BTreeMap<SeqId, Chunk>) -> Vec<(SeqId, Ended)> {
        let ids: Vec<SeqId> = chunks.keys().copied().filter(|id| self.running[id].is_embedded()).collect();
        ids.iter().for_each(|id| self.remove(*id));
        ids.into_iter().map(|id| (id, Ended::Embedded)).collect()
    }

    fn take_tokens(&mut self, sampled: &Sampled, drafts: &[u32]) -> Option<Ended> {
        let sequence = self.running.get_mut(&sampled.id).expect("what is in flight runs");
        let (_, accepted) = sampled.tokens.split_last().expect("a token is missing");
        assert!(drafts.starts_with(accepted), "{:?} accepted {accepted:?} of the drafts {drafts:?}", sampled.id);
        sampled.tokens.iter().for_each(|token| sequence.push(*token));
        for (content, block) in sequence.accept(accepted.len()) {
            self.kv.insert(content, block);
        }
        let reason = if sampled.stop {
            Ended::Stop
        } else if sequence.is_at_max_len() {
            Ended::Length
        } else {
            return None;
        };
        self.remove(sampled.id);
        Some(reason)
    }

    /// Forgets a sequence, if it is there.
    fn remove(&mut self, id: SeqId) {
        self.lacks_blocks = false;
        for plan in [&mut self.in_flight, &mut self.ahead].into_iter().flatten() {
            plan.remove(&id);
        }
        let deadline = if let Some(mut sequence) = self.running.remove(&id) {
            self.kv.release(&sequence.stop());
            self.released.push(id);
            sequence.deadline
        } else {
            self.waiting.remove(&id).and_then(|sequence| sequence.deadline)
        };
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ahead::PENDING;
    use super::*;

    fn config() -> SchedulerConfig {
        SchedulerConfig {
            max_step_tokens: 16,
            max_prefill_chunk: 2,
            max_prompt_logits_rows: 16,
            max_running: 4,
            max_waiting: 100,
            n_blocks: 16,
            block_size: 2,
            context_length: 16,
            speculation: Speculation::Off,
        }
    }

    fn add(scheduler: &mut Scheduler, prompt: &[u32]) -> SeqId {
        let new = NewSequence { prompt: prompt.to_vec(), max_new_tokens: 4, ..NewSequence::default() };
        scheduler.add(new, Instant::now()).unwrap()
    }

    #[test]
    fn a_limit_of_zero_is_refused_by_name() {
        let error = Scheduler::new(SchedulerConfig { block_size: 0, ..config() }).unwrap_err();
        assert_eq!(error.to_string(), "scheduler: block_size must be at least 1");
    }

    #[test]
    fn a_step_must_hold_a_row_for_everybody_who_runs() {
        let error = Scheduler::new(SchedulerConfig { max_step_tokens: 3, ..config() }).unwrap_err();
        assert_eq!(error.to_string(), "scheduler: max_step_tokens = 3 must be at least max_running = 4");
    }

    #[test]
    fn only_so_many_who_wait_for_a_prefix_are_passed() {
        let check = |n_equal: usize, expected: usize| {
            let mut scheduler = Scheduler::new(config()).unwrap();
            for _ in 0..=n_equal {
                add(&mut scheduler, &[1, 2, 3, 4, 5]);
            }
            add(&mut scheduler, &[9]);
            let plan = scheduler.schedule(Instant::now()).plan.unwrap();
            assert_eq!(plan.sequences.len(), expected, "{n_equal} wait for the first");
        };
        check(admission::MAX_PASSED - 1, 2);
        check(admission::MAX_PASSED, 1);
    }

    #[test]
    #[should_panic(expected = "two plans have not been committed")]
    fn a_third_plan_is_not_made() {
        let mut scheduler = Scheduler::new(config()).unwrap();
        add(&mut scheduler, &[1]);
        (0..3).for_each(|_| drop(scheduler.schedule(Instant::now())));
    }

    #[test]
    fn the_next_plan_is_made_while_one_is_under_way() {
        let mut scheduler = Scheduler::new(config()).unwrap();
        let (first, second) = (add(&mut scheduler, &[1]), add(&mut scheduler, &[5, 6]));
        scheduler.schedule(Instant::now());
        let ahead = scheduler.schedule(Instant::now()).plan.unwrap();
        let rows: Vec<_> =
            ahead.sequences.iter().map(|step| (step.id, step.start_position, &step.token_ids[..])).collect();
        assert_eq!(rows, [(first, 1, &[PENDING][..]), (second, 2, &[PENDING][..])]);
        assert_eq!(ahead.step_id, 1);
        // One of them ends after all.
        let sampled = |id, token, stop| Sampled { id, tokens: vec![token], stop };
        let ended = scheduler.commit(&[sampled(first, 7, true), sampled(second, 8, false)]);
        assert_eq!(ended, [(first, Ended::Stop)]);
        assert_eq!(scheduler.due().collect::<Vec<_>>(), [second]);
        let ahead = scheduler.schedule(Instant::now()).plan.unwrap();
        assert_eq!((ahead.released, ahead.sequences.len()), (vec![first], 1));
        scheduler.commit(&[sampled(second, 9, false)]);
        scheduler.check_integrity();
    }

    #[test]
    fn nothing_is_planned_ahead_of_a_prompt_or_a_newcomer() {
        let mut scheduler = Scheduler::new(config()).unwrap();
        let id = add(&mut scheduler, &[1, 2, 3]);
        scheduler.schedule(Instant::now());
        assert_eq!(scheduler.schedule(Instant::now()).plan, None, "a token of the prompt is left");
        scheduler.commit(&[]);
        scheduler.schedule(Instant::now());
        add(&mut scheduler, &[4]);
        assert_eq!(scheduler.schedule(Instant::now()).plan, None, "somebody can be admitted");
        scheduler.commit(&[Sampled { id, tokens: vec![4], stop: false }]);
        assert_eq!(scheduler.schedule(Instant::now()).plan.unwrap().sequences.len(), 2);
    }

    #[test]
    fn whoever_ends_with_the_token_under_way_has_no_row_ahead() {
        let mut scheduler = Scheduler::new(config()).unwrap();
        let new = NewSequence { prompt: vec![1], max_new_tokens: 1, ..NewSequence::default() };
        scheduler.add(new, Instant::now()).unwrap();
        scheduler.schedule(Instant::now());
        assert_eq!(scheduler.schedule(Instant::now()).plan, None);
    }

    #[test]
    #[should_panic(expected = "a token is missing")]
    fn every_sequence_that_is_due_must_be_sampled() {
        let mut scheduler = Scheduler::new(config()).unwrap();
        add(&mut scheduler, &[1]);
        scheduler.schedule(Instant::now());
        scheduler.commit(&[]);
    }
}

//! A long random life of the scheduler: arrivals, aborts, deadlines, preemptions, shared prefixes, tiny pools, resets,
//! drafts from either source that turn out right and wrong, plans that are made ahead of tokens, embeddings.
//!
//! Beside the scheduler runs a follower that knows nothing but the plans. It keeps block tables and a KV storage in which
//! each slot remembers the tokens that its keys and values stand for. Every row that a plan computes must find, in every
//! slot before it, exactly the tokens of its own sequence: a block that was leaked, shared wrongly, overwritten or
//! evicted too early shows at once. And somebody watches the prefix cache, whose copy of it must stay right.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::ahead::PENDING;
use super::plan::{BlockId, RowResults, SeqId, SequenceStep, StepPlan};
use super::speculation::{Draftable, Drafts, MAX_ROWS, Speculation};
use super::{Ended, NewSequence, Pooling, Refusal, Sampled, Scheduled, Scheduler, SchedulerConfig};
use crate::kv::prefix_cache::{BlockKey, Change, Content};
use crate::test_seed::seed;

/// Steps in which something was computed.
const N_PLANS: u64 = 200_000;
const STEPS_PER_WORLD: u64 = 400;
const VOCAB_SIZE: u32 = 3;

#[test]
fn nothing_leaks_is_shared_wrongly_or_starves_in_a_long_random_life() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let mut seen = Seen::default();
    while seen.plans < N_PLANS {
        let mut world = World::new(&mut rng);
        let end = seen.steps + STEPS_PER_WORLD;
        while seen.steps < end {
            world.turn(&mut rng, &mut seen);
        }
        world.drain(&mut rng, &mut seen);
    }
    println!("{seen:?}");
    seen.check_that_everything_happened();
}

/// How often what was to be tried has happened.
#[derive(Debug, Default)]
struct Seen {
    steps: u64,
    plans: u64,
    finished: u64,
    stopped: u64,
    aborted: u64,
    aborted_in_flight: u64,
    expired_waiting: u64,
    expired_running: u64,
    preempted: u64,
    preempted_owing_prompt_logits: u64,
    embedded_by_mean: u64,
    embedded_by_last: u64,
    embeddings_preempted: u64,
    means_preempted_half_way: u64,
    prompt_logits_cut: u64,
    skipped_for_prompt_logits: u64,
    started_after: u64,
    prefix_hits: u64,
    resets: u64,
    queue_full: u64,
    never_fits: u64,
    drafts_accepted: u64,
    drafts_rejected: u64,
    drafts_cut_by_a_stop: u64,
    blocks_for_drafts: u64,
    model_drafts: u64,
    model_drafts_beside_repeats: u64,
    model_without_drafts: u64,
    planned_ahead: u64,
    not_planned_ahead: u64,
    ended_with_a_row_ahead: u64,
}

impl Seen {
    fn check_that_everything_happened(&self) {
        let counts = [
            self.finished,
            self.stopped,
            self.aborted,
            self.aborted_in_flight,
            self.expired_waiting,
            self.expired_running,
            self.preempted,
            self.preempted_owing_prompt_logits,
            self.embedded_by_mean,
            self.embedded_by_last,
            self.embeddings_preempted,
            self.means_preempted_half_way,
            self.prompt_logits_cut,
            self.skipped_for_prompt_logits,
            self.started_after,
            self.prefix_hits,
            self.resets,
            self.queue_full,
            self.never_fits,
            self.drafts_accepted,
            self.drafts_rejected,
            self.drafts_cut_by_a_stop,
            self.blocks_for_drafts,
            self.model_drafts,
            self.model_drafts_beside_repeats,
            self.model_without_drafts,
            self.planned_ahead,
            self.not_planned_ahead,
            self.ended_with_a_row_ahead,
        ];
        // The rarest happens about twenty times: so few that a higher limit would fail by chance now and then.
        assert!(counts.iter().all(|count| *count >= 3), "{self:?}");
    }
}

/// A sequence as its client sees it.
#[derive(Debug)]
struct Client {
    token_ids: Vec<u32>,
    n_prompt: usize,
    max_len: usize,
    deadline: Option<Instant>,
    prompt_logprobs: bool,
    pooling: Option<Pooling>,
    after: Option<SeqId>,
    /// Prompt positions whose results have come.
    n_delivered: usize,
    has_run: bool,
    /// The step at which it has ended at the latest.
    must_end_by: u64,
}

impl Client {
    /// Whether a result of every position of the prompt is wanted.
    fn wants_prompt_results(&self) -> bool {
        self.prompt_logprobs || self.pooling == Some(Pooling::Mean)
    }

    fn owes_prompt_results(&self) -> bool {
        self.wants_prompt_results() && self.n_delivered < self.n_prompt
    }

    fn owes_prompt_logits(&self) -> bool {
        self.owes_prompt_results() && self.pooling.is_none()
    }
}

/// The tokens that a slot's keys and values stand for: those up to its position.
type SlotContent = Vec<u32>;

/// A rank that sees plans and nothing else.
#[derive(Default)]
struct Follower {
    tables: BTreeMap<SeqId, Vec<BlockId>>,
    /// By block and offset.
    storage: BTreeMap<(BlockId, usize), SlotContent>,
}

impl Follower {
    /// `chosen`: the tokens that the step before has chosen.
    fn apply(
        &mut self,
        plan: &StepPlan,
        clients: &BTreeMap<SeqId, Client>,
        chosen: &BTreeMap<SeqId, u32>,
        block_size: usize,
    ) {
        for id in &plan.released {
            assert!(self.tables.remove(id).is_some(), "{id:?} is released and unknown");
        }
        for step in &plan.sequences {
            self.tables.entry(step.id).or_default().extend(&step.new_blocks);
        }
        for step in &plan.sequences {
            self.check_exclusive(step, block_size);
            let mut known = clients[&step.id].token_ids.clone();
            let mut step = step.clone();
            if step.token_ids == [PENDING] {
                step.token_ids = vec![chosen[&step.id]];
                known.extend(&step.token_ids);
            }
            self.compute(&step, &known, block_size);
        }
    }

    /// Blocks that the step writes to are in no other table.
    fn check_exclusive(&self, step: &SequenceStep, block_size: usize) {
        let start = step.start_position as usize;
        let written = &self.tables[&step.id][start / block_size..];
        for (id, table) in self.tables.iter().filter(|(id, _)| **id != step.id) {
            assert!(!table.iter().any(|block| written.contains(block)), "{:?} writes to blocks of {id:?}", step.id);
        }
    }

    /// `known`: the sequence's tokens. Rows of the step beyond them are drafts.
    fn compute(&mut self, step: &SequenceStep, known: &[u32], block_size: usize) {
        let start = step.start_position as usize;
        let end = start + step.token_ids.len();
        let token_ids = [&known[..start], &step.token_ids].concat();
        let n_known = known.len().min(end);
        assert_eq!(token_ids[..n_known], known[..n_known], "{step:?}");
        let table = &self.tables[&step.id];
        let slot = |position: usize| (table[position / block_size], position % block_size);
        for position in start..end {
            self.storage.insert(slot(position), token_ids[..=position].to_vec());
        }
        for position in 0..end {
            assert_eq!(self.storage.get(&slot(position)).map(Vec::as_slice), Some(&token_ids[..=position]), "{step:?}");
        }
    }
}

struct World {
    config: SchedulerConfig,
    scheduler: Scheduler,
    follower: Follower,
    /// What the prefix cache holds, by its changes.
    cached: HashMap<BlockKey, Content>,
    clients: BTreeMap<SeqId, Client>,
    /// Plans that are not committed, with the tokens that the device has chosen in them.
    under_way: VecDeque<(StepPlan, BTreeMap<SeqId, u32>)>,
    /// How often a plan is asked for while one is under way.
    p_ahead: f64,
    /// Prompts begin like one of these.
    documents: Vec<Vec<u32>>,
    now: Instant,
    next_step_id: u64,
    arrival_probability: f64,
    /// Text mostly repeats what stands so many tokens before.
    period: Option<usize>,
    /// A draft model, if there is one.
    draft_model: Option<Oracle>,
}

/// A draft model that knows what is right, and says it now and then.
#[derive(Clone, Copy)]
struct Oracle {
    /// How often a draft is right.
    p_right: f64,
    /// The longest that one of its steps takes, in steps of one row.
    step_time_max: f64,
}

impl World {
    fn new(rng: &mut ChaCha8Rng) -> Self {
        let max_running = rng.random_range(1..=6);
        let config = SchedulerConfig {
            max_step_tokens: max_running + rng.random_range(0..20),
            max_prefill_chunk: *[1, 2, 5, 20].choose(rng).unwrap(),
            max_prompt_logits_rows: *[1, 2, 3, 50].choose(rng).unwrap(),
            max_running,
            max_waiting: rng.random_range(1..12),
            n_blocks: rng.random_range(4..24),
            block_size: *[1, 2, 3, 4].choose(rng).unwrap(),
            context_length: rng.random_range(2..50),
            speculation: *[Speculation::Off, Speculation::Ngram, Speculation::Ngram].choose(rng).unwrap(),
        };
        let mut scheduler = Scheduler::new(config.clone()).unwrap();
        assert!(scheduler.watch_cache().is_empty());
        Self {
            scheduler,
            follower: Follower::default(),
            cached: HashMap::new(),
            clients: BTreeMap::new(),
            under_way: VecDeque::new(),
            p_ahead: *[0.0, 0.5, 1.0].choose(rng).unwrap(),
            documents: (0..3).map(|_| any_tokens(rng, 40)).collect(),
            now: Instant::now(),
            next_step_id: 0,
            arrival_probability: *[0.05, 0.3, 0.9].choose(rng).unwrap(),
            period: rng.random_bool(0.8).then(|| rng.random_range(1..8)),
            draft_model: rng.random_bool(0.6).then(|| Oracle {
                p_right: *[0.0, 0.5, 0.9, 1.0].choose(rng).unwrap(),
                step_time_max: *[0.0, 0.1, 3.0].choose(rng).unwrap(),
            }),
            config,
        }
    }

    /// One step, with whatever else happens meanwhile.
    fn turn(&mut self, rng: &mut ChaCha8Rng, seen: &mut Seen) {
        while rng.random_bool(self.arrival_probability) {
            self.arrive(rng, seen);
        }
        if rng.random_bool(0.05) {
            seen.aborted += u64::from(self.abort_any(rng));
        }
        if rng.random_bool(0.002) {
            self.reset(seen);
        }
        self.step(rng, seen);
    }

    /// Nobody comes any more: everybody ends.
    fn drain(&mut self, rng: &mut ChaCha8Rng, seen: &mut Seen) {
        while !self.clients.is_empty() || !self.under_way.is_empty() {
            self.step(rng, seen);
        }
        assert!(self.scheduler.schedule(self.now).plan.is_none());
        let stats = self.scheduler.stats();
        assert_eq!((stats.waiting, stats.running, stats.outstanding_tokens, stats.blocks.referenced), (0, 0, 0, 0));
    }

    fn arrive(&mut self, rng: &mut ChaCha8Rng, seen: &mut Seen) {
        let document = self.documents.choose(rng).unwrap();
        let n_common = rng.random_range(0..=document.len().min(self.config.context_length as usize));
        let n_own = rng.random_range(0..4);
        let prompt = [&document[..n_common], &any_tokens(rng, n_own)].concat();
        let deadline = rng.random_bool(0.2).then(|| self.now + Duration::from_millis(rng.random_range(1..60)));
        let pooling = rng.random_bool(0.15).then(|| *[Pooling::Mean, Pooling::Last].choose(rng).unwrap());
        let max_new_tokens = if pooling.is_some() { 0 } else { rng.random_range(1..40) };
        let prompt_logprobs = pooling.is_none() && rng.random_bool(0.35);
        let living: Vec<_> = self.clients.keys().copied().collect();
        let after = living.choose(rng).copied().filter(|_| rng.random_bool(0.2));
        let no_drafts = rng.random_bool(0.2);
        let new = NewSequence {
            prompt: prompt.clone(),
            max_new_tokens,
            pooling,
            deadline,
            prompt_logprobs,
            after,
            no_drafts,
        };
        let before = self.scheduler.stats();
        match self.scheduler.add(new, self.now) {
            Ok(id) => {
                let context_length = self.config.context_length as usize;
                let must_end_by = seen.steps + self.starvation_bound();
                let client = Client {
                    n_prompt: prompt.len(),
                    max_len: context_length.min(prompt.len() + max_new_tokens as usize),
                    token_ids: prompt,
                    deadline,
                    prompt_logprobs,
                    pooling,
                    after,
                    n_delivered: 0,
                    has_run: false,
                    must_end_by,
                };
                self.clients.insert(id, client);
            }
            Err(refusal) => {
                seen.queue_full += u64::from(matches!(refusal, Refusal::QueueFull { .. }));
                seen.never_fits += u64::from(matches!(refusal, Refusal::NeverFits { .. }));
                assert_eq!(self.scheduler.stats(), before, "a refusal changes nothing");
            }
        }
    }

    /// What the scheduler's documentation promises to whoever comes now.
    fn starvation_bound(&self) -> u64 {
        let n_ahead = self.clients.len() as u64;
        (n_ahead + 1) * (2 * self.config.max_running as u64 + 1) * (u64::from(self.config.context_length) + 1)
    }

    fn abort_any(&mut self, rng: &mut ChaCha8Rng) -> bool {
        let ids: Vec<_> = self.clients.keys().copied().collect();
        let Some(id) = ids.choose(rng) else { return false };
        let n_referenced = self.scheduler.stats().blocks.referenced;
        self.scheduler.abort(*id);
        self.scheduler.abort(*id);
        self.scheduler.check_integrity();
        assert!(self.scheduler.stats().blocks.referenced <= n_referenced);
        self.clients.remove(id);
        true
    }

    fn reset(&mut self, seen: &mut Seen) {
        let ended = self.scheduler.reset();
        assert_eq!(ended, self.clients.keys().copied().collect::<Vec<_>>());
        let blocks = self.scheduler.stats().blocks;
        assert_eq!(blocks.free, blocks.total);
        self.clients.clear();
        self.under_way.clear();
        self.follower = Follower::default();
        self.next_step_id = 0;
        seen.resets += 1;
    }

    fn step(&mut self, rng: &mut ChaCha8Rng, seen: &mut Seen) {
        seen.steps += 1;
        self.now += Duration::from_millis(rng.random_range(0..3));
        if self.under_way.is_empty() {
            let without_drafts = rng.random_bool(0.1).then(|| self.schedule_without_drafts());
            let mut scheduled = self.scheduler.schedule(self.now);
            self.scheduler.check_integrity();
            if let (Some(plan), Some(draft_model)) = (&mut scheduled.plan, self.draft_model) {
                self.ask(draft_model, plan, rng, seen);
                self.scheduler.check_integrity();
            }
            if let Some(without_drafts) = without_drafts {
                self.check_that_nobody_pays(&scheduled, &without_drafts, seen);
            }
            self.take(scheduled, seen);
        }
        if self.under_way.is_empty() {
            assert!(self.clients.is_empty(), "there is work, and no plan for it");
            return;
        }
        if rng.random_bool(self.p_ahead) {
            self.plan_ahead(rng, seen);
        }
        if rng.random_bool(0.05) {
            seen.aborted_in_flight += u64::from(self.abort_any(rng));
        }
        if rng.random_bool(0.001) {
            self.reset(seen);
            return;
        }
        let (plan, _) = self.under_way.pop_front().expect("one is under way");
        self.commit(&plan, rng, seen);
        assert!(self.clients.values().all(|client| seen.steps < client.must_end_by), "somebody starves");
    }

    fn plan_ahead(&mut self, rng: &mut ChaCha8Rng, seen: &mut Seen) {
        self.now += Duration::from_millis(rng.random_range(0..3));
        let scheduled = self.scheduler.schedule(self.now);
        self.scheduler.check_integrity();
        *(if scheduled.plan.is_some() { &mut seen.planned_ahead } else { &mut seen.not_planned_ahead }) += 1;
        self.take(scheduled, seen);
    }

    /// Checks what was decided; a plan is under way from now on, and so are its tokens.
    fn take(&mut self, scheduled: Scheduled, seen: &mut Seen) {
        self.check_expired(&scheduled.expired, seen);
        let Some(plan) = scheduled.plan else { return };
        seen.plans += 1;
        self.check_plan(&plan, seen);
        let chosen = self.under_way.back().map(|(_, chosen)| chosen.clone()).unwrap_or_default();
        self.follower.apply(&plan, &self.clients, &chosen, self.config.block_size as usize);
        let tables = self.scheduler.running.iter().map(|(id, sequence)| (*id, sequence.blocks().to_vec()));
        assert_eq!(self.follower.tables, tables.collect(), "the follower's tables are the leader's");
        let choose = |step: &SequenceStep| {
            let mut token_ids = self.clients[&step.id].token_ids.clone();
            token_ids.extend(chosen.get(&step.id).filter(|_| step.token_ids == [PENDING]));
            (step.id, next_token(&token_ids, self.period))
        };
        let chosen = plan.sequences.iter().map(choose).collect();
        self.under_way.push_back((plan, chosen));
    }

    /// Has the draft model draft for whoever may have drafts from it, or for some of them.
    fn ask(&mut self, draft_model: Oracle, plan: &mut StepPlan, rng: &mut ChaCha8Rng, seen: &mut Seen) {
        let step_time = rng.random_range(0.0..=draft_model.step_time_max);
        let mut drafts = Vec::new();
        for Draftable { id, max_drafts, .. } in self.scheduler.draftable(step_time) {
            assert!(max_drafts > 0 && self.scheduler.drafts(id).is_empty());
            if rng.random_bool(0.2) {
                continue;
            }
            let mut token_ids = self.clients[&id].token_ids.clone();
            for _ in 0..rng.random_range(0..=max_drafts) {
                let right = next_token(&token_ids, self.period);
                let is_right = rng.random_bool(draft_model.p_right);
                token_ids.push(if is_right { right } else { (right + 1) % VOCAB_SIZE });
            }
            let token_ids = token_ids.split_off(self.clients[&id].token_ids.len());
            drafts.push(Drafts { id, time: step_time * token_ids.len() as f64, token_ids });
        }
        let n_repeat = plan.sequences.iter().filter(|step| !self.scheduler.drafts(step.id).is_empty()).count();
        let n_wanted: usize = drafts.iter().map(|drafts| drafts.token_ids.len()).sum();
        seen.model_drafts += n_wanted as u64;
        seen.model_drafts_beside_repeats += u64::from(n_repeat > 0 && n_wanted > 0);
        seen.model_without_drafts += u64::from(drafts.iter().any(|drafts| drafts.token_ids.is_empty()));
        self.scheduler.add_drafts(plan, drafts);
    }

    fn check_expired(&mut self, expired: &[SeqId], seen: &mut Seen) {
        for id in expired {
            let client = self.clients.remove(id).expect("only the living expire");
            assert!(client.deadline.unwrap() <= self.now);
            *(if client.has_run { &mut seen.expired_running } else { &mut seen.expired_waiting }) += 1;
        }
        let is_late = |client: &Client| client.deadline.is_some_and(|deadline| deadline <= self.now);
        assert!(!self.clients.values().any(is_late), "whoever is late has expired");
    }

    fn schedule_without_drafts(&self) -> Scheduled {
        let mut scheduler = self.scheduler.clone();
        scheduler.config.speculation = Speculation::Off;
        scheduler.schedule(self.now)
    }

    /// Drafts come on top of the plan that would be made without them.
    fn check_that_nobody_pays(&self, scheduled: &Scheduled, without_drafts: &Scheduled, seen: &mut Seen) {
        assert_eq!(scheduled.expired, without_drafts.expired);
        let (Some(plan), Some(plain)) = (&scheduled.plan, &without_drafts.plan) else {
            assert_eq!(scheduled, without_drafts);
            return;
        };
        assert_eq!((plan.sequences.len(), &plan.released), (plain.sequences.len(), &plain.released));
        for (step, plain) in plan.sequences.iter().zip(&plain.sequences) {
            let n_drafts = self.scheduler.drafts(step.id).len();
            let token_ids = step.token_ids[..step.token_ids.len() - n_drafts].to_vec();
            let new_blocks = step.new_blocks[..plain.new_blocks.len()].to_vec();
            let results = if n_drafts > 0 { RowResults::LastLogits } else { step.results };
            assert_eq!(SequenceStep { token_ids, new_blocks, results, ..*step }, *plain, "{step:?}");
            if step.new_blocks.len() > plain.new_blocks.len() {
                let stats = self.scheduler.stats();
                assert!(stats.waiting == 0 && stats.blocks.free + stats.blocks.cached >= stats.running, "{stats:?}");
                seen.blocks_for_drafts += 1;
            }
        }
    }

    fn check_plan(&mut self, plan: &StepPlan, seen: &mut Seen) {
        assert_eq!(plan.step_id, self.next_step_id);
        self.next_step_id += 1;
        assert!((1..=self.config.max_step_tokens).contains(&plan.n_rows()));
        self.check_logits_rows(plan, seen);
        assert!(plan.sequences.is_sorted_by(|a, b| a.id < b.id), "one part each, by age");
        let is_ahead = !self.under_way.is_empty();
        let ends_before = |id: &SeqId| is_ahead && self.clients[id].token_ids.len() + 1 == self.clients[id].max_len;
        let oldest = self.scheduler.running.keys().find(|id| !ends_before(id));
        assert_eq!(plan.sequences.first().map(|step| &step.id), oldest, "the oldest is in every step");
        for (id, sequence) in self.scheduler.running.iter().filter(|(id, _)| !ends_before(id)) {
            assert!(!sequence.decodes() || plan.sequences.iter().any(|step| step.id == *id), "{id:?} decodes");
        }
        if is_ahead {
            assert!(plan.sequences.iter().all(|step| step.token_ids == [PENDING]), "{plan:?}");
        }
        for id in &plan.released {
            if let Some(client) = self.clients.get(id) {
                assert!(plan.sequences.iter().all(|step| step.id < *id), "{id:?} was not the youngest");
                seen.preempted += 1;
                let is_half_way = client.owes_prompt_results() && client.n_delivered > 0;
                seen.preempted_owing_prompt_logits += u64::from(is_half_way && client.pooling.is_none());
                seen.means_preempted_half_way += u64::from(is_half_way && client.pooling.is_some());
                seen.embeddings_preempted += u64::from(client.pooling.is_some());
            }
        }
        for step in plan.sequences.iter().filter(|_| !is_ahead) {
            self.check_part(step, seen);
        }
        for step in plan.sequences.iter().filter(|_| is_ahead) {
            let client = &self.clients[&step.id];
            assert_eq!(step.start_position as usize, client.token_ids.len());
            assert!(client.token_ids.len() + 1 < client.max_len && step.results == RowResults::LastLogits, "{step:?}");
        }
    }

    /// The logits of a step are bounded, whatever the prompts are.
    fn check_logits_rows(&self, plan: &StepPlan, seen: &mut Seen) {
        let SchedulerConfig { max_prompt_logits_rows, max_running, .. } = self.config;
        let (drafting, others): (Vec<_>, Vec<_>) =
            plan.sequences.iter().partition(|step| !self.scheduler.drafts(step.id).is_empty());
        assert!(drafting.iter().map(|step| step.token_ids.len()).sum::<usize>() <= MAX_ROWS, "{plan:?}");
        let rows_of = |kind| others.iter().copied().filter(move |step| step.results == kind);
        let n_prompt_rows: usize = rows_of(RowResults::AllLogits).map(SequenceStep::n_logits_rows).sum();
        assert!(n_prompt_rows <= max_prompt_logits_rows, "{plan:?}");
        assert!(rows_of(RowResults::LastLogits).count() <= max_running);
        seen.prompt_logits_cut += u64::from(n_prompt_rows == max_prompt_logits_rows);
        let skipped = self.scheduler.running.keys().filter(|id| plan.sequences.iter().all(|step| step.id != **id));
        seen.skipped_for_prompt_logits += skipped.filter(|id| self.clients[*id].owes_prompt_logits()).count() as u64;
    }

    /// Whoever was told to wait for another's prompt logits has waited.
    fn check_start(&self, id: SeqId, seen: &mut Seen) {
        let before = self.clients[&id].after.and_then(|id| self.clients.get(&id));
        assert!(!before.is_some_and(Client::owes_prompt_logits), "{id:?} did not wait");
        seen.started_after += u64::from(before.is_some_and(|client| client.prompt_logprobs));
    }

    fn check_part(&mut self, step: &SequenceStep, seen: &mut Seen) {
        if !self.clients[&step.id].has_run {
            self.check_start(step.id, seen);
        }
        let client = self.clients.get_mut(&step.id).expect("only the living are in plans");
        let (start, end) = (step.start_position as usize, step.start_position as usize + step.token_ids.len());
        let n_drafts = self.scheduler.drafts(step.id).len();
        let n_sampled = usize::from(client.pooling.is_none());
        assert!(end + n_sampled <= client.max_len, "no row is past the last token that may be sampled: {step:?}");
        let end = end - n_drafts;
        assert!((1..=self.config.max_prefill_chunk).contains(&(end - start)));
        let is_due = self.scheduler.due().any(|id| id == step.id);
        let is_last = end == client.token_ids.len();
        assert_eq!(is_due, is_last && client.pooling.is_none(), "{step:?}");
        let expected = if client.owes_prompt_results() && start >= client.n_delivered {
            assert_eq!(start, client.n_delivered, "no prompt position is left out: {step:?}");
            if client.pooling.is_some() { RowResults::AllHidden } else { RowResults::AllLogits }
        } else if is_last && client.pooling.is_some() {
            assert_eq!(client.pooling, Some(Pooling::Last), "{step:?}");
            RowResults::LastHidden
        } else if n_drafts > 0 {
            assert!(is_due, "{step:?}");
            RowResults::AllLogits
        } else if is_due {
            RowResults::LastLogits
        } else {
            RowResults::None
        };
        assert_eq!(step.results, expected, "{step:?}");
        let n_cached = self.scheduler.cached_tokens(step.id) as usize;
        assert!(n_cached < client.n_prompt && (n_cached == 0 || !client.wants_prompt_results()));
        if !client.has_run {
            assert_eq!(n_cached, start);
            seen.prefix_hits += u64::from(n_cached > 0);
        }
        client.has_run = true;
    }

    fn commit(&mut self, plan: &StepPlan, rng: &mut ChaCha8Rng, seen: &mut Seen) {
        let due: Vec<_> = self.scheduler.due().collect();
        let sampled: Vec<Sampled> = due.into_iter().map(|id| self.sample(id, rng, seen)).collect();
        let mut expected = self.deliver(plan, seen);
        for Sampled { id, tokens, stop } in &sampled {
            let client = self.clients.get_mut(id).unwrap();
            client.token_ids.extend(tokens);
            let is_full = client.token_ids.len() == client.max_len;
            if *stop || is_full {
                let has_row = |(plan, _): &(StepPlan, _)| plan.sequences.iter().any(|step| step.id == *id);
                seen.ended_with_a_row_ahead += u64::from(self.under_way.iter().any(has_row));
                assert!(!client.owes_prompt_logits(), "{client:?}");
                self.clients.remove(id);
                expected.push((*id, if *stop { Ended::Stop } else { Ended::Length }));
                *(if *stop { &mut seen.stopped } else { &mut seen.finished }) += 1;
            }
        }
        assert_eq!(self.scheduler.commit(&sampled), expected);
        self.scheduler.check_integrity();
        self.watch_cache();
    }

    fn watch_cache(&mut self) {
        for change in self.scheduler.cache_changes() {
            match change {
                Change::Stored(content) => assert_eq!(self.cached.insert(content.key, content), None),
                Change::Removed(key) => assert!(self.cached.remove(&key).is_some(), "{key:?} was not there"),
                Change::Cleared => self.cached.clear(),
            }
        }
        let held = self.scheduler.watch_cache();
        assert!(held.is_sorted_by_key(|content| content.block_idx));
        assert_eq!(held.into_iter().map(|content| (content.key, content)).collect::<HashMap<_, _>>(), self.cached);
    }

    /// Delivers the results of prompts. Returns the embeddings that are through.
    fn deliver(&mut self, plan: &StepPlan, seen: &mut Seen) -> Vec<(SeqId, Ended)> {
        let mut embedded = Vec::new();
        for step in &plan.sequences {
            let Some(client) = self.clients.get_mut(&step.id) else { continue };
            let gives_all = matches!(step.results, RowResults::AllLogits | RowResults::AllHidden);
            if gives_all && client.owes_prompt_results() {
                client.n_delivered += step.token_ids.len();
            }
            let is_through = step.start_position as usize + step.token_ids.len() == client.n_prompt;
            if let Some(pooling) = client.pooling.filter(|_| is_through) {
                assert!(!client.owes_prompt_results(), "{client:?}");
                self.clients.remove(&step.id);
                embedded.push((step.id, Ended::Embedded));
                *(match pooling {
                    Pooling::Mean => &mut seen.embedded_by_mean,
                    Pooling::Last => &mut seen.embedded_by_last,
                }) += 1;
            }
        }
        embedded
    }

    /// Verifies the drafts: goes on for as long as they are what the model says.
    fn sample(&self, id: SeqId, rng: &mut ChaCha8Rng, seen: &mut Seen) -> Sampled {
        let mut token_ids = self.clients[&id].token_ids.clone();
        let n_known = token_ids.len();
        let mut drafts = self.scheduler.drafts(id).iter();
        let stop = loop {
            let token_id = next_token(&token_ids, self.period);
            token_ids.push(token_id);
            let stop = rng.random_bool(0.05);
            let draft = drafts.next();
            seen.drafts_cut_by_a_stop += u64::from(stop && draft.is_some());
            seen.drafts_rejected += u64::from(!stop && draft.is_some_and(|draft| *draft != token_id));
            if stop || draft != Some(&token_id) {
                break stop;
            }
            seen.drafts_accepted += 1;
        };
        Sampled { id, tokens: token_ids.split_off(n_known), stop }
    }
}

fn any_tokens(rng: &mut ChaCha8Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| rng.random_range(0..VOCAB_SIZE)).collect()
}

/// The model: what follows depends on the tokens before it, and on nothing else.
fn next_token(token_ids: &[u32], period: Option<usize>) -> u32 {
    let mixed = token_ids.iter().fold(1, |sum, token_id| sum * 5 % 1009 + token_id);
    let repeated = period.and_then(|period| token_ids.iter().nth_back(period - 1)).filter(|_| mixed % 10 < 8);
    repeated.copied().unwrap_or(mixed % VOCAB_SIZE)
}

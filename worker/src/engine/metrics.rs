//! What a rank measures: its steps, the time that they spend waiting for other ranks, queues, blocks and tokens.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicI64, AtomicU64},
    time::{Duration, Instant},
};

use lockstep_collectives::{Collective, Timed};
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::scheduler::Stats;

/// A rank's metrics. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Time of a step on this rank.
    pub step: Histogram,
    /// Time of a step that went into collectives: waiting for the slowest rank, and moving data.
    pub collective: Histogram,
    /// Time that a step waited for the draft model.
    pub draft: Histogram,
    /// Time that a step waited for masks.
    pub mask_wait: Histogram,
    /// Time that a constraint took to compile, with its trial.
    pub constraint_compile: Histogram,
    /// Steps that were started while the one before them ran.
    pub steps_ahead: Counter,
    /// Prompt tokens of admitted jobs.
    pub prompt_tokens: Counter,
    /// Tokens sampled.
    pub generated_tokens: Counter,
    /// Tokens guessed in advance; each took a row of a step.
    pub drafted_tokens: Counter,
    /// Those of them that were then sampled; each saved a step.
    pub accepted_tokens: Counter,
    /// Jobs whose reader went away.
    pub cancelled: Counter,
    /// Jobs whose reader was too slow.
    pub slow_readers: Counter,
    /// Epochs begun.
    pub epochs: Counter,
    waiting: Gauge,
    running: Gauge,
    outstanding_tokens: Gauge<i64, AtomicI64>,
    free_blocks: Gauge,
    used_blocks: Gauge,
    cached_blocks: Gauge,
    block_size: Gauge,
    total_blocks: Gauge,
    cache_usage: Gauge<f64, AtomicU64>,
}

/// From 0.25 ms to 8 s: a small model's decode step up to a large model's prefill on a CPU.
fn step_buckets() -> impl Iterator<Item = f64> {
    (0..16).map(|i| 0.000_25 * f64::from(1u32 << i))
}

/// From 10 µs, which is none, to 0.3 s.
fn mask_buckets() -> impl Iterator<Item = f64> {
    (0..16).map(|i| 0.000_01 * f64::from(1u32 << i))
}

impl Metrics {
    /// Registers them with names that start with `worker_`: those of jobs and of the scheduler, which only the leader has,
    /// if this rank `leads`.
    pub fn register(registry: &mut Registry, leads: bool) -> Self {
        let metrics = Self {
            step: Histogram::new(step_buckets()),
            collective: Histogram::new(step_buckets()),
            draft: Histogram::new(step_buckets()),
            mask_wait: Histogram::new(mask_buckets()),
            constraint_compile: Histogram::new(step_buckets()),
            steps_ahead: Counter::<u64, AtomicU64>::default(),
            prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            drafted_tokens: Counter::default(),
            accepted_tokens: Counter::default(),
            cancelled: Counter::default(),
            slow_readers: Counter::default(),
            epochs: Counter::default(),
            waiting: Gauge::default(),
            running: Gauge::default(),
            outstanding_tokens: Gauge::default(),
            free_blocks: Gauge::default(),
            used_blocks: Gauge::default(),
            cached_blocks: Gauge::default(),
            block_size: Gauge::default(),
            total_blocks: Gauge::default(),
            cache_usage: Gauge::default(),
        };
        let sub = registry.sub_registry_with_prefix("worker");
        sub.register_with_unit("step", "Time of a step on this rank", Unit::Seconds, metrics.step.clone());
        let help = "Time of a step on this rank that went into collectives";
        sub.register_with_unit("collective", help, Unit::Seconds, metrics.collective.clone());
        sub.register("epochs", "Times that the group has formed", metrics.epochs.clone());
        if !leads {
            return metrics;
        }
        let help = "Time that a step waited for the draft model";
        sub.register_with_unit("draft", help, Unit::Seconds, metrics.draft.clone());
        let help = "Time that a step waited for the masks of constrained sequences";
        sub.register_with_unit("mask_wait", help, Unit::Seconds, metrics.mask_wait.clone());
        let help = "Time that a constraint took to compile";
        sub.register_with_unit("constraint_compile", help, Unit::Seconds, metrics.constraint_compile.clone());
        let help = "Steps that were started while the one before them ran";
        sub.register("steps_ahead", help, metrics.steps_ahead.clone());
        sub.register("prompt_tokens", "Prompt tokens of admitted jobs", metrics.prompt_tokens.clone());
        sub.register("generated_tokens", "Tokens sampled", metrics.generated_tokens.clone());
        sub.register("drafted_tokens", "Tokens guessed in advance", metrics.drafted_tokens.clone());
        sub.register("accepted_tokens", "Tokens guessed in advance and then sampled", metrics.accepted_tokens.clone());
        sub.register("cancelled_jobs", "Jobs whose reader went away", metrics.cancelled.clone());
        sub.register("slow_reader_jobs", "Jobs whose reader was cut off", metrics.slow_readers.clone());
        sub.register("waiting_sequences", "Sequences that wait", metrics.waiting.clone());
        sub.register("running_sequences", "Sequences that run", metrics.running.clone());
        let help = "Tokens still to be computed or generated, at most";
        sub.register("outstanding_tokens", help, metrics.outstanding_tokens.clone());
        sub.register("kv_blocks_free", "KV blocks that hold nothing", metrics.free_blocks.clone());
        sub.register("kv_blocks_used", "KV blocks that sequences use", metrics.used_blocks.clone());
        sub.register("kv_blocks_cached", "KV blocks that hold an unused prefix", metrics.cached_blocks.clone());
        // What other routers want to know beside these (docs/behind-other-gateways.md).
        sub.register("kv_blocks", "KV blocks in all", metrics.total_blocks.clone());
        sub.register("kv_block_size", "Positions in a KV block", metrics.block_size.clone());
        let help = "Part of the KV blocks that sequences use, from 0 to 1";
        sub.register("kv_cache_usage", help, metrics.cache_usage.clone());
        metrics
    }

    /// Shows what a KV block is.
    pub fn observe_block_size(&self, block_size: usize) {
        self.block_size.set(block_size as i64);
    }

    /// Shows the scheduler's state.
    pub fn observe_stats(&self, stats: &Stats) {
        self.waiting.set(stats.waiting as i64);
        self.running.set(stats.running as i64);
        self.outstanding_tokens.set(stats.outstanding_tokens as i64);
        self.free_blocks.set(stats.blocks.free as i64);
        self.used_blocks.set(stats.blocks.referenced as i64);
        self.cached_blocks.set(stats.blocks.cached as i64);
        self.total_blocks.set(stats.blocks.total as i64);
        self.cache_usage.set(stats.blocks.usage());
    }
}

/// The stopwatch of a rank's steps. Of steps that overlap, each counts from the end of the one before.
#[derive(Debug)]
pub struct StepClock {
    /// When each step that is under way was started, and the time that it has spent on collectives.
    under_way: VecDeque<(Instant, Duration)>,
    last_end: Instant,
}

// === impl StepClock ===

impl Default for StepClock {
    fn default() -> Self {
        Self { under_way: VecDeque::new(), last_end: Instant::now() }
    }
}

impl StepClock {
    /// Times the start of a step on `collective`.
    pub fn start<T>(&mut self, collective: &mut dyn Collective, run: impl FnOnce(&mut dyn Collective) -> T) -> T {
        let start = Instant::now();
        let mut timed = Timed::new(collective);
        let result = run(&mut timed);
        self.under_way.push_back((start, timed.spent()));
        result
    }

    /// Times the end of the oldest step that was started, and adds the whole of it to `metrics`. Returns what it took.
    pub fn finish<T>(
        &mut self,
        metrics: &Metrics,
        collective: &mut dyn Collective,
        run: impl FnOnce(&mut dyn Collective) -> T,
    ) -> (T, Duration) {
        let mut timed = Timed::new(collective);
        let result = run(&mut timed);
        let spent = timed.spent();
        let now = Instant::now();
        let (start, spent_before) = self.under_way.pop_front().unwrap_or((now, Duration::ZERO));
        let took = now - start.max(std::mem::replace(&mut self.last_end, now));
        metrics.step.observe(took.as_secs_f64());
        metrics.collective.observe((spent_before + spent).as_secs_f64());
        (result, took)
    }
}

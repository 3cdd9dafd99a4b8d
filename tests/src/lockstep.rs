//! The lockstep rule as a check: computes the same prompt under two conditions and compares every bit.

use std::{path::Path, time::Instant};

use lockstep_kernels::KvEncoding;
use lockstep_worker::{
    device::Device,
    scheduler::{
        NewSequence, Pooling, Sampled, Scheduler, SchedulerConfig,
        plan::{SeqId, SequenceStep},
        speculation::Speculation,
    },
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ranks::{BLOCK_SIZE, Ranks, argmax};

/// Decides prompts.
pub const SEED: u64 = 20_261_123;

/// Room for sixteen requests.
const N_TOKENS: usize = 16 * 256;

/// More than any prompt has.
pub const WHOLE: usize = 1_024;

/// Under which conditions a prompt is computed.
#[derive(Clone, Copy, Debug)]
pub struct Condition {
    /// How keys and values are stored.
    pub kv_encoding: KvEncoding,
    /// Ranks that share the model.
    pub world_size: usize,
    /// Threads of each rank.
    pub threads: usize,
    /// Rows of a prompt in a step.
    pub chunk: usize,
    /// Other requests that run beside it.
    pub others: usize,
    /// Tokens that the first of them generates, and up to 8 fewer the others. At least 9.
    pub others_generate: u32,
    /// Prompts that are embedded beside it: by the mean, older ones; every second by the last token, younger ones.
    pub embedded: usize,
    /// Whether the same prompt has run before, so that its prefix is cached.
    pub cached: bool,
    /// Whether tokens are drafted.
    pub speculation: Speculation,
    /// Blocks of keys and values. With few of them, the youngest sequence is preempted: the prompt's.
    pub n_blocks: usize,
}

/// Alone, whole, on one rank and one thread, a token in a step.
pub const PLAIN: Condition = Condition {
    kv_encoding: KvEncoding::F16,
    world_size: 1,
    threads: 1,
    chunk: WHOLE,
    others: 0,
    others_generate: 9,
    embedded: 0,
    cached: false,
    speculation: Speculation::Off,
    n_blocks: N_TOKENS / BLOCK_SIZE,
};

/// How a prompt went on, or was embedded.
#[derive(Debug, Default)]
pub struct Continuation {
    /// The logits of every row that its tokens were chosen from, or the hidden states that were to be pooled.
    pub rows: Vec<Vec<f32>>,
    /// Tokens that were drafted.
    pub n_accepted: usize,
    /// How often it gave its blocks up.
    pub n_preempted: usize,
}

/// Ranks of a model, as the condition has them.
///
/// # Panics
/// If the model does not load.
pub fn load(model: &Path, device: &Device, condition: Condition) -> Ranks {
    let Condition { kv_encoding, world_size, threads, .. } = condition;
    Ranks::load(model, device, kv_encoding, world_size, threads, N_TOKENS).expect("the model loads")
}

/// A scheduler for the ranks.
///
/// # Panics
/// If the condition contradicts itself.
pub fn scheduler(condition: Condition, max_prompt_logits_rows: usize) -> Scheduler {
    Scheduler::new(SchedulerConfig {
        max_step_tokens: condition.chunk.max(32),
        max_prefill_chunk: condition.chunk,
        max_prompt_logits_rows,
        max_running: 32,
        max_waiting: 32,
        n_blocks: condition.n_blocks as u32,
        block_size: BLOCK_SIZE as u32,
        context_length: WHOLE as u32,
        speculation: condition.speculation,
    })
    .expect("a scheduler")
}

/// How `target` goes on, greedily, or what it is embedded by.
fn go_on(ranks: &mut Ranks, condition: Condition, target: &NewSequence, seed: u64) -> Continuation {
    let mut scheduler = scheduler(condition, WHOLE);
    ranks.group.reset();
    let now = Instant::now();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let add = |scheduler: &mut Scheduler, prompt: Vec<u32>, max_new_tokens: u32| {
        let new = NewSequence { prompt, max_new_tokens, ..NewSequence::default() };
        scheduler.add(new, now).expect("room")
    };
    if condition.cached {
        let before = add(&mut scheduler, target.prompt.clone(), target.max_new_tokens.max(1));
        run(ranks, &mut scheduler, before);
    }
    let vocab_size = ranks.vocab_size as u32;
    let mut any_prompt = || {
        let length = rng.random_range(1..100);
        (0..length).map(|_| rng.random_range(0..vocab_size)).collect::<Vec<u32>>()
    };
    let embed = |scheduler: &mut Scheduler, pooling, prompt| {
        let new = NewSequence { prompt, pooling: Some(pooling), ..NewSequence::default() };
        scheduler.add(new, now).expect("room");
    };
    // Older and younger ones: their rows are before and behind the target's.
    for _ in 0..condition.embedded.div_ceil(2) {
        embed(&mut scheduler, Pooling::Mean, any_prompt());
    }
    for other in 0..condition.others {
        add(&mut scheduler, any_prompt(), condition.others_generate - other as u32 % 9);
    }
    let id = scheduler.add(target.clone(), now).expect("room");
    for _ in 0..condition.embedded / 2 {
        embed(&mut scheduler, Pooling::Last, any_prompt());
    }
    let found = run(ranks, &mut scheduler, id);
    let n_rows = match target.pooling {
        None => target.max_new_tokens as usize,
        Some(Pooling::Mean) => target.prompt.len(),
        Some(Pooling::Last) => 1,
    };
    assert_eq!(found.rows.len(), n_rows);
    found
}

/// Runs until nothing is left; how `target` went on.
fn run(ranks: &mut Ranks, scheduler: &mut Scheduler, target: SeqId) -> Continuation {
    let mut found = Continuation::default();
    let mut has_ended = false;
    while let Some(plan) = scheduler.schedule(Instant::now()).plan {
        found.n_preempted += usize::from(!has_ended && plan.released.contains(&target));
        let out = ranks.group.run(&plan).expect("the step runs");
        let hidden_dim = out.hidden.len() / plan.n_hidden_rows().max(1);
        let mut hidden = out.hidden.chunks_exact(hidden_dim.max(1));
        for step in &plan.sequences {
            let of_step = hidden.by_ref().take(step.n_hidden_rows());
            found.rows.extend(of_step.filter(|_| step.id == target).map(<[f32]>::to_vec));
        }
        let mut rows = out.logits.chunks_exact(ranks.vocab_size);
        let mut sampled = Vec::new();
        for step in plan.sequences.iter().filter(|step| step.n_logits_rows() > 0) {
            let rows: Vec<&[f32]> = rows.by_ref().take(step.n_logits_rows()).collect();
            let tokens = verify(step, &rows);
            if step.id == target {
                found.n_accepted += tokens.len() - 1;
                found.rows.extend(rows[..tokens.len()].iter().map(|row| row.to_vec()));
            }
            sampled.push(Sampled { id: step.id, tokens, stop: false });
        }
        has_ended |= scheduler.commit(&sampled).iter().any(|(id, _)| *id == target);
    }
    found
}

/// The likeliest tokens after a decoding sequence's first row and after each draft that is the likeliest token.
fn verify(step: &SequenceStep, rows: &[&[f32]]) -> Vec<u32> {
    let drafts = &step.token_ids[step.token_ids.len() - (rows.len() - 1)..];
    let likeliest: Vec<u32> = rows.iter().map(|row| argmax(row)).collect();
    let n_accepted = drafts.iter().zip(&likeliest).take_while(|(draft, token)| draft == token).count();
    likeliest[..=n_accepted].to_vec()
}

/// Random token ids.
pub fn prompt(n_tokens: usize, vocab_size: u32, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n_tokens).map(|_| rng.random_range(0..vocab_size)).collect()
}

/// Computes the same random prompt plainly and under `conditions`, whose keys and values are stored alike, and compares
/// every bit.
///
/// # Panics
/// If a bit differs, or the model does not run.
pub fn check(model: &Path, device: &Device, n_prompt: usize, conditions: &[Condition]) {
    check_text(model, device, |vocab_size| prompt(n_prompt, vocab_size, SEED), 8, conditions);
}

/// The same for any prompt. Returns how it went on under each of the conditions.
///
/// # Panics
/// If a bit differs, or the model does not run.
pub fn check_text(
    model: &Path,
    device: &Device,
    prompt: impl Fn(u32) -> Vec<u32>,
    n_tokens: u32,
    conditions: &[Condition],
) -> Vec<Continuation> {
    let new =
        |vocab_size| NewSequence { prompt: prompt(vocab_size), max_new_tokens: n_tokens, ..NewSequence::default() };
    check_sequence(model, device, new, conditions)
}

/// The same for the hidden states that a random prompt is embedded by.
///
/// # Panics
/// If a bit differs, or the model does not run.
pub fn check_embedding(
    model: &Path,
    device: &Device,
    n_prompt: usize,
    pooling: Pooling,
    conditions: &[Condition],
) -> Vec<Continuation> {
    let new = |vocab_size| NewSequence {
        prompt: prompt(n_prompt, vocab_size, SEED),
        pooling: Some(pooling),
        ..NewSequence::default()
    };
    check_sequence(model, device, new, conditions)
}

fn check_sequence(
    model: &Path,
    device: &Device,
    new: impl Fn(u32) -> NewSequence,
    conditions: &[Condition],
) -> Vec<Continuation> {
    println!("seed {SEED}");
    let condition = Condition { kv_encoding: conditions[0].kv_encoding, ..PLAIN };
    let mut plain = load(model, device, condition);
    let new = new(plain.vocab_size as u32);
    let wanted = go_on(&mut plain, condition, &new, SEED).rows;
    assert!(wanted.iter().flatten().all(|value| value.is_finite()));
    let mut all = Vec::new();
    let mut ranks: Option<(usize, usize, Ranks)> = None;
    for &condition in conditions {
        let key = (condition.world_size, condition.threads);
        let mut loaded = match ranks.take() {
            Some((world_size, threads, loaded)) if (world_size, threads) == key => loaded,
            _ => load(model, device, condition),
        };
        let got = go_on(&mut loaded, condition, &new, SEED);
        for (row, (wanted, got)) in wanted.iter().zip(&got.rows).enumerate() {
            let differ = wanted.iter().zip(got).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert_eq!(differ, 0, "{differ} of {} values differ in row {row} under {condition:?}", wanted.len());
        }
        ranks = Some((key.0, key.1, loaded));
        all.push(got);
    }
    all
}

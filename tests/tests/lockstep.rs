//! The lockstep rule, bit for bit: the logits at a position depend on the model and on the tokens before it, and on
//! nothing else. Every test computes the same prompt under two conditions and compares every bit.

use std::{path::Path, time::Instant};

use lockstep_checkpoint::Encoding;
use lockstep_tests::{
    cluster::demo_model,
    ranks::{BLOCK_SIZE, Ranks, argmax},
    tiny_model::TinyModel,
};
use lockstep_worker::{
    model_runner::BackendChoice,
    scheduler::{
        NewSequence, Sampled, Scheduler, SchedulerConfig,
        plan::{LogitsRows, SeqId},
    },
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Room for sixteen requests.
const N_TOKENS: usize = 16 * 256;

/// More than any prompt has.
const WHOLE: usize = 1_024;

/// Under which conditions a prompt is computed.
#[derive(Clone, Copy, Debug)]
struct Condition {
    world_size: usize,
    threads: usize,
    chunk: usize,
    /// Other requests that run beside it.
    others: usize,
    /// Whether the same prompt has run before, so that its prefix is cached.
    cached: bool,
}

/// Alone, whole, on one rank and one thread.
const PLAIN: Condition = Condition { world_size: 1, threads: 1, chunk: WHOLE, others: 0, cached: false };

/// Ranks of a model and how they are loaded.
fn load(model: &Path, condition: Condition) -> Ranks {
    Ranks::load(model, BackendChoice::Cpu, condition.world_size, condition.threads, N_TOKENS).expect("the model loads")
}

/// A scheduler for the ranks.
fn scheduler(chunk: usize, max_prompt_logits_rows: usize) -> Scheduler {
    Scheduler::new(SchedulerConfig {
        max_step_tokens: chunk.max(32),
        max_prefill_chunk: chunk,
        max_prompt_logits_rows,
        max_running: 32,
        max_waiting: 32,
        n_blocks: (N_TOKENS / BLOCK_SIZE) as u32,
        block_size: BLOCK_SIZE as u32,
        context_length: WHOLE as u32,
    })
    .expect("a scheduler")
}

/// The logits of every row that `prompt`'s next `n_tokens` tokens are chosen from, greedily.
fn logits(ranks: &mut Ranks, condition: Condition, prompt: &[u32], n_tokens: u32, seed: u64) -> Vec<Vec<f32>> {
    let mut scheduler = scheduler(condition.chunk, WHOLE);
    ranks.group.reset();
    let now = Instant::now();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let add = |scheduler: &mut Scheduler, prompt: Vec<u32>, max_new_tokens: u32| {
        let new = NewSequence { prompt, max_new_tokens, ..NewSequence::default() };
        scheduler.add(new, now).expect("room")
    };
    if condition.cached {
        let before = add(&mut scheduler, prompt.to_vec(), n_tokens);
        run(ranks, &mut scheduler, before);
    }
    for other in 0..condition.others {
        let length = rng.random_range(1..100);
        let ids = (0..length).map(|_| rng.random_range(0..ranks.vocab_size as u32)).collect();
        add(&mut scheduler, ids, 1 + other as u32 % 9);
    }
    let target = add(&mut scheduler, prompt.to_vec(), n_tokens);
    let logits = run(ranks, &mut scheduler, target);
    assert_eq!(logits.len(), n_tokens as usize);
    logits
}

/// Runs until nothing is left; the logits that `target`'s tokens were chosen from.
fn run(ranks: &mut Ranks, scheduler: &mut Scheduler, target: SeqId) -> Vec<Vec<f32>> {
    let mut found = Vec::new();
    while let Some(plan) = scheduler.schedule(Instant::now()).plan {
        let logits = ranks.group.run(&plan).expect("the step runs");
        let with_logits = plan.sequences.iter().filter(|step| step.logits != LogitsRows::None);
        let rows = with_logits.zip(logits.chunks_exact(ranks.vocab_size));
        let sampled: Vec<Sampled> = rows
            .map(|(step, row)| {
                if step.id == target {
                    found.push(row.to_vec());
                }
                Sampled { id: step.id, token: argmax(row), stop: false }
            })
            .collect();
        scheduler.commit(&sampled);
    }
    found
}

/// The logits of every position of two prompts that are computed side by side, at most so many rows of them in a step.
fn prompt_logits(ranks: &mut Ranks, prompts: [&[u32]; 2], max_prompt_logits_rows: usize) -> [Vec<f32>; 2] {
    let mut scheduler = scheduler(WHOLE, max_prompt_logits_rows);
    ranks.group.reset();
    let ids = prompts.map(|prompt| {
        let new =
            NewSequence { prompt: prompt.to_vec(), max_new_tokens: 1, prompt_logprobs: true, ..NewSequence::default() };
        scheduler.add(new, Instant::now()).expect("room")
    });
    let mut found = [Vec::new(), Vec::new()];
    while let Some(plan) = scheduler.schedule(Instant::now()).plan {
        let logits = ranks.group.run(&plan).expect("the step runs");
        assert!(logits.len() <= max_prompt_logits_rows * ranks.vocab_size, "the rows of a step are bounded");
        let mut rest = logits.as_slice();
        for step in &plan.sequences {
            let (rows, after) = rest.split_at(step.n_logits_rows() * ranks.vocab_size);
            rest = after;
            found[usize::from(step.id == ids[1])].extend_from_slice(rows);
        }
        let sampled: Vec<Sampled> = scheduler.due().map(|id| Sampled { id, token: 0, stop: true }).collect();
        scheduler.commit(&sampled);
    }
    found
}

fn prompt(n_tokens: usize, vocab_size: u32, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n_tokens).map(|_| rng.random_range(0..vocab_size)).collect()
}

/// Computes the same prompt plainly and under `conditions`, and compares every bit.
fn check(model: &Path, n_prompt: usize, conditions: &[Condition]) {
    let seed = 20_261_123;
    println!("seed {seed}");
    let mut plain = load(model, PLAIN);
    let prompt = prompt(n_prompt, plain.vocab_size as u32, seed);
    let wanted = logits(&mut plain, PLAIN, &prompt, 8, seed);
    assert!(wanted.iter().flatten().all(|logit| logit.is_finite()));
    let mut ranks: Option<(usize, usize, Ranks)> = None;
    for &condition in conditions {
        let key = (condition.world_size, condition.threads);
        let mut loaded = match ranks.take() {
            Some((world_size, threads, loaded)) if (world_size, threads) == key => loaded,
            _ => load(model, condition),
        };
        let got = logits(&mut loaded, condition, &prompt, 8, seed);
        for (step, (wanted, got)) in wanted.iter().zip(&got).enumerate() {
            let differ = wanted.iter().zip(got).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert_eq!(differ, 0, "{differ} of {} logits differ at token {step} under {condition:?}", wanted.len());
        }
        ranks = Some((key.0, key.1, loaded));
    }
}

#[test]
fn chunks_do_not_change_a_bit() {
    let chunked = [1, 7, 64, WHOLE].map(|chunk| Condition { chunk, ..PLAIN });
    check(&demo_model(), 100, &chunked);
}

#[test]
fn where_a_prompts_logits_are_cut_does_not_change_a_bit() {
    let mut ranks = load(&demo_model(), PLAIN);
    let vocab_size = ranks.vocab_size;
    let prompts = [prompt(50, vocab_size as u32, 1), prompt(20, vocab_size as u32, 2)];
    let prompts = [prompts[0].as_slice(), prompts[1].as_slice()];
    let bits = |logits: [Vec<f32>; 2]| logits.map(|logits| logits.into_iter().map(f32::to_bits).collect::<Vec<_>>());
    let whole = bits(prompt_logits(&mut ranks, prompts, WHOLE));
    assert_eq!(whole.each_ref().map(|logits| logits.len() / vocab_size), [50, 20], "every position, once");
    for rows in [1, 7, 64] {
        let cut = bits(prompt_logits(&mut ranks, prompts, rows));
        assert!(cut == whole, "at most {rows} rows in a step");
    }
}

#[test]
fn a_batch_of_mixed_requests_does_not_change_a_bit() {
    let batches = [64, WHOLE].map(|chunk| Condition { others: 15, chunk, threads: 2, ..PLAIN });
    check(&demo_model(), 100, &batches);
}

#[test]
fn a_prefix_cache_hit_does_not_change_a_bit() {
    check(&demo_model(), 100, &[Condition { cached: true, ..PLAIN }, Condition { cached: true, chunk: 7, ..PLAIN }]);
}

#[test]
fn the_world_size_does_not_change_a_bit() {
    let worlds = [2, 3].map(|world_size| Condition { world_size, ..PLAIN });
    check(&demo_model(), 100, &worlds);
}

#[test]
fn all_at_once_does_not_change_a_bit() {
    let all = [2, 3].map(|world_size| Condition { world_size, others: 15, cached: true, chunk: 7, ..PLAIN });
    check(&demo_model(), 100, &all);
}

/// Attention adds up 256 positions by themselves and then merges: shorter prompts never see that.
#[test]
fn nothing_changes_a_bit_of_a_prompt_of_three_splits() {
    let conditions = [
        Condition { chunk: 7, ..PLAIN },
        Condition { others: 15, cached: true, chunk: 64, ..PLAIN },
        Condition { others: 15, threads: 2, ..PLAIN },
        Condition { world_size: 2, cached: true, chunk: 100, ..PLAIN },
        Condition { world_size: 3, others: 15, chunk: 64, ..PLAIN },
    ];
    check(&demo_model(), 600, &conditions);
}

/// A random model with eight KV heads, in a file of its own.
fn tiny(encoding: Encoding) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    // Eight segments of whole blocks, whatever the block: K-quants have 256 values in one.
    let (n_heads, ffn_dim) = if encoding.block_len() == 256 { (64, 2048) } else { (16, 768) };
    let model = TinyModel { encoding, n_heads, ffn_dim, ..TinyModel::default() };
    model.write(file.path()).expect("the model is written");
    file
}

#[test]
fn the_world_size_does_not_change_a_bit_of_a_model_with_eight_kv_heads() {
    let worlds = [2, 3, 4, 8].map(|world_size| Condition { world_size, ..PLAIN });
    for encoding in [Encoding::Q4_0, Encoding::Q8_0, Encoding::F16, Encoding::Q4K, Encoding::Q6K] {
        println!("{encoding}");
        check(tiny(encoding).path(), 40, &worlds);
    }
}

#[test]
fn batch_chunks_cache_and_ranks_together_do_not_change_a_bit() {
    let mixed = [1, 2, 3, 4, 8].map(|world_size| Condition {
        world_size,
        others: 15,
        cached: true,
        chunk: [1, 7, 64, WHOLE][world_size % 4],
        ..PLAIN
    });
    check(tiny(Encoding::Q4_1).path(), 40, &mixed);
}

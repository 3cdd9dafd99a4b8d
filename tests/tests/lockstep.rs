//! The lockstep rule, bit for bit: the logits at a position depend on the model and on the tokens before it, and on
//! nothing else. Every test computes the same prompt under two conditions and compares every bit. Here on the CPU;
//! `cuda.rs` does so on a GPU.

use std::{path::PathBuf, time::Instant};

use lockstep_checkpoint::Encoding;
use lockstep_kernels::KvEncoding;
use lockstep_tests::{
    cluster::demo_model,
    lockstep::{Condition, Continuation, PLAIN, WHOLE, check, check_embedding, check_text, load, prompt, scheduler},
    ranks::Ranks,
    tiny_model::{Container, TinyModel},
};
use lockstep_worker::{
    device::Device,
    scheduler::{NewSequence, Pooling, Sampled, speculation::Speculation},
};

const CPU: Device = Device::Cpu;

/// "The lighthouse was built in 1874 by a company of masons from the next town. It stands on a small rock, two miles from
/// the shore." as the demo model's tokens.
const SENTENCE: [u32; 34] = [
    504, 33059, 436, 2837, 281, 216, 33, 40, 39, 36, 411, 253, 2727, 282, 283, 3130, 429, 260, 1867, 3102, 30, 657,
    6443, 335, 253, 1165, 4022, 28, 827, 4158, 429, 260, 10393, 30,
];

/// The logits of every position of two prompts that are computed side by side, at most so many rows of them in a step.
fn prompt_logits(ranks: &mut Ranks, prompts: [&[u32]; 2], max_prompt_logits_rows: usize) -> [Vec<f32>; 2] {
    let mut scheduler = scheduler(PLAIN, max_prompt_logits_rows);
    ranks.group.reset();
    let ids = prompts.map(|prompt| {
        let new =
            NewSequence { prompt: prompt.to_vec(), max_new_tokens: 1, prompt_logprobs: true, ..NewSequence::default() };
        scheduler.add(new, Instant::now()).expect("room")
    });
    let mut found = [Vec::new(), Vec::new()];
    while let Some(plan) = scheduler.schedule(Instant::now()).plan {
        let logits = &ranks.group.run(&plan).expect("the step runs").logits;
        assert!(logits.len() <= max_prompt_logits_rows * ranks.vocab_size, "the rows of a step are bounded");
        let mut rest = logits.as_slice();
        for step in &plan.sequences {
            let (rows, after) = rest.split_at(step.n_logits_rows() * ranks.vocab_size);
            rest = after;
            found[usize::from(step.id == ids[1])].extend_from_slice(rows);
        }
        let sampled: Vec<Sampled> = scheduler.due().map(|id| Sampled { id, tokens: vec![0], stop: true }).collect();
        scheduler.commit(&sampled);
    }
    found
}

#[test]
fn chunks_do_not_change_a_bit() {
    let chunked = [1, 7, 64, WHOLE].map(|chunk| Condition { chunk, ..PLAIN });
    check(&demo_model(), &CPU, 100, &chunked);
}

#[test]
fn where_a_prompts_logits_are_cut_does_not_change_a_bit() {
    let mut ranks = load(&demo_model(), &CPU, PLAIN);
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
    check(&demo_model(), &CPU, 100, &batches);
}

#[test]
fn a_prefix_cache_hit_does_not_change_a_bit() {
    check(
        &demo_model(),
        &CPU,
        100,
        &[Condition { cached: true, ..PLAIN }, Condition { cached: true, chunk: 7, ..PLAIN }],
    );
}

#[test]
fn the_world_size_does_not_change_a_bit() {
    let worlds = [2, 3].map(|world_size| Condition { world_size, ..PLAIN });
    check(&demo_model(), &CPU, 100, &worlds);
}

#[test]
fn all_at_once_does_not_change_a_bit() {
    let all = [2, 3].map(|world_size| Condition { world_size, others: 15, cached: true, chunk: 7, ..PLAIN });
    check(&demo_model(), &CPU, 100, &all);
}

#[test]
fn speculation_does_not_change_a_bit() {
    let ngram = Condition { speculation: Speculation::Ngram, ..PLAIN };
    let beside = Condition { others: 3, others_generate: 40, ..ngram };
    let conditions = [
        ngram,
        Condition { cached: true, chunk: 7, ..ngram },
        beside,
        Condition { chunk: 7, ..beside },
        Condition { n_blocks: 22, ..beside },
        Condition { world_size: 2, ..ngram },
        Condition { world_size: 2, cached: true, chunk: 7, ..beside },
        Condition { world_size: 2, n_blocks: 22, ..beside },
    ];
    // The model says it again once more.
    let all = check_text(&demo_model(), &CPU, |_| SENTENCE.repeat(4), 40, &conditions);
    for (condition, found) in conditions.iter().zip(&all) {
        let Continuation { n_accepted, n_preempted, .. } = found;
        println!("{n_accepted} drafts accepted, {n_preempted} times preempted: {condition:?}");
        assert!(*n_accepted >= 10, "{n_accepted} drafts were accepted under {condition:?}");
        assert_eq!(*n_preempted > 0, condition.n_blocks < PLAIN.n_blocks, "{condition:?}");
    }
}

#[test]
fn embeddings_beside_it_do_not_change_a_bit() {
    let beside = Condition { others: 3, embedded: 5, chunk: 7, ..PLAIN };
    check(&demo_model(), &CPU, 100, &[Condition { chunk: WHOLE, ..beside }, Condition { world_size: 2, ..beside }]);
    // A short prompt goes on while another is embedded: all rows of such steps give a result, and not in their order.
    check(&demo_model(), &CPU, 10, &[Condition { embedded: 1, chunk: 7, ..PLAIN }]);
}

#[test]
fn nothing_changes_a_bit_of_an_embedding() {
    let few_blocks = Condition { others: 3, others_generate: 60, chunk: 1, n_blocks: 22, ..PLAIN };
    let conditions = [
        Condition { chunk: 1, ..PLAIN },
        Condition { others: 15, embedded: 8, chunk: 64, threads: 2, ..PLAIN },
        Condition { cached: true, chunk: 7, ..PLAIN },
        few_blocks,
        Condition { world_size: 2, others: 15, cached: true, chunk: 7, ..PLAIN },
        Condition { world_size: 2, ..few_blocks },
        Condition { world_size: 3, others: 3, ..PLAIN },
    ];
    for pooling in [Pooling::Mean, Pooling::Last] {
        let all = check_embedding(&demo_model(), &CPU, 100, pooling, &conditions);
        for (condition, Continuation { n_preempted, .. }) in conditions.iter().zip(&all) {
            assert_eq!(*n_preempted > 0, condition.n_blocks < PLAIN.n_blocks, "{condition:?}");
        }
    }
}

#[test]
fn nothing_changes_a_bit_of_an_embedding_by_a_random_model() {
    let conditions = [1, 2, 3, 4, 8].map(|world_size| Condition {
        world_size,
        others: 15,
        cached: true,
        chunk: [1, 7, 64, WHOLE][world_size % 4],
        ..PLAIN
    });
    let (_folder, path) = tiny(Encoding::Q4_1, Container::Gguf);
    for pooling in [Pooling::Mean, Pooling::Last] {
        check_embedding(&path, &CPU, 300, pooling, &conditions);
    }
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
    check(&demo_model(), &CPU, 600, &conditions);
}

#[test]
fn nothing_changes_a_bit_of_keys_and_values_in_8_bits() {
    let int8 = Condition { kv_encoding: KvEncoding::Int8, ..PLAIN };
    let conditions = [
        Condition { chunk: 7, ..int8 },
        Condition { others: 15, cached: true, chunk: 64, threads: 2, ..int8 },
        Condition { world_size: 2, others: 15, cached: true, chunk: 100, ..int8 },
        Condition { world_size: 3, ..int8 },
    ];
    check(&demo_model(), &CPU, 300, &conditions);
}

/// A random model with eight KV heads, in a folder of its own.
fn tiny(encoding: Encoding, container: Container) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model");
    // Eight segments of whole blocks, whatever the block.
    let (n_heads, ffn_dim) = match encoding.block_len() {
        256 => (64, 2048),
        128 => (32, 1024),
        _ => (16, 768),
    };
    let model = TinyModel { encoding, n_heads, ffn_dim, container, ..TinyModel::default() };
    // Embeddings stay floats in folders.
    let embedding_encoding = if container == Container::Folder { Encoding::BF16 } else { model.embedding_encoding };
    TinyModel { embedding_encoding, ..model }.write(&path).expect("the model is written");
    (folder, path)
}

#[test]
fn the_world_size_does_not_change_a_bit_of_a_model_with_eight_kv_heads() {
    let worlds = [2, 3, 4, 8].map(|world_size| Condition { world_size, ..PLAIN });
    for encoding in [Encoding::Q4_0, Encoding::Q8_0, Encoding::F16, Encoding::Q5K, Encoding::Q6K, Encoding::IQ4_XS] {
        println!("{encoding}");
        let (_folder, path) = tiny(encoding, Container::Gguf);
        check(&path, &CPU, 40, &worlds);
    }
}

#[test]
fn nothing_changes_a_bit_of_a_model_from_a_folder() {
    let mixed = [1, 2, 3, 8].map(|world_size| Condition {
        world_size,
        others: 3,
        cached: true,
        chunk: [WHOLE, 1, 7, 64][world_size % 4],
        ..PLAIN
    });
    use Encoding::{BF16, FP4, I8_32, NF4, Q4_0, Q8_0, U4_32, U4_64, U4_128};
    for encoding in [BF16, Q4_0, Q8_0, U4_32, U4_64, U4_128, I8_32, NF4, FP4] {
        println!("{encoding}");
        let (_folder, path) = tiny(encoding, Container::Folder);
        check(&path, &CPU, 40, &mixed);
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
    let (_folder, path) = tiny(Encoding::Q4_1, Container::Gguf);
    check(&path, &CPU, 40, &mixed);
}

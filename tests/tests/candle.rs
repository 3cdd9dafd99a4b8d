//! The model against candle's own quantized Llama, which reads the same file with code that is not ours.
//!
//! candle quantizes activations to int8 too, by its own rounding, so single log-probabilities differ as they do from
//! any other int8 implementation (see `reference.rs`): by some hundredths on average.

use candle_core::{Device, Tensor, quantized::gguf_file};
use candle_transformers::models::quantized_llama::ModelWeights;
use lockstep_kernels::KvEncoding;
use lockstep_tests::{
    cluster::demo_model,
    ranks::{Ranks, argmax, logprob},
};
use lockstep_worker::device;

/// "The capital of France is" in the demo model's ids, and two that are just ids.
const PROMPTS: [&[u32]; 3] =
    [&[504, 3575, 282, 4649, 314], &[1604, 17425, 19931, 24, 94, 727], &[6403, 2159, 253, 655]];

/// Tokens that are compared after each prompt.
const N_TOKENS: usize = 12;

/// candle's logits after `ids`.
fn candle_logits(model: &mut ModelWeights, ids: &[u32]) -> candle_core::Result<Vec<f32>> {
    let input = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
    model.forward(&input, 0)?.flatten_all()?.to_vec1()
}

#[test]
fn log_probabilities_agree_with_candles_own_quantized_llama() {
    let path = demo_model();
    let mut file = std::fs::File::open(&path).expect("the demo model is there: run `make fetch` first");
    let content = gguf_file::Content::read(&mut file).expect("candle reads it");
    let mut candle = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).expect("candle loads it");
    let mut ranks = Ranks::load(&path, &device::Device::Cpu, KvEncoding::F16, 1, 2, 64).expect("it loads");
    let mut differences = Vec::new();
    for prompt in PROMPTS {
        let mut ids = prompt.to_vec();
        for _ in 0..N_TOKENS {
            let ours = ranks.logits(&ids, 64).expect("the model runs");
            let ours = ours.chunks_exact(ranks.vocab_size).next_back().expect("a row for each token");
            let theirs = candle_logits(&mut candle, &ids).expect("candle runs");
            let token = argmax(&theirs);
            differences.push((logprob(ours, token) - logprob(&theirs, token)).abs());
            ids.push(token);
        }
    }
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    let max = differences.iter().fold(0.0, |max: f64, difference| max.max(*difference));
    println!("{} tokens, off by {mean:.4} on average, by {max:.4} at most", differences.len());
    assert!(mean < 0.08 && max < 0.92, "off by {mean} on average, by {max} at most");
}

//! A tiny model: a small Llama with random weights, written as a GGUF in any shape and encoding.
//!
//! The weights come from a seed, so one description always gives the same bytes. They are scaled so that activations
//! keep their size from layer to layer, attention is neither flat nor stuck, and logits spread over several units:
//! a test that compares the likeliest ids then compares something.

mod gguf;
mod quantize;
mod vocabulary;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::Encoding;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use self::gguf::Gguf;
pub use self::quantize::quantize;
use self::vocabulary::Vocabulary;

/// The chat template of the demo model's family: each turn between `<|im_start|>` and `<|im_end|>`.
pub const CHATML: &str = "{% for message in messages %}\
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Standard deviation of the logits, roughly. At 3 the likeliest of a few hundred ids has a probability around one
/// half, as in text.
const LOGIT_SPREAD: f32 = 3.0;

/// What to write. Take [`TinyModel::default`] and change what matters to the test.
#[derive(Clone, Debug, PartialEq)]
pub struct TinyModel {
    /// Decides every weight.
    pub seed: u64,
    /// Transformer layers.
    pub n_layers: usize,
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Width of the residual stream.
    pub hidden_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn_dim: usize,
    /// Ids: three control tokens, 256 bytes, merges for the rest; see [`TinyModel::VOCAB_SIZES`].
    pub vocab_size: usize,
    /// How the matrices of the layers are stored. Each width must be a whole number of its blocks.
    pub encoding: Encoding,
    /// How the embedding and the output matrix are stored.
    pub embedding_encoding: Encoding,
    /// True if the embedding is the output matrix too.
    pub tied: bool,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Dimensions of a head that rotate, from the first.
    pub rope_dim: usize,
    /// Divisors of the rotary frequencies, one for each of `rope_dim / 2` pairs.
    pub rope_factors: Option<Vec<f32>>,
    /// Positions that the model claims to know.
    pub context_length: usize,
    /// The chat template, if the model is to have one.
    pub chat_template: Option<String>,
}

/// Draws matrices from one stream of random numbers.
struct Weights {
    rng: ChaCha8Rng,
}

// === impl TinyModel ===

impl Default for TinyModel {
    /// Eight KV heads, so that 1 to 8 ranks can share it; every width a multiple of 256, so that every encoding fits,
    /// and every head and eighth of a multiple of 32.
    fn default() -> Self {
        TinyModel {
            seed: 0,
            n_layers: 2,
            n_heads: 16,
            n_kv_heads: 8,
            head_dim: 32,
            hidden_dim: 256,
            ffn_dim: 512,
            vocab_size: 384,
            encoding: Encoding::Q4_1,
            embedding_encoding: Encoding::Q8_0,
            tied: false,
            rope_base: 10_000.0,
            rope_dim: 32,
            rope_factors: None,
            context_length: 512,
            chat_template: Some(CHATML.to_owned()),
        }
    }
}

impl TinyModel {
    /// Vocabulary sizes that can be written.
    pub const VOCAB_SIZES: std::ops::RangeInclusive<usize> = Vocabulary::SIZE_MIN..=Vocabulary::SIZE_MAX;

    /// Writes the model to `path`.
    ///
    /// # Errors
    /// If the description contradicts itself or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.bytes()?).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The GGUF file's content.
    ///
    /// # Errors
    /// If the description contradicts itself.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut gguf = Gguf::default();
        self.write_metadata(&mut gguf);
        self.write_tensors(&mut gguf);
        Ok(gguf.into_bytes())
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.n_kv_heads > 0 && self.n_heads.is_multiple_of(self.n_kv_heads),
            "{} query heads cannot share {} KV heads",
            self.n_heads,
            self.n_kv_heads
        );
        ensure!(
            self.rope_dim.is_multiple_of(2) && self.rope_dim <= self.head_dim,
            "{} rotating dimensions in heads of {}",
            self.rope_dim,
            self.head_dim
        );
        let n_factors = self.rope_factors.as_ref().map_or(self.rope_dim / 2, Vec::len);
        ensure!(n_factors == self.rope_dim / 2, "{n_factors} factors for {} rotating dimensions", self.rope_dim);
        ensure!(
            Self::VOCAB_SIZES.contains(&self.vocab_size),
            "a vocabulary of {} ids is not within {:?}",
            self.vocab_size,
            Self::VOCAB_SIZES
        );
        for (width, encoding) in [
            (self.hidden_dim, self.encoding),
            (self.hidden_dim, self.embedding_encoding),
            (self.n_heads * self.head_dim, self.encoding),
            (self.ffn_dim, self.encoding),
        ] {
            let fits = width > 0 && encoding.row_bytes(width).is_some();
            ensure!(fits, "rows of {width} values are not whole {encoding} blocks");
        }
        Ok(())
    }

    fn write_metadata(&self, gguf: &mut Gguf) {
        gguf.string("general.architecture", "llama");
        gguf.string("general.name", "Lockstep tiny model");
        for (key, value) in [
            ("llama.block_count", self.n_layers),
            ("llama.context_length", self.context_length),
            ("llama.embedding_length", self.hidden_dim),
            ("llama.feed_forward_length", self.ffn_dim),
            ("llama.attention.head_count", self.n_heads),
            ("llama.attention.head_count_kv", self.n_kv_heads),
            ("llama.attention.key_length", self.head_dim),
            ("llama.attention.value_length", self.head_dim),
            ("llama.rope.dimension_count", self.rope_dim),
            ("llama.vocab_size", self.vocab_size),
        ] {
            gguf.u32(key, value as u32);
        }
        gguf.f32("llama.rope.freq_base", self.rope_base);
        gguf.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        Vocabulary::new(self.vocab_size).write(gguf);
        if let Some(template) = &self.chat_template {
            gguf.string("tokenizer.chat_template", template);
        }
    }

    fn write_tensors(&self, gguf: &mut Gguf) {
        let mut weights = Weights { rng: ChaCha8Rng::seed_from_u64(self.seed) };
        let TinyModel { hidden_dim, ffn_dim, vocab_size, encoding, embedding_encoding, .. } = *self;
        let (q_dim, kv_dim) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);

        let table = weights.matrix(vocab_size, hidden_dim, LOGIT_SPREAD);
        gguf.tensor("token_embd.weight", &[vocab_size, hidden_dim], embedding_encoding, &table);
        for layer in 0..self.n_layers {
            let norm = |name: &str, gguf: &mut Gguf, weights: &mut Weights| {
                gguf.tensor(
                    &format!("blk.{layer}.{name}.weight"),
                    &[hidden_dim],
                    Encoding::F32,
                    &weights.norm(hidden_dim),
                );
            };
            let matrix = |name: &str, n_out: usize, n_in: usize, gguf: &mut Gguf, weights: &mut Weights| {
                // Queries and keys a little larger than the rest, so that attention has favourites.
                let gain = if matches!(name, "attn_q" | "attn_k") { 1.5 } else { 1.0 };
                let values = weights.matrix(n_out, n_in, gain);
                gguf.tensor(&format!("blk.{layer}.{name}.weight"), &[n_out, n_in], encoding, &values);
            };
            norm("attn_norm", gguf, &mut weights);
            matrix("attn_q", q_dim, hidden_dim, gguf, &mut weights);
            matrix("attn_k", kv_dim, hidden_dim, gguf, &mut weights);
            matrix("attn_v", kv_dim, hidden_dim, gguf, &mut weights);
            matrix("attn_output", hidden_dim, q_dim, gguf, &mut weights);
            norm("ffn_norm", gguf, &mut weights);
            matrix("ffn_gate", ffn_dim, hidden_dim, gguf, &mut weights);
            matrix("ffn_up", ffn_dim, hidden_dim, gguf, &mut weights);
            matrix("ffn_down", hidden_dim, ffn_dim, gguf, &mut weights);
        }
        gguf.tensor("output_norm.weight", &[hidden_dim], Encoding::F32, &weights.norm(hidden_dim));
        if !self.tied {
            let output = weights.matrix(vocab_size, hidden_dim, LOGIT_SPREAD);
            gguf.tensor("output.weight", &[vocab_size, hidden_dim], embedding_encoding, &output);
        }
        if let Some(factors) = &self.rope_factors {
            gguf.tensor("rope_freqs.weight", &[factors.len()], Encoding::F32, factors);
        }
    }
}

// === impl Weights ===

impl Weights {
    /// `[n_out, n_in]` uniform numbers that map inputs of standard deviation 1 to outputs of `gain`.
    fn matrix(&mut self, n_out: usize, n_in: usize, gain: f32) -> Vec<f32> {
        // A uniform distribution on [-a, a] has the standard deviation a / sqrt(3).
        let bound = gain * (3.0 / n_in as f32).sqrt();
        (0..n_out * n_in).map(|_| self.rng.random_range(-bound..bound)).collect()
    }

    /// Weights of a norm: around 1, so that forgetting them shows.
    fn norm(&mut self, width: usize) -> Vec<f32> {
        (0..width).map(|_| self.rng.random_range(0.8..1.2)).collect()
    }
}

#[cfg(test)]
mod tests;

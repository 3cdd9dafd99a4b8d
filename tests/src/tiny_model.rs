//! A tiny model: a small Llama with random weights, written as a GGUF file or a Hugging Face folder in any shape and
//! encoding.
//!
//! The weights come from a seed, so one description always gives the same bytes. They are scaled so that activations
//! keep their size from layer to layer, attention is neither flat nor stuck, and logits spread over several units:
//! a test that compares the likeliest ids then compares something.

mod folder;
mod quantize;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::{Encoding, GgufHeader};
use lockstep_worker::make_model::{
    llama::{LlamaShape, LlamaTensor, Part},
    vocabulary::Vocabulary,
};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

pub use self::{folder::write_folder, quantize::quantize};

/// The chat template of the demo model's family: each turn between `<|im_start|>` and `<|im_end|>`.
pub const CHATML: &str = "{% for message in messages %}\
    {{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Where a model is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// One GGUF file.
    Gguf,
    /// A Hugging Face folder, quantized weights in the layout of a tool that makes such: Q4_0, Q8_0, U4_32 and I8_32 in that
    /// of GPTQ, U4_64 and U4_128 in that of AWQ, NF4 and FP4 in that of bitsandbytes.
    Folder,
}

/// What to write. Take [`TinyModel::default`] and change what matters to the test.
#[derive(Clone, Debug, PartialEq)]
pub struct TinyModel {
    /// Decides every weight.
    pub seed: u64,
    /// Where they go.
    pub container: Container,
    /// Transformer layers.
    pub n_layers: usize,
    /// Further layers that add nothing: they take time, and change no logit. Without them it is a model that says the same
    /// and is faster.
    pub n_idle_layers: usize,
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

/// Draws tensors from one stream of random numbers.
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
            container: Container::Gguf,
            n_layers: 2,
            n_idle_layers: 0,
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

    /// The model in a container that its encodings fit in.
    #[must_use]
    pub fn in_fitting_container(self) -> Self {
        let is_gguf = self.encoding.ggml_type().is_some();
        if is_gguf {
            return TinyModel { container: Container::Gguf, ..self };
        }
        // Embeddings stay floats in folders.
        TinyModel { container: Container::Folder, embedding_encoding: Encoding::F16, ..self }
    }

    /// Writes the model to `path`, the file or the folder.
    ///
    /// # Errors
    /// If the description contradicts itself or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let write = || match self.container {
            Container::Gguf => Ok(std::fs::write(path, self.bytes()?)?),
            Container::Folder => folder::write(self, path),
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// The tensors with their values, in the order of the forward pass.
    fn weights(&self) -> impl Iterator<Item = (LlamaTensor, Vec<f32>)> {
        let mut weights = Weights { rng: ChaCha8Rng::seed_from_u64(self.seed) };
        self.shape().tensors().into_iter().map(move |tensor| {
            let is_idle = tensor.layer.is_some_and(|layer| layer >= self.n_layers);
            let values = if is_idle { vec![0.0; tensor.shape.iter().product()] } else { weights.draw(&tensor) };
            (tensor, values)
        })
    }

    /// The GGUF file's content.
    ///
    /// # Errors
    /// If the description contradicts itself.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        self.check()?;
        let shape = self.shape();
        let mut header = GgufHeader::default();
        header.string("general.name", "Lockstep tiny model");
        shape.write_metadata(&mut header);
        Vocabulary::new(self.vocab_size).write(&mut header);
        if let Some(template) = &self.chat_template {
            header.string("tokenizer.chat_template", template);
        }
        for tensor in &shape.tensors() {
            header.tensor(&tensor.name, &tensor.shape, self.encoding_of(tensor));
        }
        if let Some(factors) = &self.rope_factors {
            header.tensor("rope_freqs.weight", &[factors.len()], Encoding::F32);
        }
        let mut data = header.write(Vec::new())?;
        for (tensor, values) in self.weights() {
            data.write(&quantize(self.encoding_of(&tensor), &values))?;
        }
        if let Some(factors) = &self.rope_factors {
            data.write(&quantize(Encoding::F32, factors))?;
        }
        Ok(data.finish()?)
    }

    /// Its shape, idle layers among the others.
    #[must_use]
    pub fn shape(&self) -> LlamaShape {
        LlamaShape {
            n_layers: self.n_layers + self.n_idle_layers,
            hidden_dim: self.hidden_dim,
            ffn_dim: self.ffn_dim,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            rope_dim: self.rope_dim,
            vocab_size: self.vocab_size,
            tied: self.tied,
            rope_base: self.rope_base,
            context_length: self.context_length,
        }
    }

    fn encoding_of(&self, tensor: &LlamaTensor) -> Encoding {
        match tensor.part {
            Part::Norm => Encoding::F32,
            Part::Embedding | Part::Output => self.embedding_encoding,
            _ => self.encoding,
        }
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
        if self.container == Container::Folder {
            let is_plain = self.rope_dim == self.head_dim && self.rope_factors.is_none();
            ensure!(is_plain, "config.json has no rope_dim and no rope_factors");
        }
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
}

// === impl Weights ===

impl Weights {
    /// Uniform numbers: a matrix's around 0, a norm's around 1, so that forgetting them shows.
    fn draw(&mut self, tensor: &LlamaTensor) -> Vec<f32> {
        let n_values = tensor.shape.iter().product();
        if tensor.part == Part::Norm {
            return (0..n_values).map(|_| self.rng.random_range(0.8..1.2)).collect();
        }
        // A uniform distribution on [-a, a] has the standard deviation a / sqrt(3).
        let bound = tensor.part.deviation(tensor.n_cols()) * 3f32.sqrt();
        (0..n_values).map(|_| self.rng.random_range(-bound..bound)).collect()
    }
}

#[cfg(test)]
mod tests;

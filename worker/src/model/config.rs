//! A model's configuration: its shape, as its checkpoint states it, checked once.

use lockstep_checkpoint::{Checkpoint, ROPE_HALVES};
use lockstep_kernels::RopeStyle;

use super::LoadError;

/// Limits on what a checkpoint may claim, so that products of them cannot overflow and no table grows absurd.
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1024;
const MAX_CONTEXT: usize = 1 << 21;

/// The shape of a Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Transformer blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub hidden_dim: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub ffn_dim: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Longest sequence that the model was trained for. Unit: tokens.
    pub context_length: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding: base of the frequencies.
    pub rope_base: f32,
    /// Rotary embedding: how many of a head's values are rotated; even.
    pub rope_dim: usize,
    /// Rotary embedding: positions are divided by this (linear scaling); 1 for none.
    pub rope_scale: f32,
    /// Rotary embedding: which values of a head turn together.
    pub rope_style: RopeStyle,
}

impl ModelConfig {
    /// Reads the configuration of a checkpoint.
    ///
    /// # Errors
    /// A key that is missing, of another type, out of range, or that asks for what Lockstep does not do.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, LoadError> {
        let metadata = checkpoint.metadata();
        let architecture = metadata.str("general.architecture")?;
        if architecture != "llama" {
            return Err(unsupported("general.architecture", format!("\"{architecture}\" is not \"llama\"")));
        }
        refuse_variants(checkpoint)?;
        let size = |name: &str, max: usize| -> Result<usize, LoadError> {
            let key = format!("llama.{name}");
            in_range(checkpoint.own_key(&key), metadata.u32(&key)? as usize, max)
        };
        let opt_size = |name: &str, max: usize| -> Result<Option<usize>, LoadError> {
            let key = format!("llama.{name}");
            metadata.opt_u32(&key)?.map(|value| in_range(checkpoint.own_key(&key), value as usize, max)).transpose()
        };

        let hidden_dim = size("embedding_length", MAX_WIDTH)?;
        let n_heads = size("attention.head_count", MAX_HEADS)?;
        let n_kv_heads = opt_size("attention.head_count_kv", MAX_HEADS)?.unwrap_or(n_heads);
        let head_dim = opt_size("attention.key_length", MAX_WIDTH)?.unwrap_or(hidden_dim / n_heads);
        let rope_dim = opt_size("rope.dimension_count", MAX_WIDTH)?.unwrap_or(head_dim);
        let embedding = checkpoint.tensor("token_embd.weight")?;
        let config = Self {
            n_layers: size("block_count", MAX_LAYERS)?,
            hidden_dim,
            n_heads,
            n_kv_heads,
            head_dim,
            ffn_dim: size("feed_forward_length", MAX_WIDTH)?,
            vocab_size: in_range(
                &format!("rows of {}", checkpoint.own_name(embedding.name)),
                embedding.n_rows(),
                1 << 24,
            )?,
            context_length: size("context_length", MAX_CONTEXT)?,
            rms_eps: metadata.f32("llama.attention.layer_norm_rms_epsilon")?,
            rope_base: metadata.opt_f32("llama.rope.freq_base")?.unwrap_or(10_000.0),
            rope_dim,
            rope_scale: rope_scale(checkpoint)?,
            rope_style: match metadata.opt_bool(ROPE_HALVES)? {
                Some(true) => RopeStyle::Halves,
                // GGUF conversion reorders the rows of q and k so that rotated pairs are neighbours.
                _ => RopeStyle::Adjacent,
            },
        };
        config.validate(checkpoint)?;
        Ok(config)
    }

    /// Width of all query heads together.
    pub fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key heads (and of all value heads) together.
    pub fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Query heads that share one key and value head.
    pub fn group_size(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    fn validate(&self, checkpoint: &Checkpoint) -> Result<(), LoadError> {
        let unsupported = |key: &str, why: String| unsupported(checkpoint.own_key(key), why);
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let why = format!("{} does not divide the {} query heads", self.n_kv_heads, self.n_heads);
            return Err(unsupported("llama.attention.head_count_kv", why));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(unsupported("llama.attention.key_length", format!("{} is not even", self.head_dim)));
        }
        if !self.rope_dim.is_multiple_of(2) || self.rope_dim > self.head_dim {
            let why = format!("{} is not an even number up to the head's width {}", self.rope_dim, self.head_dim);
            return Err(unsupported("llama.rope.dimension_count", why));
        }
        for (key, value) in [
            ("llama.attention.layer_norm_rms_epsilon", self.rms_eps),
            ("llama.rope.freq_base", self.rope_base),
            ("llama.rope.scaling.factor", self.rope_scale),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(unsupported(key, format!("{value} is not a positive number")));
            }
        }
        Ok(())
    }
}

fn refuse_variants(checkpoint: &Checkpoint) -> Result<(), LoadError> {
    let experts = checkpoint.metadata().opt_u32("llama.expert_count")?.unwrap_or(0);
    if experts > 0 {
        return Err(unsupported("llama.expert_count", "mixtures of experts are not supported".into()));
    }
    Ok(())
}

fn rope_scale(checkpoint: &Checkpoint) -> Result<f32, LoadError> {
    let metadata = checkpoint.metadata();
    match metadata.opt_str("llama.rope.scaling.type")? {
        None | Some("none") => Ok(1.0),
        Some("linear") => Ok(metadata.opt_f32("llama.rope.scaling.factor")?.unwrap_or(1.0)),
        Some(other) => Err(unsupported("llama.rope.scaling.type", format!("\"{other}\" is not supported"))),
    }
}

fn in_range(what: &str, value: usize, max: usize) -> Result<usize, LoadError> {
    if (1..=max).contains(&value) { Ok(value) } else { Err(unsupported(what, format!("{value} is not in 1..={max}"))) }
}

fn unsupported(what: &str, why: String) -> LoadError {
    LoadError::Unsupported { what: what.to_owned(), why }
}

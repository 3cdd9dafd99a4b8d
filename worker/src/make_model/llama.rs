//! A Llama as a GGUF file describes it: metadata and tensors, by the names that llama.cpp gave them.

use lockstep_checkpoint::GgufHeader;

/// Standard deviation of the logits, roughly. At 3 the likeliest of a few hundred ids has a probability around one
/// half, as in text.
const LOGIT_SPREAD: f32 = 3.0;

/// The shape of a Llama.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LlamaShape {
    /// Transformer layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub hidden_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn_dim: usize,
    /// Query heads; a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Dimensions of a head that rotate, from the first.
    pub rope_dim: usize,
    /// Token ids.
    pub vocab_size: usize,
    /// True if the embedding is the output matrix too.
    pub tied: bool,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Positions that the model claims to know.
    pub context_length: usize,
}

/// One tensor of a Llama.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LlamaTensor {
    /// Its name in the file.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub part: Part,
    /// Its layer, if it belongs to one.
    pub layer: Option<usize>,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the parts of a Llama have no better names than these")]
pub enum Part {
    Embedding,
    Norm,
    Query,
    Key,
    Value,
    AttentionOutput,
    Gate,
    Up,
    Down,
    Output,
}

// === impl LlamaShape ===

impl LlamaShape {
    /// Adds what a reader needs to know besides the tensors and the vocabulary.
    pub fn write_metadata(&self, header: &mut GgufHeader) {
        header.string("general.architecture", "llama");
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
            header.u32(key, value as u32);
        }
        header.f32("llama.rope.freq_base", self.rope_base);
        header.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    }

    /// All tensors, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<LlamaTensor> {
        let LlamaShape { hidden_dim, ffn_dim, vocab_size, .. } = *self;
        let (q_dim, kv_dim) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let whole = |name: &str, shape: &[usize], part: Part| LlamaTensor {
            name: format!("{name}.weight"),
            shape: shape.to_vec(),
            part,
            layer: None,
        };
        let mut tensors = vec![whole("token_embd", &[vocab_size, hidden_dim], Part::Embedding)];
        for layer in 0..self.n_layers {
            let parts: [(&str, &[usize], Part); 9] = [
                ("attn_norm", &[hidden_dim], Part::Norm),
                ("attn_q", &[q_dim, hidden_dim], Part::Query),
                ("attn_k", &[kv_dim, hidden_dim], Part::Key),
                ("attn_v", &[kv_dim, hidden_dim], Part::Value),
                ("attn_output", &[hidden_dim, q_dim], Part::AttentionOutput),
                ("ffn_norm", &[hidden_dim], Part::Norm),
                ("ffn_gate", &[ffn_dim, hidden_dim], Part::Gate),
                ("ffn_up", &[ffn_dim, hidden_dim], Part::Up),
                ("ffn_down", &[hidden_dim, ffn_dim], Part::Down),
            ];
            tensors.extend(parts.map(|(name, shape, part)| LlamaTensor {
                layer: Some(layer),
                ..whole(&format!("blk.{layer}.{name}"), shape, part)
            }));
        }
        tensors.push(whole("output_norm", &[hidden_dim], Part::Norm));
        if !self.tied {
            tensors.push(whole("output", &[vocab_size, hidden_dim], Part::Output));
        }
        tensors
    }
}

// === impl LlamaTensor ===

impl LlamaTensor {
    /// Values in a row.
    pub fn n_cols(&self) -> usize {
        *self.shape.last().expect("a tensor has a dimension")
    }
}

// === impl Part ===

impl Part {
    /// The standard deviation that random weights of this matrix, with `n_cols` inputs, should have: activations then
    /// keep their size from layer to layer, attention is neither flat nor stuck, and logits spread over several units.
    pub fn deviation(self, n_cols: usize) -> f32 {
        let gain = match self {
            Part::Embedding | Part::Output => LOGIT_SPREAD,
            // A little larger than the rest, so that attention has favourites.
            Part::Query | Part::Key => 1.5,
            _ => 1.0,
        };
        gain / (n_cols as f32).sqrt()
    }
}

//! Loading: from a checkpoint to one rank's shard, reading only the ranges that the shard plan names.

use std::{collections::HashSet, ops::Range, sync::Arc};

use lockstep_checkpoint::{Checkpoint, Tensor};
use lockstep_kernels::{EncodedRows, dequantize};

use super::{
    LoadError, OpError,
    attention::Attention,
    config::ModelConfig,
    embedding::EmbeddingTable,
    linear::{ColumnParallel, RowParallel},
    llama::{Layer, Llama},
    mlp::Mlp,
    ops::{AttentionShape, Backend, RopeSpec},
    shard::{Reduction, RowParallelBlocks, ShardPlan},
};

const OUTPUT: &str = "output.weight";
const OUTPUT_NORM: &str = "output_norm.weight";
const ROPE_FREQS: &str = "rope_freqs.weight";

/// A checkpoint that is a model Lockstep can run, with its shard plan for one rank.
#[derive(Debug)]
pub struct Source {
    checkpoint: Arc<Checkpoint>,
    config: ModelConfig,
    plan: ShardPlan,
}

impl Source {
    /// Reads the configuration and plans the shard; loads nothing yet.
    ///
    /// # Errors
    /// A damaged or unsupported model, tensors that no part of a Llama uses, or an impossible world size.
    pub fn open(checkpoint: Arc<Checkpoint>, rank: usize, world_size: usize) -> Result<Self, LoadError> {
        let config = ModelConfig::from_checkpoint(&checkpoint)?;
        refuse_unused_tensors(&checkpoint, &config)?;
        refuse_quantized_embedding(&checkpoint)?;
        let blocks = RowParallelBlocks {
            o: largest_block(&checkpoint, &config, "attn_output")?,
            down: largest_block(&checkpoint, &config, "ffn_down")?,
        };
        let plan = ShardPlan::new(&config, rank, world_size, blocks)?;
        Ok(Self { checkpoint, config, plan })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What this rank will hold.
    pub fn plan(&self) -> &ShardPlan {
        &self.plan
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Sees to it that a token id means the same to another model: vocabularies have one size and, where both models
    /// spell them out, the same texts. Tokens that both have for control, or for nothing, may have two names: releases of
    /// one family rename those that they had reserved.
    ///
    /// # Errors
    /// Two different vocabularies, or one that cannot be read.
    pub fn check_same_vocabulary(&self, other: &Source) -> Result<(), LoadError> {
        let differs = |why: String| LoadError::Vocabulary {
            path: self.checkpoint.path().to_owned(),
            other: other.checkpoint.path().to_owned(),
            why,
        };
        let (mine, others) = (self.config.vocab_size, other.config.vocab_size);
        if mine != others {
            return Err(differs(format!("{mine} tokens and {others}")));
        }
        let (mine, others) = (self.checkpoint.vocabulary()?.tokens, other.checkpoint.vocabulary()?.tokens);
        let mut pairs = mine.iter().zip(&others).enumerate();
        match pairs.find(|(_, (mine, other))| mine.text != other.text && !(mine.is_reserved && other.is_reserved)) {
            None => Ok(()),
            Some((id, (mine, other))) => Err(differs(format!("token {id} is {:?} and {:?}", mine.text, other.text))),
        }
    }

    /// The attention that this rank computes.
    ///
    /// `context_length`: positions are below this.
    ///
    /// # Errors
    /// Frequency factors of the wrong shape or encoding.
    pub fn attention_shape(&self, context_length: usize) -> Result<AttentionShape, LoadError> {
        let config = &self.config;
        let n_pairs = config.rope_dim / 2;
        let mut factors = match self.checkpoint.find(ROPE_FREQS) {
            None => None,
            Some(_) => Some(self.read_vector(ROPE_FREQS, n_pairs)?),
        };
        if config.rope_scale != 1.0 {
            // Dividing positions by the scale is dividing every frequency by it.
            factors
                .get_or_insert_with(|| vec![1.0; n_pairs])
                .iter_mut()
                .for_each(|factor| *factor *= config.rope_scale);
        }
        Ok(AttentionShape {
            n_heads: self.plan.heads.len(),
            n_kv_heads: self.plan.kv_heads.len(),
            head_dim: config.head_dim,
            rope: RopeSpec {
                rope_dim: config.rope_dim,
                base: config.rope_base,
                factors,
                n_positions: context_length,
                style: config.rope_style,
            },
        })
    }

    /// Bytes of a tensor, as encoded, that this rank holds.
    pub fn held_bytes(&self, tensor: &Tensor<'_>) -> usize {
        let part = tensor.name.rsplit('.').nth(1).unwrap_or(tensor.name);
        let (held, of) = match part {
            "attn_q" => (self.plan.heads.len(), self.config.n_heads),
            "attn_k" | "attn_v" => (self.plan.kv_heads.len(), self.config.n_kv_heads),
            "attn_output" => (self.plan.attention_sum.columns.len(), self.config.q_dim()),
            "ffn_gate" | "ffn_up" | "ffn_down" => (self.plan.ffn.len(), self.config.ffn_dim),
            "output" => (self.plan.vocab[self.plan.rank].len(), self.config.vocab_size),
            // A tied embedding is also the output matrix; otherwise its few rows a step stay in the mapped file.
            "token_embd" if self.checkpoint.find(OUTPUT).is_some() => (0, 1),
            "token_embd" => (self.plan.vocab[self.plan.rank].len(), self.config.vocab_size),
            _ => (1, 1),
        };
        (tensor.size_bytes() as u64 * held as u64 / of as u64) as usize
    }

    /// Loads this rank's shard onto a backend.
    ///
    /// # Errors
    /// A tensor that is missing, of the wrong shape, or that the backend refuses.
    pub fn load<B: Backend>(&self, ops: &mut B) -> Result<Llama<B>, LoadError> {
        let hidden_dim = self.config.hidden_dim;
        let output = if self.checkpoint.find(OUTPUT).is_some() { OUTPUT } else { EmbeddingTable::TENSOR };
        let vocab = &self.plan.vocab[self.plan.rank];
        // The largest tensor comes first: while one is loaded, its bytes are in memory twice.
        let output = self.column_parallel(ops, output, self.config.vocab_size, vocab)?;
        let layers = (0..self.config.n_layers).map(|layer| self.load_layer(ops, layer)).collect::<Result<_, _>>()?;
        Ok(Llama {
            embedding: self.embedding(ops)?,
            layers,
            norm: self.load_vector(ops, OUTPUT_NORM, hidden_dim)?,
            host_norm: self.read_vector(OUTPUT_NORM, hidden_dim)?,
            output,
            vocab: self.plan.vocab.clone(),
            config: self.config.clone(),
        })
    }

    fn load_layer<B: Backend>(&self, ops: &mut B, layer: usize) -> Result<Layer<B>, LoadError> {
        let ModelConfig { hidden_dim, head_dim, ffn_dim, .. } = self.config;
        let (q_dim, kv_dim) = (self.config.q_dim(), self.config.kv_dim());
        let q_rows = self.plan.heads.start * head_dim..self.plan.heads.end * head_dim;
        let kv_rows = self.plan.kv_heads.start * head_dim..self.plan.kv_heads.end * head_dim;
        let name = |part: &str| layer_tensor(layer, part);
        let [gate, up] = self.gate_and_up(ops, [&name("ffn_gate"), &name("ffn_up")])?;
        Ok(Layer {
            attention_norm: self.load_vector(ops, &name("attn_norm"), hidden_dim)?,
            attention: Attention {
                q: self.column_parallel(ops, &name("attn_q"), q_dim, &q_rows)?,
                k: self.column_parallel(ops, &name("attn_k"), kv_dim, &kv_rows)?,
                v: self.column_parallel(ops, &name("attn_v"), kv_dim, &kv_rows)?,
                o: self.row_parallel(ops, &name("attn_output"), q_dim, &self.plan.attention_sum)?,
            },
            mlp_norm: self.load_vector(ops, &name("ffn_norm"), hidden_dim)?,
            mlp: Mlp { gate, up, down: self.row_parallel(ops, &name("ffn_down"), ffn_dim, &self.plan.ffn_sum)? },
        })
    }

    /// Rows `rows` of a weight `[n_rows, hidden_dim]`.
    fn column_parallel<B: Backend>(
        &self,
        ops: &mut B,
        name: &str,
        n_rows: usize,
        rows: &Range<usize>,
    ) -> Result<ColumnParallel<B>, LoadError> {
        let tensor = self.tensor(name, Some(n_rows), self.config.hidden_dim)?;
        let bytes = tensor.bytes()?;
        let load = || -> Result<B::Matrix, OpError> {
            let source = encoded(&tensor, &bytes)?.rows(rows.clone())?;
            ops.load_matrix(&source, None)
        };
        let weight = self.named(name, load)?;
        // The backend has its own copy.
        self.checkpoint.release(name);
        Ok(ColumnParallel { weight })
    }

    /// This rank's rows of the weights `[ffn_dim, hidden_dim]` of an MLP's first half.
    fn gate_and_up<B: Backend>(&self, ops: &mut B, names: [&str; 2]) -> Result<[ColumnParallel<B>; 2], LoadError> {
        let tensor = |name: &str| self.tensor(name, Some(self.config.ffn_dim), self.config.hidden_dim);
        let (gate, up) = (tensor(names[0])?, tensor(names[1])?);
        let (gate_bytes, up_bytes) = (gate.bytes()?, up.bytes()?);
        let rows = |tensor, bytes| Ok(encoded(tensor, bytes)?.rows(self.plan.ffn.clone())?);
        let gate_rows = self.named(gate.name, || rows(&gate, &gate_bytes))?;
        let up_rows = self.named(up.name, || rows(&up, &up_bytes))?;
        let weights = ops.load_gated([&gate_rows, &up_rows]).map_err(|source| {
            let [gate, up] = names.map(|name| self.checkpoint.own_name(name));
            LoadError::Tensor { tensor: format!("{gate} and {up}"), source }
        })?;
        names.iter().for_each(|name| self.checkpoint.release(name));
        Ok(weights.map(|weight| ColumnParallel { weight }))
    }

    /// The reduction's columns of a weight `[hidden_dim, n_cols]`.
    fn row_parallel<B: Backend>(
        &self,
        ops: &mut B,
        name: &str,
        n_cols: usize,
        reduction: &Reduction,
    ) -> Result<RowParallel<B>, LoadError> {
        let tensor = self.tensor(name, Some(self.config.hidden_dim), n_cols)?;
        let bytes = tensor.bytes()?;
        let load = || -> Result<B::Matrix, OpError> {
            let source = encoded(&tensor, &bytes)?.cols(reduction.columns.clone())?;
            ops.load_matrix(&source, Some(reduction))
        };
        let weight = self.named(name, load)?;
        self.checkpoint.release(name);
        Ok(RowParallel { weight, reduction: reduction.clone() })
    }

    fn load_vector<B: Backend>(&self, ops: &mut B, name: &str, width: usize) -> Result<B::Tensor, LoadError> {
        let values = self.read_vector(name, width)?;
        self.named(name, || ops.upload(values, width))
    }

    fn read_vector(&self, name: &str, width: usize) -> Result<Vec<f32>, LoadError> {
        let tensor = self.tensor(name, Some(1), width)?;
        let mut values = vec![0.0; width];
        dequantize(tensor.encoding, &tensor.bytes()?, &mut values);
        Ok(values)
    }

    /// A tensor of the shape `[n_rows, n_cols]`; a vector is one row.
    fn tensor(&self, name: &str, n_rows: Option<usize>, n_cols: usize) -> Result<Tensor<'_>, LoadError> {
        let tensor = self.checkpoint.tensor(name)?;
        if tensor.shape.len() <= 2 && n_rows.is_none_or(|n| tensor.n_rows() == n) && tensor.n_cols() == n_cols {
            return Ok(tensor);
        }
        let wanted = n_rows.map_or_else(|| format!("[*, {n_cols}]"), |n| format!("[{n}, {n_cols}]"));
        let asks = self.checkpoint.own_settings();
        let why = format!("its shape {:?} is not {wanted}, which {asks} asks for", tensor.shape);
        Err(LoadError::Unsupported { what: format!("tensor {}", self.checkpoint.own_name(name)), why })
    }

    fn named<T>(&self, tensor: &str, load: impl FnOnce() -> Result<T, OpError>) -> Result<T, LoadError> {
        load().map_err(|source| LoadError::Tensor { tensor: self.checkpoint.own_name(tensor).into(), source })
    }

    /// The embedding table, all of it.
    fn embedding<B: Backend>(&self, ops: &mut B) -> Result<B::Table, LoadError> {
        let (name, hidden_dim) = (EmbeddingTable::TENSOR, self.config.hidden_dim);
        self.tensor(name, None, hidden_dim)?;
        self.named(name, || ops.load_table(EmbeddingTable::new(Arc::clone(&self.checkpoint), hidden_dim)))
    }
}

fn encoded<'a>(tensor: &Tensor<'_>, bytes: &'a [u8]) -> Result<EncodedRows<'a>, OpError> {
    Ok(EncodedRows::new(tensor.encoding, bytes, tensor.n_rows(), tensor.n_cols())?)
}

fn layer_tensor(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}.weight")
}

fn largest_block(checkpoint: &Checkpoint, config: &ModelConfig, part: &str) -> Result<usize, LoadError> {
    let mut largest = 1;
    for layer in 0..config.n_layers {
        largest = largest.max(checkpoint.tensor(&layer_tensor(layer, part))?.encoding.block_len());
    }
    Ok(largest)
}

/// A tensor that a Llama does not know (a bias, a router, an adapter) would change the result if it were used, so a
/// file that has one is refused rather than run wrongly.
fn refuse_unused_tensors(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<(), LoadError> {
    const PARTS: [&str; 9] =
        ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"];
    let mut known: HashSet<String> =
        [EmbeddingTable::TENSOR, OUTPUT, OUTPUT_NORM, ROPE_FREQS].map(str::to_owned).into_iter().collect();
    known.extend((0..config.n_layers).flat_map(|layer| PARTS.iter().map(move |part| layer_tensor(layer, part))));
    match checkpoint.tensors().find(|tensor| !known.contains(tensor.name)) {
        None => Ok(()),
        Some(tensor) => Err(LoadError::Unsupported {
            what: format!("tensor {}", checkpoint.own_name(tensor.name)),
            why: "it is no part of a Llama with this metadata".into(),
        }),
    }
}

/// Rows of the embedding are looked up where they lie, so a folder's must be floats: its other encodings are made of
/// several tensors.
fn refuse_quantized_embedding(checkpoint: &Checkpoint) -> Result<(), LoadError> {
    if checkpoint.tensor(EmbeddingTable::TENSOR)?.mapped().is_some() {
        return Ok(());
    }
    Err(LoadError::Unsupported {
        what: format!("tensor {}", checkpoint.own_name(EmbeddingTable::TENSOR)),
        why: "it is quantized, and of a folder only embeddings of floats are supported".into(),
    })
}

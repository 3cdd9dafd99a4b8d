//! The oracle: a Llama forward pass in `f64`, the standard against which backends are tested.
//!
//! It reads top to bottom and does everything the slow way: weights are dequantized exactly, row by row, every position
//! attends over all before it, nothing is cached. Activations are `[n_rows][width]`, one row a position.

pub mod dequantize;

use anyhow::{Result, ensure};
use lockstep_checkpoint::{Checkpoint, Metadata, ROPE_HALVES, Tensor};

use self::dequantize::dequantize;

type Rows = Vec<Vec<f64>>;

/// The logits `[n_ids][vocab_size]` after each of `ids`.
///
/// # Errors
/// As [`hidden`].
pub fn logits(model: &Checkpoint, ids: &[u32]) -> Result<Rows> {
    let embedding = model.tensor("token_embd.weight")?;
    let output = model.find("output.weight").unwrap_or(embedding); // tied when absent
    linear(&hidden(model, ids)?, output)
}

/// The hidden states `[n_ids][hidden_dim]` of `ids`, normalized.
///
/// # Errors
/// If the model is not a Llama of a form that is handled here, or an id is outside its vocabulary.
pub fn hidden(model: &Checkpoint, ids: &[u32]) -> Result<Rows> {
    let config = Config::read(model)?;
    let mut x = embed(model.tensor("token_embd.weight")?, ids)?; // [n_ids][hidden_dim]
    for layer in 0..config.n_layers {
        let weight = |name: &str| model.tensor(&format!("blk.{layer}.{name}.weight"));

        let normed = rms_norm(&x, weight("attn_norm")?, config.norm_eps)?;
        let mut q = linear(&normed, weight("attn_q")?)?; // [n_ids][n_heads * head_dim]
        let mut k = linear(&normed, weight("attn_k")?)?; // [n_ids][n_kv_heads * head_dim]
        let v = linear(&normed, weight("attn_v")?)?; // [n_ids][n_kv_heads * head_dim]
        rotate(&mut q, &config);
        rotate(&mut k, &config);
        let attended = attend(&q, &k, &v, &config); // [n_ids][n_heads * head_dim]
        add(&mut x, &linear(&attended, weight("attn_output")?)?);

        let normed = rms_norm(&x, weight("ffn_norm")?, config.norm_eps)?;
        let gate = linear(&normed, weight("ffn_gate")?)?; // [n_ids][ffn_dim]
        let up = linear(&normed, weight("ffn_up")?)?; // [n_ids][ffn_dim]
        add(&mut x, &linear(&silu_times(&gate, &up), weight("ffn_down")?)?);
    }
    rms_norm(&x, model.tensor("output_norm.weight")?, config.norm_eps)
}

/// Natural log-probabilities of one row of logits.
pub fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln();
    logits.iter().map(|logit| logit - largest - log_sum).collect()
}

/// What the forward pass needs to know about the model.
struct Config {
    n_layers: u32,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    norm_eps: f64,
    /// Radians that pair `i` of a head turns per position.
    turns: Vec<f64>,
    /// How far apart the values of a pair are, and how far the pairs.
    pair_stride: (usize, usize),
}

impl Config {
    fn read(model: &Checkpoint) -> Result<Self> {
        let metadata = model.metadata();
        let architecture = metadata.str("general.architecture")?;
        ensure!(architecture == "llama", "the oracle knows llama, not {architecture}");
        let scaling = metadata.opt_str("llama.rope.scaling.type")?.unwrap_or("none");
        ensure!(scaling == "none", "the oracle knows rope_freqs.weight, not {scaling} scaling");

        let hidden_dim = metadata.u32("llama.embedding_length")?;
        let n_heads = metadata.u32("llama.attention.head_count")?;
        let head_dim = metadata.opt_u32("llama.attention.key_length")?.unwrap_or(hidden_dim / n_heads);
        Ok(Config {
            n_layers: metadata.u32("llama.block_count")?,
            n_heads: n_heads as usize,
            n_kv_heads: metadata.opt_u32("llama.attention.head_count_kv")?.unwrap_or(n_heads) as usize,
            head_dim: head_dim as usize,
            norm_eps: metadata.f32("llama.attention.layer_norm_rms_epsilon")?.into(),
            turns: turns(metadata, model.find("rope_freqs.weight"), head_dim)?,
            pair_stride: match metadata.opt_bool(ROPE_HALVES)? {
                Some(true) => (head_dim as usize / 2, 1),
                _ => (1, 2),
            },
        })
    }
}

/// The speed of each pair: base^(-2i / rope_dim), divided by its factor if the model has factors. Pairs beyond
/// `rope_dim` do not turn and are left out.
fn turns(metadata: &Metadata, factors: Option<Tensor<'_>>, head_dim: u32) -> Result<Vec<f64>> {
    let base: f64 = metadata.opt_f32("llama.rope.freq_base")?.unwrap_or(10_000.0).into();
    let rope_dim = metadata.opt_u32("llama.rope.dimension_count")?.unwrap_or(head_dim);
    let n_pairs = rope_dim as usize / 2;
    let factors = factors.map_or_else(|| Ok(vec![1.0; n_pairs]), values)?;
    ensure!(factors.len() == n_pairs, "{} rope factors for {n_pairs} pairs", factors.len());
    let speed = |i: usize| base.powf(-2.0 * i as f64 / f64::from(rope_dim));
    Ok(factors.iter().enumerate().map(|(i, factor)| speed(i) / factor).collect())
}

fn embed(table: Tensor<'_>, ids: &[u32]) -> Result<Rows> {
    let bytes = table.bytes()?;
    let row = |&id: &u32| {
        let id = id as usize;
        ensure!(id < table.n_rows(), "id {id} is outside the vocabulary of {}", table.n_rows());
        Ok(row_values(table, &bytes, id))
    };
    ids.iter().map(row).collect()
}

/// x / sqrt(mean(x²) + eps) * weight
fn rms_norm(x: &Rows, weight: Tensor<'_>, eps: f64) -> Result<Rows> {
    let weight = values(weight)?;
    let norm = |row: &Vec<f64>| {
        let scale = 1.0 / (dot(row, row) / row.len() as f64 + eps).sqrt();
        row.iter().zip(&weight).map(|(x, w)| x * scale * w).collect()
    };
    Ok(x.iter().map(norm).collect())
}

/// x · weightᵀ
fn linear(x: &Rows, weight: Tensor<'_>) -> Result<Rows> {
    let bytes = weight.bytes()?;
    let mut out = vec![vec![0.0; weight.n_rows()]; x.len()];
    for j in 0..weight.n_rows() {
        let weights = row_values(weight, &bytes, j);
        for (x, out) in x.iter().zip(&mut out) {
            out[j] = dot(x, &weights);
        }
    }
    Ok(out)
}

/// Turns each pair in each head by its position: neighbours, as GGUF stores Llama's q and k, or, as Hugging Face does, the
/// halves of the head against each other.
fn rotate(x: &mut Rows, config: &Config) {
    for (position, row) in x.iter_mut().enumerate() {
        for head in row.chunks_exact_mut(config.head_dim) {
            let (within, between) = config.pair_stride;
            for (pair, turn) in config.turns.iter().enumerate() {
                let (sin, cos) = (position as f64 * turn).sin_cos();
                let (a, b) = (pair * between, pair * between + within);
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
            }
        }
    }
}

/// softmax(q · kᵀ / sqrt(head_dim)) · v over the positions up to each row's own. Query heads share KV heads in
/// consecutive groups.
fn attend(q: &Rows, k: &Rows, v: &Rows, config: &Config) -> Rows {
    let head = |row: &[f64], head: usize| row[head * config.head_dim..][..config.head_dim].to_vec();
    let mut out = vec![Vec::new(); q.len()];
    for (position, out) in out.iter_mut().enumerate() {
        for q_head in 0..config.n_heads {
            let kv_head = q_head / (config.n_heads / config.n_kv_heads);
            let query = head(&q[position], q_head);
            let score = |key: &Vec<f64>| dot(&query, &head(key, kv_head)) / (config.head_dim as f64).sqrt();
            let scores: Vec<f64> = k[..=position].iter().map(score).collect();
            let mut mixed = vec![0.0; config.head_dim];
            for (log_weight, value) in log_softmax(&scores).into_iter().zip(v) {
                let weight = log_weight.exp();
                mixed.iter_mut().zip(head(value, kv_head)).for_each(|(mixed, value)| *mixed += weight * value);
            }
            out.extend(mixed);
        }
    }
    out
}

/// silu(gate) * up, where silu(z) = z / (1 + exp(-z))
fn silu_times(gate: &Rows, up: &Rows) -> Rows {
    let row = |(gate, up): (&Vec<f64>, &Vec<f64>)| {
        gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
    };
    gate.iter().zip(up).map(row).collect()
}

fn add(x: &mut Rows, y: &Rows) {
    x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
}

/// Eight running sums, since one alone would wait for each addition.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len(), "the widths of a layer's input and weights agree");
    let ((a_chunks, a_rest), (b_chunks, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        (0..8).for_each(|lane| sums[lane] += a[lane] * b[lane]);
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

fn row_values(tensor: Tensor<'_>, bytes: &[u8], row: usize) -> Vec<f64> {
    dequantize(tensor.encoding, &bytes[row * tensor.row_bytes()..][..tensor.row_bytes()])
}

fn values(tensor: Tensor<'_>) -> Result<Vec<f64>> {
    Ok(dequantize(tensor.encoding, &tensor.bytes()?))
}

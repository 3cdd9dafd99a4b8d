//! The plain twin of every op: scalar, sequential, short. It is the standard that the fast kernels are tested against,
//! bit for bit.
//!
//! Products read the file's encoding directly, so that the packed layout is under test as well.

use std::ops::Range;

use crate::cpu::activations::ActivationBlock;
use crate::cpu::attention::SPLIT;
use crate::exp::exp;
use crate::kv_cache::TILE;
use crate::packed::BLOCK;
use crate::quant::{self, Block, Format, dequantize};
use crate::segments::SegmentPlan;
use crate::{AttentionBatch, EncodedRows, KernelError, KvCache, NewTokens};

/// `out[plane, row, o] = Σ x[row, k] * weights[o, k]` over the K-segments of each subtree, as
/// [`PackedMatrix::pack`](crate::PackedMatrix::pack) and [`Cpu::matmul`](crate::Cpu::matmul) do it together.
///
/// # Errors
/// As `PackedMatrix::pack`.
///
/// # Panics
/// If a slice has another length.
pub fn matmul(
    weights: &EncodedRows<'_>,
    segments: &[usize],
    subtrees: &[Range<usize>],
    x: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    let format = Format::of(weights.encoding());
    let plan = SegmentPlan::new(segments, subtrees, weights.n_cols(), if format.is_some() { BLOCK } else { 1 })?;
    let (n_in, n_out) = (weights.n_cols(), weights.n_rows());
    let n_rows = x.len() / n_in;
    assert!(x.len() == n_rows * n_in && out.len() == plan.n_partials() * n_rows * n_out, "shapes of a product");
    for (row_idx, x) in x.chunks_exact(n_in).enumerate() {
        for out_idx in 0..n_out {
            let sum_segment = |cols: Range<usize>| match format {
                Some(format) => dot_quantized(weights, out_idx, format, x, cols),
                None => dot_floats(weights, out_idx, x, cols),
            };
            let store = |plane: usize, sum: f32| out[(plane * n_rows + row_idx) * n_out + out_idx] = sum;
            plan.sum(0.0, sum_segment, |a, b| a + b, store);
        }
    }
    Ok(())
}

/// The products of one K-segment with quantized weights.
fn dot_quantized(weights: &EncodedRows<'_>, out_idx: usize, format: Format, x: &[f32], cols: Range<usize>) -> f32 {
    let block_len = weights.encoding().block_len();
    let mut block = Block::default();
    let mut sum = 0.0f32;
    for start in cols.step_by(format.group_len) {
        let block_bytes = weights.encoding().block_bytes();
        let bytes = &weights.row(out_idx)[start / block_len * block_bytes..][..block_bytes];
        quant::decoder(weights.encoding())(bytes, &mut block);
        let in_block = start % block_len;
        let codes = &block.codes[in_block..in_block + format.group_len];
        let (activations, scale) = quantize_around(x, start);
        let activations = &activations[start % BLOCK..][..format.group_len];
        let product = |(code, a): (&u8, &i8)| i32::from(format.steps(*code)) * i32::from(*a);
        let dot: i32 = codes.iter().zip(activations).map(product).sum();
        let activation_sum: i32 = activations.iter().map(|a| i32::from(*a)).sum();
        sum = (block.group_scale(in_block / format.group_len) * scale).mul_add(dot as f32, sum);
        if format.has_minimum {
            let minimum = block.group_minimum(in_block / format.group_len);
            sum = minimum.mul_add(scale * activation_sum as f32, sum);
        }
    }
    sum
}

/// Codes and scale of the block of 32 activations that column `col` is in.
fn quantize_around(x: &[f32], col: usize) -> ([i8; BLOCK], f32) {
    let block = ActivationBlock::quantize(&x.as_chunks::<BLOCK>().0[col / BLOCK]);
    (block.codes(), block.scale)
}

/// The products of one K-segment with weights that are floats.
fn dot_floats(weights: &EncodedRows<'_>, out_idx: usize, x: &[f32], cols: Range<usize>) -> f32 {
    let mut row = vec![0.0; weights.n_cols()];
    dequantize(weights.encoding(), weights.row(out_idx), &mut row);
    sum_of_products(&row[cols.clone()], &x[cols])
}

/// `Σ a[i] * b[i]` in 16 lanes, added as a tree.
fn sum_of_products(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        lanes[i % 16] = a.mul_add(*b, lanes[i % 16]);
    }
    sum_lanes(lanes)
}

fn sum_lanes(lanes: [f32; 16]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let factor = 1.0 / (sum_of_products(x, x) / weight.len() as f32 + eps).sqrt();
        for i in 0..x.len() {
            out[i] = x[i] * factor * weight[i];
        }
    }
}

/// `out = gate / (1 + e^-gate) * up`.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// Turns keys to their positions and writes them with their values, token by token.
///
/// # Panics
/// As [`KvCache::write`], or if a position is not in the table.
pub fn write_kv(cache: &mut KvCache, tokens: &NewTokens<'_>, k: &[f32], v: &[f32]) {
    let (head_dim, width) = (cache.head_dim(), cache.n_kv_heads() * cache.head_dim());
    for (i, (slot, position)) in tokens.slots.iter().zip(tokens.positions).enumerate() {
        let mut k = k[i * width..(i + 1) * width].to_vec();
        k.chunks_exact_mut(head_dim).for_each(|head| tokens.rope.turn(head, *position as usize));
        cache.write(tokens.layer, *slot as usize, &k, &v[i * width..(i + 1) * width]);
    }
}

/// Causal attention, one query after another, each turned to its position first.
///
/// # Panics
/// If a slice has another length or a row points to what does not exist.
pub fn attention(q: &[f32], batch: &AttentionBatch<'_>, out: &mut [f32]) {
    let head_dim = batch.cache.head_dim();
    for (query_idx, (q, out)) in q.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)).enumerate() {
        attend(q, batch, query_idx / batch.n_heads, query_idx % batch.n_heads, out);
    }
}

/// One query: `q` and `out` are `[head_dim]`.
fn attend(q: &[f32], batch: &AttentionBatch<'_>, row_idx: usize, head: usize, out: &mut [f32]) {
    let AttentionBatch { cache, layer, rows, tables, n_heads, rope } = *batch;
    let (head_dim, block_size) = (cache.head_dim(), cache.block_size());
    let kv_head = head / (n_heads / cache.n_kv_heads());
    let position = rows[row_idx].position as usize;
    let mut q = q.to_vec();
    rope.turn(&mut q, position);
    let (mut largest, mut total) = (f32::NEG_INFINITY, [0.0f32; TILE]);
    let (mut k, mut v) = (vec![0.0; head_dim], vec![0.0; head_dim]);
    out.fill(0.0);
    for first in (0..=position).step_by(SPLIT) {
        let n = SPLIT.min(position + 1 - first);
        let read = |i: usize, k: &mut [f32], v: &mut [f32]| {
            let block = tables[rows[row_idx].table][(first + i) / block_size] as usize;
            cache.read_codes(layer, block * block_size + (first + i) % block_size, kv_head, k, v)
        };
        let mut weights = Vec::with_capacity(n);
        for i in 0..n {
            let [k_scale, _] = read(i, &mut k, &mut v);
            weights.push(score(&q, &k, k_scale));
        }
        let split_largest =
            weights.iter().fold(f32::NEG_INFINITY, |most, score| if *score > most { *score } else { most });
        weights.iter_mut().for_each(|weight| *weight = exp(*weight - split_largest));
        let (mut split_total, mut split_out) = ([0.0f32; TILE], vec![0.0f32; head_dim]);
        for (i, weight) in weights.iter().enumerate() {
            split_total[i % TILE] += weight;
            let [_, v_scale] = read(i, &mut k, &mut v);
            let weight = weight * v_scale;
            split_out.iter_mut().zip(&v).for_each(|(out, v)| *out = weight.mul_add(*v, *out));
        }
        let before = largest;
        largest = if split_largest > before { split_largest } else { before };
        let factor = |other: f32| if largest == other { 1.0 } else { exp(other - largest) };
        let (a, b) = (factor(before), factor(split_largest));
        total.iter_mut().zip(split_total).for_each(|(total, split)| *total = total.mul_add(a, split * b));
        out.iter_mut().zip(split_out).for_each(|(out, split)| *out = out.mul_add(a, split * b));
    }
    let total = sum_lanes(total);
    out.iter_mut().for_each(|out| *out /= total);
}

/// `q * k * k_scale / sqrt(head_dim)`.
fn score(q: &[f32], k: &[f32], k_scale: f32) -> f32 {
    let sum = q.iter().zip(k).fold(0.0f32, |sum, (q, k)| q.mul_add(*k, sum));
    sum * k_scale * (1.0 / (q.len() as f32).sqrt())
}

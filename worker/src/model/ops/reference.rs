//! The `reference` backend: the same graph on candle tensors, in f32, with eager attention. Short and obviously right,
//! on any device that candle has; the standard against which the fast backends are tested. It keeps weights
//! dequantized, so it needs four bytes a parameter, and it does not promise the lockstep rule. Keys and values stay f32,
//! but are rounded if the cache is to have them in 8 bits.

use std::ops::Range;

use candle_core::{D, Device, Tensor};
use lockstep_collectives::Collective;
use lockstep_kernels::{EncodedRows, KvCache, KvEncoding, RopeStyle, dequantize};

use super::{
    AttentionShape, Backend, KvShape, StepRun,
    cpu::embedded,
    exchange::{HostResults, gather_planes, hand_over},
};
use crate::model::{
    OpError, StepError,
    batch::{Batch, Rows},
    embedding::EmbeddingTable,
    output::StepOutput,
    shard::Reduction,
};

/// Candle on one device.
#[derive(Debug)]
pub struct ReferenceBackend {
    device: Device,
    shape: AttentionShape,
}

/// A rank's part of a weight, dequantized, and the columns of each partial sum.
#[derive(Debug)]
pub struct ReferenceMatrix {
    weight: Tensor,                        // [n_out, n_in]
    partials: Vec<std::ops::Range<usize>>, // columns
}

/// Keys and values, a tensor a layer: `[n_blocks * block_size, n_kv_heads, head_dim]`.
#[derive(Debug)]
pub struct ReferenceKv {
    block_size: usize,
    layers: Vec<(Tensor, Tensor)>,
    /// In int8, the slot that keys and values go through, so that they are rounded as those of the `cpu` backend are.
    rounding: Option<KvCache>,
}

impl ReferenceBackend {
    /// A backend on `device` for attention of one shape.
    pub fn new(device: Device, shape: AttentionShape) -> Self {
        Self { device, shape }
    }

    /// Keys or values of a sequence's first `n` positions: `[n_heads, n, head_dim]`, KV heads repeated for the query
    /// heads that share them.
    fn gather(&self, cache: &Tensor, slots: &Tensor) -> Result<Tensor, OpError> {
        let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = self.shape;
        let n = slots.dim(0)?;
        let rows = cache.index_select(slots, 0)?.transpose(0, 1)?; // [n_kv_heads, n, head_dim]
        let group = n_heads / n_kv_heads;
        Ok(rows.unsqueeze(1)?.repeat((1, group, 1, 1))?.reshape((n_heads, n, head_dim))?)
    }

    /// One row's attention: `q: [n_heads, 1, head_dim]` over positions `0..=position`.
    fn attend(
        &self,
        q: &Tensor,
        kv: &ReferenceKv,
        layer: usize,
        table: &[u32],
        position: u32,
    ) -> Result<Tensor, OpError> {
        let block_size = kv.block_size;
        let slots: Vec<u32> = (0..=position as usize)
            .map(|at| table[at / block_size] * block_size as u32 + (at % block_size) as u32)
            .collect();
        let slots = Tensor::from_slice(&slots, slots.len(), &self.device)?;
        let (keys, values) = &kv.layers[layer];
        let keys = self.gather(keys, &slots)?;
        let values = self.gather(values, &slots)?;
        let scores = (q.matmul(&keys.transpose(1, 2)?)? / (self.shape.head_dim as f64).sqrt())?; // [n_heads, 1, n]
        let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
        Ok(weights.contiguous()?.matmul(&values.contiguous()?)?) // [n_heads, 1, head_dim]
    }

    /// Cosines and sines of the rotation angles, `[n_rows, 1, rope_dim / 2]`.
    fn angles(&self, positions: &[u32]) -> Result<(Tensor, Tensor), OpError> {
        let rope = &self.shape.rope;
        let half = rope.rope_dim / 2;
        let angles: Vec<f64> = positions
            .iter()
            .flat_map(|&position| {
                (0..half).map(move |i| {
                    let frequency = f64::from(rope.base).powf(-2.0 * i as f64 / rope.rope_dim as f64);
                    let factor = rope.factors.as_ref().map_or(1.0, |factors| f64::from(factors[i]));
                    f64::from(position) * frequency / factor
                })
            })
            .collect();
        let table = |f: fn(f64) -> f64| -> Result<Tensor, OpError> {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle) as f32).collect();
            Ok(Tensor::from_vec(values, (positions.len(), 1, half), &self.device)?)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }

    /// Rotates heads by their rows' positions: `x: [n_rows, n_heads * head_dim]`.
    fn rope(&self, x: &Tensor, n_heads: usize, positions: &[u32]) -> Result<Tensor, OpError> {
        let AttentionShape { head_dim, ref rope, .. } = self.shape;
        let (n_rows, half) = (positions.len(), rope.rope_dim / 2);
        let (cos, sin) = self.angles(positions)?;
        let heads = x.reshape((n_rows, n_heads, head_dim))?;
        let rotated = heads.narrow(2, 0, rope.rope_dim)?;
        let (pairs, pair_dim) = match rope.style {
            RopeStyle::Adjacent => (rotated.reshape((n_rows, n_heads, half, 2))?, 3),
            RopeStyle::Halves => (rotated.reshape((n_rows, n_heads, 2, half))?, 2),
        };
        let a = pairs.narrow(pair_dim, 0, 1)?.squeeze(pair_dim)?; // [n_rows, n_heads, half]
        let b = pairs.narrow(pair_dim, 1, 1)?.squeeze(pair_dim)?;
        let new_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let new_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rotated = Tensor::stack(&[new_a, new_b], pair_dim)?.reshape((n_rows, n_heads, rope.rope_dim))?;
        let rest = heads.narrow(2, rope.rope_dim, head_dim - rope.rope_dim)?;
        Ok(Tensor::cat(&[rotated, rest], 2)?.reshape((n_rows, n_heads * head_dim))?)
    }
}

impl Backend for ReferenceBackend {
    type Tensor = Tensor;
    type Input = Tensor;
    type Terms = Tensor; // added up
    type Matrix = ReferenceMatrix;
    type Table = EmbeddingTable;
    type Logits = Vec<f32>;
    type Hidden = Vec<f32>;
    type Started = HostResults;
    type Kv = ReferenceKv;

    fn load_matrix(
        &mut self,
        source: &EncodedRows<'_>,
        reduction: Option<&Reduction>,
    ) -> Result<ReferenceMatrix, OpError> {
        let (n_out, n_in) = (source.n_rows(), source.n_cols());
        let mut values = vec![0.0; n_out * n_in];
        for (i, row) in values.chunks_exact_mut(n_in).enumerate() {
            dequantize(source.encoding(), source.row(i), row);
        }
        let partials = reduction.map_or_else(
            || std::iter::once(0..n_in).collect(),
            |reduction| {
                let start = |segment: usize| if segment == 0 { 0 } else { reduction.segment_ends[segment - 1] };
                reduction.local_subtrees.iter().map(|subtree| start(subtree.start)..start(subtree.end)).collect()
            },
        );
        Ok(ReferenceMatrix { weight: Tensor::from_vec(values, (n_out, n_in), &self.device)?, partials })
    }

    fn load_table(&mut self, table: EmbeddingTable) -> Result<EmbeddingTable, OpError> {
        Ok(table)
    }

    fn new_kv(&mut self, shape: KvShape) -> Result<ReferenceKv, OpError> {
        let AttentionShape { n_kv_heads, head_dim, .. } = self.shape;
        let n_slots = shape.n_blocks * shape.block_size;
        let empty = || Tensor::zeros((n_slots, n_kv_heads, head_dim), candle_core::DType::F32, &self.device);
        let layers = (0..shape.n_layers).map(|_| Ok((empty()?, empty()?))).collect::<candle_core::Result<_>>()?;
        let rounding = match shape.encoding {
            KvEncoding::F16 => None,
            encoding => Some(KvCache::new(1, 1, shape.block_size, n_kv_heads, head_dim, encoding)?),
        };
        Ok(ReferenceKv { block_size: shape.block_size, layers, rounding })
    }

    fn matrix_bytes(&self, matrix: &ReferenceMatrix) -> usize {
        matrix.weight.elem_count() * size_of::<f32>()
    }

    fn send_results(
        &mut self,
        _run: &mut StepRun<'_, ReferenceKv>,
        results: HostResults,
    ) -> Result<HostResults, StepError> {
        Ok(results)
    }

    fn finish_step(
        &mut self,
        results: HostResults,
        vocab: &[Range<usize>],
        collective: &mut dyn Collective,
        out: &mut StepOutput,
    ) -> Result<(), StepError> {
        hand_over(results, vocab, collective, out).map(|_| ())
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Tensor, OpError> {
        let n_rows = values.len() / width;
        Ok(Tensor::from_vec(values, (n_rows, width), &self.device)?)
    }

    fn embed(&mut self, table: &EmbeddingTable, batch: &Batch) -> Result<Tensor, OpError> {
        let (values, width) = embedded(table, batch)?;
        self.upload(values, width)
    }

    fn rms_norm(
        &mut self,
        x: &mut Tensor,
        terms: Option<Tensor>,
        weight: &Tensor,
        eps: f32,
    ) -> Result<Tensor, OpError> {
        if let Some(terms) = terms {
            *x = (&*x + terms)?;
        }
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let scale = (mean_square + f64::from(eps))?.sqrt()?.recip()?;
        Ok(x.broadcast_mul(&scale)?.broadcast_mul(weight)?)
    }

    fn matmul<const N: usize>(&mut self, weights: [&ReferenceMatrix; N], x: &Tensor) -> Result<[Tensor; N], OpError> {
        let products: Vec<Tensor> =
            weights.iter().map(|weight| x.matmul(&weight.weight.t()?)).collect::<candle_core::Result<_>>()?;
        Ok(products.try_into().expect("one product for each weight"))
    }

    fn logits(&mut self, weight: &ReferenceMatrix, x: &Tensor) -> Result<Vec<f32>, OpError> {
        to_vec(&x.matmul(&weight.weight.t()?)?)
    }

    fn matmul_reduce(
        &mut self,
        weight: &ReferenceMatrix,
        x: &Tensor,
        reduction: &Reduction,
        collective: &mut dyn Collective,
    ) -> Result<Tensor, StepError> {
        let partials = weight.partials.iter().map(|columns| {
            let x = x.narrow(1, columns.start, columns.len())?.contiguous()?;
            x.matmul(&weight.weight.narrow(1, columns.start, columns.len())?.contiguous()?.t()?)
        });
        let partials: Vec<Tensor> = partials.collect::<candle_core::Result<_>>().map_err(OpError::from)?;
        let (n_rows, n_out) = (x.dim(0).map_err(OpError::from)?, weight.weight.dim(0).map_err(OpError::from)?);
        let stacked = Tensor::stack(&partials, 0).map_err(OpError::from)?;
        let (mine, plane) = (to_vec(&stacked)?, n_rows * n_out);
        let mut planes = vec![0.0; reduction.order.n_planes() * plane];
        planes[reduction.partials(collective.rank()).start * plane..][..mine.len()].copy_from_slice(&mine);
        gather_planes(&mut planes, plane, reduction, collective)?;
        let mut sum = vec![0.0; plane];
        reduction.order.add(&planes, &mut sum);
        Ok(self.upload(sum, n_out)?)
    }

    fn gated(&mut self, gate: &ReferenceMatrix, up: &ReferenceMatrix, x: &Tensor) -> Result<Tensor, OpError> {
        let [gate, up] = self.matmul([gate, up], x)?;
        Ok((gate.silu()? * up)?)
    }

    fn write_kv(
        &mut self,
        kv: &mut ReferenceKv,
        layer: usize,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(), OpError> {
        let AttentionShape { n_kv_heads, head_dim, .. } = self.shape;
        let (mut k, mut v) = (self.rope(k, n_kv_heads, &batch.positions)?, v.clone());
        if let Some(slot) = &mut kv.rounding {
            (k, v) = round(slot, &k, &v)?;
        }
        let (keys, values) = &kv.layers[layer];
        for (row, &slot) in batch.slots.iter().enumerate() {
            let shape = (1, n_kv_heads, head_dim);
            keys.slice_set(&k.narrow(0, row, 1)?.reshape(shape)?.contiguous()?, 0, slot as usize)?;
            values.slice_set(&v.narrow(0, row, 1)?.reshape(shape)?.contiguous()?, 0, slot as usize)?;
        }
        Ok(())
    }

    fn attention(
        &mut self,
        q: Tensor,
        kv: &ReferenceKv,
        layer: usize,
        batch: &Batch,
        rows: Rows,
    ) -> Result<Tensor, OpError> {
        let AttentionShape { n_heads, head_dim, .. } = self.shape;
        let rows = batch.attention(rows);
        let positions: Vec<u32> = rows.iter().map(|row| row.position).collect();
        let q = self.rope(&q, n_heads, &positions)?;
        let rows = rows.iter().enumerate().map(|(i, row)| {
            let q = q.narrow(0, i, 1)?.reshape((n_heads, 1, head_dim))?;
            let table = &batch.block_tables[row.table];
            Ok(self.attend(&q, kv, layer, table, row.position)?.reshape((1, n_heads * head_dim))?)
        });
        Ok(Tensor::cat(&rows.collect::<Result<Vec<_>, OpError>>()?, 0)?)
    }

    fn result_rows(&mut self, x: Tensor, batch: &Batch) -> Result<Tensor, OpError> {
        let rows = &batch.result_rows[..];
        Ok(x.index_select(&Tensor::from_slice(rows, rows.len(), &self.device)?, 0)?)
    }

    fn take_hidden(&mut self, x: &mut Tensor, batch: &Batch, rank: usize) -> Result<Vec<f32>, OpError> {
        let hidden = x.narrow(0, batch.n_logits_rows, batch.n_hidden_rows())?;
        *x = x.narrow(0, 0, batch.n_logits_rows)?;
        if rank == 0 { to_vec(&hidden) } else { Ok(Vec::new()) }
    }
}

/// The values of a tensor of any shape.
fn to_vec(x: &Tensor) -> Result<Vec<f32>, OpError> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// Keys and values, `[n_rows, n_kv_heads * head_dim]` each, as they are once a cache has stored them.
fn round(cache: &mut KvCache, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor), OpError> {
    let shape = k.shape();
    let (mut keys, mut values) = (to_vec(k)?, to_vec(v)?);
    let (head_dim, width) = (cache.head_dim(), cache.n_kv_heads() * cache.head_dim());
    for (k, v) in keys.chunks_exact_mut(width).zip(values.chunks_exact_mut(width)) {
        cache.write(0, 0, k, v);
        for (head, (k, v)) in k.chunks_exact_mut(head_dim).zip(v.chunks_exact_mut(head_dim)).enumerate() {
            cache.read(0, 0, head, k, v);
        }
    }
    Ok((Tensor::from_vec(keys, shape, k.device())?, Tensor::from_vec(values, shape, v.device())?))
}

//! The `cpu` backend: our own kernels, which keep the lockstep rule.

use lockstep_collectives::Collective;
use lockstep_kernels::{AttentionBatch, Cpu, EncodedRows, KvCache, PackedMatrix, Product, RopeTable};

use super::{AttentionShape, Backend, KvShape, RopeSpec};
use crate::model::{OpError, StepError, batch::Batch, shard::Reduction};

/// Kernels on a pool of threads.
#[derive(Debug)]
pub struct CpuBackend {
    cpu: Cpu,
    shape: AttentionShape,
    rope: RopeTable,
}

/// `[n_rows, width]`, row by row.
#[derive(Debug)]
pub struct CpuTensor {
    values: Vec<f32>,
    width: usize,
}

impl CpuTensor {
    fn new(n_rows: usize, width: usize) -> Self {
        Self { values: vec![0.0; n_rows * width], width }
    }

    fn n_rows(&self) -> usize {
        self.values.len() / self.width
    }
}

impl CpuBackend {
    /// A backend on `cpu` for attention of one shape.
    ///
    /// # Errors
    /// What [`RopeTable::new`] refuses.
    pub fn new(cpu: Cpu, shape: AttentionShape) -> Result<Self, OpError> {
        let RopeSpec { rope_dim, base, ref factors, n_positions, style } = shape.rope;
        let rope = RopeTable::new(shape.head_dim, rope_dim, base, factors.as_deref(), n_positions, style)?;
        Ok(Self { cpu, shape, rope })
    }
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Matrix = PackedMatrix;
    type Kv = KvCache;

    fn load_matrix(
        &mut self,
        source: &EncodedRows<'_>,
        reduction: Option<&Reduction>,
    ) -> Result<PackedMatrix, OpError> {
        let packed = match reduction {
            None => PackedMatrix::pack_whole(source),
            Some(reduction) => PackedMatrix::pack(source, &reduction.segment_ends, &reduction.local_subtrees),
        };
        Ok(packed?)
    }

    fn new_kv(&mut self, shape: KvShape) -> Result<KvCache, OpError> {
        let AttentionShape { n_kv_heads, head_dim, .. } = self.shape;
        Ok(KvCache::new(shape.n_layers, shape.n_blocks, shape.block_size, n_kv_heads, head_dim)?)
    }

    fn matrix_bytes(&self, matrix: &PackedMatrix) -> usize {
        matrix.size_bytes()
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<CpuTensor, OpError> {
        Ok(CpuTensor { values, width })
    }

    fn download(&mut self, x: CpuTensor) -> Result<Vec<f32>, OpError> {
        Ok(x.values)
    }

    fn rms_norm(&mut self, x: &CpuTensor, weight: &CpuTensor, eps: f32) -> Result<CpuTensor, OpError> {
        let mut out = CpuTensor::new(x.n_rows(), x.width);
        self.cpu.rms_norm(&x.values, &weight.values, eps, x.n_rows(), &mut out.values);
        Ok(out)
    }

    fn matmul<const N: usize>(
        &mut self,
        weights: [&PackedMatrix; N],
        x: &CpuTensor,
    ) -> Result<[CpuTensor; N], OpError> {
        let mut outputs = weights.map(|weight| CpuTensor::new(x.n_rows(), weight.n_out()));
        let mut products =
            weights.into_iter().zip(&mut outputs).map(|(weights, out)| Product { weights, out: &mut out.values });
        let mut products: [Product<'_>; N] = std::array::from_fn(|_| products.next().expect("one for each weight"));
        self.cpu.matmul_many(&x.values, x.n_rows(), &mut products);
        Ok(outputs)
    }

    fn matmul_reduce(
        &mut self,
        weight: &PackedMatrix,
        x: &CpuTensor,
        reduction: &Reduction,
        collective: &mut dyn Collective,
    ) -> Result<CpuTensor, StepError> {
        let plane = x.n_rows() * weight.n_out();
        let mut partials = vec![0.0; weight.n_partials() * plane];
        self.cpu.matmul(weight, &x.values, x.n_rows(), &mut partials);
        let values = reduce(partials, plane, reduction, collective)?;
        Ok(CpuTensor { values, width: weight.n_out() })
    }

    fn add(&mut self, acc: &mut CpuTensor, x: &CpuTensor) -> Result<(), OpError> {
        self.cpu.add(&x.values, &mut acc.values);
        Ok(())
    }

    fn rope(&mut self, x: &mut CpuTensor, n_heads: usize, positions: &[u32]) -> Result<(), OpError> {
        self.cpu.rope(&mut x.values, n_heads, &self.rope, positions);
        Ok(())
    }

    fn write_kv(
        &mut self,
        kv: &mut KvCache,
        layer: usize,
        slots: &[u32],
        k: &CpuTensor,
        v: &CpuTensor,
    ) -> Result<(), OpError> {
        self.cpu.write_kv(kv, layer, slots, &k.values, &v.values);
        Ok(())
    }

    fn attention(&mut self, q: &CpuTensor, kv: &KvCache, layer: usize, batch: &Batch) -> Result<CpuTensor, OpError> {
        let tables: Vec<&[u32]> = batch.block_tables.iter().map(Vec::as_slice).collect();
        let mut out = CpuTensor::new(q.n_rows(), q.width);
        let n_heads = self.shape.n_heads;
        let rows = AttentionBatch { cache: kv, layer, rows: &batch.attention, tables: &tables, n_heads };
        self.cpu.attention(&q.values, &rows, &mut out.values);
        Ok(out)
    }

    fn silu_mul(&mut self, gate: CpuTensor, up: &CpuTensor) -> Result<CpuTensor, OpError> {
        let mut out = CpuTensor::new(gate.n_rows(), gate.width);
        self.cpu.silu_mul(&gate.values, &up.values, &mut out.values);
        Ok(out)
    }

    fn select_rows(&mut self, x: CpuTensor, rows: &[u32]) -> Result<CpuTensor, OpError> {
        let mut values = Vec::with_capacity(rows.len() * x.width);
        for &row in rows {
            let start = row as usize * x.width;
            values.extend_from_slice(&x.values[start..start + x.width]);
        }
        Ok(CpuTensor { values, width: x.width })
    }
}

/// Gathers every rank's partial planes and finishes the tree: `[n]`, the same bits on every rank.
pub(super) fn reduce(
    mut partials: Vec<f32>,
    plane: usize,
    reduction: &Reduction,
    collective: &mut dyn Collective,
) -> Result<Vec<f32>, StepError> {
    let world_size = collective.world_size();
    if world_size > 1 {
        let lengths: Vec<usize> = (0..world_size).map(|rank| reduction.n_partials(rank) * plane).collect();
        let mut gathered = vec![0.0; lengths.iter().sum()];
        collective.all_gather(&partials, &lengths, &mut gathered)?;
        partials = gathered;
    }
    let subtrees = reduction.subtrees.concat();
    if subtrees.len() == 1 {
        return Ok(partials);
    }
    let mut sum = vec![0.0; plane];
    reduction.tree.combine(&subtrees, &mut partials, &mut sum);
    Ok(sum)
}

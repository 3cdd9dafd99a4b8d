//! The `cpu` backend: our own kernels, which keep the lockstep rule.

use std::ops::Range;

use lockstep_collectives::Collective;
use lockstep_kernels::{
    Activations, AttentionBatch, Cpu, EncodedRows, Forms, KvCache, NewTokens, PackedMatrix, Product, RopeTable,
    SumOrder, Terms,
};

use super::{
    AttentionShape, Backend, KvShape, RopeSpec, StepRun,
    exchange::{HostResults, gather_planes, hand_over},
    recycled::{Home, Recycled},
};
use crate::model::{
    OpError, StepError,
    batch::{Batch, Rows},
    embedding::EmbeddingTable,
    output::StepOutput,
    shard::Reduction,
};

/// Kernels on a pool of threads, and the memory that steps use in turn.
#[derive(Debug)]
pub struct CpuBackend {
    cpu: Cpu,
    shape: AttentionShape,
    rope: RopeTable,
    /// The forms of inputs that the weights loaded so far read.
    forms: Option<Forms>,
    values: Home<Vec<f32>>,
    inputs: Home<Activations>,
    /// Room for logits, while the last step's are at whoever wanted them.
    logits: Vec<f32>,
}

/// `[n_rows, width]`, row by row.
#[derive(Debug)]
pub struct CpuTensor {
    values: Recycled<Vec<f32>>,
    width: usize,
}

/// `[n_planes, n_rows, n_out]`, and the order in which planes are added.
#[derive(Debug)]
pub struct CpuTerms {
    planes: Recycled<Vec<f32>>,
    order: SumOrder,
}

impl CpuTensor {
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
        Ok(Self { cpu, shape, rope, forms: None, values: Home::default(), inputs: Home::default(), logits: Vec::new() })
    }

    /// Memory for values that will all be written; what it holds is left from earlier.
    fn values(&self, len: usize) -> Recycled<Vec<f32>> {
        let mut values = self.values.take(Vec::new);
        values.resize(len, 0.0);
        values
    }

    fn tensor(&self, n_rows: usize, width: usize) -> CpuTensor {
        CpuTensor { values: self.values(n_rows * width), width }
    }

    /// Inputs are to be made in the form that `weights` read, too.
    fn note_forms(&mut self, weights: &PackedMatrix) {
        let forms = Forms::of(weights);
        self.forms = Some(self.forms.map_or(forms, |known| known.and(forms)));
    }

    fn input(&self) -> Recycled<Activations> {
        let forms = self.forms.unwrap_or(Forms::Floats);
        self.inputs.take(|| Activations::new(forms))
    }
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Input = Recycled<Activations>;
    type Terms = CpuTerms;
    type Matrix = PackedMatrix;
    type Table = EmbeddingTable;
    type Logits = Vec<f32>;
    type Hidden = Vec<f32>;
    type Started = HostResults;
    type Kv = KvCache;

    fn load_matrix(
        &mut self,
        source: &EncodedRows<'_>,
        reduction: Option<&Reduction>,
    ) -> Result<PackedMatrix, OpError> {
        let packed = match reduction {
            None => PackedMatrix::pack_whole(source)?,
            Some(reduction) => PackedMatrix::pack(source, &reduction.segment_ends, &reduction.local_subtrees)?,
        };
        self.note_forms(&packed);
        Ok(packed)
    }

    fn load_gated(&mut self, sources: [&EncodedRows<'_>; 2]) -> Result<[PackedMatrix; 2], OpError> {
        let packed = PackedMatrix::pack_pair(sources)?;
        packed.iter().for_each(|packed| self.note_forms(packed));
        Ok(packed)
    }

    fn load_table(&mut self, table: EmbeddingTable) -> Result<EmbeddingTable, OpError> {
        Ok(table)
    }

    fn new_kv(&mut self, shape: KvShape) -> Result<KvCache, OpError> {
        let AttentionShape { n_kv_heads, head_dim, .. } = self.shape;
        let KvShape { n_layers, n_blocks, block_size, encoding } = shape;
        Ok(KvCache::new(n_layers, n_blocks, block_size, n_kv_heads, head_dim, encoding)?)
    }

    fn matrix_bytes(&self, matrix: &PackedMatrix) -> usize {
        matrix.size_bytes()
    }

    fn send_results(
        &mut self,
        _run: &mut StepRun<'_, KvCache>,
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
        if let Some(room) = hand_over(results, vocab, collective, out)? {
            self.logits = room;
        }
        Ok(())
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<CpuTensor, OpError> {
        Ok(CpuTensor { values: self.values.adopt(values), width })
    }

    fn embed(&mut self, table: &EmbeddingTable, batch: &Batch) -> Result<CpuTensor, OpError> {
        let (values, width) = embedded(table, batch)?;
        self.upload(values, width)
    }

    fn rms_norm(
        &mut self,
        x: &mut CpuTensor,
        terms: Option<CpuTerms>,
        weight: &CpuTensor,
        eps: f32,
    ) -> Result<Recycled<Activations>, OpError> {
        let mut out = self.input();
        let terms = terms.as_ref().map(|terms| Terms { planes: &terms.planes, order: &terms.order });
        self.cpu.rms_norm(&mut x.values, terms, &weight.values, eps, &mut out);
        Ok(out)
    }

    fn matmul<const N: usize>(
        &mut self,
        weights: [&PackedMatrix; N],
        x: &Recycled<Activations>,
    ) -> Result<[CpuTensor; N], OpError> {
        let mut outputs = weights.map(|weight| self.tensor(x.n_rows(), weight.n_out()));
        let mut products =
            weights.into_iter().zip(&mut outputs).map(|(weights, out)| Product { weights, out: &mut out.values });
        let mut products: [Product<'_>; N] = std::array::from_fn(|_| products.next().expect("one for each weight"));
        self.cpu.matmul_many(x, &mut products);
        Ok(outputs)
    }

    fn logits(&mut self, weight: &PackedMatrix, x: &Recycled<Activations>) -> Result<Vec<f32>, OpError> {
        let mut logits = std::mem::take(&mut self.logits);
        logits.resize(x.n_rows() * weight.n_out(), 0.0);
        self.cpu.matmul(weight, x, &mut logits);
        Ok(logits)
    }

    fn matmul_reduce(
        &mut self,
        weight: &PackedMatrix,
        x: &Recycled<Activations>,
        reduction: &Reduction,
        collective: &mut dyn Collective,
    ) -> Result<CpuTerms, StepError> {
        let plane = x.n_rows() * weight.n_out();
        let mut planes = self.values(reduction.order.n_planes() * plane);
        let mine = reduction.partials(collective.rank());
        self.cpu.matmul(weight, x, &mut planes[mine.start * plane..mine.end * plane]);
        gather_planes(&mut planes, plane, reduction, collective)?;
        Ok(CpuTerms { planes, order: reduction.order.clone() })
    }

    fn gated(
        &mut self,
        gate: &PackedMatrix,
        up: &PackedMatrix,
        x: &Recycled<Activations>,
    ) -> Result<Recycled<Activations>, OpError> {
        let mut out = self.input();
        self.cpu.gated(gate, up, x, &mut out);
        Ok(out)
    }

    fn write_kv(
        &mut self,
        kv: &mut KvCache,
        layer: usize,
        batch: &Batch,
        k: &CpuTensor,
        v: &CpuTensor,
    ) -> Result<(), OpError> {
        let tokens = NewTokens { layer, slots: &batch.slots, positions: &batch.positions, rope: &self.rope };
        self.cpu.write_kv(kv, &tokens, &k.values, &v.values);
        Ok(())
    }

    fn attention(
        &mut self,
        mut q: CpuTensor,
        kv: &KvCache,
        layer: usize,
        batch: &Batch,
        rows: Rows,
    ) -> Result<Recycled<Activations>, OpError> {
        let (mut mixed, mut out) = (self.tensor(q.n_rows(), q.width), self.input());
        let batch = AttentionBatch {
            cache: kv,
            layer,
            rows: batch.attention(rows),
            tables: &batch.block_tables,
            n_heads: self.shape.n_heads,
            rope: &self.rope,
        };
        self.cpu.attention(&mut q.values, &batch, &mut mixed.values);
        self.cpu.quantize(&mixed.values, mixed.width, &mut out);
        Ok(out)
    }

    fn result_rows(&mut self, x: CpuTensor, batch: &Batch) -> Result<CpuTensor, OpError> {
        let rows = &batch.result_rows;
        let mut selected = self.tensor(rows.len(), x.width);
        for (&row, out) in rows.iter().zip(selected.values.chunks_exact_mut(x.width)) {
            out.copy_from_slice(&x.values[row as usize * x.width..][..x.width]);
        }
        Ok(selected)
    }

    fn take_hidden(&mut self, x: &mut CpuTensor, batch: &Batch, rank: usize) -> Result<Vec<f32>, OpError> {
        let hidden = x.values.split_off(batch.n_logits_rows * x.width);
        Ok(if rank == 0 { hidden } else { Vec::new() })
    }
}

/// The embedded tokens of a batch, and their width.
pub(super) fn embedded(table: &EmbeddingTable, batch: &Batch) -> Result<(Vec<f32>, usize), OpError> {
    let token_ids = batch.token_ids().ok_or(OpError::TokensUnknown)?;
    Ok((table.rows(token_ids.into_iter())?, table.hidden_dim()))
}

//! The `cuda` backend: our own kernels on one GPU. It keeps the lockstep rule, in an order of its own: its bits are not
//! those of the `cpu` backend.

use std::collections::HashMap;

use lockstep_collectives::Collective;
use lockstep_kernels::{
    EncodedRows, RopeTable,
    cuda::{
        Device, Gpu, GpuHeads, GpuInput, GpuKvCache, GpuMatrix, GpuStep, GpuTensor, GpuTerms, Recording, RowChoice,
        RowParallelSum, StepRows, StepShape,
    },
};

use super::{AttentionShape, Backend, KvShape, RopeSpec, StepRun, cpu::gather};
use crate::model::{
    OpError, StepError,
    batch::{Batch, Rows},
    shard::Reduction,
};

/// Shapes of steps that are kept as recordings, each some MiB of the device at most.
const MAX_RECORDINGS: usize = 64;

/// A GPU, and the step that is on it.
#[derive(Debug)]
pub struct CudaBackend {
    // Recordings go before what they point to.
    recordings: HashMap<StepShape, Option<Recording>>,
    gpu: Gpu,
    step: Option<GpuStep>,
    /// Whether logits stay on the device, for whoever runs the step to bring them to the host.
    keeps_logits: bool,
    kept_logits: Option<GpuTensor>,
    /// Planes on their way to other ranks.
    planes: Vec<f32>,
}

impl CudaBackend {
    /// A backend on `device` for attention of one shape.
    ///
    /// # Errors
    /// What [`RopeTable::new`] and [`Gpu::new`] refuse.
    pub fn new(device: Device, shape: &AttentionShape) -> Result<Self, OpError> {
        let AttentionShape { n_heads, n_kv_heads, head_dim, ref rope } = *shape;
        let RopeSpec { rope_dim, base, ref factors, n_positions, style } = *rope;
        let rope = RopeTable::new(head_dim, rope_dim, base, factors.as_deref(), n_positions, style)?;
        let gpu = Gpu::new(device, GpuHeads { n_heads, n_kv_heads, head_dim }, &rope)?;
        Ok(Self {
            recordings: HashMap::new(),
            gpu,
            step: None,
            keeps_logits: false,
            kept_logits: None,
            planes: Vec::new(),
        })
    }

    fn step(&self) -> &GpuStep {
        self.step.as_ref().expect("the forward pass begins with `begin`")
    }

    fn begin_shaped(&mut self, run: &StepRun<'_, GpuKvCache>, shape: StepShape) -> Result<(), OpError> {
        self.step = Some(self.gpu.begin(&rows_of(run.batch), run.kv, Some(shape))?);
        Ok(())
    }

    /// A step as it comes. Between devices, what is queued may wait for a rank that is gone: then the group's own wait ends,
    /// and no other, so nothing may wait for the device before it.
    fn run_unrecorded(
        &mut self,
        run: &mut StepRun<'_, GpuKvCache>,
        x: GpuTensor,
        forward: impl Fn(&mut Self, &mut StepRun<'_, GpuKvCache>, GpuTensor) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        self.kept_logits = None;
        self.keeps_logits = run.collective.device().is_some();
        let queued = forward(self, run, x);
        self.keeps_logits = false;
        queued?;
        if let Some(mut device) = run.collective.device() {
            device.wait()?;
        }
        if let Some(logits) = self.kept_logits.take() {
            self.gpu.download(&logits, run.logits)?;
        }
        Ok(())
    }

    /// Records the step that was just computed, if its shape has come before.
    fn record(
        &mut self,
        shape: StepShape,
        embedded: &[f32],
        width: usize,
        run: &mut StepRun<'_, GpuKvCache>,
        forward: impl Fn(&mut Self, &mut StepRun<'_, GpuKvCache>, GpuTensor) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        if !self.recordings.contains_key(&shape) {
            if self.recordings.len() >= MAX_RECORDINGS {
                self.recordings.clear();
            }
            self.recordings.insert(shape, None);
            return Ok(());
        }
        let x = self.gpu.upload_padded(embedded, width, shape.n_rows())?;
        let device = self.gpu.device().clone();
        self.keeps_logits = true;
        let recording = Recording::new(&device, shape, x, |x| {
            forward(self, run, x)?;
            let logits = self.kept_logits.take().expect("the forward pass ends with logits");
            Ok::<_, StepError>((logits, self.step.take().expect("the step that was computed")))
        });
        self.keeps_logits = false;
        self.recordings.insert(shape, Some(recording?));
        Ok(())
    }
}

fn rows_of(batch: &Batch) -> StepRows<'_> {
    StepRows {
        slots: &batch.slots,
        rows: &batch.attention,
        logits_rows: &batch.logits_rows,
        logits_attention: &batch.logits_attention,
        tables: &batch.block_tables,
    }
}

impl Backend for CudaBackend {
    type Tensor = GpuTensor;
    type Input = GpuInput;
    type Terms = GpuTerms;
    type Matrix = GpuMatrix;
    type Kv = GpuKvCache;

    fn load_matrix(&mut self, source: &EncodedRows<'_>, reduction: Option<&Reduction>) -> Result<GpuMatrix, OpError> {
        let sum = reduction.map(|reduction| RowParallelSum {
            segment_ends: &reduction.segment_ends,
            subtrees: &reduction.local_subtrees,
            order: &reduction.order,
        });
        Ok(self.gpu.load_matrix(source, sum)?)
    }

    fn load_gated(&mut self, sources: [&EncodedRows<'_>; 2]) -> Result<[GpuMatrix; 2], OpError> {
        Ok(self.gpu.load_gated(sources)?)
    }

    fn new_kv(&mut self, shape: KvShape) -> Result<GpuKvCache, OpError> {
        let KvShape { n_layers, n_blocks, block_size, encoding } = shape;
        Ok(self.gpu.new_kv(n_layers, n_blocks, block_size, encoding)?)
    }

    fn matrix_bytes(&self, matrix: &GpuMatrix) -> usize {
        matrix.size_bytes()
    }

    fn begin(&mut self, kv: &GpuKvCache, batch: &Batch) -> Result<(), OpError> {
        self.step = Some(self.gpu.begin(&rows_of(batch), kv, None)?);
        Ok(())
    }

    /// A step without prompts is computed filled up to one of a few shapes. When a shape comes for the second time it is
    /// recorded, and from then on replayed. Where other ranks are reached through the host, nothing can be recorded.
    fn run_step(
        &mut self,
        embedded: Vec<f32>,
        width: usize,
        mut run: StepRun<'_, GpuKvCache>,
        forward: impl Fn(&mut Self, &mut StepRun<'_, GpuKvCache>, GpuTensor) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        let rows = rows_of(run.batch);
        let shape = StepShape::of(&rows).filter(|_| run.collective.world_size() == 1);
        let Some(shape) = shape else {
            self.begin(run.kv, run.batch)?;
            let x = self.upload(embedded, width)?;
            return self.run_unrecorded(&mut run, x, forward);
        };
        let n_rows = run.batch.n_rows();
        if let Some(Some(recording)) = self.recordings.get_mut(&shape) {
            let logits = self.gpu.replay(recording, &rows, run.kv, &embedded)?;
            self.gpu.download_rows(logits, n_rows, run.logits)?;
            return Ok(());
        }
        self.begin_shaped(&run, shape)?;
        let x = self.gpu.upload_padded(&embedded, width, shape.n_rows())?;
        forward(self, &mut run, x)?;
        run.logits.truncate(run.logits.len() / shape.n_rows() * n_rows);
        self.record(shape, &embedded, width, &mut run, forward)
    }

    fn wait(&mut self) -> Result<(), OpError> {
        Ok(self.gpu.device().synchronize()?)
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<GpuTensor, OpError> {
        Ok(self.gpu.upload(&values, width)?)
    }

    fn rms_norm(
        &mut self,
        x: &mut GpuTensor,
        terms: Option<GpuTerms>,
        weight: &GpuTensor,
        eps: f32,
    ) -> Result<GpuInput, OpError> {
        Ok(self.gpu.rms_norm(x, terms.as_ref(), weight, eps)?)
    }

    fn matmul<const N: usize>(&mut self, weights: [&GpuMatrix; N], x: &GpuInput) -> Result<[GpuTensor; N], OpError> {
        Ok(self.gpu.matmul(weights, x)?)
    }

    fn logits(&mut self, weight: &GpuMatrix, x: &GpuInput, out: &mut Vec<f32>) -> Result<(), OpError> {
        let [logits] = self.gpu.matmul([weight], x)?;
        if self.keeps_logits {
            self.kept_logits = Some(logits);
            return Ok(());
        }
        Ok(self.gpu.download(&logits, out)?)
    }

    fn matmul_reduce(
        &mut self,
        weight: &GpuMatrix,
        x: &GpuInput,
        reduction: &Reduction,
        collective: &mut dyn Collective,
    ) -> Result<GpuTerms, StepError> {
        let first = reduction.partials(collective.rank()).start;
        let mut terms = self.gpu.matmul_partial(weight, x, first)?;
        if let Some(mut device) = collective.device() {
            device.all_gather(&reduction.lengths(terms.plane_len()), terms.collective_slice_mut())?;
        } else if collective.world_size() > 1 {
            terms.download(&mut self.planes)?;
            gather(&mut self.planes, terms.plane_len(), reduction, collective)?;
            terms.upload(&self.planes)?;
        }
        Ok(terms)
    }

    fn gated(&mut self, gate: &GpuMatrix, up: &GpuMatrix, x: &GpuInput) -> Result<GpuInput, OpError> {
        Ok(self.gpu.gated(gate, up, x)?)
    }

    fn write_kv(
        &mut self,
        kv: &mut GpuKvCache,
        layer: usize,
        _batch: &Batch,
        k: &GpuTensor,
        v: &GpuTensor,
    ) -> Result<(), OpError> {
        Ok(self.gpu.write_kv(kv, layer, self.step(), k, v)?)
    }

    fn attention(
        &mut self,
        q: GpuTensor,
        kv: &GpuKvCache,
        layer: usize,
        _batch: &Batch,
        rows: Rows,
    ) -> Result<GpuInput, OpError> {
        let choice = match rows {
            Rows::All => RowChoice::All,
            Rows::Logits => RowChoice::Logits,
        };
        Ok(self.gpu.attention(&q, kv, layer, self.step(), choice)?)
    }

    fn logits_rows(&mut self, x: GpuTensor, _batch: &Batch) -> Result<GpuTensor, OpError> {
        Ok(self.gpu.select_rows(&x, self.step())?)
    }
}

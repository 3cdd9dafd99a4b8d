//! The `cuda` backend: our own kernels on one GPU. It keeps the lockstep rule, in an order of its own: its bits are not
//! those of the `cpu` backend.
//!
//! A step is queued and not waited for, so that the next one can be queued behind it. Where other ranks are reached
//! through the host, it waits for its own sums in between.

use std::{collections::HashMap, ops::Range, slice};

use lockstep_collectives::{Collective, CollectiveError, device::Captured};
use lockstep_kernels::{
    EncodedRows, RopeTable, SumTree,
    cuda::{
        Answer, CHOSEN, CudaError, Device, Gpu, GpuHeads, GpuInput, GpuKvCache, GpuMatrix, GpuStep, GpuTable,
        GpuTensor, GpuTerms, GpuVocab, Recording, RowChoice, RowParallelSum, StepRows, StepShape,
    },
};
use tracing::warn;

use super::{
    AttentionShape, Backend, KvShape, RopeSpec, StepResults, StepRun,
    exchange::{gather_logits, gather_planes},
};
use crate::model::{
    OpError, StepError,
    batch::{Batch, Rows, Token},
    embedding::EmbeddingTable,
    output::StepOutput,
    shard::Reduction,
};

/// Shapes of steps that are kept as recordings, each some MiB of the device at most.
const MAX_RECORDINGS: usize = 64;

/// A GPU, and the step that is on it.
#[derive(Debug)]
pub struct CudaBackend {
    // Recordings go before what they point to.
    recordings: HashMap<StepShape, Recorded>,
    gpu: Gpu,
    /// Whether sums over ranks are added in the order of their tree.
    deterministic: bool,
    step: Option<GpuStep>,
    vocab: Option<GpuVocab>,
    /// Whether the driver makes recordings.
    records: bool,
    /// Steps that were started.
    n_steps: u64,
    /// Planes on their way to other ranks.
    planes: Vec<f32>,
}

/// What is known of steps of one shape.
#[derive(Debug)]
struct Recorded {
    /// There from the second such step on.
    recording: Option<Recording>,
    /// Calls between devices that are part of it, in the epoch in which it was made.
    calls: Option<Captured>,
    /// The number of the step that was the last of its shape.
    last_step: u64,
}

/// Where the logits of a step are.
#[derive(Clone, Copy)]
enum Logits<'a> {
    Computed(&'a GpuTensor),
    Recorded(&'a Recording),
}

/// What a step gives on the device, and what of it is queued.
type CudaResults = StepResults<GpuTensor, Option<Answer<f32>>>;

/// What a step brings to the host when it is done.
#[derive(Debug)]
pub struct CudaStarted {
    /// Queued before the choice, on rank 0.
    hidden: Option<Answer<f32>>,
    choice: Choice,
}

/// From what tokens are chosen, or the tokens: the last that a step brings.
#[derive(Debug)]
enum Choice {
    /// The tokens that were chosen, if any were.
    Tokens(Answer<u32>),
    /// Logits: of all ranks if they were gathered between devices, otherwise this rank's.
    Logits(Answer<f32>),
}

impl CudaBackend {
    /// A backend on `device` for attention of one shape. If it is not `deterministic`, its sums over ranks are added in
    /// whichever order is the fastest.
    ///
    /// # Errors
    /// What [`RopeTable::new`] and [`Gpu::new`] refuse.
    pub fn new(device: Device, shape: &AttentionShape, deterministic: bool) -> Result<Self, OpError> {
        let AttentionShape { n_heads, n_kv_heads, head_dim, ref rope } = *shape;
        let RopeSpec { rope_dim, base, ref factors, n_positions, style } = *rope;
        let rope = RopeTable::new(head_dim, rope_dim, base, factors.as_deref(), n_positions, style)?;
        let mut gpu = Gpu::new(device, GpuHeads { n_heads, n_kv_heads, head_dim }, &rope)?;
        if !deterministic {
            gpu = gpu.with_dense_prompts()?;
        }
        Ok(Self {
            recordings: HashMap::new(),
            gpu,
            deterministic,
            step: None,
            vocab: None,
            records: true,
            n_steps: 0,
            planes: Vec::new(),
        })
    }

    /// Adds the sums of all ranks up, a plane of each, in an order that depends on the group.
    fn all_reduce(&mut self, terms: &mut GpuTerms, collective: &mut dyn Collective) -> Result<(), StepError> {
        let (rank, world_size, plane) = (collective.rank(), collective.world_size(), terms.plane_len());
        if let Some(mut device) = collective.device() {
            return Ok(device.all_reduce(terms.collective_slice_mut())?);
        }
        if world_size == 1 {
            return Ok(());
        }
        terms.download(&mut self.planes)?; // [1, plane]
        let mut all = vec![0.0; world_size * plane];
        all[rank * plane..][..plane].copy_from_slice(&self.planes);
        collective.all_gather(&vec![plane; world_size], &mut all)?;
        self.planes.fill(0.0);
        for (i, term) in all.iter().enumerate() {
            self.planes[i % plane] += term;
        }
        Ok(terms.upload(&self.planes)?)
    }

    fn step(&self) -> &GpuStep {
        self.step.as_ref().expect("the forward pass begins with `begin`")
    }

    /// Records the step that was just computed, if its shape has come before.
    fn record(
        &mut self,
        shape: StepShape,
        run: &mut StepRun<'_, GpuKvCache>,
        forward: impl Fn(&mut Self, &mut StepRun<'_, GpuKvCache>) -> Result<CudaResults, StepError>,
    ) -> Result<(), StepError> {
        if !self.recordings.contains_key(&shape) {
            self.forget_a_recording();
            self.recordings.insert(shape, Recorded { recording: None, calls: None, last_step: self.n_steps });
            return Ok(());
        }
        let device = self.gpu.device().clone();
        if let Some(mut device) = run.collective.device() {
            device.begin_capture();
        }
        let recording = Recording::new(&device, shape, || {
            let logits = forward(self, run)?.logits.expect("all rows of a step that has a shape give logits");
            let logits = self.conclude(run, logits)?;
            Ok::<_, StepError>((logits, self.step.take().expect("the step that was computed")))
        });
        let recording = match recording {
            // Between devices all ranks record, or none. A device that has failed says so again at the next launch.
            Err(StepError::Op(OpError::Cuda(error))) if run.collective.world_size() == 1 => {
                self.record_less(&error);
                return Ok(());
            }
            recording => recording?,
        };
        let calls = run.collective.device().map(|mut device| device.end_capture());
        self.recordings.insert(shape, Recorded { recording: Some(recording), calls, last_step: self.n_steps });
        Ok(())
    }

    /// A step could not be recorded: the next is tried without kernels that overlap, and after that none.
    fn record_less(&mut self, error: &CudaError) {
        if self.gpu.device().stop_overlapping() {
            warn!(%error, "a step was not recorded; from now on kernels do not overlap");
        } else {
            warn!(%error, "this GPU's driver records no steps, they take longer");
            self.records = false;
        }
    }

    /// Makes room for another recording.
    fn forget_a_recording(&mut self) {
        if self.recordings.len() < MAX_RECORDINGS {
            return;
        }
        let oldest = self.recordings.iter().min_by_key(|(_, recorded)| recorded.last_step);
        if let Some(shape) = oldest.map(|(shape, _)| *shape) {
            self.recordings.remove(&shape);
        }
    }

    /// What a step does once this rank has its logits: those of other ranks come to rank 0's device, which chooses tokens
    /// if the plan has them chosen; then all ranks get these. Returns the logits as rank 0 may bring them to the host.
    fn conclude(&mut self, run: &mut StepRun<'_, GpuKvCache>, logits: GpuTensor) -> Result<GpuTensor, StepError> {
        let n_rows = logits.n_rows();
        let (is_first, is_alone) = (run.collective.rank() == 0, run.collective.world_size() == 1);
        let mut whole = logits;
        if !is_alone && let Some(mut device) = run.collective.device() {
            let lengths: Vec<usize> = run.vocab.iter().map(|range| range.len() * n_rows).collect();
            let vocab_size = run.vocab.last().map_or(0, |range| range.end);
            let mut room = is_first.then(|| self.gpu.gather_room(n_rows, vocab_size)).transpose()?;
            let out = room.as_mut().map(GpuTensor::collective_slice_mut);
            device.gather(0, whole.collective_slice(), &lengths, out)?;
            whole = room.unwrap_or(whole);
        }
        let ends = || run.vocab.iter().map(|range| range.end as u32).collect::<Vec<_>>();
        if run.batch.chooses {
            if is_first {
                let vocab = match self.vocab.take() {
                    Some(vocab) => vocab,
                    None => self.gpu.load_vocab(&ends())?,
                };
                self.gpu.choose(&whole, &vocab, self.step())?;
                self.vocab = Some(vocab);
            }
            if !is_alone && let Some(mut device) = run.collective.device() {
                device.broadcast(0, self.gpu.choices_slice_mut(n_rows))?;
            }
        } else if is_first && !is_alone && run.collective.device().is_some() {
            whole = self.gpu.join_columns(&whole, &ends())?;
        }
        Ok(whole)
    }

    /// Sends the logits of a step, or the tokens chosen from them, to the host, behind all that is queued.
    fn queue_choice(
        gpu: &mut Gpu,
        run: &mut StepRun<'_, GpuKvCache>,
        logits: Option<Logits<'_>>,
    ) -> Result<Choice, CudaError> {
        let n_rows = run.batch.n_logits_rows;
        // Through the host, every rank's logits are gathered there.
        let has_logits = run.collective.rank() == 0 || run.collective.device().is_none();
        Ok(match logits {
            Some(logits) if has_logits && !run.batch.chooses => Choice::Logits(match logits {
                Logits::Computed(logits) => gpu.queue_rows(logits, 0..n_rows)?,
                Logits::Recorded(recording) => gpu.queue_result(recording, n_rows)?,
            }),
            Some(_) if run.batch.chooses => Choice::Tokens(gpu.queue_choices(n_rows)?),
            _ => Choice::Tokens(gpu.queue_choices(0)?),
        })
    }
}

impl CudaStarted {
    fn is_there(&self) -> Result<bool, CudaError> {
        match &self.choice {
            Choice::Tokens(tokens) => tokens.is_there(),
            Choice::Logits(logits) => logits.is_there(),
        }
    }

    /// Waits for the answer. Between devices, what is queued may wait for a rank that is gone: then the group's own wait
    /// ends, and no other, so nothing may wait for the device before it.
    fn wait(&self, collective: &mut dyn Collective) -> Result<(), StepError> {
        let Some(mut device) = collective.device() else { return Ok(()) };
        let mut failure = None;
        let waited = device.wait_until(|| keep(self.is_there(), &mut failure));
        first_of(failure, waited)
    }
}

impl Recorded {
    /// Queues another step of its shape, with its calls between devices.
    fn replay(
        &mut self,
        gpu: &mut Gpu,
        rows: &StepRows<'_>,
        run: &mut StepRun<'_, GpuKvCache>,
    ) -> Result<(), StepError> {
        let recording = self.recording.as_mut().expect("a step was recorded");
        let (Some(mut device), Some(calls)) = (run.collective.device(), &self.calls) else {
            return Ok(gpu.replay(recording, rows, run.kv)?);
        };
        let mut failure = None;
        let launched = device.launch(calls, || keep(gpu.replay(recording, rows, run.kv), &mut failure));
        first_of(failure, launched)
    }
}

/// Keeps a GPU's own error, of which a collective passes on the text alone.
fn keep<T>(result: Result<T, CudaError>, failure: &mut Option<CudaError>) -> Result<T, String> {
    result.map_err(|error| failure.insert(error).to_string())
}

fn first_of(failure: Option<CudaError>, result: Result<(), CollectiveError>) -> Result<(), StepError> {
    match failure {
        Some(failure) => Err(failure.into()),
        None => Ok(result?),
    }
}

fn encode(batch: &Batch) -> Vec<u32> {
    let word = |token: &Token| match *token {
        Token::Known(id) => id,
        Token::Chosen(row) => CHOSEN | row,
    };
    batch.tokens.iter().map(word).collect()
}

fn rows_of<'a>(batch: &'a Batch, tokens: &'a [u32]) -> StepRows<'a> {
    StepRows {
        tokens,
        slots: &batch.slots,
        rows: &batch.attention,
        result_rows: &batch.result_rows,
        result_attention: &batch.result_attention,
        choices: &batch.rules,
        tables: &batch.block_tables,
    }
}

impl Backend for CudaBackend {
    type Tensor = GpuTensor;
    type Input = GpuInput;
    type Terms = GpuTerms;
    type Matrix = GpuMatrix;
    type Table = GpuTable;
    type Logits = GpuTensor;
    type Hidden = Option<Answer<f32>>;
    type Started = CudaStarted;
    type Kv = GpuKvCache;

    fn load_matrix(&mut self, source: &EncodedRows<'_>, reduction: Option<&Reduction>) -> Result<GpuMatrix, OpError> {
        let Some(reduction) = reduction else { return Ok(self.gpu.load_matrix(source, None)?) };
        let (order, whole) = (SumTree::new(1).order(slice::from_ref(&(0..1))), 0..reduction.segment_ends.len());
        let sum =
            RowParallelSum { segment_ends: &reduction.segment_ends, subtrees: slice::from_ref(&whole), order: &order };
        let in_order = RowParallelSum { subtrees: &reduction.local_subtrees, order: &reduction.order, ..sum };
        Ok(self.gpu.load_matrix(source, Some(if self.deterministic { in_order } else { sum }))?)
    }

    fn load_gated(&mut self, sources: [&EncodedRows<'_>; 2]) -> Result<[GpuMatrix; 2], OpError> {
        Ok(self.gpu.load_gated(sources)?)
    }

    fn load_table(&mut self, table: EmbeddingTable) -> Result<GpuTable, OpError> {
        Ok(self.gpu.load_table(&table.encoded()?)?)
    }

    fn new_kv(&mut self, shape: KvShape) -> Result<GpuKvCache, OpError> {
        let KvShape { n_layers, n_blocks, block_size, encoding } = shape;
        Ok(self.gpu.new_kv(n_layers, n_blocks, block_size, encoding)?)
    }

    fn matrix_bytes(&self, matrix: &GpuMatrix) -> usize {
        matrix.size_bytes()
    }

    fn begin(&mut self, kv: &GpuKvCache, batch: &Batch) -> Result<(), OpError> {
        self.step = Some(self.gpu.begin(&rows_of(batch, &encode(batch)), kv, None)?);
        Ok(())
    }

    fn runs_ahead(&self, collective: &mut dyn Collective) -> bool {
        collective.world_size() == 1 || collective.device().is_some()
    }

    /// A step without prompts and embeddings is computed filled up to one of a few shapes. When a shape comes for the second time it is
    /// recorded, and from then on replayed. Where other ranks are reached through the host, nothing can be recorded.
    fn start_step(
        &mut self,
        mut run: StepRun<'_, GpuKvCache>,
        forward: impl Fn(&mut Self, &mut StepRun<'_, GpuKvCache>) -> Result<CudaResults, StepError>,
    ) -> Result<CudaStarted, StepError> {
        self.n_steps += 1;
        if run.collective.device().is_some() {
            // How that goes with what NCCL captures, nobody has seen.
            self.gpu.device().stop_overlapping();
        }
        let tokens = encode(run.batch);
        let rows = rows_of(run.batch, &tokens);
        let may_record = run.batch.n_hidden_rows() == 0 && self.records && self.runs_ahead(run.collective);
        let shape = StepShape::of(&rows).filter(|_| may_record);
        if let Some(shape) = shape
            && let Some(recorded) = self.recordings.get_mut(&shape).filter(|recorded| recorded.recording.is_some())
        {
            recorded.last_step = self.n_steps;
            recorded.replay(&mut self.gpu, &rows, &mut run)?;
            let recording = recorded.recording.as_ref();
            let choice = Self::queue_choice(&mut self.gpu, &mut run, recording.map(Logits::Recorded))?;
            return Ok(CudaStarted { hidden: None, choice });
        }
        self.step = Some(self.gpu.begin(&rows, run.kv, shape)?);
        let results = forward(self, &mut run)?;
        let started = self.send_results(&mut run, results)?;
        if let Some(shape) = shape {
            self.record(shape, &mut run, forward)?;
        }
        Ok(started)
    }

    fn is_finished(&self, started: &CudaStarted) -> Result<bool, OpError> {
        Ok(started.is_there()?)
    }

    fn send_results(
        &mut self,
        run: &mut StepRun<'_, GpuKvCache>,
        results: CudaResults,
    ) -> Result<CudaStarted, StepError> {
        let logits = results.logits.map(|logits| self.conclude(run, logits)).transpose()?;
        let choice = Self::queue_choice(&mut self.gpu, run, logits.as_ref().map(Logits::Computed))?;
        Ok(CudaStarted { hidden: results.hidden.flatten(), choice })
    }

    fn finish_step(
        &mut self,
        started: CudaStarted,
        vocab: &[Range<usize>],
        collective: &mut dyn Collective,
        out: &mut StepOutput,
    ) -> Result<(), StepError> {
        out.clear();
        started.wait(collective)?;
        if let Some(hidden) = started.hidden {
            out.hidden.extend_from_slice(hidden.wait()?);
        }
        match started.choice {
            Choice::Tokens(tokens) => {
                out.token_ids.extend_from_slice(tokens.wait()?);
                out.device_time = tokens.device_time()?;
            }
            Choice::Logits(logits) => {
                out.logits.extend_from_slice(logits.wait()?);
                out.device_time = logits.device_time()?;
                if collective.device().is_none() {
                    gather_logits(vocab, collective, out)?;
                }
            }
        }
        Ok(())
    }

    /// NCCL waits for graphs that call it. Those of a rank that is alone need no group. Shapes that came once are forgotten,
    /// too: ranks that were not in the same epochs must record at the same step.
    fn abandon_steps(&mut self) {
        self.recordings.retain(|_, recorded| recorded.recording.is_some() && recorded.calls.is_none());
        self.step = None;
    }

    fn wait(&mut self) -> Result<(), OpError> {
        Ok(self.gpu.device().synchronize()?)
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<GpuTensor, OpError> {
        Ok(self.gpu.upload(&values, width)?)
    }

    fn embed(&mut self, table: &GpuTable, _batch: &Batch) -> Result<GpuTensor, OpError> {
        Ok(self.gpu.embed(table, self.step())?)
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

    fn logits(&mut self, weight: &GpuMatrix, x: &GpuInput) -> Result<GpuTensor, OpError> {
        let [logits] = self.gpu.matmul([weight], x)?;
        Ok(logits)
    }

    fn matmul_reduce(
        &mut self,
        weight: &GpuMatrix,
        x: &GpuInput,
        reduction: &Reduction,
        collective: &mut dyn Collective,
    ) -> Result<GpuTerms, StepError> {
        if !self.deterministic {
            let mut terms = self.gpu.matmul_partial(weight, x, 0)?;
            self.all_reduce(&mut terms, collective)?;
            return Ok(terms);
        }
        let first = reduction.partials(collective.rank()).start;
        let mut terms = self.gpu.matmul_partial(weight, x, first)?;
        if let Some(mut device) = collective.device() {
            device.all_gather(&reduction.lengths(terms.plane_len()), terms.collective_slice_mut())?;
        } else if collective.world_size() > 1 {
            terms.download(&mut self.planes)?;
            gather_planes(&mut self.planes, terms.plane_len(), reduction, collective)?;
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
            Rows::Results => RowChoice::Results,
        };
        Ok(self.gpu.attention(&q, kv, layer, self.step(), choice)?)
    }

    fn result_rows(&mut self, x: GpuTensor, _batch: &Batch) -> Result<GpuTensor, OpError> {
        Ok(self.gpu.select_rows(&x, self.step())?)
    }

    fn take_hidden(&mut self, x: &mut GpuTensor, batch: &Batch, rank: usize) -> Result<Option<Answer<f32>>, OpError> {
        let hidden = batch.n_logits_rows..batch.result_rows.len();
        let answer = (rank == 0).then(|| self.gpu.queue_rows(x, hidden)).transpose()?;
        x.truncate(batch.n_logits_rows);
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    //! Sums over ranks, which are threads with a GPU of the emulator each.

    use std::{
        sync::Arc,
        thread,
        time::{Duration, Instant},
    };

    use lockstep_checkpoint::Encoding;
    use lockstep_collectives::{Member, local, nccl};
    use lockstep_kernels::{RopeStyle, cuda::KernelCache};

    use super::*;
    use crate::model::{
        config::ModelConfig,
        shard::{RowParallelBlocks, ShardPlan},
    };

    const N_ROWS: usize = 3;
    const WIDTH: usize = 64;
    /// Of the attention's output, in segments of 32: eight, which three ranks share unevenly.
    const N_IN: usize = 256;

    /// How ranks meet.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Meeting {
        Devices,
        Hosts,
    }

    fn plan(rank: usize, world_size: usize) -> ShardPlan {
        let config = ModelConfig {
            n_layers: 1,
            hidden_dim: WIDTH,
            n_heads: 8,
            n_kv_heads: 8,
            head_dim: N_IN / 8,
            ffn_dim: N_IN,
            vocab_size: 100,
            context_length: 16,
            rms_eps: 1e-5,
            rope_base: 1e4,
            rope_dim: 32,
            rope_scale: 1.0,
            rope_style: RopeStyle::Adjacent,
        };
        ShardPlan::new(&config, rank, world_size, RowParallelBlocks { o: 1, down: 1 }).unwrap()
    }

    /// Values that are exact in bf16, and whose sums of all are not in f32, so that an order shows.
    fn values(n: usize, seed: usize) -> Vec<f32> {
        let value = |i: usize| {
            let hash = (i + seed).wrapping_mul(0x9E37_79B1) >> 3;
            ((hash % 255) as f32 - 127.0) * [1.0, 1e-3, 300.0][hash % 3]
        };
        (0..n).map(|i| half::bf16::from_f32(value(i)).to_f32()).collect()
    }

    fn backend(rank: usize, deterministic: bool) -> CudaBackend {
        lockstep_cuda_emulator::load_into_this_process().unwrap();
        let cache = lockstep_cuda_emulator::build().unwrap().join("kernels");
        let device = Device::open(rank, KernelCache::new(Some(cache))).unwrap();
        let rope = RopeSpec { rope_dim: 32, base: 1e4, factors: None, n_positions: 16, style: RopeStyle::Adjacent };
        let shape = AttentionShape { n_heads: 8, n_kv_heads: 8, head_dim: 32, rope };
        CudaBackend::new(device, &shape, deterministic).unwrap()
    }

    /// The product of one rank's columns, summed over ranks: `[N_ROWS, WIDTH]`, and the planes that it came in.
    fn product(backend: &mut CudaBackend, collective: &mut dyn Collective) -> (Vec<f32>, usize) {
        let reduction = plan(collective.rank(), collective.world_size()).attention_sum;
        let weights: Vec<u8> = values(WIDTH * N_IN, 5).iter().flat_map(|value| value.to_le_bytes()).collect();
        let source = EncodedRows::new(Encoding::F32, &weights, WIDTH, N_IN).unwrap();
        let source = source.cols(reduction.columns.clone()).unwrap();
        let weight = backend.load_matrix(&source, Some(&reduction)).unwrap();
        let x = values(N_ROWS * N_IN, 7);
        let x: Vec<f32> = x.chunks_exact(N_IN).flat_map(|row| row[reduction.columns.clone()].to_vec()).collect();
        let x = backend.gpu.upload_input(&x, reduction.columns.len()).unwrap();
        let terms = backend.matmul_reduce(&weight, &x, &reduction, collective).unwrap();
        if let Some(mut device) = collective.device() {
            device.wait().unwrap();
        }
        let mut planes = Vec::new();
        terms.download(&mut planes).unwrap();
        let n_planes = planes.len() / terms.plane_len();
        let mut sum = backend.upload(vec![0.0; N_ROWS * WIDTH], WIDTH).unwrap();
        let ones = backend.upload(vec![1.0; WIDTH], WIDTH).unwrap();
        backend.rms_norm(&mut sum, Some(terms), &ones, 1e-5).unwrap();
        let mut out = Vec::new();
        backend.gpu.download(&sum, &mut out).unwrap();
        (out, n_planes)
    }

    /// The product on every rank of a group.
    fn products(world_size: usize, deterministic: bool, meeting: Meeting) -> Vec<(Vec<f32>, usize)> {
        let mut hosts: Vec<_> = local::group(world_size).into_iter().map(Some).collect();
        let id = Arc::new(std::sync::OnceLock::new());
        thread::scope(|scope| {
            let ranks: Vec<_> = hosts
                .iter_mut()
                .enumerate()
                .map(|(rank, host)| {
                    let (host, id) = (host.take().unwrap(), Arc::clone(&id));
                    scope.spawn(move || {
                        let mut backend = backend(rank, deterministic);
                        if meeting == Meeting::Hosts {
                            let mut host = host;
                            return product(&mut backend, &mut host);
                        }
                        let id = id.get_or_init(|| nccl::UniqueId::new().unwrap());
                        let member = Member { rank, world_size, ..Member::default() };
                        let stream = backend.gpu.device().collective_stream().unwrap();
                        let deadline = Instant::now() + Duration::from_secs(60);
                        product(&mut backend, &mut nccl::connect(id, stream, member, deadline).unwrap())
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn without_its_order_a_sum_crosses_in_one_plane_and_is_right_up_to_rounding() {
        let [(expected, _)] = products(1, true, Meeting::Hosts).try_into().unwrap();
        let scale = expected.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
        for world_size in [1, 2, 3] {
            for meeting in [Meeting::Devices, Meeting::Hosts] {
                for (found, n_planes) in products(world_size, false, meeting) {
                    assert_eq!(n_planes, 1, "{world_size} ranks, {meeting:?}");
                    for (found, expected) in found.iter().zip(&expected) {
                        assert!((found - expected).abs() <= 1e-5 * scale, "{found} for {expected}, {world_size} ranks");
                    }
                }
            }
        }
    }

    #[test]
    fn in_its_order_a_sum_has_the_same_bits_on_any_number_of_ranks() {
        let [(expected, _)] = products(1, true, Meeting::Hosts).try_into().unwrap();
        let mut differs = false;
        for world_size in [2, 3] {
            for meeting in [Meeting::Devices, Meeting::Hosts] {
                for (found, n_planes) in products(world_size, true, meeting) {
                    assert!(n_planes >= world_size, "{n_planes} planes of {world_size} ranks");
                    assert_eq!(bits(&found), bits(&expected), "{world_size} ranks, {meeting:?}");
                }
            }
            differs |= bits(&products(world_size, false, Meeting::Devices)[0].0) != bits(&expected);
        }
        assert!(differs, "these values do not show an order");
    }
}

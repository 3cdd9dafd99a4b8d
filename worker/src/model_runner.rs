//! The model runner: turns a step plan into logits. Every rank has one, and its result is a function of the weights,
//! the cache and the plan; only rank 0 sees the logits.

use std::collections::HashMap;

use lockstep_collectives::Collective;
use lockstep_kernels::{AttentionRow, Cpu, KvEncoding, cuda};

use crate::{
    device::Device,
    model::{
        LoadError, OpError, StepError,
        batch::Batch,
        llama::{Llama, LogitsRoom},
        load::Source,
        ops::{
            AttentionShape, Backend, KvShape,
            cpu::CpuBackend,
            cuda::CudaBackend,
            profiled::{Profile, Profiled},
            reference::ReferenceBackend,
        },
    },
    scheduler::plan::{BlockId, LogitsRows, SeqId, SequenceStep, StepPlan},
};

/// How a runner is built.
#[derive(Clone, Debug)]
pub struct RunnerSettings {
    /// What computes.
    pub device: Device,
    /// Threads that compute. Only our CPU kernels have threads of their own.
    pub threads: usize,
    /// Blocks of keys and values.
    pub n_blocks: usize,
    /// Positions in a block.
    pub block_size: usize,
    /// How keys and values are stored.
    pub kv_encoding: KvEncoding,
    /// Longest sequence.
    pub context_length: usize,
}

/// Loads a rank's shard and makes a runner of it.
///
/// # Errors
/// See [`Source::load`].
pub fn build(source: &Source, settings: &RunnerSettings) -> Result<Box<dyn RunStep>, LoadError> {
    let shape = source.attention_shape(settings.context_length)?;
    match &settings.device {
        Device::Cpu => build_on(cpu(settings, shape)?, source, settings),
        Device::Reference => build_on(reference(shape), source, settings),
        Device::Cuda(device) => build_on(gpu(device, &shape)?, source, settings),
    }
}

/// As [`build`], with a stopwatch around every op.
///
/// # Errors
/// See [`Source::load`].
pub fn build_profiled(
    source: &Source,
    settings: &RunnerSettings,
    profile: Profile,
) -> Result<Box<dyn RunStep>, LoadError> {
    let shape = source.attention_shape(settings.context_length)?;
    match &settings.device {
        Device::Cpu => build_on(Profiled::new(cpu(settings, shape)?, profile), source, settings),
        Device::Reference => build_on(Profiled::new(reference(shape), profile), source, settings),
        Device::Cuda(device) => build_on(Profiled::new(gpu(device, &shape)?, profile), source, settings),
    }
}

fn build_on<B: Backend + 'static>(
    mut ops: B,
    source: &Source,
    settings: &RunnerSettings,
) -> Result<Box<dyn RunStep>, LoadError> {
    let RunnerSettings { n_blocks, block_size, kv_encoding, context_length, .. } = *settings;
    let kv_shape = KvShape { n_layers: source.config().n_layers, n_blocks, block_size, encoding: kv_encoding };
    let model = source.load(&mut ops)?;
    Ok(Box::new(ModelRunner::new(ops, model, kv_shape, context_length).map_err(no_cache)?))
}

fn cpu(settings: &RunnerSettings, shape: AttentionShape) -> Result<CpuBackend, LoadError> {
    CpuBackend::new(Cpu::new(settings.threads), shape).map_err(no_cache)
}

fn reference(shape: AttentionShape) -> ReferenceBackend {
    ReferenceBackend::new(candle_core::Device::Cpu, shape)
}

fn gpu(device: &cuda::Device, shape: &AttentionShape) -> Result<CudaBackend, LoadError> {
    CudaBackend::new(device.clone(), shape)
        .map_err(|source| LoadError::Tensor { tensor: "rotary table".into(), source })
}

fn no_cache(source: OpError) -> LoadError {
    LoadError::Tensor { tensor: "key and value cache".into(), source }
}

/// Runs steps, whatever the backend.
pub trait RunStep: Send + std::fmt::Debug {
    /// Executes one plan. On rank 0 `room.logits` becomes the logits of the rows that the plan asks for, in its order,
    /// `[n, vocab_size]`; on other ranks they are void.
    ///
    /// # Errors
    /// See [`StepError`]. After an error only [`RunStep::reset`] makes the runner usable again.
    fn run(&mut self, plan: &StepPlan, collective: &mut dyn Collective, room: &mut LogitsRoom)
    -> Result<(), StepError>;
    /// Forgets every sequence: a new epoch begins.
    fn reset(&mut self);
    /// Token ids are below this.
    fn vocab_size(&self) -> usize;
    /// Rows that fit into one block and the context.
    fn block_size(&self) -> usize;
}

/// A shard of a model on a backend, with its cache and its mirror of the block tables.
#[derive(Debug)]
pub struct ModelRunner<B: Backend> {
    ops: B,
    model: Llama<B>,
    kv: B::Kv,
    kv_shape: KvShape,
    context_length: usize,
    block_tables: HashMap<SeqId, Vec<u32>>,
}

impl<B: Backend> ModelRunner<B> {
    /// A runner for sequences of at most `context_length` tokens.
    ///
    /// # Errors
    /// No room for the cache.
    pub fn new(mut ops: B, model: Llama<B>, kv_shape: KvShape, context_length: usize) -> Result<Self, OpError> {
        let kv = ops.new_kv(kv_shape)?;
        Ok(Self { ops, model, kv, kv_shape, context_length, block_tables: HashMap::new() })
    }

    /// Applies the plan's deltas to the mirrored block tables and lays its rows out.
    fn batch(&mut self, plan: &StepPlan) -> Result<Batch, String> {
        for id in &plan.released {
            self.block_tables.remove(id);
        }
        let block_size = self.kv_shape.block_size;
        let vocab_size = self.model.vocab_size();
        let mut batch = Batch::default();
        for step in &plan.sequences {
            let table = self.block_tables.entry(step.id).or_default();
            table.extend(step.new_blocks.iter().map(|block| block.0));
            let start = step.start_position as usize;
            let end = start + step.token_ids.len();
            if end > self.context_length || end > table.len() * block_size {
                return Err(format!(
                    "{:?} ends at position {end}, past its {} blocks or the context of {}",
                    step.id,
                    table.len(),
                    self.context_length
                ));
            }
            if let Some(block) = step.new_blocks.iter().find(|block| block.0 as usize >= self.kv_shape.n_blocks) {
                return Err(format!("{block:?} is not one of {} blocks", self.kv_shape.n_blocks));
            }
            if let Some(id) = step.token_ids.iter().find(|id| **id as usize >= vocab_size) {
                return Err(format!("token id {id} is not below the vocabulary's size {vocab_size}"));
            }
            let first_row = batch.n_rows();
            batch.token_ids.extend(&step.token_ids);
            for position in start..end {
                batch.positions.push(position as u32);
                batch.slots.push(table[position / block_size] * block_size as u32 + (position % block_size) as u32);
                batch.attention.push(AttentionRow { position: position as u32, table: batch.block_tables.len() });
            }
            batch.block_tables.push(table.clone());
            let rows = match step.logits {
                LogitsRows::None => batch.n_rows()..batch.n_rows(),
                LogitsRows::Last => batch.n_rows() - 1..batch.n_rows(),
                LogitsRows::All => first_row..batch.n_rows(),
            };
            batch.logits_attention.extend(&batch.attention[rows.clone()]);
            batch.logits_rows.extend(rows.map(|row| row as u32));
        }
        Ok(batch)
    }
}

impl<B: Backend> RunStep for ModelRunner<B>
where
    B::Tensor: Send,
{
    fn run(
        &mut self,
        plan: &StepPlan,
        collective: &mut dyn Collective,
        room: &mut LogitsRoom,
    ) -> Result<(), StepError> {
        let batch = self.batch(plan).map_err(|why| StepError::Plan { step_id: plan.step_id, why })?;
        if batch.n_rows() == 0 {
            room.logits.clear();
            return Ok(());
        }
        self.model.forward(&mut self.ops, collective, &mut self.kv, &batch, room)
    }

    fn reset(&mut self) {
        self.block_tables.clear();
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn block_size(&self) -> usize {
        self.kv_shape.block_size.min(self.context_length)
    }
}

/// Runs one prefill that every rank knows without being told, so that the first request finds caches, pages and
/// threads warm, and a rank that cannot compute is found out before the group is ready.
///
/// # Errors
/// See [`RunStep::run`].
pub fn warm_up(runner: &mut dyn RunStep, collective: &mut dyn Collective) -> Result<(), StepError> {
    let id = SeqId(u64::MAX);
    let prefill = SequenceStep {
        id,
        start_position: 0,
        token_ids: (0..runner.block_size()).map(|i| (i % runner.vocab_size()) as u32).collect(),
        new_blocks: vec![BlockId(0)],
        logits: LogitsRows::Last,
    };
    let plan = StepPlan { step_id: 0, released: Vec::new(), sequences: vec![prefill] };
    runner.run(&plan, collective, &mut LogitsRoom::default())?;
    runner.reset();
    Ok(())
}

//! The model runner: turns a step plan into logits. Every rank has one, and its result is a function of the weights,
//! the cache and the plan; only rank 0 sees the logits.

use std::collections::{HashMap, VecDeque};

use lockstep_collectives::Collective;
use lockstep_kernels::{
    AttentionRow, Cpu, KvEncoding,
    cuda::{self, ChoiceRule},
};

use crate::{
    device::Device,
    model::{
        LoadError, OpError, StepError,
        batch::{Batch, Token},
        llama::Llama,
        load::Source,
        ops::{
            AttentionShape, Backend, KvShape,
            cpu::CpuBackend,
            cuda::CudaBackend,
            profiled::{Profile, Profiled},
            reference::ReferenceBackend,
        },
        output::StepOutput,
    },
    scheduler::{
        ahead::PENDING,
        plan::{BlockId, RowResults, SeqId, SequenceStep, StepPlan},
    },
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
    /// Whether sums over ranks are added in one order, whatever the group. GPUs alone can do without.
    pub deterministic: bool,
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
        Device::Cuda(device) => build_on(gpu(device, &shape, settings)?, source, settings),
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
        Device::Cuda(device) => build_on(Profiled::new(gpu(device, &shape, settings)?, profile), source, settings),
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

fn gpu(device: &cuda::Device, shape: &AttentionShape, settings: &RunnerSettings) -> Result<CudaBackend, LoadError> {
    CudaBackend::new(device.clone(), shape, settings.deterministic)
        .map_err(|source| LoadError::Tensor { tensor: "rotary table".into(), source })
}

fn no_cache(source: OpError) -> LoadError {
    LoadError::Tensor { tensor: "key and value cache".into(), source }
}

/// Runs steps, whatever the backend.
pub trait RunStep: Send + std::fmt::Debug {
    /// Whether a plan may have tokens chosen where the logits are, and be started before the one before it is finished.
    fn runs_ahead(&self, collective: &mut dyn Collective) -> bool;
    /// Starts to execute a plan. On rank 0 `rules` say how tokens are chosen, one rule for each row of logits, if the plan has
    /// them chosen.
    ///
    /// # Errors
    /// See [`StepError`]. After an error only [`RunStep::reset`] makes the runner usable again.
    fn start(
        &mut self,
        plan: &StepPlan,
        rules: &[ChoiceRule],
        collective: &mut dyn Collective,
    ) -> Result<(), StepError>;
    /// Whether the oldest plan that was started has been computed, so that there is no wait for it.
    ///
    /// # Errors
    /// As [`RunStep::start`].
    fn is_finished(&self) -> Result<bool, StepError> {
        Ok(true)
    }
    /// Waits for the oldest plan that was started, of at most two. What it gives is for the rows that the plan asks for, in
    /// its order.
    ///
    /// # Errors
    /// As [`RunStep::start`].
    fn finish(&mut self, collective: &mut dyn Collective, out: &mut StepOutput) -> Result<(), StepError>;
    /// Forgets every sequence and step: an epoch ends. Its collective must still be there.
    fn reset(&mut self);
    /// Executes a plan that has nothing chosen.
    ///
    /// # Errors
    /// As [`RunStep::start`].
    fn run(&mut self, plan: &StepPlan, collective: &mut dyn Collective, out: &mut StepOutput) -> Result<(), StepError> {
        self.start(plan, &[], collective)?;
        self.finish(collective, out)
    }
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
    /// Which row of the last plan's logits each sequence's token is chosen from.
    chosen_rows: HashMap<SeqId, u32>,
    /// Steps that are not finished. Those without a row have nothing to start.
    started: VecDeque<Option<B::Started>>,
}

impl<B: Backend> ModelRunner<B> {
    /// A runner for sequences of at most `context_length` tokens.
    ///
    /// # Errors
    /// No room for the cache.
    pub fn new(mut ops: B, model: Llama<B>, kv_shape: KvShape, context_length: usize) -> Result<Self, OpError> {
        let kv = ops.new_kv(kv_shape)?;
        Ok(Self {
            ops,
            model,
            kv,
            kv_shape,
            context_length,
            block_tables: HashMap::new(),
            chosen_rows: HashMap::new(),
            started: VecDeque::new(),
        })
    }

    /// Applies the plan's deltas to the mirrored block tables and lays its rows out.
    fn batch(&mut self, plan: &StepPlan) -> Result<Batch, String> {
        for id in &plan.released {
            self.block_tables.remove(id);
        }
        let block_size = self.kv_shape.block_size;
        let vocab_size = self.model.vocab_size();
        let mut batch = Batch { chooses: plan.chooses, ..Batch::default() };
        let mut hidden_rows = Vec::new();
        let chosen_before = std::mem::take(&mut self.chosen_rows);
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
            let first_row = batch.n_rows();
            for &id in &step.token_ids {
                batch.tokens.push(match chosen_before.get(&step.id) {
                    Some(&row) if step.token_ids == [PENDING] => Token::Chosen(row),
                    _ if (id as usize) < vocab_size => Token::Known(id),
                    _ if id == PENDING => {
                        return Err(format!("no token was chosen for {:?} in the step before", step.id));
                    }
                    _ => return Err(format!("token id {id} is not below the vocabulary's size {vocab_size}")),
                });
            }
            for position in start..end {
                batch.positions.push(position as u32);
                batch.slots.push(table[position / block_size] * block_size as u32 + (position % block_size) as u32);
                batch.attention.push(AttentionRow { position: position as u32, table: batch.block_tables.len() });
            }
            batch.block_tables.push(table.clone());
            if plan.chooses && step.results == RowResults::LastLogits {
                self.chosen_rows.insert(step.id, batch.result_rows.len() as u32);
            }
            let rows = first_row as u32..batch.n_rows() as u32;
            match step.results {
                RowResults::None => {}
                RowResults::LastLogits => batch.result_rows.extend(rows.last()),
                RowResults::AllLogits => batch.result_rows.extend(rows),
                RowResults::LastHidden => hidden_rows.extend(rows.last()),
                RowResults::AllHidden => hidden_rows.extend(rows),
            }
        }
        batch.n_logits_rows = batch.result_rows.len();
        batch.result_rows.extend(hidden_rows);
        batch.result_attention = batch.result_rows.iter().map(|row| batch.attention[*row as usize]).collect();
        Ok(batch)
    }
}

impl<B: Backend> RunStep for ModelRunner<B>
where
    B::Tensor: Send,
{
    fn runs_ahead(&self, collective: &mut dyn Collective) -> bool {
        self.ops.runs_ahead(collective)
    }

    fn start(
        &mut self,
        plan: &StepPlan,
        rules: &[ChoiceRule],
        collective: &mut dyn Collective,
    ) -> Result<(), StepError> {
        let wrong = |why| StepError::Plan { step_id: plan.step_id, why };
        let mut batch = self.batch(plan).map_err(wrong)?;
        if plan.chooses && !self.ops.runs_ahead(collective) {
            return Err(wrong("this backend chooses no tokens".into()));
        }
        if plan.chooses {
            batch.rules.extend_from_slice(rules);
            // Other ranks need to know how many there are.
            batch.rules.resize(batch.n_logits_rows, ChoiceRule::default());
        }
        let started = match batch.n_rows() {
            0 => None,
            _ => Some(self.model.start(&mut self.ops, collective, &mut self.kv, &batch)?),
        };
        self.started.push_back(started);
        Ok(())
    }

    fn is_finished(&self) -> Result<bool, StepError> {
        match self.started.front() {
            Some(Some(started)) => Ok(self.ops.is_finished(started)?),
            _ => Ok(true),
        }
    }

    fn finish(&mut self, collective: &mut dyn Collective, out: &mut StepOutput) -> Result<(), StepError> {
        match self.started.pop_front().flatten() {
            Some(started) => self.model.finish(&mut self.ops, started, collective, out),
            None => {
                out.clear();
                Ok(())
            }
        }
    }

    fn reset(&mut self) {
        self.block_tables.clear();
        self.chosen_rows.clear();
        self.started.clear();
        self.ops.abandon_steps();
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
        results: RowResults::LastLogits,
    };
    let plan = StepPlan { sequences: vec![prefill], ..StepPlan::default() };
    runner.run(&plan, collective, &mut StepOutput::default())?;
    runner.reset();
    Ok(())
}

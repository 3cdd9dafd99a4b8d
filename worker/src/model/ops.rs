//! Ops: what a backend must be able to do for one forward pass. The only place of the worker that knows tensors and
//! kernels; a layer sees nothing but [`Backend`].
//!
//! Activations are f32 matrices `[n_rows, width]` in a form of the backend's own choice. Row `i` of a result depends
//! on row `i` of the operands alone (and, in attention, on the cached keys and values of its own sequence).

pub mod cpu;
pub mod cuda;
mod exchange;
pub mod profiled;
mod recycled;
pub mod reference;

use std::{fmt::Debug, ops::Range};

use lockstep_collectives::Collective;
use lockstep_kernels::{EncodedRows, KvEncoding, RopeStyle};

use super::{
    OpError, StepError,
    batch::{Batch, Rows},
    embedding::EmbeddingTable,
    output::StepOutput,
    shard::Reduction,
};

/// The shape of the attention that one rank computes.
#[derive(Clone, Debug)]
pub struct AttentionShape {
    /// Query heads of this rank.
    pub n_heads: usize,
    /// Key and value heads of this rank.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rotary embedding.
    pub rope: RopeSpec,
}

/// A rotary position embedding (Su et al., RoFormer, arXiv 2104.09864).
#[derive(Clone, Debug)]
pub struct RopeSpec {
    /// Values of a head that are rotated; even.
    pub rope_dim: usize,
    /// Base of the frequencies: pair `i` turns by `position * base^(-2i / rope_dim) / factor_i`.
    pub base: f32,
    /// Divisors of the frequencies, `[rope_dim / 2]`: Llama 3.1's `rope_freqs`, or a linear scaling.
    pub factors: Option<Vec<f32>>,
    /// Positions are below this.
    pub n_positions: usize,
    /// Which values of a head are a pair.
    pub style: RopeStyle,
}

/// The size of a paged key and value cache, and how it stores them.
#[derive(Clone, Copy, Debug)]
pub struct KvShape {
    /// Layers.
    pub n_layers: usize,
    /// Blocks in each layer.
    pub n_blocks: usize,
    /// Positions in a block.
    pub block_size: usize,
    /// How keys and values are stored.
    pub encoding: KvEncoding,
}

/// What a step works on beside weights and activations.
#[derive(Debug)]
pub struct StepRun<'a, Kv> {
    /// Other ranks.
    pub collective: &'a mut dyn Collective,
    /// Keys and values.
    pub kv: &'a mut Kv,
    /// The rows.
    pub batch: &'a Batch,
    /// Which part of the vocabulary each rank's logits are of.
    pub vocab: &'a [Range<usize>],
}

/// What this rank has of a step's results, on its device or on its way from there.
#[derive(Debug)]
pub struct StepResults<Logits, Hidden> {
    /// If any row gives logits.
    pub logits: Option<Logits>,
    /// If any row gives hidden states.
    pub hidden: Option<Hidden>,
}

impl<Logits, Hidden> Default for StepResults<Logits, Hidden> {
    fn default() -> Self {
        Self { logits: None, hidden: None }
    }
}

/// A device and how it computes. See the module for what every method keeps to.
pub trait Backend: Debug + Send {
    /// Activations, `[n_rows, width]`, or norm weights, `[1, width]`.
    type Tensor: Debug + Send;
    /// Activations in the form in which products read them, `[n_rows, width]`.
    type Input: Debug + Send;
    /// A row-parallel product, `[n_rows, n_out]`, as terms of a sum that is still to be added up.
    type Terms: Debug + Send;
    /// One rank's part of a weight, `[n_out, n_in]`.
    type Matrix: Debug + Send;
    /// The embedding table, `[vocab_size, hidden_dim]`.
    type Table: Debug + Send;
    /// One rank's part of the logits, `[n_logits_rows, vocab_size/world]`.
    type Logits: Debug + Send;
    /// Hidden states on their way to the host.
    type Hidden: Debug + Send;
    /// A step that was started.
    type Started: Debug + Send;
    /// Keys and values of all layers.
    type Kv: Debug + Send;

    /// Loads a rank's part of a weight. With a `reduction` the weight is row-parallel: products are partial sums, one
    /// for each of the rank's subtrees. All weights are loaded before anything is computed.
    fn load_matrix(&mut self, source: &EncodedRows<'_>, reduction: Option<&Reduction>)
    -> Result<Self::Matrix, OpError>;
    /// As [`Backend::load_matrix`], for the two weights of [`Backend::gated`], which are read side by side.
    fn load_gated(&mut self, sources: [&EncodedRows<'_>; 2]) -> Result<[Self::Matrix; 2], OpError> {
        let [gate, up] = sources;
        Ok([self.load_matrix(gate, None)?, self.load_matrix(up, None)?])
    }
    /// Loads the embedding table, or notes where it is.
    fn load_table(&mut self, table: EmbeddingTable) -> Result<Self::Table, OpError>;
    /// Makes room for keys and values, empty.
    fn new_kv(&mut self, shape: KvShape) -> Result<Self::Kv, OpError>;
    /// Bytes of device memory that a loaded weight takes.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize;

    /// A step begins: all that follows, up to its results, is of this batch.
    fn begin(&mut self, _kv: &Self::Kv, _batch: &Batch) -> Result<(), OpError> {
        Ok(())
    }
    /// Whether a step may be started before the one before it is finished, and tokens may be chosen where logits are.
    fn runs_ahead(&self, _collective: &mut dyn Collective) -> bool {
        false
    }
    /// Starts a step: `forward` computes its results. A backend may record what `forward` does, and do it again for another
    /// step without asking; or ask twice.
    fn start_step(
        &mut self,
        mut run: StepRun<'_, Self::Kv>,
        forward: impl Fn(
            &mut Self,
            &mut StepRun<'_, Self::Kv>,
        ) -> Result<StepResults<Self::Logits, Self::Hidden>, StepError>,
    ) -> Result<Self::Started, StepError>
    where
        Self: Sized,
    {
        self.begin(run.kv, run.batch)?;
        let results = forward(self, &mut run)?;
        self.send_results(&mut run, results)
    }
    /// Sends what was computed of a step on its way back from the device.
    fn send_results(
        &mut self,
        run: &mut StepRun<'_, Self::Kv>,
        results: StepResults<Self::Logits, Self::Hidden>,
    ) -> Result<Self::Started, StepError>;
    /// Whether a step that was started has been computed.
    fn is_finished(&self, _started: &Self::Started) -> Result<bool, OpError> {
        Ok(true)
    }
    /// Waits for a step, the oldest that was started, and brings what it gives to `out`: on rank 0 the logits of all
    /// ranks, and hidden states as [`Backend::take_hidden`] has taken them.
    fn finish_step(
        &mut self,
        started: Self::Started,
        vocab: &[Range<usize>],
        collective: &mut dyn Collective,
        out: &mut StepOutput,
    ) -> Result<(), StepError>;
    /// The group's end: nothing that was started is waited for, and whatever holds on to a collective is dropped.
    fn abandon_steps(&mut self) {}
    /// Waits until the device has done what it was asked for.
    fn wait(&mut self) -> Result<(), OpError> {
        Ok(())
    }
    /// Brings values `[n_rows, width]` to the device.
    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<Self::Tensor, OpError>;
    /// The embedded tokens of the batch's rows, `[n_rows, hidden_dim]`.
    fn embed(&mut self, table: &Self::Table, batch: &Batch) -> Result<Self::Tensor, OpError>;
    /// `x += terms`, if there are any; then `x * weight / sqrt(mean(x^2) + eps)`, row by row.
    fn rms_norm(
        &mut self,
        x: &mut Self::Tensor,
        terms: Option<Self::Terms>,
        weight: &Self::Tensor,
        eps: f32,
    ) -> Result<Self::Input, OpError>;
    /// `x · wᵀ` for several weights: `[n_rows, n_out]` each. None may be row-parallel.
    fn matmul<const N: usize>(
        &mut self,
        weights: [&Self::Matrix; N],
        x: &Self::Input,
    ) -> Result<[Self::Tensor; N], OpError>;
    /// `x · wᵀ`: `[n_rows, n_out]`. The weight may not be row-parallel.
    fn logits(&mut self, weight: &Self::Matrix, x: &Self::Input) -> Result<Self::Logits, OpError>;
    /// `x · wᵀ` for a row-parallel weight: the terms of all ranks, whose sum in the reduction's order is the product.
    fn matmul_reduce(
        &mut self,
        weight: &Self::Matrix,
        x: &Self::Input,
        reduction: &Reduction,
        collective: &mut dyn Collective,
    ) -> Result<Self::Terms, StepError>;
    /// `silu(x · gateᵀ) * (x · upᵀ)`, element by element: `[n_rows, n_out]`. Neither may be row-parallel.
    fn gated(&mut self, gate: &Self::Matrix, up: &Self::Matrix, x: &Self::Input) -> Result<Self::Input, OpError>;
    /// Rotates the keys of all of the batch's rows by their positions and stores them with their values, both
    /// `[n_rows, n_kv_heads * head_dim]`, at the batch's slots.
    fn write_kv(
        &mut self,
        kv: &mut Self::Kv,
        layer: usize,
        batch: &Batch,
        k: &Self::Tensor,
        v: &Self::Tensor,
    ) -> Result<(), OpError>;
    /// Rotates queries by their positions; then causal attention over each row's own sequence. `q` and the result are
    /// `[n_rows, n_heads * head_dim]`, of `rows`.
    fn attention(
        &mut self,
        q: Self::Tensor,
        kv: &Self::Kv,
        layer: usize,
        batch: &Batch,
        rows: Rows,
    ) -> Result<Self::Input, OpError>;
    /// Of all rows of the batch, those that give a result.
    fn result_rows(&mut self, x: Self::Tensor, batch: &Batch) -> Result<Self::Tensor, OpError>;
    /// Takes the rows that give hidden states off the batch's results, of which they are the last, and sends them to the host
    /// of rank 0, which alone needs them. Those that give logits are left.
    fn take_hidden(&mut self, x: &mut Self::Tensor, batch: &Batch, rank: usize) -> Result<Self::Hidden, OpError>;
}

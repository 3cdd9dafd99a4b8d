//! A profile: where the time of steps goes. [`Profiled`] is any backend with a stopwatch around every op.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use lockstep_collectives::{Collective, Timed};
use lockstep_kernels::EncodedRows;

use super::{Backend, KvShape, StepResults, StepRun};
use crate::model::{
    OpError, StepError,
    batch::{Batch, Rows},
    embedding::EmbeddingTable,
    output::StepOutput,
    shard::Reduction,
};

/// What all calls of one kind came to. Products of different shapes are different kinds.
#[derive(Clone, Debug)]
pub struct OpTime {
    /// What was computed.
    pub name: &'static str,
    /// Outputs and inputs of a product: `[n_out, n_in]`, the outputs of all its weights.
    pub shape: Option<[usize; 2]>,
    /// How often.
    pub n_calls: usize,
    /// How long, in all.
    pub time: Duration,
    /// Bytes of weights that were read.
    pub bytes: usize,
    /// Multiplications of a weight and an activation.
    pub n_products: usize,
}

/// The times of a backend's ops since they were last taken, shared by the backend and whoever reads them.
#[derive(Clone, Debug, Default)]
pub struct Profile(Arc<Mutex<Vec<OpTime>>>);

/// A backend whose ops are timed.
#[derive(Debug)]
pub struct Profiled<B> {
    ops: B,
    profile: Profile,
    /// Rows of the activations at hand.
    n_rows: usize,
}

/// A weight that knows its shape, `[n_out, n_in]`.
#[derive(Debug)]
pub struct ProfiledMatrix<M> {
    matrix: M,
    shape: [usize; 2],
}

// === impl Profile ===

impl Profile {
    /// The times since the last call, in the order in which ops first ran.
    pub fn take(&self) -> Vec<OpTime> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn add(&self, time: OpTime) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match times.iter_mut().find(|known| known.name == time.name && known.shape == time.shape) {
            None => times.push(time),
            Some(known) => {
                known.n_calls += time.n_calls;
                known.time += time.time;
                known.bytes += time.bytes;
                known.n_products += time.n_products;
            }
        }
    }

    /// Adds what is no product.
    pub fn add_other(&self, name: &'static str, time: Duration) {
        self.add(OpTime { name, shape: None, n_calls: 1, time, bytes: 0, n_products: 0 });
    }
}

// === impl Profiled ===

impl<B: Backend> Profiled<B> {
    /// `ops`, whose times go to `profile`.
    pub fn new(ops: B, profile: Profile) -> Self {
        Self { ops, profile, n_rows: 0 }
    }

    fn other<T>(&mut self, name: &'static str, run: impl FnOnce(&mut B) -> Result<T, OpError>) -> Result<T, OpError> {
        let start = Instant::now();
        let result = run(&mut self.ops)?;
        self.ops.wait()?;
        self.profile.add_other(name, start.elapsed());
        Ok(result)
    }

    fn product<T, E: From<OpError>, const N: usize>(
        &mut self,
        name: &'static str,
        weights: [&ProfiledMatrix<B::Matrix>; N],
        run: impl FnOnce(&mut B, [&B::Matrix; N]) -> (Result<T, E>, Duration),
    ) -> Result<T, E> {
        let start = Instant::now();
        let (result, elsewhere) = run(&mut self.ops, weights.map(|weight| &weight.matrix));
        let result = result?;
        self.ops.wait()?;
        let time = start.elapsed() - elsewhere;
        let n_out = weights.iter().map(|weight| weight.shape[0]).sum();
        let n_in = weights.first().map_or(0, |weight| weight.shape[1]);
        self.profile.add(OpTime {
            name,
            shape: Some([n_out, n_in]),
            n_calls: 1,
            time,
            bytes: weights.iter().map(|weight| self.ops.matrix_bytes(&weight.matrix)).sum(),
            n_products: self.n_rows * n_out * n_in,
        });
        Ok(result)
    }
}

impl<B: Backend> Backend for Profiled<B> {
    type Tensor = B::Tensor;
    type Input = B::Input;
    type Terms = B::Terms;
    type Matrix = ProfiledMatrix<B::Matrix>;
    type Table = B::Table;
    type Logits = B::Logits;
    type Hidden = B::Hidden;
    type Started = B::Started;
    type Kv = B::Kv;

    fn load_matrix(
        &mut self,
        source: &EncodedRows<'_>,
        reduction: Option<&Reduction>,
    ) -> Result<Self::Matrix, OpError> {
        let matrix = self.ops.load_matrix(source, reduction)?;
        Ok(ProfiledMatrix { matrix, shape: [source.n_rows(), source.n_cols()] })
    }

    fn load_gated(&mut self, sources: [&EncodedRows<'_>; 2]) -> Result<[Self::Matrix; 2], OpError> {
        let shapes = sources.map(|source| [source.n_rows(), source.n_cols()]);
        let [gate, up] = self.ops.load_gated(sources)?;
        Ok([ProfiledMatrix { matrix: gate, shape: shapes[0] }, ProfiledMatrix { matrix: up, shape: shapes[1] }])
    }

    fn load_table(&mut self, table: EmbeddingTable) -> Result<B::Table, OpError> {
        self.ops.load_table(table)
    }

    fn new_kv(&mut self, shape: KvShape) -> Result<B::Kv, OpError> {
        self.ops.new_kv(shape)
    }

    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize {
        self.ops.matrix_bytes(&matrix.matrix)
    }

    fn begin(&mut self, kv: &B::Kv, batch: &Batch) -> Result<(), OpError> {
        self.other("begin", |ops| ops.begin(kv, batch))
    }

    fn send_results(
        &mut self,
        run: &mut StepRun<'_, B::Kv>,
        results: StepResults<B::Logits, B::Hidden>,
    ) -> Result<B::Started, StepError> {
        self.ops.send_results(run, results)
    }

    fn is_finished(&self, started: &B::Started) -> Result<bool, OpError> {
        self.ops.is_finished(started)
    }

    fn finish_step(
        &mut self,
        started: B::Started,
        vocab: &[Range<usize>],
        collective: &mut dyn Collective,
        out: &mut StepOutput,
    ) -> Result<(), StepError> {
        let start = Instant::now();
        self.ops.finish_step(started, vocab, collective, out)?;
        self.profile.add_other("results", start.elapsed());
        Ok(())
    }

    fn upload(&mut self, values: Vec<f32>, width: usize) -> Result<B::Tensor, OpError> {
        self.ops.upload(values, width)
    }

    fn embed(&mut self, table: &B::Table, batch: &Batch) -> Result<B::Tensor, OpError> {
        self.n_rows = batch.n_rows();
        self.other("embed", |ops| ops.embed(table, batch))
    }

    fn rms_norm(
        &mut self,
        x: &mut B::Tensor,
        terms: Option<B::Terms>,
        weight: &B::Tensor,
        eps: f32,
    ) -> Result<B::Input, OpError> {
        self.other("rms_norm", |ops| ops.rms_norm(x, terms, weight, eps))
    }

    fn matmul<const N: usize>(&mut self, weights: [&Self::Matrix; N], x: &B::Input) -> Result<[B::Tensor; N], OpError> {
        self.product("matmul", weights, |ops, weights| (ops.matmul(weights, x), Duration::ZERO))
    }

    fn logits(&mut self, weight: &Self::Matrix, x: &B::Input) -> Result<B::Logits, OpError> {
        self.product("logits", [weight], |ops, [weight]| (ops.logits(weight, x), Duration::ZERO))
    }

    fn matmul_reduce(
        &mut self,
        weight: &Self::Matrix,
        x: &B::Input,
        reduction: &Reduction,
        collective: &mut dyn Collective,
    ) -> Result<B::Terms, StepError> {
        let mut timed = Timed::new(collective);
        let result = self.product("matmul_reduce", [weight], |ops, [weight]| {
            let result = ops.matmul_reduce(weight, x, reduction, &mut timed);
            (result, timed.spent())
        });
        if timed.spent() > Duration::ZERO {
            self.profile.add_other("all_gather", timed.spent());
        }
        result
    }

    fn gated(&mut self, gate: &Self::Matrix, up: &Self::Matrix, x: &B::Input) -> Result<B::Input, OpError> {
        self.product("gated", [gate, up], |ops, [gate, up]| (ops.gated(gate, up, x), Duration::ZERO))
    }

    fn write_kv(
        &mut self,
        kv: &mut B::Kv,
        layer: usize,
        batch: &Batch,
        k: &B::Tensor,
        v: &B::Tensor,
    ) -> Result<(), OpError> {
        self.other("write_kv", |ops| ops.write_kv(kv, layer, batch, k, v))
    }

    fn attention(
        &mut self,
        q: B::Tensor,
        kv: &B::Kv,
        layer: usize,
        batch: &Batch,
        rows: Rows,
    ) -> Result<B::Input, OpError> {
        self.other("attention", |ops| ops.attention(q, kv, layer, batch, rows))
    }

    fn result_rows(&mut self, x: B::Tensor, batch: &Batch) -> Result<B::Tensor, OpError> {
        self.n_rows = batch.result_rows.len();
        self.other("result_rows", |ops| ops.result_rows(x, batch))
    }

    fn take_hidden(&mut self, x: &mut B::Tensor, batch: &Batch, rank: usize) -> Result<B::Hidden, OpError> {
        self.n_rows = batch.n_logits_rows;
        self.other("take_hidden", |ops| ops.take_hidden(x, batch, rank))
    }
}

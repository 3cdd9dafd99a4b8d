//! An exchange: how the partial sums of a row-parallel product come together over ranks, by itself, to be measured.

use std::time::{Duration, Instant};

use lockstep_collectives::{Captured, Collective, CollectiveError};
use thiserror::Error;

use super::{
    super::{CudaError, Graph, matrix::GpuSumOrder},
    Gpu, GpuTensor, GpuTerms,
};
use crate::SumOrder;

/// Planes that all ranks have of a sum, and how they are added.
#[derive(Clone, Debug)]
pub struct ExchangeShape {
    /// Rows of a plane.
    pub n_rows: usize,
    /// Columns of a plane.
    pub width: usize,
    /// Planes of each rank.
    pub n_planes: Vec<usize>,
    /// How all planes are added.
    pub order: SumOrder,
}

/// How partial sums come together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// All ranks gather all planes and add them in their order.
    Gather,
    /// NCCL adds one plane of each rank, in an order of its own.
    AllReduce,
}

/// Exchanges that are done at once, one after another, as a step does: each with the normalization that reads its sum.
#[derive(Debug)]
pub struct Exchanges<'a> {
    gpu: &'a Gpu,
    graph: Graph,
    captured: Captured,
    // What the graph works on, beside pieces of the GPU's pool.
    _terms: GpuTerms,
    _x: GpuTensor,
    _weight: GpuTensor,
}

/// Why exchanges fail.
#[derive(Debug, Error)]
pub enum ExchangeError {
    /// Between the ranks.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// On this rank's device.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

// === impl Exchanges ===

impl<'a> Exchanges<'a> {
    /// Records `n` exchanges, after doing them once. All ranks do so at the same time, with the same values.
    ///
    /// # Errors
    /// Another rank that fails or is gone; or the driver's.
    ///
    /// # Panics
    /// If the ranks do not meet by NCCL, or the planes are not those of the order.
    pub fn record(
        gpu: &'a Gpu,
        exchange: Exchange,
        shape: &ExchangeShape,
        n: usize,
        collective: &mut dyn Collective,
    ) -> Result<Self, ExchangeError> {
        let ExchangeShape { n_rows, width, ref n_planes, ref order } = *shape;
        assert_eq!(n_planes.iter().sum::<usize>(), order.n_planes(), "the planes of all ranks");
        let plane = n_rows * width;
        let mut terms = GpuTerms {
            planes: gpu.pool.take(order.n_planes() * plane)?,
            n_rows,
            width,
            order: GpuSumOrder::new(&gpu.device, order)?,
        };
        // Sums of zeros do not grow, however often they are added.
        terms.planes.upload(&vec![0.0; order.n_planes() * plane])?;
        let (mut x, mut weight) = (gpu.tensor(n_rows, width)?, gpu.tensor(1, width)?);
        x.values.upload(&vec![1.0; plane])?;
        weight.values.upload(&vec![1.0; width])?;
        let lengths: Vec<usize> = n_planes.iter().map(|n_planes| n_planes * plane).collect();
        let mut all = |collective: &mut dyn Collective| {
            for _ in 0..n {
                let mut group = collective.device().expect("ranks meet by NCCL");
                match exchange {
                    Exchange::Gather => group.all_gather(&lengths, terms.collective_slice_mut())?,
                    Exchange::AllReduce => group.all_reduce(terms.collective_slice_mut())?,
                }
                gpu.rms_norm(&mut x, Some(&terms), &weight, 1e-5)?;
            }
            Ok::<(), ExchangeError>(())
        };
        all(collective)?;
        collective.device().expect("ranks meet by NCCL").begin_capture();
        let graph = gpu.device.capture(|| all(collective))?;
        let captured = collective.device().expect("ranks meet by NCCL").end_capture();
        Ok(Self { gpu, graph, captured, _terms: terms, _x: x, _weight: weight })
    }

    /// Does them, and says how long that took after all ranks had come.
    ///
    /// # Errors
    /// As [`Exchanges::record`].
    ///
    /// # Panics
    /// If the ranks are not those of the recording.
    pub fn run(&mut self, collective: &mut dyn Collective) -> Result<Duration, ExchangeError> {
        self.gpu.device.bind()?;
        collective.barrier()?;
        let start = Instant::now();
        let mut group = collective.device().expect("ranks meet by NCCL");
        // SAFETY: what was recorded works on what is kept beside the graph and on pieces of the pool, which lasts as long as
        // the borrowed GPU does.
        group.launch(&self.captured, || unsafe { self.graph.launch() }.map_err(|error| error.to_string()))?;
        group.wait()?;
        Ok(start.elapsed())
    }
}

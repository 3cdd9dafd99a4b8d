//! Linear layers as tensor parallelism sees them: a column-parallel layer is cut by output rows and needs nothing from
//! other ranks, a row-parallel layer is cut by input columns and ends with a sum over all ranks (Megatron-LM, Shoeybi
//! et al. 2019, section 3).

use lockstep_collectives::Collective;

use super::{StepError, ops::Backend, shard::Reduction};

/// `[n_out / world, n_in]`: this rank's output rows.
#[derive(Debug)]
pub struct ColumnParallel<B: Backend> {
    pub(super) weight: B::Matrix,
}

/// `[n_out, n_in / world]`: this rank's input columns.
#[derive(Debug)]
pub struct RowParallel<B: Backend> {
    pub(super) weight: B::Matrix,
    pub(super) reduction: Reduction,
}

impl<B: Backend> RowParallel<B> {
    /// `x: [n_rows, n_in / world]` → the terms of `[n_rows, n_out]`, the same on every rank.
    pub(super) fn forward(
        &self,
        ops: &mut B,
        collective: &mut dyn Collective,
        x: &B::Input,
    ) -> Result<B::Terms, StepError> {
        ops.matmul_reduce(&self.weight, x, &self.reduction, collective)
    }
}

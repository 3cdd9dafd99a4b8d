//! The MLP: SwiGLU.

use super::{
    StepError,
    linear::{ColumnParallel, RowParallel},
    llama::Step,
    ops::Backend,
};

/// The MLP of one layer.
#[derive(Debug)]
pub struct Mlp<B: Backend> {
    pub(super) gate: ColumnParallel<B>,
    pub(super) up: ColumnParallel<B>,
    pub(super) down: RowParallel<B>,
}

impl<B: Backend> Mlp<B> {
    pub(super) fn forward(
        &self,
        step: &mut Step<'_, B>,
        x: &B::Input, // [n_rows, hidden_dim]
    ) -> Result<B::Terms, StepError> {
        let hidden = step.ops.gated(&self.gate.weight, &self.up.weight, x)?; // [n_rows, ffn_dim/world]
        self.down.forward(step.ops, step.collective, &hidden) // [n_rows, hidden_dim], terms of all ranks
    }
}

//! Attention: grouped queries over the paged cache.

use super::{
    StepError,
    batch::Rows,
    linear::{ColumnParallel, RowParallel},
    llama::Step,
    ops::Backend,
};

/// The attention of one layer. A rank has whole KV heads with all the query heads that share them.
#[derive(Debug)]
pub struct Attention<B: Backend> {
    pub(super) q: ColumnParallel<B>,
    pub(super) k: ColumnParallel<B>,
    pub(super) v: ColumnParallel<B>,
    pub(super) o: RowParallel<B>,
}

impl<B: Backend> Attention<B> {
    /// Stores the keys and values of all rows, and returns their queries, `[n_rows, n_heads/world * head_dim]`.
    pub(super) fn project(
        &self,
        step: &mut Step<'_, B>,
        layer: usize,
        x: &B::Input, // [n_rows, hidden_dim]
    ) -> Result<B::Tensor, StepError> {
        let [q, k, v] = step.ops.matmul([&self.q.weight, &self.k.weight, &self.v.weight], x)?;
        step.ops.write_kv(step.kv, layer, step.batch, &k, &v)?; // [n_rows, n_kv_heads/world * head_dim] each
        Ok(q)
    }

    /// Mixes the values that `rows` attend to: the terms of all ranks of `[n_rows, hidden_dim]`.
    pub(super) fn mix(
        &self,
        step: &mut Step<'_, B>,
        layer: usize,
        q: B::Tensor, // [n_rows, n_heads/world * head_dim]
        rows: Rows,
    ) -> Result<B::Terms, StepError> {
        let mixed = step.ops.attention(q, step.kv, layer, step.batch, rows)?;
        self.o.forward(step.ops, step.collective, &mixed)
    }
}

//! Attention: grouped queries over the paged cache.

use super::{
    StepError,
    linear::{ColumnParallel, RowParallel},
    llama::Step,
    ops::{AttentionShape, Backend},
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
    pub(super) fn forward(
        &self,
        step: &mut Step<'_, B>,
        layer: usize,
        x: &B::Tensor, // [n_rows, hidden_dim]
    ) -> Result<B::Tensor, StepError> {
        let AttentionShape { n_heads, n_kv_heads, .. } = *step.shape;
        let [mut q, mut k, v] = step.ops.matmul([&self.q.weight, &self.k.weight, &self.v.weight], x)?;
        step.ops.rope(&mut q, n_heads, &step.batch.positions)?; // [n_rows, n_heads/world * head_dim]
        step.ops.rope(&mut k, n_kv_heads, &step.batch.positions)?; // [n_rows, n_kv_heads/world * head_dim]
        step.ops.write_kv(step.kv, layer, &step.batch.slots, &k, &v)?;
        let mixed = step.ops.attention(&q, step.kv, layer, step.batch)?; // [n_rows, n_heads/world * head_dim]
        self.o.forward(step.ops, step.collective, &mixed) // [n_rows, hidden_dim], summed over ranks
    }
}

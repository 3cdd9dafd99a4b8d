//! A batch: the rows of one step, as the layers see them.

use lockstep_kernels::AttentionRow;

/// The rows of one step. Row `i` is one token of one sequence.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// `[n_rows]`
    pub token_ids: Vec<u32>,
    /// `[n_rows]`: each token's place in its sequence.
    pub positions: Vec<u32>,
    /// `[n_rows]`: where its keys and values go, `block * block_size + offset`.
    pub slots: Vec<u32>,
    /// `[n_rows]`: what each row attends to.
    pub attention: Vec<AttentionRow>,
    /// Block tables that `attention` points into: one for each sequence of the step.
    pub block_tables: Vec<Vec<u32>>,
    /// Rows that need logits, ascending.
    pub logits_rows: Vec<u32>,
    /// `[n_logits_rows]`: what each of them attends to.
    pub logits_attention: Vec<AttentionRow>,
}

impl Batch {
    /// Rows in the step.
    pub fn n_rows(&self) -> usize {
        self.token_ids.len()
    }
}

//! The embedding table, in the mapped checkpoint.

use std::sync::Arc;

use lockstep_checkpoint::Checkpoint;
use lockstep_kernels::{EncodedRows, KernelError, dequantize};

/// Rows of the vocabulary, read where they lie. Every rank needs all of them, but only a few a step: a backend that reads
/// them from host memory keeps no copy.
#[derive(Debug)]
pub struct EmbeddingTable {
    checkpoint: Arc<Checkpoint>,
    hidden_dim: usize,
}

impl EmbeddingTable {
    /// Its name.
    pub const TENSOR: &str = "token_embd.weight";

    /// `checkpoint` must have the table, `[vocab_size, hidden_dim]`, as it is in the file.
    pub(super) fn new(checkpoint: Arc<Checkpoint>, hidden_dim: usize) -> Self {
        Self { checkpoint, hidden_dim }
    }

    /// Values of a row.
    pub fn hidden_dim(&self) -> usize {
        self.hidden_dim
    }

    /// All rows.
    ///
    /// # Errors
    /// A width that rows of this encoding cannot have.
    pub fn encoded(&self) -> Result<EncodedRows<'_>, KernelError> {
        let table = self.checkpoint.tensor(Self::TENSOR).expect("it was there when the model was loaded");
        let bytes = table.mapped().expect("so were its bytes");
        EncodedRows::new(table.encoding, bytes, table.n_rows(), table.n_cols())
    }

    /// Some of the rows, `[n_ids, hidden_dim]`. Ids must be below the vocabulary's size, which the model runner has checked.
    ///
    /// # Errors
    /// As [`EmbeddingTable::encoded`].
    pub fn rows(&self, ids: impl ExactSizeIterator<Item = u32>) -> Result<Vec<f32>, KernelError> {
        let table = self.encoded()?;
        let mut out = vec![0.0; ids.len() * self.hidden_dim];
        for (id, out) in ids.zip(out.chunks_exact_mut(self.hidden_dim)) {
            dequantize(table.encoding(), table.row(id as usize), out);
        }
        Ok(out)
    }
}

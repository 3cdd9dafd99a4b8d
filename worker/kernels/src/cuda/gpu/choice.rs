//! From logits to token ids: the worker's sampler, on the device (`cuda/choose.cu`).

use bytemuck::{Pod, Zeroable};

use super::{
    super::{Arg, Buffer, CudaError},
    Gpu, GpuStep, GpuTensor,
};

/// Rows of logits of a step whose tokens are chosen, at most: more than a step has, unless it verifies many drafts.
pub const MAX_CHOICES: usize = 8192;
/// Tokens of a vocabulary, at most: twice the largest one in use. Sums of their weights, of up to 2^44 each, fit 64 bits.
pub(in crate::cuda) const MAX_VOCAB: usize = 1 << 19;

/// Threads of a block of `choose.cu`.
const THREADS: u32 = 512;
/// Its shared memory: 16 sums for each thread.
const SHARED_BYTES: u32 = 16 * THREADS * 8;

/// How the token of one row of logits is chosen: what the worker's sampler does with the same numbers, bit for bit. The
/// default takes the likeliest.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct ChoiceRule {
    /// Divides the logits. 0 (or less, or NaN) takes the likeliest token, and nothing below counts.
    pub temperature: f32,
    /// Keeps the k likeliest tokens, and what is as likely as the last of them. 0: off.
    pub top_k: u32,
    /// Keeps the smallest set of likeliest tokens that has this probability. 1: off.
    pub top_p: f32,
    /// Drops tokens less likely than this fraction of the likeliest one's probability. 0: off.
    pub min_p: f32,
    /// The number in [0, 1) that decides, times 2^53; the low word first.
    pub uniform: [u32; 2],
}

/// The vocabulary of a model whose logits were computed by one rank or several, each of which has a range of it.
#[derive(Debug)]
pub struct GpuVocab {
    /// Where the ranks' ranges end.
    ends: Buffer<u32>,
    n_tokens: usize,
}

// === impl Gpu ===

impl Gpu {
    /// Brings the ends of the ranks' ranges of the vocabulary to the device, the last of them its size.
    ///
    /// # Errors
    /// Ends that do not ascend, a vocabulary that is empty or too large; or the driver's.
    pub fn load_vocab(&self, ends: &[u32]) -> Result<GpuVocab, CudaError> {
        let n_tokens = ends.last().map_or(0, |end| *end as usize);
        if !ends.is_sorted() || !(1..=MAX_VOCAB).contains(&n_tokens) {
            return Err(CudaError::Vocab { ends: ends.to_vec() });
        }
        Ok(GpuVocab { ends: self.device.upload_new(ends)?, n_tokens })
    }

    /// Chooses the token of each row of logits by the step's rules. `logits` are `[rank][n_rows][range]`: those of one
    /// rank after those of another.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the step chooses nothing, or for other rows; or if the logits are not those of the vocabulary.
    pub fn choose(&self, logits: &GpuTensor, vocab: &GpuVocab, step: &GpuStep) -> Result<(), CudaError> {
        let n_rows = step.layout.n_choices;
        assert_eq!((logits.n_rows, logits.width), (n_rows, vocab.n_tokens), "logits of all rows that are chosen for");
        if n_rows == 0 {
            return Ok(());
        }
        let args = [
            Arg::Ptr(logits.values.pointer()),
            Arg::from(&vocab.ends),
            Arg::U32(vocab.ends.len() as u32),
            Arg::Ptr(step.at(step.layout.choices)),
            Arg::from(&self.choices),
        ];
        // SAFETY: the kernel's parameters; logits have a row for each block and a column for each token, there is a rule
        // for each row, and room for MAX_CHOICES, which `begin` held the step against.
        unsafe { self.kernels.choose.launch([n_rows as u32, 1, 1], THREADS, SHARED_BYTES, &args) }
    }

    /// What was chosen last, for the first rows, once all that is queued is done.
    ///
    /// # Errors
    /// More rows than [`MAX_CHOICES`]; the driver's, or a kernel that failed.
    pub fn download_choices(&self, n_rows: usize) -> Result<Vec<u32>, CudaError> {
        let mut choices = vec![0; n_rows];
        self.device.download(&self.choices, 0..n_rows, &mut choices)?;
        Ok(choices)
    }
}

//! Dense products: those of many rows, at the speed of bf16 tensor cores, where nobody asks for the lockstep rule.
//!
//! The weight is dequantized, some outputs at a time, and NVIDIA's library multiplies by those. So a row's bits depend on
//! how many rows there are, and weights are rounded to bf16. All that cannot be done so is done by the kernels that keep the
//! rule.

use std::sync::{Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};
use tracing::warn;

use super::{
    super::{
        Arg, Buffer, CudaError, Device, DeviceLimits,
        blas::{Blas, DenseShape},
        matrix::{GpuMatrix, MatrixArg},
        packing::TILE,
    },
    Gpu, GpuInput,
};

/// Rows from which on weights are worth dequantizing. By arithmetic, for an H100 (no GPU was at hand): a weight is written in
/// 2 bytes and read again, at worst from memory, which takes 1.2 ps at 3.35 TB/s. A row's share of it, two operations, takes
/// the library 2.5 fs at 790 Tflop/s, our kernels twice that at best: so some 480 rows win as much.
const MIN_ROWS: usize = 512;
/// Bytes of weights that are dequantized at once, so that the library reads them from the second-level cache: 50 MB on an
/// H100. It needs some for inputs and outputs.
const CHUNK_BYTES: usize = 32 << 20;
/// Bytes of weights that are dequantized at once where fewer would leave multiprocessors idle.
const MAX_CHUNK_BYTES: usize = 64 << 20;
/// Outputs and rows that a multiprocessor computes at a time, in the library's large kernels.
const BLOCK: [usize; 2] = [128, 256];
/// What outputs are multiples of, so that 16 bytes of any row are aligned.
const ALIGNED_OUTPUTS: usize = 8;

/// Threads of a block of `dequantize`, and tiles of inputs, a warp for each.
const DEQUANTIZE_THREADS: u32 = 256;
const DEQUANTIZE_TILES: usize = 8;

/// What dense products need on a device.
#[derive(Debug)]
pub(super) struct Dense {
    blas: Blas,
    /// A chunk of a weight: `[outputs, n_in]`.
    weights: Buffer<u16>,
    limits: DeviceLimits,
    chunk_bytes: usize,
}

/// `Dequantized` of `dequantize.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct DequantizedArg {
    weights: MatrixArg,
    codebook: [u32; 4],
    values: u64,
    first_tile: u32,
    padding: u32,
}

// === impl Gpu ===

impl Gpu {
    /// Lets weights that are loaded from now on multiply many rows in dense bf16, by cuBLASLt: faster, and without the
    /// lockstep rule. Where there is no such library, or it does not work, nothing changes, which is logged.
    ///
    /// # Errors
    /// There is not enough device memory: it takes 96 MiB.
    pub fn with_dense_prompts(mut self) -> Result<Self, CudaError> {
        match Dense::new(&self.device) {
            Ok(dense) => self.dense = Some(Mutex::new(dense)),
            // One for a newer driver is as good as none.
            Err(error @ (CudaError::MissingLibrary { .. } | CudaError::Blas { .. })) => {
                warn!("{error}; prompts are computed by our own kernels");
            }
            Err(error) => return Err(error),
        }
        Ok(self)
    }

    /// `x · wᵀ` in dense bf16, to `out`, which is `[n_rows, n_out]`; false if this is not for dense products.
    pub(super) fn multiply_dense(&self, weight: &GpuMatrix, x: &GpuInput, out: u64) -> Result<bool, CudaError> {
        assert_eq!(x.width, weight.n_in(), "inputs of a product");
        let Some(dense) = &self.dense else { return Ok(false) };
        // Held until all is queued: nobody else's weights may come between. What a panicking thread left is overwritten.
        dense.lock().unwrap_or_else(PoisonError::into_inner).multiply(weight, x, out)
    }

    /// Whether a product of so many rows may be a dense one.
    pub(super) fn may_be_dense(&self, n_rows: usize) -> bool {
        self.dense.is_some() && n_rows >= MIN_ROWS
    }
}

// === impl Dense ===

impl Dense {
    fn new(device: &Device) -> Result<Self, CudaError> {
        Ok(Self {
            blas: Blas::open(device)?,
            weights: device.alloc(MAX_CHUNK_BYTES / size_of::<u16>())?,
            limits: device.info().limits,
            chunk_bytes: CHUNK_BYTES,
        })
    }

    /// See [`Gpu::multiply_dense`].
    fn multiply(&mut self, weight: &GpuMatrix, x: &GpuInput, out: u64) -> Result<bool, CudaError> {
        let (n_rows, n_out, n_in) = (x.n_rows, weight.n_out(), weight.n_in());
        let Some(dequantize) = weight.dequantize() else { return Ok(false) };
        if n_rows < MIN_ROWS || weight.n_planes() != 1 || !n_out.is_multiple_of(ALIGNED_OUTPUTS) {
            return Ok(false);
        }
        let chunk = chunk_outputs(n_rows, n_in, self.chunk_bytes, self.limits);
        let Some(chunk) = chunk.filter(|chunk| chunk * n_in <= self.weights.len()) else { return Ok(false) };
        let shape = |first: usize| DenseShape { n_rows, n_out: chunk.min(n_out - first), n_in, stride: n_out };
        // Chunks but the last are alike.
        let last = (n_out - 1) / chunk * chunk;
        if !self.blas.can(shape(0))? || !self.blas.can(shape(last))? {
            return Ok(false);
        }
        for first in (0..n_out).step_by(chunk) {
            let shape = shape(first);
            let dequantized = DequantizedArg {
                weights: weight.arg(),
                codebook: weight.form().codebook_words(),
                values: self.weights.pointer(),
                first_tile: (first / TILE) as u32,
                padding: 0,
            };
            let grid = [(n_in / TILE).div_ceil(DEQUANTIZE_TILES) as u32, shape.n_out.div_ceil(TILE) as u32, 1];
            let out = out + (first * size_of::<f32>()) as u64;
            // SAFETY: the kernel's parameter: the chunk's tiles are the weight's, and there is room for its outputs.
            unsafe { dequantize.launch(grid, DEQUANTIZE_THREADS, 0, &[Arg::of(&dequantized)])? };
            // SAFETY: weights, inputs and outputs have this shape, and what frees them comes behind it on the stream.
            unsafe { self.blas.multiply(shape, self.weights.pointer(), x.values.pointer(), out)? };
        }
        Ok(true)
    }
}

/// Outputs whose weights are dequantized at once: as many as `chunk_bytes` hold, but enough for all multiprocessors to have a
/// block, and whole rounds of them; `None` if not even one block's fit.
fn chunk_outputs(n_rows: usize, n_in: usize, chunk_bytes: usize, limits: DeviceLimits) -> Option<usize> {
    let [block_outputs, block_rows] = BLOCK;
    let blocks_that_fit = |n_bytes: usize| n_bytes / (n_in * size_of::<u16>() * block_outputs);
    let round = (limits.n_multiprocessors as usize / n_rows.div_ceil(block_rows)).max(1);
    let blocks = (blocks_that_fit(chunk_bytes) / round).max(1) * round;
    let blocks = blocks.min(blocks_that_fit(MAX_CHUNK_BYTES));
    (blocks > 0).then_some(blocks * block_outputs)
}

#[cfg(test)]
mod tests {
    use lockstep_checkpoint::Encoding;

    use super::*;
    use crate::{
        EncodedRows, RopeStyle, RopeTable,
        cuda::{GpuHeads, KernelCache},
    };

    #[test]
    fn chunks_fill_the_cache_and_the_multiprocessors() {
        let h100 = DeviceLimits { n_multiprocessors: 132, shared_bytes_per_block: 227 << 10, l2_bytes: 50 << 20 };
        for (n_rows, n_in, expected) in [
            (4096, 4096, Some(4096)),
            // Half as many rows want twice as many outputs, though they go beyond the cache.
            (4096, 14_336, Some(1024)),
            (2048, 14_336, Some(2048)),
            (2048, 4096, Some(4096)),
            // As many as there is room for, if not for all multiprocessors.
            (512, 14_336, Some(2304)),
            // More blocks of rows than multiprocessors.
            (65_536, 4096, Some(4096)),
            (512, 1 << 20, None),
        ] {
            assert_eq!(chunk_outputs(n_rows, n_in, CHUNK_BYTES, h100), expected, "{n_rows} rows of {n_in}");
        }
    }

    /// A GPU with dense products, a weight of `n_out` outputs and inputs of as many rows as it takes.
    fn product(n_out: usize, n_in: usize) -> (Gpu, GpuMatrix, GpuInput) {
        lockstep_cuda_emulator::load_into_this_process().unwrap();
        let cache = lockstep_cuda_emulator::build().unwrap().join("kernels");
        let device = Device::open(0, KernelCache::new(Some(cache))).unwrap();
        let rope = RopeTable::new(64, 64, 10_000.0, None, 100, RopeStyle::Adjacent).unwrap();
        let gpu = Gpu::new(device, GpuHeads { n_heads: 2, n_kv_heads: 1, head_dim: 64 }, &rope).unwrap();
        let gpu = gpu.with_dense_prompts().unwrap();
        let values = |n: usize| (0..n as u32).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 20) as f32 / 4096.0 - 0.5);
        let bytes: Vec<u8> = values(n_out * n_in).flat_map(f32::to_le_bytes).collect();
        let source = EncodedRows::new(Encoding::F32, &bytes, n_out, n_in).unwrap();
        let weight = gpu.load_matrix(&source, None).unwrap();
        let x = gpu.upload_input(&values(MIN_ROWS * n_in).collect::<Vec<_>>(), n_in).unwrap();
        (gpu, weight, x)
    }

    fn multiply(gpu: &Gpu, weight: &GpuMatrix, x: &GpuInput) -> Vec<f32> {
        let [out] = gpu.matmul([weight], x).unwrap();
        let mut found = Vec::new();
        gpu.download(&out, &mut found).unwrap();
        found
    }

    #[test]
    fn chunks_make_up_the_whole() {
        let (gpu, weight, x) = product(2 * BLOCK[0] + 40, 64);
        let whole = multiply(&gpu, &weight, &x);
        gpu.dense.as_ref().unwrap().lock().unwrap().chunk_bytes = 1;
        // What the whole has left there is of no use to chunks.
        assert_eq!(multiply(&gpu, &weight, &x), whole);
        let dense = gpu.dense.as_ref().unwrap().lock().unwrap();
        assert_eq!(dense.blas.n_plans(), 3, "one for the whole, one for its first chunks, one for its last");
    }

    #[test]
    fn dense_products_are_part_of_a_graph() {
        let (gpu, weight, x) = product(64, 96);
        let expected = multiply(&gpu, &weight, &x);
        let mut out = None;
        let mut graph = gpu
            .device
            .capture(|| {
                out = Some(gpu.matmul([&weight], &x)?);
                Ok::<(), CudaError>(())
            })
            .unwrap();
        let [mut out] = out.unwrap();
        for _ in 0..2 {
            out.values.upload(&vec![0.0; expected.len()]).unwrap();
            // SAFETY: weight, inputs and outputs are still there.
            unsafe { graph.launch() }.unwrap();
            let mut found = Vec::new();
            gpu.download(&out, &mut found).unwrap();
            assert_eq!(found, expected);
        }
    }
}

//! The CPU: a pool of threads and an instruction set, with every op as a method.
//!
//! Activations are f32, row-major `[n_rows, width]`. Each output element depends only on its own row's inputs, is
//! summed in one fixed order, and has the same bits for any number of rows in the call, any number of threads and any
//! [`Isa`]; the modules of the ops state the order.

pub(crate) mod activations;
pub(crate) mod attention;
mod elementwise;
mod matmul;
mod pool;
mod shared_slice;
mod simd;
mod write_kv;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

pub use attention::AttentionRow;

use activations::{ActivationBlock, QuantizeRows, STRIP};
use attention::{HeadTimesRows, MAX_QUERIES};
use elementwise::{Add, RmsNorm, Rope, SiluMul};
use matmul::{Inputs, PanelsTimesRows};
use pool::Pool;
use shared_slice::SharedSlice;
use simd::{Kernel, Portable, Simd};
use write_kv::WriteHeads;

use crate::packed::{BLOCK, PackedMatrix};
use crate::{KernelError, KvCache, RopeTable};

/// Elements that an elementwise task should have at least, so that it outweighs being handed to another thread.
const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Bytes of weights that a product's task should have at least, for the same reason.
const WEIGHT_BYTES_PER_TASK: usize = 8 * 1024;

/// Rows of a product that are taken through all panels together: their quantized inputs stay in the second-level cache
/// while the weights stream by.
const ACTIVATION_BYTES_PER_PASS: usize = 512 * 1024;

/// Rows of a prompt that go through attention together, at most: with them, the queries of any number of heads fill the
/// kernel's width.
const ROWS_PER_RUN: usize = 8;

/// Products that may share an input in one call: query, key and value, or gate and up.
pub const MAX_PRODUCTS: usize = 4;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Any processor.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
}

/// An [`Isa`] whose instructions this processor has.
#[derive(Clone, Copy, Debug)]
enum Detected {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
}

/// The threads and the instruction set that ops run on, and the scratch memory they keep between calls.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    isa: Detected,
    /// Quantized inputs of the product at hand.
    blocks: Vec<ActivationBlock>,
    /// Runs of rows that go through attention together.
    runs: Vec<Range<usize>>,
}

/// A product of a call that multiplies one input with several matrices.
#[derive(Debug)]
pub struct Product<'a> {
    /// The weights, `[n_out, n_in]`.
    pub weights: &'a PackedMatrix,
    /// `[n_partials, n_rows, n_out]`.
    pub out: &'a mut [f32],
}

// === impl Isa ===

impl Isa {
    /// Every instruction set, the slowest first.
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Avx2, Isa::Avx512];

    /// Whether this processor has it.
    pub fn is_supported(self) -> bool {
        Detected::new(self).is_some()
    }

    /// The fastest that this processor has.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rfind(|isa| isa.is_supported()).unwrap_or(Isa::Portable)
    }
}

// === impl Detected ===

impl Detected {
    #[cfg(target_arch = "x86_64")]
    fn new(isa: Isa) -> Option<Self> {
        match isa {
            Isa::Portable => Some(Self::Portable(Portable)),
            Isa::Avx2 => x86::Avx2::detect().map(Self::Avx2),
            Isa::Avx512 => x86::Avx512::detect().map(Self::Avx512),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn new(isa: Isa) -> Option<Self> {
        (isa == Isa::Portable).then_some(Self::Portable(Portable))
    }

    fn isa(self) -> Isa {
        match self {
            Self::Portable(_) => Isa::Portable,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => Isa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => Isa::Avx512,
        }
    }

    fn run(self, kernel: impl Kernel) {
        match self {
            Self::Portable(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.vectorize(kernel),
        }
    }

    fn multiply(self, task: &PanelsTimesRows<'_>) {
        match self {
            Self::Portable(simd) => task.run(simd),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => task.run(simd),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => task.run(simd),
        }
    }
}

// === impl Cpu ===

impl Cpu {
    /// `n_threads` threads, the caller being one of them, and the fastest instruction set that there is.
    ///
    /// # Panics
    /// If `n_threads` is 0 or over 1024, or the system refuses a thread.
    pub fn new(n_threads: usize) -> Self {
        Self::with_isa(n_threads, Isa::best()).expect("the best instruction set is there")
    }

    /// As [`Cpu::new`], with a given instruction set.
    ///
    /// # Errors
    /// If this processor lacks it.
    ///
    /// # Panics
    /// As [`Cpu::new`].
    pub fn with_isa(n_threads: usize, isa: Isa) -> Result<Self, KernelError> {
        let isa = Detected::new(isa).ok_or(KernelError::UnsupportedIsa { isa })?;
        Ok(Self { pool: Pool::new(n_threads), isa, blocks: Vec::new(), runs: Vec::new() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa.isa()
    }

    /// Threads, the caller included.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// `out = x * weights^T`: `x` is `[n_rows, n_in]`, `out` `[n_partials, n_rows, n_out]`. For quantized weights, `x` is
    /// quantized to 8 bits per row and block of 32 first.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn matmul(&mut self, weights: &PackedMatrix, x: &[f32], n_rows: usize, out: &mut [f32]) {
        self.matmul_many(x, n_rows, &mut [Product { weights, out }]);
    }

    /// Several products of one input, which is quantized once: as [`Cpu::matmul`] for each.
    ///
    /// # Panics
    /// If a slice has another length, the matrices differ in `n_in`, or there are more than [`MAX_PRODUCTS`].
    pub fn matmul_many(&mut self, x: &[f32], n_rows: usize, products: &mut [Product<'_>]) {
        assert!(products.len() <= MAX_PRODUCTS, "{} products", products.len());
        for product in products.iter() {
            let weights = product.weights;
            assert_eq!(x.len(), n_rows * weights.n_in(), "inputs of {n_rows} rows");
            let out_len = weights.n_partials() * n_rows * weights.n_out();
            assert_eq!(product.out.len(), out_len, "outputs of {n_rows} rows");
        }
        if n_rows == 0 {
            return;
        }
        let mut blocks = std::mem::take(&mut self.blocks);
        if products.iter().any(|product| product.weights.is_quantized()) {
            self.quantize(x, n_rows, &mut blocks);
        }
        self.multiply(Inputs { values: x, blocks: &blocks, n_rows }, products);
        self.blocks = blocks;
    }

    fn quantize(&mut self, x: &[f32], n_rows: usize, blocks: &mut Vec<ActivationBlock>) {
        let n_blocks = x.len() / BLOCK;
        blocks.resize(n_blocks, ActivationBlock::default());
        let blocks = SharedSlice::new(&mut blocks[..]);
        let isa = self.isa;
        let quantize = |range| isa.run(QuantizeRows { values: x, n_rows, blocks, range });
        self.divide(n_blocks, ELEMENTS_PER_TASK / BLOCK, &quantize);
    }

    fn multiply(&mut self, inputs: Inputs<'_>, products: &mut [Product<'_>]) {
        let isa = self.isa;
        let mut n_tasks = 0;
        let mut grids: [Option<Grid<'_>>; MAX_PRODUCTS] = [const { None }; MAX_PRODUCTS];
        for (grid, product) in grids.iter_mut().zip(products) {
            let out = SharedSlice::new(&mut *product.out);
            let grid = grid.insert(Grid::new(product.weights, inputs.n_rows, n_tasks, out));
            n_tasks += grid.n_tasks();
        }
        self.pool.run(n_tasks, &|task_idx| {
            let grid = grids.iter().flatten().rfind(|grid| grid.first_task <= task_idx).expect("the first begins at 0");
            let (rows, panels) = grid.task(task_idx - grid.first_task);
            isa.multiply(&PanelsTimesRows { matrix: grid.matrix, inputs, panels, rows, out: grid.out });
        });
    }

    /// Copies the rows `ids` of an embedding table, exactly dequantized, to `out`, `[ids.len(), n_in]`.
    ///
    /// # Panics
    /// If an id is not below the table's `n_out`, or `out` has another length.
    pub fn embed(&mut self, table: &PackedMatrix, ids: &[u32], out: &mut [f32]) {
        let width = table.n_in();
        self.by_rows(ids.len(), width, out, |rows, out| {
            for (id, out) in ids[rows].iter().zip(out.chunks_exact_mut(width)) {
                table.dequantize_row(*id as usize, out);
            }
        });
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row: `x` and `out` are `[n_rows, weight.len()]`.
    ///
    /// # Panics
    /// If a slice has another length.
    pub fn rms_norm(&mut self, x: &[f32], weight: &[f32], eps: f32, n_rows: usize, out: &mut [f32]) {
        let (isa, width) = (self.isa, weight.len());
        assert_eq!(x.len(), n_rows * width, "{n_rows} rows");
        self.by_rows(n_rows, width, out, |rows, out| {
            isa.run(RmsNorm { x: &x[rows.start * width..rows.end * width], weight, eps, out });
        });
    }

    /// `acc += x`, element by element.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn add(&mut self, x: &[f32], acc: &mut [f32]) {
        let isa = self.isa;
        assert_eq!(x.len(), acc.len(), "terms of a sum");
        self.by_rows(x.len(), 1, acc, |range, acc| isa.run(Add { x: &x[range], acc }));
    }

    /// Turns every head of `x`, `[positions.len(), n_heads, head_dim]`, to its row's position.
    ///
    /// # Panics
    /// If `x` has another length or a position is not below the table's `max_position`.
    pub fn rope(&mut self, x: &mut [f32], n_heads: usize, table: &RopeTable, positions: &[u32]) {
        let isa = self.isa;
        self.by_rows(positions.len(), n_heads * table.head_dim(), x, |rows, x| {
            isa.run(Rope { x, n_heads, table, positions: &positions[rows] });
        });
    }

    /// `out = silu(gate) * up`, element by element, with `silu(g) = g / (1 + e^-g)`.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn silu_mul(&mut self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        let isa = self.isa;
        assert!(gate.len() == out.len() && up.len() == out.len(), "gate, up and out");
        self.by_rows(out.len(), 1, out, |range, out| {
            isa.run(SiluMul { gate: &gate[range.clone()], up: &up[range], out });
        });
    }

    /// Writes the keys and values of `slots.len()` tokens, `[slots.len(), n_kv_heads, head_dim]` each, to their slots.
    ///
    /// # Panics
    /// If a slice has another length, or `layer` or a slot does not exist.
    pub fn write_kv(&mut self, cache: &mut KvCache, layer: usize, slots: &[u32], k: &[f32], v: &[f32]) {
        let width = cache.n_kv_heads() * cache.head_dim();
        assert!(k.len() == slots.len() * width && v.len() == k.len(), "keys and values of {} tokens", slots.len());
        let (isa, layout) = (self.isa, cache.layout());
        let bits = SharedSlice::new(cache.bits_mut());
        let heads_per_task = ELEMENTS_PER_TASK.div_ceil((slots.len() * layout.head_dim).max(1));
        self.divide(layout.n_kv_heads, heads_per_task, &|heads| {
            isa.run(WriteHeads { layout, bits, layer, heads, slots, k, v });
        });
    }

    /// Causal attention of every row of `q`, `[rows.len(), n_heads, head_dim]`, to its sequence's cached positions.
    /// `tables` hold each sequence's blocks, those of positions 0 on first; scores are divided by `sqrt(head_dim)`. Query
    /// heads share the KV heads in equal runs. `out` is shaped as `q`.
    ///
    /// # Panics
    /// If a slice has another length, `n_heads` is not a multiple of the cache's, or a row points to a table, block or
    /// position that does not exist.
    pub fn attention(&mut self, q: &[f32], batch: &AttentionBatch<'_>, out: &mut [f32]) {
        let AttentionBatch { cache, layer, rows, tables, n_heads } = *batch;
        let n_kv_heads = cache.n_kv_heads();
        assert!(n_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads over {n_kv_heads} of the cache");
        assert_eq!(q.len(), rows.len() * n_heads * cache.head_dim(), "queries");
        assert_eq!(out.len(), q.len(), "outputs");
        let mut runs = std::mem::take(&mut self.runs);
        let rows_per_run = (MAX_QUERIES / (n_heads / n_kv_heads)).clamp(1, ROWS_PER_RUN);
        find_runs(rows, rows_per_run, &mut runs);
        let (isa, out) = (self.isa, SharedSlice::new(out));
        self.pool.run(runs.len() * n_kv_heads, &|task_idx| {
            // The last runs of a prompt are the longest: they go first.
            let rows_of_task = runs[runs.len() - 1 - task_idx / n_kv_heads].clone();
            let table = tables[rows[rows_of_task.start].table];
            let kv_head = task_idx % n_kv_heads;
            isa.run(HeadTimesRows {
                cache,
                layer,
                kv_head,
                n_heads,
                q,
                all_rows: rows,
                rows: rows_of_task,
                table,
                out,
            });
        });
        self.runs = runs;
    }

    /// Runs `task` on runs of rows that together cover `out`, `[n_rows, width]`, each with its part of `out`.
    fn by_rows(
        &mut self,
        n_rows: usize,
        width: usize,
        out: &mut [f32],
        task: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) {
        assert_eq!(out.len(), n_rows * width, "{n_rows} rows of {width}");
        let out = SharedSlice::new(out);
        self.divide(n_rows, ELEMENTS_PER_TASK.div_ceil(width.max(1)), &|rows| {
            // SAFETY: `divide` gives every task rows of its own.
            let out = unsafe { out.part(rows.start * width..rows.end * width) };
            task(rows, out);
        });
    }

    /// Divides `0..n` into ranges of at least `n_min` (but for the last) and runs `task` on each.
    fn divide(&mut self, n: usize, n_min: usize, task: &(dyn Fn(Range<usize>) + Sync)) {
        let per_task = n.div_ceil(self.n_threads()).max(n_min).max(1);
        self.pool.run(n.div_ceil(per_task), &|task_idx| task(task_idx * per_task..n.min((task_idx + 1) * per_task)));
    }
}

/// What attention reads besides the queries.
#[derive(Clone, Copy, Debug)]
pub struct AttentionBatch<'a> {
    /// Keys and values, those of the rows themselves included.
    pub cache: &'a KvCache,
    /// Layer of the cache.
    pub layer: usize,
    /// One for each row of queries. Rows of one sequence should be neighbours.
    pub rows: &'a [AttentionRow],
    /// Block tables, one for each sequence.
    pub tables: &'a [&'a [u32]],
    /// Query heads.
    pub n_heads: usize,
}

/// Neighbouring rows of one sequence, at most `max_len` to a run.
fn find_runs(rows: &[AttentionRow], max_len: usize, runs: &mut Vec<Range<usize>>) {
    runs.clear();
    for (row_idx, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if rows[run.start].table == row.table && run.len() < max_len => run.end = row_idx + 1,
            _ => runs.push(row_idx..row_idx + 1),
        }
    }
}

/// A product's tasks: passes over its rows, and within a pass runs of panels.
struct Grid<'a> {
    matrix: &'a PackedMatrix,
    n_rows: usize,
    out: SharedSlice<'a, f32>,
    /// Number of this grid's first task among those of all products.
    first_task: usize,
    rows_per_task: usize,
    panels_per_task: usize,
}

// === impl Grid ===

impl<'a> Grid<'a> {
    fn new(matrix: &'a PackedMatrix, n_rows: usize, first_task: usize, out: SharedSlice<'a, f32>) -> Self {
        let row_bytes = matrix.n_in() / BLOCK * size_of::<ActivationBlock>();
        let rows_per_task = (ACTIVATION_BYTES_PER_PASS / row_bytes.max(1)).next_multiple_of(STRIP);
        let panel_bytes = matrix.size_bytes() / matrix.n_panels();
        // With many rows, a small run of panels is work enough.
        let work = panel_bytes.max(1) * n_rows.min(rows_per_task).div_ceil(4).max(1);
        let panels_per_task = (WEIGHT_BYTES_PER_TASK / work).max(1);
        Self { matrix, n_rows, out, first_task, rows_per_task, panels_per_task }
    }

    fn n_runs(&self) -> usize {
        self.matrix.n_panels().div_ceil(self.panels_per_task)
    }

    fn n_tasks(&self) -> usize {
        self.n_rows.div_ceil(self.rows_per_task) * self.n_runs()
    }

    /// Rows and panels of a task.
    fn task(&self, task_idx: usize) -> (Range<usize>, Range<usize>) {
        let part = |idx: usize, len: usize, end: usize| idx * len..end.min((idx + 1) * len);
        let rows = part(task_idx / self.n_runs(), self.rows_per_task, self.n_rows);
        let panels = part(task_idx % self.n_runs(), self.panels_per_task, self.matrix.n_panels());
        (rows, panels)
    }
}

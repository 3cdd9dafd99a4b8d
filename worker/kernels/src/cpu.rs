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
pub(crate) mod simd;
mod write_kv;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::marker::PhantomData;
use std::ops::Range;

pub use activations::{Activations, Forms};
pub use attention::AttentionRow;

use activations::{ActivationBlock, Quantize, STRIP};
use attention::{Attend, HeadTimesRows, MAX_QUERIES, MergeParts, Parts, SCORES, SPLIT};
use elementwise::RmsNorm;
use matmul::{GatedRows, Multiplication, Outputs, PanelsTimesRows};
use pool::Pool;
use shared_slice::SharedSlice;
use simd::{Kernel, Portable, Simd};
use write_kv::WriteHeads;

use crate::kv_cache::Code;
use crate::packed::{BLOCK, PackedMatrix};
use crate::{KernelError, KvCache, KvEncoding, RopeTable, Terms};

/// Elements that an elementwise task should have at least, so that it outweighs being handed to another thread.
const ELEMENTS_PER_TASK: usize = 4 * 1024;

/// Bytes of weights that a product's task should have at least, for the same reason.
const WEIGHT_BYTES_PER_TASK: usize = 8 * 1024;

/// Runs of panels that a product is divided into at most, for the same reason: enough for threads to help each other out.
const MAX_RUNS: usize = 256;

/// Rows of a product that are taken through all panels together: their quantized inputs stay in the second-level cache
/// while the weights stream by.
const ACTIVATION_BYTES_PER_PASS: usize = 512 * 1024;

/// Rows of a prompt that go through attention together, at most: with them, the queries of any number of heads fill the
/// kernel's width.
const ROWS_PER_RUN: usize = 8;

/// Tasks of attention that a thread should have at least; with fewer, threads share splits.
const TASKS_PER_THREAD: usize = 4;

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
    /// As `Avx512`, with AMX tiles of 8-bit integers.
    Amx,
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
    /// Runs of rows that go through attention together.
    runs: Vec<Range<usize>>,
    /// Splits that are not merged yet.
    parts: Vec<f32>,
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
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx];

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
            Isa::Amx => Some(Self::Avx512(x86::Avx512::detect()?.with_tiles(x86::Tiles::detect()?))),
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
            Self::Avx512(simd) if simd.has_tiles() => Isa::Amx,
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

    fn gate(self, task: &GatedRows<'_>) {
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
        Ok(Self::with_detected(n_threads, isa))
    }

    /// As [`Cpu::with_isa`] with [`Isa::Amx`] where only the tiles are missing, for tests that emulate them.
    ///
    /// # Errors
    /// If this processor lacks AVX-512.
    ///
    /// # Panics
    /// As [`Cpu::new`].
    ///
    /// # Safety
    /// From now on, whichever thread of this process comes to an AMX instruction, something must execute it.
    #[cfg(target_arch = "x86_64")]
    pub unsafe fn with_emulated_tiles(n_threads: usize) -> Result<Self, KernelError> {
        let simd = x86::Avx512::detect().ok_or(KernelError::UnsupportedIsa { isa: Isa::Amx })?;
        // SAFETY: the caller's promise.
        let tiles = unsafe { x86::Tiles::promised() };
        Ok(Self::with_detected(n_threads, Detected::Avx512(simd.with_tiles(tiles))))
    }

    fn with_detected(n_threads: usize, isa: Detected) -> Self {
        Self { pool: Pool::new(n_threads), isa, runs: Vec::new(), parts: Vec::new() }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa.isa()
    }

    /// Threads, the caller included.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// Takes values `[n_rows, width]` in as inputs of products.
    ///
    /// # Panics
    /// If the values are no whole number of rows, or rows that are to be quantized no whole number of blocks of 32.
    pub fn quantize(&mut self, values: &[f32], width: usize, out: &mut Activations) {
        let isa = self.isa;
        assert!(width > 0 && values.len().is_multiple_of(width), "{} values in rows of {width}", values.len());
        let out = out.reshape(values.len() / width, width);
        let n_parts = values.len() / width * out.n_parts();
        self.divide(n_parts, ELEMENTS_PER_TASK / BLOCK, &|parts| isa.run(Quantize { values, out, parts }));
    }

    /// `out = x * weights^T`, `[n_partials, n_rows, n_out]`.
    ///
    /// # Panics
    /// If `out` has another length, or `x` another width than `n_in` or not the form that the weights read.
    pub fn matmul(&mut self, weights: &PackedMatrix, x: &Activations, out: &mut [f32]) {
        self.matmul_many(x, &mut [Product { weights, out }]);
    }

    /// Several products of one input: as [`Cpu::matmul`] for each.
    ///
    /// # Panics
    /// As [`Cpu::matmul`], or if there are more than [`MAX_PRODUCTS`].
    pub fn matmul_many(&mut self, x: &Activations, products: &mut [Product<'_>]) {
        assert!(products.len() <= MAX_PRODUCTS, "{} products", products.len());
        let isa = self.isa;
        let mut n_tasks = 0;
        let mut grids: [Option<Grid<'_>>; MAX_PRODUCTS] = [const { None }; MAX_PRODUCTS];
        for (grid, product) in grids.iter_mut().zip(products) {
            check_input(product.weights, x);
            let (n_rows, width) = (x.n_rows(), product.weights.n_out());
            assert_eq!(product.out.len(), product.weights.n_partials() * n_rows * width, "outputs of {n_rows} rows");
            let values = SharedSlice::new(&mut *product.out);
            let out = Outputs { values, n_rows, width, first_row: 0, first_out: 0 };
            let product = Multiplication { matrix: product.weights, x, out };
            let division = Division::new(product.matrix, n_rows, 1);
            n_tasks += grid.insert(Grid { product, division, first_task: n_tasks }).division.n_tasks();
        }
        self.pool.run(n_tasks, &|task_idx| {
            let grid = grids.iter().flatten().rfind(|grid| grid.first_task <= task_idx).expect("the first begins at 0");
            let (rows, panels) = grid.division.task(task_idx - grid.first_task);
            isa.multiply(&PanelsTimesRows { product: grid.product, panels, rows });
        });
    }

    /// The first half of a gated MLP: `out = silu(x * gate^T) * (x * up^T)`, element by element, `[n_rows, n_out]`, with
    /// `silu(g) = g / (1 + e^-g)`.
    ///
    /// # Panics
    /// If the matrices differ in shape or have several partial planes, or `x` has another width than `n_in` or not the
    /// forms that they read.
    pub fn gated(&mut self, gate: &PackedMatrix, up: &PackedMatrix, x: &Activations, out: &mut Activations) {
        assert!(gate.n_out() == up.n_out() && gate.n_partials() == 1 && up.n_partials() == 1, "gate and up");
        check_input(gate, x);
        check_input(up, x);
        let isa = self.isa;
        let division = Division::new(gate, x.n_rows(), 2);
        let out = out.reshape(x.n_rows(), gate.n_out());
        self.pool.run(division.n_tasks(), &|task_idx| {
            let (rows, pairs) = division.task(task_idx);
            isa.gate(&GatedRows { gate, up, x, pairs, rows, out });
        });
    }

    /// Adds `terms`, planes of the shape of `x`, to `x`, `[n_rows, weight.len()]`, if there are any; then
    /// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row.
    ///
    /// # Panics
    /// If a slice has another length, or rows are to be quantized that are no whole number of blocks of 32.
    pub fn rms_norm(
        &mut self,
        x: &mut [f32],
        terms: Option<Terms<'_>>,
        weight: &[f32],
        eps: f32,
        out: &mut Activations,
    ) {
        let (isa, width) = (self.isa, weight.len());
        assert!(width > 0 && x.len().is_multiple_of(width), "{} values in rows of {width}", x.len());
        if let Some(terms) = terms {
            assert_eq!(terms.planes.len(), terms.order.n_planes() * x.len(), "terms of a sum");
        }
        let n_rows = x.len() / width;
        let out = out.reshape(n_rows, width);
        self.by_rows(n_rows, width, x, |rows, x| isa.run(RmsNorm { x, rows, terms, weight, eps, out }));
    }

    /// Turns the keys of `slots.len()` tokens, `[slots.len(), n_kv_heads, head_dim]`, to their positions, and writes them
    /// and the values, of the same shape, to their slots.
    ///
    /// # Panics
    /// If a slice has another length, or `layer`, a slot or a position does not exist.
    pub fn write_kv(&mut self, cache: &mut KvCache, tokens: &NewTokens<'_>, k: &[f32], v: &[f32]) {
        match cache.encoding() {
            KvEncoding::F16 => self.write_codes::<u16>(cache, tokens, k, v),
            KvEncoding::Int8 => self.write_codes::<i8>(cache, tokens, k, v),
        }
    }

    fn write_codes<C: Code>(&mut self, cache: &mut KvCache, tokens: &NewTokens<'_>, k: &[f32], v: &[f32]) {
        let NewTokens { layer, slots, positions, rope } = *tokens;
        let width = cache.n_kv_heads() * cache.head_dim();
        assert!(positions.len() == slots.len() && rope.head_dim() == cache.head_dim(), "positions of every token");
        assert!(k.len() == slots.len() * width && v.len() == k.len(), "keys and values of {} tokens", slots.len());
        let (isa, layout) = (self.isa, cache.layout());
        let (words, code) = (SharedSlice::new(cache.words_mut()), PhantomData::<C>);
        let heads_per_task = ELEMENTS_PER_TASK.div_ceil((slots.len() * layout.head_dim).max(1));
        self.divide(layout.n_kv_heads, heads_per_task, &|heads| {
            isa.run(WriteHeads { layout, words, code, layer, heads, slots, positions, rope, k, v });
        });
    }

    /// Turns every row of `q`, `[rows.len(), n_heads, head_dim]`, to its position, in place; then causal attention of each
    /// to its sequence's cached positions. `tables` hold each sequence's blocks, those of positions 0 on first; scores are divided by `sqrt(head_dim)`. Query
    /// heads share the KV heads in equal runs. `out` is shaped as `q`.
    ///
    /// # Panics
    /// If a slice has another length, `n_heads` is not a multiple of the cache's, or a row points to a table, block or
    /// position that does not exist.
    pub fn attention(&mut self, q: &mut [f32], batch: &AttentionBatch<'_>, out: &mut [f32]) {
        match batch.cache.encoding() {
            KvEncoding::F16 => self.attend::<u16>(q, batch, out),
            KvEncoding::Int8 => self.attend::<i8>(q, batch, out),
        }
    }

    fn attend<C: Code>(&mut self, q: &mut [f32], batch: &AttentionBatch<'_>, out: &mut [f32]) {
        let AttentionBatch { cache, layer, rows, tables, n_heads, rope } = *batch;
        let n_kv_heads = cache.n_kv_heads();
        assert!(n_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads over {n_kv_heads} of the cache");
        assert_eq!(q.len(), rows.len() * n_heads * cache.head_dim(), "queries");
        assert!(out.len() == q.len() && rope.head_dim() == cache.head_dim(), "outputs");
        let mut runs = std::mem::take(&mut self.runs);
        let rows_per_run = (MAX_QUERIES / (n_heads / n_kv_heads)).clamp(1, ROWS_PER_RUN);
        find_runs(rows, rows_per_run, &mut runs);
        let n_splits = rows.iter().map(|row| row.position as usize / SPLIT + 1).max().unwrap_or(0);
        let n_tasks = runs.len() * n_kv_heads;
        // The threads' shares of few tasks would be uneven.
        let by_splits = n_splits > 1 && self.n_threads() > 1 && n_tasks < TASKS_PER_THREAD * self.n_threads();
        if by_splits {
            turn_queries(q, batch);
        }
        let (isa, q, out) = (self.isa, SharedSlice::new(q), SharedSlice::new(out));
        let task = |task_idx: usize| {
            // The last runs of a prompt are the longest: they go first.
            let rows_of_task = runs[runs.len() - 1 - task_idx / n_kv_heads].clone();
            let table = &tables[rows[rows_of_task.start].table];
            let kv_head = task_idx % n_kv_heads;
            let (all_rows, rows, code) = (rows, rows_of_task, PhantomData::<C>);
            HeadTimesRows { cache, code, layer, kv_head, n_heads, rope, q, all_rows, rows, table, out }
        };
        let attend = |task_idx: usize, part| {
            let task = task(task_idx);
            SCORES.with_borrow_mut(|scores| isa.run(Attend { task, part, scores }));
        };
        if by_splits {
            let n_queries = rows.len() * n_heads;
            let parts = Parts::new(n_queries, cache.head_dim(), n_splits, &mut self.parts);
            self.pool.run(n_tasks * n_splits, &|idx| attend(idx / n_splits, Some((idx % n_splits, parts))));
            self.pool.run(n_tasks, &|task_idx| isa.run(MergeParts { task: task(task_idx), parts }));
        } else {
            self.pool.run(n_tasks, &|task_idx| attend(task_idx, None));
        }
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
    pub tables: &'a [Vec<u32>],
    /// Query heads.
    pub n_heads: usize,
    /// How queries turn with their positions.
    pub rope: &'a RopeTable,
}

/// Tokens whose keys and values are written.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a> {
    /// Layer of the cache.
    pub layer: usize,
    /// Where each goes.
    pub slots: &'a [u32],
    /// Each token's place in its sequence.
    pub positions: &'a [u32],
    /// How keys turn with their positions.
    pub rope: &'a RopeTable,
}

/// Panics if `x` cannot be multiplied with `weights`.
fn check_input(weights: &PackedMatrix, x: &Activations) {
    assert_eq!(x.width(), weights.n_in(), "inputs of a product");
    let is_there = if weights.is_quantized() { !x.blocks().is_empty() } else { !x.values().is_empty() };
    assert!(is_there || x.n_rows() == 0, "inputs in the form that weights read");
}

/// Turns all queries to their rows' positions.
fn turn_queries(q: &mut [f32], batch: &AttentionBatch<'_>) {
    let head_dim = batch.cache.head_dim();
    for (q, row) in q.chunks_exact_mut(batch.n_heads * head_dim).zip(batch.rows) {
        q.chunks_exact_mut(head_dim).for_each(|head| batch.rope.turn(head, row.position as usize));
    }
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

/// A product among others.
struct Grid<'a> {
    product: Multiplication<'a>,
    division: Division,
    /// Number of its first task among those of all products.
    first_task: usize,
}

/// A product's tasks: passes over its rows, and within a pass runs of units, which are one or two panels of outputs.
struct Division {
    n_rows: usize,
    n_units: usize,
    rows_per_task: usize,
    units_per_task: usize,
}

// === impl Division ===

impl Division {
    fn new(matrix: &PackedMatrix, n_rows: usize, panels_per_unit: usize) -> Self {
        let row_bytes = matrix.n_in() / BLOCK * size_of::<ActivationBlock>();
        let rows_per_task = (ACTIVATION_BYTES_PER_PASS / row_bytes.max(1)).next_multiple_of(STRIP);
        let unit_bytes = matrix.size_bytes() / matrix.n_panels() * panels_per_unit;
        // With many rows, a small run of panels is work enough.
        let work = unit_bytes.max(1) * n_rows.min(rows_per_task).div_ceil(4).max(1);
        let n_units = matrix.n_panels().div_ceil(panels_per_unit);
        let units_per_task = (WEIGHT_BYTES_PER_TASK / work).max(n_units.div_ceil(MAX_RUNS));
        Self { n_rows, n_units, rows_per_task, units_per_task }
    }

    fn n_runs(&self) -> usize {
        self.n_units.div_ceil(self.units_per_task)
    }

    fn n_tasks(&self) -> usize {
        self.n_rows.div_ceil(self.rows_per_task) * self.n_runs()
    }

    /// Rows and units of a task.
    fn task(&self, task_idx: usize) -> (Range<usize>, Range<usize>) {
        let part = |idx: usize, len: usize, end: usize| idx * len..end.min((idx + 1) * len);
        let rows = part(task_idx / self.n_runs(), self.rows_per_task, self.n_rows);
        let units = part(task_idx % self.n_runs(), self.units_per_task, self.n_units);
        (rows, units)
    }
}

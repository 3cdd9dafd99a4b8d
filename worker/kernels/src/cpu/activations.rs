//! Activations: the inputs of a product, quantized to 8 bits per row and block of 32.
//!
//! A block has codes and a scale as [`int8`](crate::int8) states. A row is quantized by itself, so its codes never depend
//! on the rest of a batch. A value that is not finite poisons every output of its row, and of no other.
//!
//! Kernels take several rows at once, so rows lie together in *strips*: sixteen rows each, and a last one of what is left.
//! Within a strip the blocks of its rows that cover the same inputs are neighbours: `[n_in / 32, rows of the strip]`.

use std::ops::Range;

use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::int8::{self, ROUNDER};
use crate::packed::{BLOCK, PackedMatrix};

/// 32 quantized activations, with all that kernels need of them on one cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct ActivationBlock {
    /// Four signed codes each, little-endian.
    pub(crate) quads: [i32; 8],
    /// What a step of the codes is worth.
    pub(crate) scale: f32,
    /// Sum of all codes.
    pub(crate) sum: i32,
    /// Sums of the codes 0 to 15 and 16 to 31.
    pub(crate) half_sums: [i32; 2],
    /// `scale * sum`, rounded once.
    pub(crate) scaled_sum: f32,
    /// `scale * half_sums`, rounded once each.
    pub(crate) scaled_half_sums: [f32; 2],
}

// === impl ActivationBlock ===

impl ActivationBlock {
    /// Quantizes 32 values.
    pub(crate) fn quantize(values: &[f32; BLOCK]) -> Self {
        let mut codes = [0; BLOCK];
        let scale = int8::quantize(values, &mut codes);
        Self::from_codes(&codes, scale)
    }

    #[inline(always)]
    fn from_codes(codes: &[i8; BLOCK], scale: f32) -> Self {
        let quads = std::array::from_fn(|i| i32::from_le_bytes(std::array::from_fn(|k| codes[4 * i + k] as u8)));
        let half_sum = |codes: &[i8]| codes.iter().map(|code| i32::from(*code)).sum::<i32>();
        Self::from_quads(quads, scale, [half_sum(&codes[..16]), half_sum(&codes[16..])])
    }

    #[inline(always)]
    fn from_quads(quads: [i32; 8], scale: f32, half_sums: [i32; 2]) -> Self {
        let sum = half_sums[0] + half_sums[1];
        Self {
            quads,
            scale,
            sum,
            half_sums,
            scaled_sum: scale * sum as f32,
            scaled_half_sums: half_sums.map(|sum| scale * sum as f32),
        }
    }

    /// The codes, in order.
    pub(crate) fn codes(&self) -> [i8; BLOCK] {
        std::array::from_fn(|i| self.quads[i / 4].to_le_bytes()[i % 4] as i8)
    }
}

/// [`ActivationBlock::quantize`] with vectors: the first 16 values and the others.
#[inline(always)]
fn quantize_lanes<S: Simd>(simd: S, [low, high]: [S::F32; 2]) -> ActivationBlock {
    let largest = simd.largest_magnitude(low, high);
    if !largest.is_finite() {
        return ActivationBlock::from_codes(&[0; BLOCK], f32::NAN);
    }
    let steps_per_one = 127.0 / largest;
    if !steps_per_one.is_finite() {
        return ActivationBlock::default();
    }
    let (steps, rounder) = (simd.splat(steps_per_one), simd.splat(ROUNDER));
    let [low, high] = [simd.add(simd.mul(low, steps), rounder), simd.add(simd.mul(high, steps), rounder)];
    // Sums of 16 codes are exact as floats.
    let half_sums = [simd.sum(simd.sub(low, rounder)) as i32, simd.sum(simd.sub(high, rounder)) as i32];
    let mut quads = [0; 8];
    let (four, _) = quads.as_chunks_mut::<4>();
    four[0] = simd.low_bytes(low);
    four[1] = simd.low_bytes(high);
    ActivationBlock::from_quads(quads, largest / 127.0, half_sums)
}

/// The most rows in a strip.
pub(crate) const STRIP: usize = 16;

/// Rows of the strip that begins at `first_row`.
pub(crate) fn strip_rows(first_row: usize, n_rows: usize) -> usize {
    (n_rows - first_row).min(STRIP)
}

/// The forms in which products read their inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forms {
    /// f32, for weights that are floats.
    Floats,
    /// 8 bits, for quantized weights.
    Quantized,
    /// Both.
    #[default]
    Both,
}

/// The inputs of products, `[n_rows, width]`, in the forms that are read. Whatever makes them makes every form in one
/// go, while the values are at hand.
#[derive(Debug, Default)]
pub struct Activations {
    forms: Forms,
    n_rows: usize,
    width: usize,
    /// `[n_rows, width]`, or empty.
    values: Vec<f32>,
    /// In strips, or empty.
    blocks: Vec<ActivationBlock>,
}

/// Where the tasks of a job write activations.
#[derive(Clone, Copy)]
pub(crate) struct Places<'a> {
    values: Option<SharedSlice<'a, f32>>,
    blocks: Option<SharedSlice<'a, ActivationBlock>>,
    n_rows: usize,
    width: usize,
}

// === impl Forms ===

impl Forms {
    /// What `weights` read.
    pub fn of(weights: &PackedMatrix) -> Self {
        if weights.is_quantized() { Forms::Quantized } else { Forms::Floats }
    }

    /// What weights of both kinds read, `self` being what others read already.
    pub fn and(self, other: Forms) -> Forms {
        if self == other { self } else { Forms::Both }
    }
}

// === impl Activations ===

impl Activations {
    /// No rows yet.
    pub fn new(forms: Forms) -> Self {
        Self { forms, n_rows: 0, width: 0, values: Vec::new(), blocks: Vec::new() }
    }

    /// The values, `[n_rows, width]`; empty if they are kept in 8 bits only.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Values in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// In strips; empty if only floats are kept.
    pub(crate) fn blocks(&self) -> &[ActivationBlock] {
        &self.blocks
    }

    /// Takes a new shape; what was there is void, and memory is kept for larger ones.
    ///
    /// # Panics
    /// If rows are to be quantized and are no whole number of blocks.
    pub(crate) fn reshape(&mut self, n_rows: usize, width: usize) -> Places<'_> {
        (self.n_rows, self.width) = (n_rows, width);
        if self.forms != Forms::Quantized {
            self.values.resize(n_rows * width, 0.0);
        }
        if self.forms != Forms::Floats {
            assert!(width.is_multiple_of(BLOCK), "rows of {width} in blocks of {BLOCK}");
            self.blocks.resize(n_rows * width / BLOCK, ActivationBlock::default());
        }
        let values = (self.forms != Forms::Quantized).then(|| SharedSlice::new(&mut self.values[..]));
        let blocks = (self.forms != Forms::Floats).then(|| SharedSlice::new(&mut self.blocks[..]));
        Places { values, blocks, n_rows, width }
    }
}

// === impl Places ===

impl Places<'_> {
    /// Runs of 32 values in a row, the last one perhaps shorter.
    pub(crate) fn n_parts(&self) -> usize {
        self.width.div_ceil(BLOCK)
    }

    /// Writes the run `part_idx` of a row; lanes behind the row's end are dropped.
    ///
    /// # Safety
    /// No other task may write to the same run, and nobody may read it meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(&self, simd: S, row_idx: usize, part_idx: usize, lanes: [S::F32; 2]) {
        if let Some(values) = self.values {
            let at = row_idx * self.width + part_idx * BLOCK;
            let end = at + BLOCK.min(self.width - part_idx * BLOCK);
            // SAFETY: the run is this task's alone, by the caller's promise.
            store(simd, lanes, unsafe { values.part(at..end) });
        }
        if let Some(blocks) = self.blocks {
            let first_row = row_idx / STRIP * STRIP;
            let in_strip = part_idx * strip_rows(first_row, self.n_rows) + row_idx - first_row;
            let at = first_row * self.n_parts() + in_strip;
            // SAFETY: every run has a block of its own, and the run is this task's alone, by the caller's promise.
            unsafe { blocks.part(at..at + 1) }.fill(quantize_lanes(simd, lanes));
        }
    }
}

/// The first 32 of `values`, zeros behind their end.
#[inline(always)]
pub(crate) fn load<S: Simd>(simd: S, values: &[f32]) -> [S::F32; 2] {
    if let Some(values) = values.first_chunk::<BLOCK>() {
        let (halves, _) = values.as_chunks::<LANES>();
        return [simd.load(&halves[0]), simd.load(&halves[1])];
    }
    let mut filled = [[0.0; LANES]; 2];
    filled.as_flattened_mut()[..values.len()].copy_from_slice(values);
    [simd.load(&filled[0]), simd.load(&filled[1])]
}

/// Writes at most 32 values.
#[inline(always)]
pub(crate) fn store<S: Simd>(simd: S, lanes: [S::F32; 2], out: &mut [f32]) {
    let mut filled = [[0.0; LANES]; 2];
    match out.as_chunks_mut::<LANES>() {
        ([low, high], []) => {
            simd.store(lanes[0], low);
            simd.store(lanes[1], high);
        }
        _ => {
            simd.store(lanes[0], &mut filled[0]);
            simd.store(lanes[1], &mut filled[1]);
            out.copy_from_slice(&filled.as_flattened()[..out.len()]);
        }
    }
}

/// Takes in some runs of rows as they are.
pub(crate) struct Quantize<'a> {
    /// `[n_rows, width]`.
    pub(crate) values: &'a [f32],
    pub(crate) out: Places<'a>,
    /// The runs of 32 values, counted row by row.
    pub(crate) parts: Range<usize>,
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let n_parts = self.out.n_parts();
        for part in self.parts {
            let (row_idx, part_idx) = (part / n_parts, part % n_parts);
            let row = &self.values[row_idx * self.out.width..(row_idx + 1) * self.out.width];
            let lanes = load(simd, &row[part_idx * BLOCK..]);
            // SAFETY: the tasks of a job have runs of their own (`Cpu::quantize`).
            unsafe { self.out.put(simd, row_idx, part_idx, lanes) };
        }
    }
}

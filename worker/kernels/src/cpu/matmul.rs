//! Matrix products over packed weights: the same inner loop for one row and for many.
//!
//! The rule, for each output, each row and each K-segment, with groups in K order:
//!
//! ```text
//! sum = 0
//! for each group of 16 or 32 inputs:
//!     dot = Σ (code - offset) * activation_code              exact, in integers
//!     sum = fma(scale * activation_scale, dot, sum)          the product of the scales is rounded once
//!     sum = fma(minimum, activation_scale * Σ activation_code, sum)     where there are minimums; likewise
//! ```
//!
//! (a codebook's entries stand in the place of their codes) and for weights that are floats
//!
//! ```text
//! lane[i % 16] = fma(weight[i], x[i], lane[i % 16])          i counts from the segment's start, ascending;
//! sum = the lanes, added as `sum_lanes` does                 behind the segment's end weights and inputs are 0
//! ```
//!
//! Segment sums are then added as [`SumTree`](crate::SumTree) says. Nothing here depends on how many rows there are: rows
//! only share the loading and unpacking of weights, up to eight at a time, or sixteen with tiles (`x86/amx.rs`).
//!
//! [`PanelsTimesRows`] goes through a task's panels and rows, [`GatedRows`] through those of two matrices whose products
//! meet; a panel times some rows is a [`Kernel`] of its own for each
//! kind of weights and number of rows, so that the compiler keeps all of it in registers.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::cpu::activations::{ActivationBlock, Activations, Places, STRIP, load, strip_rows};
use crate::cpu::elementwise::silu_mul;
use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd, unrolled};
use crate::packed::{BLOCK, Integers, PANEL, PackedMatrix, Piece, QUADS, Weights, layout};
use crate::sum_tree::MAX_PENDING;

/// Rows that share the loading and unpacking of weights.
const ABREAST: usize = 8;

/// Panels that may go through a task's strips in turn: two of gate and two of up.
pub(crate) const MAX_TURNS: usize = 4;

/// How far ahead of their use codes are fetched, in runs of 32 inputs: 2 to 4 KiB.
const PREFETCH_PARTS: usize = 8;

/// A product, or what a task needs to know of it.
#[derive(Clone, Copy)]
pub(crate) struct Multiplication<'a> {
    pub(crate) matrix: &'a PackedMatrix,
    pub(crate) x: &'a Activations,
    pub(crate) out: Outputs<'a>,
}

/// Where products go: outputs `first_out ..` of the rows `first_row ..`.
#[derive(Clone, Copy)]
pub(crate) struct Outputs<'a> {
    /// `[n_partials, n_rows, width]`.
    pub(crate) values: SharedSlice<'a, f32>,
    pub(crate) n_rows: usize,
    pub(crate) width: usize,
    pub(crate) first_row: usize,
    pub(crate) first_out: usize,
}

/// One task of a product: some panels of outputs for some rows, the first at the start of a strip.
pub(crate) struct PanelsTimesRows<'a> {
    pub(crate) product: Multiplication<'a>,
    pub(crate) panels: Range<usize>,
    pub(crate) rows: Range<usize>,
}

/// One task of an MLP's first half, `silu(x * gate^T) * (x * up^T)`: some pairs of panels of both for some rows. A pair is
/// a whole block of activations.
pub(crate) struct GatedRows<'a> {
    pub(crate) gate: &'a PackedMatrix,
    pub(crate) up: &'a PackedMatrix,
    pub(crate) x: &'a Activations,
    pub(crate) pairs: Range<usize>,
    pub(crate) rows: Range<usize>,
    pub(crate) out: Places<'a>,
}

// === impl PanelsTimesRows ===

impl PanelsTimesRows<'_> {
    /// Computes the task's outputs.
    pub(crate) fn run<S: Simd>(&self, simd: S) {
        for panel_idx in self.panels.clone() {
            for strip in strips(self.rows.clone(), self.product.x.n_rows()) {
                self.product.panel(simd, Place { panel_idx, ..strip }, 0);
            }
        }
    }
}

// === impl GatedRows ===

impl GatedRows<'_> {
    /// Computes the task's outputs.
    pub(crate) fn run<S: Simd>(&self, simd: S) {
        let n_panels = self.gate.n_panels();
        let mut gate = [[0.0; BLOCK]; STRIP];
        let mut up = [[0.0; BLOCK]; STRIP];
        for pair_idx in self.pairs.clone() {
            for strip in strips(self.rows.clone(), self.x.n_rows()) {
                let [gate_sums, up_sums] = [(self.gate, &mut gate), (self.up, &mut up)].map(|(matrix, sums)| {
                    let out = Outputs {
                        values: SharedSlice::new(sums.as_flattened_mut()),
                        n_rows: STRIP,
                        width: BLOCK,
                        first_row: strip.first_row,
                        first_out: pair_idx * BLOCK,
                    };
                    Multiplication { matrix, x: self.x, out }
                });
                // In the order of `PackedMatrix::pack_pair`.
                for panel_idx in 2 * pair_idx..n_panels.min(2 * pair_idx + 2) {
                    let place = Place { panel_idx, ..strip };
                    gate_sums.panel(simd, place, panel_idx % 2 * 2);
                    up_sums.panel(simd, place, panel_idx % 2 * 2 + 1);
                }
                simd.vectorize(Gate { gate: &gate, up: &up, pair_idx, strip, out: self.out });
            }
        }
    }
}

/// Gates the sums of a pair of panels and some rows.
struct Gate<'a> {
    gate: &'a [[f32; BLOCK]; STRIP],
    up: &'a [[f32; BLOCK]; STRIP],
    pair_idx: usize,
    strip: Place,
    out: Places<'a>,
}

impl Kernel for Gate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (i, (gate, up)) in self.gate.iter().zip(self.up).take(self.strip.n_rows).enumerate() {
            let (gate, up) = (load(simd, gate), load(simd, up));
            let lanes = [silu_mul(simd, gate[0], up[0]), silu_mul(simd, gate[1], up[1])];
            // SAFETY: the tasks of a job divide pairs and rows among them (`Cpu::gated`).
            unsafe { self.out.put(simd, self.strip.first_row + i, self.pair_idx, lanes) };
        }
    }
}

/// A task's rows, strip by strip: places without a panel yet.
fn strips(rows: Range<usize>, n_rows: usize) -> impl Iterator<Item = Place> {
    let (start, is_only) = (rows.start, rows.len() <= STRIP);
    rows.step_by(STRIP).map(move |first_row| {
        let turn = if is_only {
            Turn::Only
        } else if first_row == start {
            Turn::First
        } else {
            Turn::Later
        };
        Place { panel_idx: 0, first_row, place: 0, n_rows: strip_rows(first_row, n_rows), turn }
    })
}

// === impl Multiplication ===

impl<'a> Multiplication<'a> {
    /// One panel times the rows of a strip: with tiles, or as many rows at a time as vectors take. If panels take turns,
    /// `turn_idx`, below [`MAX_TURNS`], tells them apart.
    fn panel<S: Simd>(&self, simd: S, strip: Place, turn_idx: usize) {
        if let Weights::Integers(integers) = self.matrix.weights()
            && simd.sum_with_tiles(self, integers, strip, turn_idx)
        {
            return;
        }
        for place in (0..strip.n_rows).step_by(ABREAST) {
            let place = Place { place, n_rows: ABREAST.min(strip.n_rows - place), ..strip };
            match place.n_rows {
                1 => self.rows::<S, 1>(simd, place),
                2 => self.rows::<S, 2>(simd, place),
                3 => self.rows::<S, 3>(simd, place),
                4 => self.rows::<S, 4>(simd, place),
                5 => self.rows::<S, 5>(simd, place),
                6 => self.rows::<S, 6>(simd, place),
                7 => self.rows::<S, 7>(simd, place),
                _ => self.rows::<S, ABREAST>(simd, place),
            }
        }
    }

    /// The strip's quantized inputs, `[n_in / 32, rows of the strip]`.
    #[inline(always)]
    pub(crate) fn strip(&self, panel: Panel<'_>, place: Place) -> &'a [ActivationBlock] {
        let n_parts = panel.integers.n_parts();
        &self.x.blocks()[place.first_row * n_parts..][..strip_rows(place.first_row, self.x.n_rows()) * n_parts]
    }

    /// Stores the sums of a panel and the `i`-th of its rows.
    #[inline(always)]
    pub(crate) fn store<S: Simd>(&self, simd: S, plane_idx: usize, place: Place, i: usize, sums: S::F32) {
        let out = self.out(plane_idx, place, i);
        if let ([out], []) = out.as_chunks_mut() {
            simd.store(sums, out);
        } else {
            let mut lanes = [0.0; PANEL];
            simd.store(sums, &mut lanes);
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }

    fn rows<S: Simd, const N: usize>(&self, simd: S, place: Place) {
        match self.matrix.weights() {
            Weights::Integers(integers) => {
                let panel = Panel { integers, panel_idx: integers.place(place.panel_idx) };
                SumIntegers::<N> { product: *self, panel, place }.run(simd);
            }
            Weights::Singles(values) => self.floats::<S, Single, N>(simd, values, place),
            Weights::Halves(bits) => self.floats::<S, Half, N>(simd, bits, place),
            Weights::Brains(bits) => self.floats::<S, Brain, N>(simd, bits, place),
        }
    }

    fn floats<S: Simd, F: FloatFormat, const N: usize>(&self, simd: S, weights: &[F::Bits], place: Place) {
        let n_in = self.matrix.n_in();
        let rows: [&[f32]; N] = std::array::from_fn(|i| {
            let row_idx = place.first_row + place.place + i;
            &self.x.values()[row_idx * n_in..(row_idx + 1) * n_in]
        });
        let panel_len = PANEL * n_in;
        let weights = &weights[place.panel_idx * panel_len..weights.len().min((place.panel_idx + 1) * panel_len)];
        let n_out = weights.len() / n_in;
        let sum_segment = |cols: Range<usize>| {
            let rows = rows.map(|row| &row[cols.clone()]);
            let mut sums = [[0.0; PANEL]; N];
            // Sums of several outputs share the loading of inputs: as many as fit the registers.
            let n_abreast = if N > 4 { 2 } else { 4 };
            let weights = |out_idx: usize| &weights[out_idx * n_in..][cols.clone()];
            let mut first_out = 0;
            while first_out < n_out {
                let out = SegmentOutputs { rows, first_out, sums: &mut sums };
                first_out += match n_abreast.min(n_out - first_out) {
                    4 => out.sum::<S, F, 4>(simd, std::array::from_fn(|i| weights(first_out + i))),
                    2 => out.sum::<S, F, 2>(simd, std::array::from_fn(|i| weights(first_out + i))),
                    _ => out.sum::<S, F, 1>(simd, [weights(first_out)]),
                };
            }
            sums
        };
        let store = |plane_idx: usize, sums: [[f32; PANEL]; N]| {
            for (i, sums) in sums.iter().enumerate() {
                let out = self.out(plane_idx, place, i);
                out.copy_from_slice(&sums[..out.len()]);
            }
        };
        self.matrix.plan().sum([[0.0; PANEL]; N], sum_segment, add, store);
    }

    /// Where the sums of a panel and the `i`-th of its rows go.
    #[inline(always)]
    fn out(&self, plane_idx: usize, place: Place, i: usize) -> &'a mut [f32] {
        let Outputs { values, n_rows, width, first_row, first_out } = self.out;
        let row_idx = plane_idx * n_rows + place.first_row + place.place + i - first_row;
        let n_lanes = PANEL.min(self.matrix.n_out() - place.panel_idx * PANEL);
        let at = row_idx * width + place.panel_idx * PANEL - first_out;
        // SAFETY: the tasks of a job divide panels and rows among them (`Cpu::multiply`, `Cpu::gated`), so no other task
        // writes these outputs; this task holds one part at a time.
        unsafe { values.part(at..at + n_lanes) }
    }
}

/// Adds the sums of two segments.
fn add<const N: usize>(mut left: [[f32; PANEL]; N], right: [[f32; PANEL]; N]) -> [[f32; PANEL]; N] {
    let sums = left.as_flattened_mut().iter_mut();
    sums.zip(right.as_flattened()).for_each(|(left, right)| *left += right);
    left
}

/// Whether codes of so many bits have an offset: a format with minimums does without, unless its codes are signed bytes.
#[inline(always)]
pub(crate) const fn has_offset(bits: usize, has_minimum: bool) -> bool {
    !has_minimum || bits == 8
}

/// Some rows of a strip, and a panel.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) panel_idx: usize,
    /// Where the strip begins.
    first_row: usize,
    /// The first row's place in the strip.
    place: usize,
    /// How many rows.
    pub(crate) n_rows: usize,
    pub(crate) turn: Turn,
}

/// Which of a task's strips meets the panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Only,
    First,
    Later,
}

/// One panel of integer weights.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    pub(crate) integers: &'a Integers,
    /// Where it stands in their arrays.
    pub(crate) panel_idx: usize,
}

/// The products of a panel and `N` rows.
struct SumIntegers<'a, const N: usize> {
    product: Multiplication<'a>,
    panel: Panel<'a>,
    place: Place,
}

/// [`SumIntegers`] for one kind of format: how many bits codes have, whether there is a codebook, whether scales belong to
/// half a run of 32 inputs, and whether there are minimums.
struct SumFormat<'a, const N: usize, const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool>(
    SumIntegers<'a, N>,
);

// === impl SumIntegers ===

impl<const N: usize> SumIntegers<'_, N> {
    fn run<S: Simd>(self, simd: S) {
        let format = self.panel.integers.format;
        match (format.bits, format.codebook, format.group_len, format.has_minimum) {
            (4, None, 32, false) => simd.vectorize(SumFormat::<N, 4, false, false, false>(self)),
            (4, None, 32, true) => simd.vectorize(SumFormat::<N, 4, false, false, true>(self)),
            (4, None, _, false) => simd.vectorize(SumFormat::<N, 4, false, true, false>(self)),
            (4, None, _, true) => simd.vectorize(SumFormat::<N, 4, false, true, true>(self)),
            (4, Some(_), ..) => simd.vectorize(SumFormat::<N, 4, true, false, false>(self)),
            (5, _, _, false) => simd.vectorize(SumFormat::<N, 5, false, false, false>(self)),
            (5, _, _, true) => simd.vectorize(SumFormat::<N, 5, false, false, true>(self)),
            (6, ..) => simd.vectorize(SumFormat::<N, 6, false, true, false>(self)),
            (_, _, _, false) => simd.vectorize(SumFormat::<N, 8, false, false, false>(self)),
            (_, _, _, true) => simd.vectorize(SumFormat::<N, 8, false, false, true>(self)),
        }
    }
}

// === impl SumFormat ===

impl<const N: usize, const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool> Kernel
    for SumFormat<'_, N, BITS, CODEBOOK, HALVES, MINIMUM>
{
    /// As [`SegmentPlan::sum`](crate::segments::SegmentPlan::sum), written out so that sums stay in registers.
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (plane_idx, segments) in self.0.product.matrix.plan().subtrees().enumerate() {
            // Left unwritten: to clear it would take a twentieth of a narrow matrix's time.
            let mut pending = [const { MaybeUninit::uninit() }; MAX_PENDING];
            let mut n_pending = 0;
            let mut sums = [simd.splat(0.0); N];
            for segment in segments {
                sums = self.sum_segment(simd, &segment.cols);
                for _ in 0..segment.n_merges {
                    n_pending -= 1;
                    // SAFETY: the entries below `n_pending` were written when it passed them, and it was above this one.
                    let left: [S::F32; N] = unsafe { pending[n_pending].assume_init() };
                    unrolled!(i in 0..N { sums[i] = simd.add(left[i], sums[i]) });
                }
                pending[n_pending] = MaybeUninit::new(sums);
                n_pending += 1;
            }
            unrolled!(i in 0..N { self.0.product.store(simd, plane_idx, self.0.place, i, sums[i]) });
        }
    }
}

impl<const N: usize, const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool>
    SumFormat<'_, N, BITS, CODEBOOK, HALVES, MINIMUM>
{
    #[inline(always)]
    fn sum_segment<S: Simd>(&self, simd: S, cols: &Range<usize>) -> [S::F32; N] {
        let SumIntegers { product, panel, place } = self.0;
        let strip = product.strip(panel, place);
        let n_rows = strip_rows(place.first_row, product.x.n_rows());
        let first_part = cols.start / BLOCK;
        let parts = strip[first_part * n_rows..cols.end / BLOCK * n_rows].chunks_exact(n_rows);
        let mut sums = [simd.splat(0.0); N];
        for (i, blocks) in parts.enumerate() {
            let part_idx = first_part + i;
            let blocks = &blocks[place.place..place.place + N];
            panel.prefetch::<S, BITS>(simd, part_idx);
            let codes = panel.codes::<S, BITS, CODEBOOK>(simd, part_idx);
            if HALVES {
                let first = panel.group::<S, MINIMUM>(simd, 2 * part_idx);
                let second = panel.group::<S, MINIMUM>(simd, 2 * part_idx + 1);
                unrolled!(row_idx in 0..N {
                    let x = &blocks[row_idx];
                    let [quads, more_quads] = [&x.quads.as_chunks::<4>().0[0], &x.quads.as_chunks::<4>().0[1]];
                    let [codes, more_codes] = [&codes.as_chunks::<4>().0[0], &codes.as_chunks::<4>().0[1]];
                    let dot = Self::dot(simd, panel.offset() * x.half_sums[0], codes, quads);
                    sums[row_idx] = add_group::<_, MINIMUM>(simd, sums[row_idx], first, dot, x.scale, x.scaled_half_sums[0]);
                    let dot = Self::dot(simd, panel.offset() * x.half_sums[1], more_codes, more_quads);
                    sums[row_idx] = add_group::<_, MINIMUM>(simd, sums[row_idx], second, dot, x.scale, x.scaled_half_sums[1]);
                });
            } else {
                let group = panel.group::<S, MINIMUM>(simd, part_idx);
                unrolled!(row_idx in 0..N {
                    let x = &blocks[row_idx];
                    let dot = Self::dot(simd, panel.offset() * x.sum, &codes, &x.quads);
                    sums[row_idx] = add_group::<_, MINIMUM>(simd, sums[row_idx], group, dot, x.scale, x.scaled_sum);
                });
            }
        }
        sums
    }

    /// The integer dot products of a group, less `correction` where the format has an offset.
    #[inline(always)]
    fn dot<S: Simd, const QUADS: usize>(
        simd: S,
        correction: i32,
        codes: &[S::Bytes; QUADS],
        quads: &[i32; QUADS],
    ) -> S::I32 {
        let mut dot = simd.splat_i32(if has_offset(BITS, MINIMUM) { -correction } else { 0 });
        for quad_idx in 0..QUADS {
            dot = if BITS < 8 && !CODEBOOK {
                simd.dot_small(dot, codes[quad_idx], quads[quad_idx])
            } else {
                simd.dot_bytes(dot, codes[quad_idx], quads[quad_idx])
            };
        }
        dot
    }
}

/// Scales the integers of a group and adds them to a row's sums.
#[inline(always)]
pub(crate) fn add_group<S: Simd, const MINIMUM: bool>(
    simd: S,
    sum: S::F32,
    (scale, minimum): (S::F32, S::F32),
    dot: S::I32,
    x_scale: f32,
    scaled_sum: f32,
) -> S::F32 {
    let sum = simd.fma(simd.mul(scale, simd.splat(x_scale)), simd.to_f32(dot), sum);
    if MINIMUM { simd.fma(minimum, simd.splat(scaled_sum), sum) } else { sum }
}

// === impl Panel ===

impl Panel<'_> {
    #[inline(always)]
    pub(crate) fn offset(&self) -> i32 {
        i32::from(self.integers.format.offset)
    }

    /// Begins to fetch the codes that come [`PREFETCH_PARTS`] later, beyond this panel's end in the next one: the
    /// processor by itself looks ahead less far, and not across pages.
    #[inline(always)]
    pub(crate) fn prefetch<S: Simd, const BITS: usize>(&self, simd: S, part_idx: usize) {
        let part_idx = self.panel_idx * self.integers.n_parts() + part_idx + PREFETCH_PARTS;
        if let Some(lines) = self.integers.codes.as_chunks::<BITS>().0.get(part_idx) {
            lines.iter().for_each(|line| simd.prefetch(line));
        }
    }

    /// The codes of 32 inputs, by quads, or what a codebook has for them.
    #[inline(always)]
    pub(crate) fn codes<S: Simd, const BITS: usize, const CODEBOOK: bool>(
        &self,
        simd: S,
        part_idx: usize,
    ) -> [S::Bytes; QUADS] {
        let part_idx = self.panel_idx * self.integers.n_parts() + part_idx;
        let lines = &self.integers.codes.as_chunks::<BITS>().0[part_idx];
        let bits = |piece: Piece| simd.bits(simd.load_bytes(&lines[piece.line]), piece.shift, piece.mask);
        let layout = const { layout(BITS) };
        let mut codes = [simd.load_bytes(&lines[0]); QUADS];
        for quad_idx in 0..QUADS {
            let [first, second, third] = layout[quad_idx];
            codes[quad_idx] = simd.or(simd.or(bits(first), bits(second)), bits(third));
            if CODEBOOK && let Some(codebook) = self.integers.format.codebook {
                codes[quad_idx] = simd.look_up(codebook, codes[quad_idx]);
            }
        }
        codes
    }

    /// Scales and minimums of a group.
    #[inline(always)]
    pub(crate) fn group<S: Simd, const MINIMUM: bool>(&self, simd: S, group_idx: usize) -> (S::F32, S::F32) {
        let integers = self.integers;
        let inner = self.panel_idx * integers.n_groups + group_idx;
        let outer = self.panel_idx * integers.n_scales + group_idx / integers.groups_per_scale;
        let mut scale = simd.load_f16(&integers.scales[outer]);
        let mut minimum = if MINIMUM { simd.load_f16(&integers.minimums[outer]) } else { simd.splat(0.0) };
        if integers.format.two_level {
            scale = simd.mul(scale, simd.load_i8(&integers.sub_scales[inner]));
            if MINIMUM {
                minimum = simd.mul(minimum, simd.load_i8(&integers.sub_minimums[inner]));
            }
        }
        (scale, minimum)
    }
}

/// How a float weight is stored.
trait FloatFormat {
    type Bits: Copy + Default;
    fn load<S: Simd>(simd: S, bits: &[Self::Bits; LANES]) -> S::F32;
}

/// F32.
struct Single;
/// F16.
struct Half;
/// BF16.
struct Brain;

// === impl FloatFormat ===

impl FloatFormat for Single {
    type Bits = f32;
    #[inline(always)]
    fn load<S: Simd>(simd: S, bits: &[f32; LANES]) -> S::F32 {
        simd.load(bits)
    }
}

impl FloatFormat for Half {
    type Bits = u16;
    #[inline(always)]
    fn load<S: Simd>(simd: S, bits: &[u16; LANES]) -> S::F32 {
        simd.load_f16(bits)
    }
}

impl FloatFormat for Brain {
    type Bits = u16;
    #[inline(always)]
    fn load<S: Simd>(simd: S, bits: &[u16; LANES]) -> S::F32 {
        simd.load_bf16(bits)
    }
}

/// Where the sums of a K-segment of float weights come from and go to.
struct SegmentOutputs<'a, const N: usize> {
    rows: [&'a [f32]; N],
    /// Where in the panel the outputs are.
    first_out: usize,
    sums: &'a mut [[f32; PANEL]; N],
}

impl<const N: usize> SegmentOutputs<'_, N> {
    /// Sums the segment for `M` outputs abreast; returns `M`.
    fn sum<S: Simd, F: FloatFormat, const M: usize>(self, simd: S, weights: [&[F::Bits]; M]) -> usize {
        simd.vectorize(SumFloats::<F, M, N> { weights, out: self });
        M
    }
}

/// Dot products of one K-segment of the weights of `M` outputs with `N` rows.
struct SumFloats<'a, F: FloatFormat, const M: usize, const N: usize> {
    weights: [&'a [F::Bits]; M],
    out: SegmentOutputs<'a, N>,
}

impl<F: FloatFormat, const M: usize, const N: usize> Kernel for SumFloats<'_, F, M, N> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut sums = [[simd.splat(0.0); N]; M];
        let n_vectors = self.weights[0].len() / LANES;
        let weights = self.weights.map(|weights| &weights.as_chunks::<LANES>().0[..n_vectors]);
        let rows = self.out.rows.map(|row| &row.as_chunks::<LANES>().0[..n_vectors]);
        for i in 0..n_vectors {
            let mut x = [simd.splat(0.0); N];
            unrolled!(row_idx in 0..N { x[row_idx] = simd.load(&rows[row_idx][i]) });
            unrolled!(out_idx in 0..M {
                let weight = F::load(simd, &weights[out_idx][i]);
                unrolled!(row_idx in 0..N {
                    sums[out_idx][row_idx] = simd.fma(weight, x[row_idx], sums[out_idx][row_idx]);
                });
            });
        }
        if self.weights[0].len() > n_vectors * LANES {
            unrolled!(out_idx in 0..M {
                let weight = F::load(simd, &zero_filled(&self.weights[out_idx][n_vectors * LANES..]));
                unrolled!(row_idx in 0..N {
                    let x = simd.load(&zero_filled(&self.out.rows[row_idx][n_vectors * LANES..]));
                    sums[out_idx][row_idx] = simd.fma(weight, x, sums[out_idx][row_idx]);
                });
            });
        }
        unrolled!(out_idx in 0..M {
            unrolled!(row_idx in 0..N {
                self.out.sums[row_idx][self.out.first_out + out_idx] = simd.sum(sums[out_idx][row_idx]);
            });
        });
    }
}

/// The last elements of a row, filled up to a vector.
#[inline(always)]
fn zero_filled<T: Copy + Default>(tail: &[T]) -> [T; LANES] {
    let mut filled = [T::default(); LANES];
    filled[..tail.len()].copy_from_slice(tail);
    filled
}

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
//! and for weights that are floats
//!
//! ```text
//! lane[i % 16] = fma(weight[i], x[i], lane[i % 16])          i counts from the segment's start, ascending;
//! sum = the lanes, added as `sum_lanes` does                 behind the segment's end weights and inputs are 0
//! ```
//!
//! Segment sums are then added as [`SumTree`](crate::SumTree) says. Nothing here depends on how many rows there are: rows
//! only share the loading and unpacking of weights, up to eight at a time.

use std::ops::Range;

use crate::cpu::activations::ActivationBlock;
use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::packed::{BLOCK, Integers, PANEL, PackedMatrix, Weights};

/// The inputs of a product, in both forms that weights may want.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// `[n_rows, n_in]`.
    pub(crate) values: &'a [f32],
    /// `[n_rows, n_in / 32]`; may be empty if all weights are floats.
    pub(crate) blocks: &'a [ActivationBlock],
    pub(crate) n_rows: usize,
}

/// One task of a product: some panels of outputs for some rows.
pub(crate) struct PanelsTimesRows<'a> {
    pub(crate) matrix: &'a PackedMatrix,
    pub(crate) inputs: Inputs<'a>,
    pub(crate) panels: Range<usize>,
    pub(crate) rows: Range<usize>,
    /// `[n_partials, n_rows, n_out]`.
    pub(crate) out: SharedSlice<'a, f32>,
}

impl Kernel for PanelsTimesRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for panel_idx in self.panels.clone() {
            let mut row_idx = self.rows.start;
            while row_idx < self.rows.end {
                // Some counts round up: the spare places repeat the last row, and their sums are dropped.
                let n_left = self.rows.end - row_idx;
                match n_left {
                    1 => self.panel::<S, 1>(simd, panel_idx, row_idx),
                    2 => self.panel::<S, 2>(simd, panel_idx, row_idx),
                    3 | 4 => self.panel::<S, 4>(simd, panel_idx, row_idx),
                    _ => self.panel::<S, 8>(simd, panel_idx, row_idx),
                }
                row_idx += n_left.min(8);
            }
        }
    }
}

// === impl PanelsTimesRows ===

impl PanelsTimesRows<'_> {
    /// One panel for `N` rows from `first_row` on.
    #[inline(always)]
    fn panel<S: Simd, const N: usize>(&self, simd: S, panel_idx: usize, first_row: usize) {
        match self.matrix.weights() {
            Weights::Integers(integers) => self.integers::<S, N>(simd, integers, panel_idx, first_row),
            Weights::Singles(values) => {
                self.floats::<S, f32, N>(simd, values, |w| simd.load(w), panel_idx, first_row);
            }
            Weights::Halves(bits) => {
                self.floats::<S, u16, N>(simd, bits, |w| simd.load_f16(w), panel_idx, first_row);
            }
            Weights::Brains(bits) => {
                self.floats::<S, u16, N>(simd, bits, |w| simd.load_bf16(w), panel_idx, first_row);
            }
        }
    }

    #[inline(always)]
    fn integers<S: Simd, const N: usize>(&self, simd: S, integers: &Integers, panel_idx: usize, first_row: usize) {
        let format = integers.format;
        let n_parts = integers.n_parts();
        let rows: [&[ActivationBlock]; N] = std::array::from_fn(|i| {
            let row_idx = self.row(first_row, i);
            &self.inputs.blocks[row_idx * n_parts..(row_idx + 1) * n_parts]
        });
        let panel = Panel { integers, panel_idx };
        let zero = [simd.splat(0.0); N];
        let sum_segment = |cols: Range<usize>| {
            let parts = cols.start / BLOCK..cols.end / BLOCK;
            match (format.nibbles, format.group_len, format.has_minimum) {
                (true, 32, false) => panel.sum::<S, N, true, false, false>(simd, parts, &rows),
                (true, 32, true) => panel.sum::<S, N, true, false, true>(simd, parts, &rows),
                (true, _, false) => panel.sum::<S, N, true, true, false>(simd, parts, &rows),
                (true, _, true) => panel.sum::<S, N, true, true, true>(simd, parts, &rows),
                (false, 32, false) => panel.sum::<S, N, false, false, false>(simd, parts, &rows),
                (false, 32, true) => panel.sum::<S, N, false, false, true>(simd, parts, &rows),
                (false, ..) => panel.sum::<S, N, false, true, false>(simd, parts, &rows),
            }
        };
        let add = |a: [S::F32; N], b: [S::F32; N]| std::array::from_fn(|i| simd.add(a[i], b[i]));
        self.matrix.plan().sum(zero, sum_segment, add, |plane_idx, sums| {
            for (i, sum) in sums.iter().enumerate().take(self.rows.end - first_row) {
                let mut lanes = [0.0; LANES];
                simd.store(*sum, &mut lanes);
                self.store(plane_idx, first_row + i, panel_idx, &lanes);
            }
        });
    }

    #[inline(always)]
    fn floats<S: Simd, T: Copy + Default, const N: usize>(
        &self,
        simd: S,
        weights: &[T],
        load: impl Fn(&[T; LANES]) -> S::F32,
        panel_idx: usize,
        first_row: usize,
    ) {
        let n_in = self.matrix.n_in();
        let rows: [&[f32]; N] = std::array::from_fn(|i| {
            let row_idx = self.row(first_row, i);
            &self.inputs.values[row_idx * n_in..(row_idx + 1) * n_in]
        });
        let n_partials = self.matrix.n_partials();
        for out_idx in panel_idx * PANEL..self.matrix.n_out().min((panel_idx + 1) * PANEL) {
            let weights = &weights[out_idx * n_in..(out_idx + 1) * n_in];
            let sum_segment = |cols: Range<usize>| {
                let rows: [&[f32]; N] = std::array::from_fn(|i| &rows[i][cols.clone()]);
                dot_floats(simd, &weights[cols.clone()], &load, &rows)
            };
            let add = |a: [f32; N], b: [f32; N]| std::array::from_fn(|i| a[i] + b[i]);
            self.matrix.plan().sum([0.0; N], sum_segment, add, |plane_idx, sums| {
                debug_assert!(plane_idx < n_partials);
                for (i, sum) in sums.iter().enumerate().take(self.rows.end - first_row) {
                    let at = (plane_idx * self.inputs.n_rows + first_row + i) * self.matrix.n_out() + out_idx;
                    // SAFETY: as in `store`; a task alone writes the outputs of its panels and rows.
                    unsafe { self.out.part(at..at + 1) }.fill(*sum);
                }
            });
        }
    }

    /// The row in place `i` from `first_row` on.
    #[inline(always)]
    fn row(&self, first_row: usize, i: usize) -> usize {
        (first_row + i).min(self.rows.end - 1)
    }

    /// Stores one row's sums of a panel.
    #[inline(always)]
    fn store(&self, plane_idx: usize, row_idx: usize, panel_idx: usize, sums: &[f32; LANES]) {
        let n_out = self.matrix.n_out();
        let n_lanes = (n_out - panel_idx * PANEL).min(PANEL);
        let at = (plane_idx * self.inputs.n_rows + row_idx) * n_out + panel_idx * PANEL;
        // SAFETY: the tasks of a job divide panels and rows among them (`Cpu::matmul_many`), so no other task writes
        // these outputs; this task holds no other part.
        unsafe { self.out.part(at..at + n_lanes) }.copy_from_slice(&sums[..n_lanes]);
    }
}

/// One panel of integer weights.
#[derive(Clone, Copy)]
struct Panel<'a> {
    integers: &'a Integers,
    panel_idx: usize,
}

// === impl Panel ===

impl Panel<'_> {
    /// Sums of one K-segment, the runs `parts` of 32 inputs, for the 16 outputs and `N` rows.
    #[inline(always)]
    fn sum<S: Simd, const N: usize, const NIBBLES: bool, const HALVES: bool, const MINIMUM: bool>(
        &self,
        simd: S,
        parts: Range<usize>,
        rows: &[&[ActivationBlock]; N],
    ) -> [S::F32; N] {
        let offset = i32::from(self.integers.format.offset);
        let rows: [&[ActivationBlock]; N] = std::array::from_fn(|i| &rows[i][parts.clone()]);
        let mut sums = [simd.splat(0.0); N];
        for (i, part_idx) in parts.enumerate() {
            let codes = self.codes::<S, NIBBLES>(simd, part_idx);
            let groups: [(S::F32, S::F32); 2] = if HALVES {
                [self.group::<S, MINIMUM>(simd, 2 * part_idx), self.group::<S, MINIMUM>(simd, 2 * part_idx + 1)]
            } else {
                [self.group::<S, MINIMUM>(simd, part_idx); 2]
            };
            for row_idx in 0..N {
                let x = &rows[row_idx][i];
                let scale = simd.splat(x.scale);
                let mut add_group = |quads: Range<usize>, (weight_scale, minimum), x_sum: i32, scaled_sum: f32| {
                    let mut dot = simd.splat_i32(if MINIMUM { 0 } else { -offset * x_sum });
                    for quad_idx in quads {
                        dot = if NIBBLES {
                            simd.dot_nibbles(dot, codes[quad_idx], x.quads[quad_idx])
                        } else {
                            simd.dot_bytes(dot, codes[quad_idx], x.quads[quad_idx])
                        };
                    }
                    sums[row_idx] = simd.fma(simd.mul(weight_scale, scale), simd.to_f32(dot), sums[row_idx]);
                    if MINIMUM {
                        sums[row_idx] = simd.fma(minimum, simd.splat(scaled_sum), sums[row_idx]);
                    }
                };
                if HALVES {
                    add_group(0..4, groups[0], x.half_sums[0], x.scaled_half_sums[0]);
                    add_group(4..8, groups[1], x.half_sums[1], x.scaled_half_sums[1]);
                } else {
                    add_group(0..8, groups[0], x.sum, x.scaled_sum);
                }
            }
        }
        sums
    }

    /// The codes of 32 inputs, by quads.
    #[inline(always)]
    fn codes<S: Simd, const NIBBLES: bool>(&self, simd: S, part_idx: usize) -> [S::Bytes; 8] {
        let part_idx = self.panel_idx * self.integers.n_parts() + part_idx;
        if NIBBLES {
            let lines = self.integers.codes.as_chunks::<4>().0[part_idx].each_ref().map(|line| simd.load_bytes(line));
            std::array::from_fn(|i| if i < 4 { simd.low_nibbles(lines[i]) } else { simd.high_nibbles(lines[i - 4]) })
        } else {
            self.integers.codes.as_chunks::<8>().0[part_idx].each_ref().map(|line| simd.load_bytes(line))
        }
    }

    /// Scales and minimums of a group.
    #[inline(always)]
    fn group<S: Simd, const MINIMUM: bool>(&self, simd: S, group_idx: usize) -> (S::F32, S::F32) {
        let integers = self.integers;
        let inner = self.panel_idx * integers.n_groups + group_idx;
        if !integers.format.two_level {
            let minimum = if MINIMUM { simd.load_f16(&integers.minimums[inner]) } else { simd.splat(0.0) };
            return (simd.load_f16(&integers.scales[inner]), minimum);
        }
        let n_scales = integers.n_groups / integers.groups_per_scale;
        let outer = self.panel_idx * n_scales + group_idx / integers.groups_per_scale;
        let product = |outers: &[[u16; PANEL]], inners: &[[i8; PANEL]]| {
            simd.mul(simd.load_f16(&outers[outer]), simd.load_i8(&inners[inner]))
        };
        let scale = product(&integers.scales, &integers.sub_scales);
        let minimum = if MINIMUM { product(&integers.minimums, &integers.sub_minimums) } else { simd.splat(0.0) };
        (scale, minimum)
    }
}

/// Dot products of one segment of a row of float weights with `N` rows.
#[inline(always)]
fn dot_floats<S: Simd, T: Copy + Default, const N: usize>(
    simd: S,
    weights: &[T],
    load: &impl Fn(&[T; LANES]) -> S::F32,
    rows: &[&[f32]; N],
) -> [f32; N] {
    let mut sums = [simd.splat(0.0); N];
    let (vectors, weight_tail) = weights.as_chunks::<LANES>();
    for (i, vector) in vectors.iter().enumerate() {
        let weight = load(vector);
        for row_idx in 0..N {
            sums[row_idx] = simd.fma(weight, simd.load(&rows[row_idx].as_chunks::<LANES>().0[i]), sums[row_idx]);
        }
    }
    if !weight_tail.is_empty() {
        let weight = load(&zero_filled(weight_tail));
        for row_idx in 0..N {
            let x = zero_filled(rows[row_idx].as_chunks::<LANES>().1);
            sums[row_idx] = simd.fma(weight, simd.load(&x), sums[row_idx]);
        }
    }
    sums.map(|sum| simd.sum(sum))
}

#[inline(always)]
fn zero_filled<T: Copy + Default>(tail: &[T]) -> [T; LANES] {
    std::array::from_fn(|i| tail.get(i).copied().unwrap_or_default())
}

//! Activations: the inputs of a product, quantized to 8 bits per row and block of 32.
//!
//! A block's scale is its largest magnitude divided by 127, its codes are the values times `127 / largest`, rounded to
//! the nearest integer, ties to even. A row is quantized by itself, so its codes never depend on the rest of a batch.
//! A block of zeros, or of magnitudes so small (below 2^-121) that the factor overflows, has the
//! scale 0. A block with a value that is not finite has the scale NaN and zero codes, so that
//! it poisons every output of its row, and of no other.
//!
//! Kernels take several rows at once, so rows lie together in *strips*: sixteen rows each, and a last one of what is left.
//! Within a strip the blocks of its rows that cover the same inputs are neighbours: `[n_in / 32, rows of the strip]`.

use std::ops::Range;

use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::packed::BLOCK;

/// Adding and subtracting this rounds a float below 2^22 to an integer, ties to even: 1.5 * 2^23 is where the spacing of
/// floats is one.
pub(crate) const ROUNDER: f32 = 12_582_912.0;

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
    #[inline(always)]
    pub(crate) fn quantize(values: &[f32; BLOCK]) -> Self {
        // As integers, magnitudes have the order of the floats, with NaN above infinity; so the largest finds either.
        let largest = values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        if !largest.is_finite() {
            return Self::from_codes(&[0; BLOCK], f32::NAN);
        }
        let steps_per_one = 127.0 / largest;
        if !steps_per_one.is_finite() {
            return Self::default();
        }
        let codes: [i8; BLOCK] = std::array::from_fn(|i| {
            let rounded = values[i] * steps_per_one + ROUNDER;
            // The integer stands in the low bits of the sum.
            rounded.to_bits() as i8
        });
        Self::from_codes(&codes, largest / 127.0)
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

/// [`ActivationBlock::quantize`] with vectors.
#[inline(always)]
pub(crate) fn quantize_lanes<S: Simd>(simd: S, values: &[f32; BLOCK]) -> ActivationBlock {
    let (halves, _) = values.as_chunks::<LANES>();
    let [low, high] = [simd.load(&halves[0]), simd.load(&halves[1])];
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

/// Quantizes some rows of `[n_rows, n_in]` to their places in the strips.
pub(crate) struct QuantizeRows<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) n_rows: usize,
    pub(crate) blocks: SharedSlice<'a, ActivationBlock>,
    /// The blocks to fill, counted row by row.
    pub(crate) range: Range<usize>,
}

impl Kernel for QuantizeRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (values, _) = self.values.as_chunks::<BLOCK>();
        let n_parts = values.len() / self.n_rows;
        for block_idx in self.range {
            let (row_idx, part_idx) = (block_idx / n_parts, block_idx % n_parts);
            let first_row = row_idx / STRIP * STRIP;
            let at = first_row * n_parts + part_idx * strip_rows(first_row, self.n_rows) + row_idx - first_row;
            // SAFETY: every block has a place of its own, and the tasks of a job have blocks of their own
            // (`Cpu::quantize`).
            unsafe { self.blocks.part(at..at + 1) }.fill(quantize_lanes(simd, &values[block_idx]));
        }
    }
}

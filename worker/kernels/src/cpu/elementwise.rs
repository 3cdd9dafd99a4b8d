//! Normalization, and the elementwise functions that other kernels end with.

use std::ops::Range;

use crate::cpu::activations::{Places, load, store};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::exp;
use crate::packed::BLOCK;
use crate::sum_tree::{MAX_PENDING, Terms};

/// Adds terms to some rows of `x`, if there are any, and normalizes them: `out = x / sqrt(mean(x^2) + eps) * weight`.
pub(crate) struct RmsNorm<'a> {
    /// `[n_rows, width]` of these rows.
    pub(crate) x: &'a mut [f32],
    pub(crate) rows: Range<usize>,
    pub(crate) terms: Option<Terms<'a>>,
    /// `[width]`.
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: Places<'a>,
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for (row_idx, x) in self.rows.zip(self.x.chunks_exact_mut(width)) {
            if let Some(terms) = &self.terms {
                add_terms(simd, terms, row_idx * width, x);
            }
            let mean = sum_of_squares(simd, x) / width as f32;
            let factor = simd.splat(1.0 / (mean + self.eps).sqrt());
            for (part_idx, (x, weight)) in x.chunks(BLOCK).zip(self.weight.chunks(BLOCK)).enumerate() {
                let ([low, high], weight) = (load(simd, x), load(simd, weight));
                let low = simd.mul(simd.mul(low, factor), weight[0]);
                let high = simd.mul(simd.mul(high, factor), weight[1]);
                // SAFETY: the tasks of a job have rows of their own (`Cpu::rms_norm`).
                unsafe { self.out.put(simd, row_idx, part_idx, [low, high]) };
            }
        }
    }
}

/// Adds to `x` what the planes of `terms` hold from `at` on, in the tree's order.
#[inline(always)]
fn add_terms<S: Simd>(simd: S, terms: &Terms<'_>, at: usize, x: &mut [f32]) {
    let plane_len = terms.planes.len() / terms.order.n_planes();
    let width = x.len();
    for (part_idx, x) in x.chunks_mut(BLOCK).enumerate() {
        let first = at + part_idx * BLOCK;
        let end = at + width.min((part_idx + 1) * BLOCK);
        let mut pending = [[simd.splat(0.0); 2]; MAX_PENDING];
        let mut n_pending = 0;
        for (plane_idx, n_merges) in terms.order.merges().iter().enumerate() {
            let plane = plane_idx * plane_len;
            let mut sum = load(simd, &terms.planes[plane + first..plane + end]);
            for _ in 0..*n_merges {
                n_pending -= 1;
                let left = pending[n_pending];
                sum = [simd.add(left[0], sum[0]), simd.add(left[1], sum[1])];
            }
            pending[n_pending] = sum;
            n_pending += 1;
        }
        let [low, high] = load(simd, x);
        store(simd, [simd.add(low, pending[0][0]), simd.add(high, pending[0][1])], x);
    }
}

#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (vectors, tail) = x.as_chunks::<LANES>();
    let mut sums = simd.splat(0.0);
    for vector in vectors {
        let x = simd.load(vector);
        sums = simd.fma(x, x, sums);
    }
    let x = simd.load(&std::array::from_fn(|i| tail.get(i).copied().unwrap_or_default()));
    simd.sum(simd.fma(x, x, sums))
}

/// `gate / (1 + e^-gate) * up`.
#[inline(always)]
pub(crate) fn silu_mul<S: Simd>(simd: S, gate: S::F32, up: S::F32) -> S::F32 {
    let power = exp_lanes(simd, simd.sub(simd.splat(-0.0), gate));
    simd.mul(simd.div(gate, simd.add(simd.splat(1.0), power)), up)
}

/// [`exp::exp`] of 16 lanes, operation by operation.
#[inline(always)]
pub(crate) fn exp_lanes<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let lowest = simd.splat(exp::LOWEST);
    let clamped = simd.min(simd.splat(exp::HIGHEST), simd.max(lowest, x));
    let rounder = simd.splat(crate::int8::ROUNDER);
    let steps = simd.fma(clamped, simd.splat(exp::LOG2_E), rounder);
    let n = simd.sub(steps, rounder);
    let r = simd.fma(n, simd.splat(-exp::LN2_HIGH), clamped);
    let r = simd.fma(n, simd.splat(-exp::LN2_LOW), r);
    let mut power = simd.splat(exp::TAYLOR[0]);
    for term in &exp::TAYLOR[1..] {
        power = simd.fma(power, r, simd.splat(*term));
    }
    simd.zero_below(x, lowest, simd.add_exponent(power, steps))
}

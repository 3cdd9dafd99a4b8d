//! Elementwise ops and normalization, on the rows of one task.

use crate::RopeTable;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::exp;

/// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row.
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weight.len();
        for (x, out) in self.x.chunks_exact(width).zip(self.out.chunks_exact_mut(width)) {
            let mean = sum_of_squares(simd, x) / width as f32;
            let factor = 1.0 / (mean + self.eps).sqrt();
            out.iter_mut().zip(x).zip(self.weight).for_each(|((out, x), weight)| *out = x * factor * weight);
        }
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

/// `acc += x`.
pub(crate) struct Add<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) acc: &'a mut [f32],
}

impl Kernel for Add<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        self.acc.iter_mut().zip(self.x).for_each(|(acc, x)| *acc += x);
    }
}

/// `out = gate / (1 + e^-gate) * up`.
pub(crate) struct SiluMul<'a> {
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (gates, gate_tail) = self.gate.as_chunks::<LANES>();
        let (ups, up_tail) = self.up.as_chunks::<LANES>();
        let (outs, out_tail) = self.out.as_chunks_mut::<LANES>();
        for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
            simd.store(silu_mul(simd, simd.load(gate), simd.load(up)), out);
        }
        let filled = |tail: &[f32]| std::array::from_fn(|i| tail.get(i).copied().unwrap_or_default());
        let mut last = [0.0; LANES];
        simd.store(silu_mul(simd, simd.load(&filled(gate_tail)), simd.load(&filled(up_tail))), &mut last);
        out_tail.copy_from_slice(&last[..out_tail.len()]);
    }
}

#[inline(always)]
fn silu_mul<S: Simd>(simd: S, gate: S::F32, up: S::F32) -> S::F32 {
    let power = exp_lanes(simd, simd.sub(simd.splat(-0.0), gate));
    simd.mul(simd.div(gate, simd.add(simd.splat(1.0), power)), up)
}

/// [`exp::exp`] of 16 lanes, operation by operation.
#[inline(always)]
pub(crate) fn exp_lanes<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let lowest = simd.splat(exp::LOWEST);
    let clamped = simd.min(simd.splat(exp::HIGHEST), simd.max(lowest, x));
    let rounder = simd.splat(crate::cpu::activations::ROUNDER);
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

/// Turns every head of the rows to the row's position.
pub(crate) struct Rope<'a> {
    /// `[n_rows, n_heads, head_dim]`.
    pub(crate) x: &'a mut [f32],
    pub(crate) n_heads: usize,
    pub(crate) table: &'a RopeTable,
    /// `[n_rows]`.
    pub(crate) positions: &'a [u32],
}

impl Kernel for Rope<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let head_dim = self.table.head_dim();
        for (row, position) in self.x.chunks_exact_mut(self.n_heads * head_dim).zip(self.positions) {
            row.chunks_exact_mut(head_dim).for_each(|head| self.table.turn(head, *position as usize));
        }
    }
}

//! SIMD: the vector operations that kernels are written in, and the instruction sets that offer them.
//!
//! A kernel is written once, over [`Simd`], whose vectors always have 16 lanes of 32 bits; each instruction set gives
//! the same bits for every operation, so it gives the same bits for every kernel. Floats use only operations that IEEE
//! 754 rounds correctly (add, subtract, multiply, divide, fused multiply-add) and the order in which lanes are added is
//! fixed ([`sum_lanes`]).
//!
//! A value of a type that implements [`Simd`] is the proof that the processor has the instructions; that makes the
//! operations safe to call. They must be inlined into [`Simd::vectorize`] to be fast.

use crate::cpu::matmul::{Multiplication, Place};
use crate::packed::{Integers, Line};

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// A piece of work that is compiled for each instruction set.
pub(crate) trait Kernel {
    /// Does the work with the operations of `simd`. Implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S);
}

/// The operations of an instruction set on vectors of 16 lanes.
pub(crate) trait Simd: Copy + Send + Sync {
    /// 16 floats.
    type F32: Copy;
    /// 16 signed integers.
    type I32: Copy;
    /// 64 bytes: 16 quads.
    type Bytes: Copy;

    /// Runs a kernel with this instruction set enabled.
    fn vectorize(self, kernel: impl Kernel);

    /// Computes a panel's outputs for the rows of a strip with tiles; does nothing and says so if there are none, or if
    /// vectors are as fast.
    fn sum_with_tiles(self, _: &Multiplication<'_>, _: &Integers, _strip: Place, _turn_idx: usize) -> bool {
        false
    }

    fn splat(self, value: f32) -> Self::F32;
    fn load(self, values: &[f32; LANES]) -> Self::F32;
    fn store(self, values: Self::F32, out: &mut [f32; LANES]);
    fn load_f16(self, bits: &[u16; LANES]) -> Self::F32;
    /// Rounds to the nearest, ties to even.
    fn store_f16(self, values: Self::F32, out: &mut [u16; LANES]);
    fn load_bf16(self, bits: &[u16; LANES]) -> Self::F32;
    fn load_i8(self, values: &[i8; LANES]) -> Self::F32;

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// `if a > b { a } else { b }`: `b` where either is not a number.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `if a < b { a } else { b }`: `b` where either is not a number.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `if x < limit { 0.0 } else { value }`.
    fn zero_below(self, x: Self::F32, limit: Self::F32, value: Self::F32) -> Self::F32;
    /// Adds the low 9 bits of `steps`, read as an integer, to the exponent of `values`.
    fn add_exponent(self, values: Self::F32, steps: Self::F32) -> Self::F32;
    /// The sum of the lanes, in the order of [`sum_lanes`].
    fn sum(self, values: Self::F32) -> f32;
    /// The largest of the lanes; any value if one is not a number.
    fn largest(self, values: Self::F32) -> f32;
    /// The largest magnitude among the lanes of both; not a number if one of them is not.
    #[inline(always)]
    fn largest_magnitude(self, a: Self::F32, b: Self::F32) -> f32 {
        let mut lanes = [[0.0; LANES]; 2];
        self.store(a, &mut lanes[0]);
        self.store(b, &mut lanes[1]);
        // As integers, magnitudes have the order of the floats, with NaN above infinity.
        let magnitudes = lanes.as_flattened().iter().map(|lane| lane.to_bits() & 0x7fff_ffff);
        f32::from_bits(magnitudes.fold(0, u32::max))
    }
    /// The lowest byte of every lane, as four little-endian words.
    #[inline(always)]
    fn low_bytes(self, values: Self::F32) -> [i32; 4] {
        let mut lanes = [0.0f32; LANES];
        self.store(values, &mut lanes);
        let byte = |i: usize| lanes[i].to_bits() as u8;
        std::array::from_fn(|i| i32::from_le_bytes(std::array::from_fn(|k| byte(4 * i + k))))
    }
    /// Begins to fetch the cache line of an element.
    fn prefetch<T>(self, element: &T);

    fn splat_i32(self, value: i32) -> Self::I32;
    /// Exact below 2^24.
    fn to_f32(self, values: Self::I32) -> Self::F32;

    fn load_bytes(self, line: &Line) -> Self::Bytes;
    /// Of every byte `b`, `b >> shift & mask`. The mask ends where the shifted byte does: `mask <= 255 >> shift`.
    fn bits(self, bytes: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// For every byte, below 16, the entry of `table`.
    fn look_up(self, table: &[u8; 16], bytes: Self::Bytes) -> Self::Bytes;
    /// To each lane of `sums`, adds the four products of its unsigned bytes, all below 64, with the signed bytes of
    /// `quad` (little-endian).
    fn dot_small(self, sums: Self::I32, codes: Self::Bytes, quad: i32) -> Self::I32;
    /// As [`Simd::dot_small`], for any unsigned bytes.
    fn dot_bytes(self, sums: Self::I32, codes: Self::Bytes, quad: i32) -> Self::I32;
}

/// A loop of at most eight turns (or of those that are listed), written out, so that the sums it works on are registers: left to itself the compiler
/// keeps the loop over eight rows and the sums in memory, at half the speed.
macro_rules! unrolled {
    ($i:ident in 0..$n:ident $body:block) => {
        $crate::cpu::simd::unrolled!($i in [0 1 2 3 4 5 6 7], $n $body)
    };
    ($i:ident in [$($value:literal)*], $n:ident $body:block) => {
        $(if $value < $n {
            let $i = $value;
            $body
        })*
    };
}
pub(crate) use unrolled;

/// Adds 16 lanes as a fixed tree: lane `i` and lane `i + 8`, then the first 8 sums alike, then 4, then 2.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// Any processor: lanes in an array. With `mul_add` as a library call it is slow where the compiler's target lacks the
/// instruction; it is there to be right.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

// === impl Portable ===

#[inline(always)]
fn lanes<T, const N: usize>(f: impl FnMut(usize) -> T) -> [T; N] {
    std::array::from_fn(f)
}

impl Simd for Portable {
    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    type Bytes = [u8; 64];

    fn vectorize(self, kernel: impl Kernel) {
        kernel.run(self);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [value; LANES]
    }
    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Self::F32 {
        *values
    }
    #[inline(always)]
    fn store(self, values: Self::F32, out: &mut [f32; LANES]) {
        *out = values;
    }
    #[inline(always)]
    fn load_f16(self, bits: &[u16; LANES]) -> Self::F32 {
        bits.map(|bits| half::f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn store_f16(self, values: Self::F32, out: &mut [u16; LANES]) {
        *out = values.map(|value| half::f16::from_f32(value).to_bits());
    }
    #[inline(always)]
    fn load_bf16(self, bits: &[u16; LANES]) -> Self::F32 {
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Self::F32 {
        values.map(f32::from)
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn zero_below(self, x: Self::F32, limit: Self::F32, value: Self::F32) -> Self::F32 {
        lanes(|i| if x[i] < limit[i] { 0.0 } else { value[i] })
    }
    #[inline(always)]
    fn add_exponent(self, values: Self::F32, steps: Self::F32) -> Self::F32 {
        lanes(|i| f32::from_bits(values[i].to_bits().wrapping_add(steps[i].to_bits() << 23)))
    }
    #[inline(always)]
    fn sum(self, values: Self::F32) -> f32 {
        sum_lanes(values)
    }
    #[inline(always)]
    fn largest(self, values: Self::F32) -> f32 {
        values.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn prefetch<T>(self, _element: &T) {}

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        [value; LANES]
    }
    #[inline(always)]
    fn to_f32(self, values: Self::I32) -> Self::F32 {
        values.map(|value| value as f32)
    }

    #[inline(always)]
    fn load_bytes(self, line: &Line) -> Self::Bytes {
        line.0
    }
    #[inline(always)]
    fn bits(self, bytes: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes {
        bytes.map(|byte| byte >> shift & mask)
    }
    #[inline(always)]
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        lanes(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Self::Bytes) -> Self::Bytes {
        bytes.map(|byte| table[usize::from(byte & 15)])
    }
    #[inline(always)]
    fn dot_small(self, sums: Self::I32, codes: Self::Bytes, quad: i32) -> Self::I32 {
        self.dot_bytes(sums, codes, quad)
    }
    #[inline(always)]
    fn dot_bytes(self, sums: Self::I32, codes: Self::Bytes, quad: i32) -> Self::I32 {
        let x = quad.to_le_bytes().map(|byte| i32::from(byte as i8));
        lanes(|i| {
            let code = |k: usize| i32::from(codes[4 * i + k]);
            sums[i] + code(0) * x[0] + code(1) * x[1] + code(2) * x[2] + code(3) * x[3]
        })
    }
}

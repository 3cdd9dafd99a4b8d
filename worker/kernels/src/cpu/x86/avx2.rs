//! AVX2 with FMA and F16C: a vector is two registers.

use std::arch::x86_64::*;

use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::packed::Line;

/// The proof that this processor has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

/// Two registers: lanes 0 to 7, lanes 8 to 15.
type Pair<T> = [T; 2];

// === impl Avx2 ===

impl Avx2 {
    /// The proof, if the processor has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let detected =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        detected.then_some(Self(()))
    }
}

/// A kernel with the instruction set enabled, so that everything in it is inlined here.
///
/// # Safety
/// The processor must have the features that [`Avx2::detect`] checks.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run(simd: Avx2, kernel: impl Kernel) {
    kernel.run(simd);
}

/// Wraps intrinsics that touch no memory.
macro_rules! instructions {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $out:ty { $body:expr })*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $out {
            // SAFETY: only registers are touched, and `self` proves that the processor has the instructions
            // (`Avx2::detect` is the only place that makes one).
            unsafe { $body }
        }
    )*};
}

impl Simd for Avx2 {
    type F32 = Pair<__m256>;
    type I32 = Pair<__m256i>;
    type Bytes = Pair<__m256i>;

    fn vectorize(self, kernel: impl Kernel) {
        // SAFETY: `self` proves that the processor has the features (`Avx2::detect` is the only place that makes one).
        unsafe { run(self, kernel) }
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Pair<__m256> {
        // SAFETY: the reference covers the twice 32 bytes read; unaligned loads are allowed; `self` proves the feature.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[8..].as_ptr())] }
    }
    #[inline(always)]
    fn store(self, values: Pair<__m256>, out: &mut [f32; LANES]) {
        // SAFETY: the reference covers the twice 32 bytes written; unaligned stores are allowed; `self` proves the feature.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), values[0]);
            _mm256_storeu_ps(out[8..].as_mut_ptr(), values[1]);
        }
    }
    #[inline(always)]
    fn load_f16(self, bits: &[u16; LANES]) -> Pair<__m256> {
        // SAFETY: the reference covers the twice 16 bytes read; unaligned loads are allowed; `self` proves the features.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(bits.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(bits[8..].as_ptr().cast())),
            ]
        }
    }
    #[inline(always)]
    fn store_f16(self, values: Pair<__m256>, out: &mut [u16; LANES]) {
        // SAFETY: the reference covers the twice 16 bytes written; unaligned stores are allowed; `self` proves the features.
        unsafe {
            let [low, high] = values.map(|values| _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values));
            _mm_storeu_si128(out.as_mut_ptr().cast(), low);
            _mm_storeu_si128(out[8..].as_mut_ptr().cast(), high);
        }
    }
    #[inline(always)]
    fn load_bf16(self, bits: &[u16; LANES]) -> Pair<__m256> {
        // SAFETY: the reference covers the twice 16 bytes read; unaligned loads are allowed; `self` proves the feature.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(bits.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(bits[8..].as_ptr().cast()));
            [low, high].map(|bits| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> Pair<__m256> {
        // SAFETY: the reference covers the 16 bytes read; unaligned loads are allowed; `self` proves the feature.
        unsafe {
            let values = _mm_loadu_si128(values.as_ptr().cast());
            let low = _mm256_cvtepi8_epi32(values);
            let high = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(values, values));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }
    #[inline(always)]
    fn load_bytes(self, line: &Line) -> Pair<__m256i> {
        // SAFETY: the reference covers the twice 32 bytes read, aligned by the type; `self` proves the feature.
        unsafe { [_mm256_load_si256(line.0.as_ptr().cast()), _mm256_load_si256(line.0[32..].as_ptr().cast())] }
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Pair<__m256i>) -> Pair<__m256i> {
        // SAFETY: the reference covers the 16 bytes read; unaligned loads are allowed; `self` proves the feature.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            both(|i| _mm256_shuffle_epi8(table, bytes[i]))
        }
    }

    #[inline(always)]
    fn prefetch<T>(self, element: &T) {
        // SAFETY: prefetching reads nothing that the program could see; every x86-64 processor has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) }
    }

    instructions! {
        fn splat(value: f32) -> Pair<__m256> { [_mm256_set1_ps(value); 2] }
        fn add(a: Pair<__m256>, b: Pair<__m256>) -> Pair<__m256> { both(|i| _mm256_add_ps(a[i], b[i])) }
        fn sub(a: Pair<__m256>, b: Pair<__m256>) -> Pair<__m256> { both(|i| _mm256_sub_ps(a[i], b[i])) }
        fn mul(a: Pair<__m256>, b: Pair<__m256>) -> Pair<__m256> { both(|i| _mm256_mul_ps(a[i], b[i])) }
        fn div(a: Pair<__m256>, b: Pair<__m256>) -> Pair<__m256> { both(|i| _mm256_div_ps(a[i], b[i])) }
        fn fma(a: Pair<__m256>, b: Pair<__m256>, c: Pair<__m256>) -> Pair<__m256> {
            both(|i| _mm256_fmadd_ps(a[i], b[i], c[i]))
        }
        fn max(a: Pair<__m256>, b: Pair<__m256>) -> Pair<__m256> { both(|i| _mm256_max_ps(a[i], b[i])) }
        fn min(a: Pair<__m256>, b: Pair<__m256>) -> Pair<__m256> { both(|i| _mm256_min_ps(a[i], b[i])) }
        fn zero_below(x: Pair<__m256>, limit: Pair<__m256>, value: Pair<__m256>) -> Pair<__m256> {
            both(|i| _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[i], limit[i]), value[i]))
        }
        fn add_exponent(values: Pair<__m256>, steps: Pair<__m256>) -> Pair<__m256> {
            both(|i| {
                let steps = _mm256_slli_epi32::<23>(_mm256_castps_si256(steps[i]));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(values[i]), steps))
            })
        }
        fn sum(values: Pair<__m256>) -> f32 {{
            let eight = _mm256_add_ps(values[0], values[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }}
        fn largest(values: Pair<__m256>) -> f32 {{
            let eight = _mm256_max_ps(values[0], values[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }}
        fn splat_i32(value: i32) -> Pair<__m256i> { [_mm256_set1_epi32(value); 2] }
        fn to_f32(values: Pair<__m256i>) -> Pair<__m256> { both(|i| _mm256_cvtepi32_ps(values[i])) }
        // Words are shifted; what comes from the byte above is not in the mask.
        fn bits(bytes: Pair<__m256i>, shift: u32, mask: u8) -> Pair<__m256i> {{
            let (shift, mask) = (_mm_cvtsi32_si128(shift as i32), _mm256_set1_epi8(mask as i8));
            both(|i| _mm256_and_si256(_mm256_srl_epi16(bytes[i], shift), mask))
        }}
        fn or(a: Pair<__m256i>, b: Pair<__m256i>) -> Pair<__m256i> { both(|i| _mm256_or_si256(a[i], b[i])) }
        // Two products of six bits and a signed byte stay below 2^14, where `maddubs` saturates at 2^15.
        fn dot_small(sums: Pair<__m256i>, codes: Pair<__m256i>, quad: i32) -> Pair<__m256i> {
            both(|i| {
                let pairs = _mm256_maddubs_epi16(codes[i], _mm256_set1_epi32(quad));
                _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            })
        }
        // Products with any byte could saturate 16 bits, so even and odd bytes are widened and multiplied apart.
        fn dot_bytes(sums: Pair<__m256i>, codes: Pair<__m256i>, quad: i32) -> Pair<__m256i> {{
            let x = _mm256_set1_epi32(quad);
            let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
            let x_odd = _mm256_srai_epi16::<8>(x);
            both(|i| {
                let even = _mm256_madd_epi16(_mm256_and_si256(codes[i], _mm256_set1_epi16(0xff)), x_even);
                let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes[i]), x_odd);
                _mm256_add_epi32(sums[i], _mm256_add_epi32(even, odd))
            })
        }}
    }
}

#[inline(always)]
fn both<T>(mut f: impl FnMut(usize) -> T) -> Pair<T> {
    [f(0), f(1)]
}

//! AVX-512 with VNNI: a vector is one register, a quad dot product one instruction.

use std::arch::x86_64::*;

use super::amx::Tiles;
use crate::cpu::matmul::{Multiplication, Place};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::packed::{Integers, Line};

/// The proof that this processor has AVX-512 F, BW, DQ, VL and VNNI, and perhaps tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512 {
    tiles: Option<Tiles>,
}

// === impl Avx512 ===

impl Avx512 {
    /// The proof, if the processor has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let detected = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        detected.then_some(Self { tiles: None })
    }

    /// The same, with tiles.
    pub(crate) fn with_tiles(self, tiles: Tiles) -> Self {
        Self { tiles: Some(tiles) }
    }

    /// Whether it uses tiles.
    pub(crate) fn has_tiles(self) -> bool {
        self.tiles.is_some()
    }
}

/// A kernel with the instruction set enabled, so that everything in it is inlined here.
///
/// # Safety
/// The processor must have the features that [`Avx512::detect`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn run(simd: Avx512, kernel: impl Kernel) {
    kernel.run(simd);
}

/// Wraps intrinsics that touch no memory.
macro_rules! instructions {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $out:ty { $body:expr })*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $out {
            // SAFETY: only registers are touched, and `self` proves that the processor has the instructions
            // (`Avx512::detect` is the only place that makes one).
            unsafe { $body }
        }
    )*};
}

impl Simd for Avx512 {
    type F32 = __m512;
    type I32 = __m512i;
    type Bytes = __m512i;

    fn vectorize(self, kernel: impl Kernel) {
        // SAFETY: `self` proves that the processor has the features (`Avx512::detect` is the only place that makes one).
        unsafe { run(self, kernel) }
    }

    fn sum_with_tiles(self, product: &Multiplication<'_>, integers: &Integers, strip: Place, turn_idx: usize) -> bool {
        self.tiles.is_some_and(|tiles| tiles.sum(self, product, integers, strip, turn_idx))
    }

    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> __m512 {
        // SAFETY: the reference covers the 64 bytes read; unaligned loads are allowed; `self` proves the feature.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, values: __m512, out: &mut [f32; LANES]) {
        // SAFETY: the reference covers the 64 bytes written; unaligned stores are allowed; `self` proves the feature.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) }
    }
    #[inline(always)]
    fn load_f16(self, bits: &[u16; LANES]) -> __m512 {
        // SAFETY: the reference covers the 32 bytes read; unaligned loads are allowed; `self` proves the features.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bits.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, values: __m512, out: &mut [u16; LANES]) {
        // SAFETY: the reference covers the 32 bytes written; unaligned stores are allowed; `self` proves the features.
        unsafe {
            let bits = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), bits);
        }
    }
    #[inline(always)]
    fn load_bf16(self, bits: &[u16; LANES]) -> __m512 {
        // SAFETY: the reference covers the 32 bytes read; unaligned loads are allowed; `self` proves the features.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bits.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    fn load_i8(self, values: &[i8; LANES]) -> __m512 {
        // SAFETY: the reference covers the 16 bytes read; unaligned loads are allowed; `self` proves the features.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(values.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn load_bytes(self, line: &Line) -> __m512i {
        // SAFETY: the reference covers the 64 bytes read, aligned by the type; `self` proves the feature.
        unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
    }
    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: __m512i) -> __m512i {
        // SAFETY: the reference covers the 16 bytes read; unaligned loads are allowed; `self` proves the features.
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), bytes) }
    }

    #[inline(always)]
    fn prefetch<T>(self, element: &T) {
        // SAFETY: prefetching reads nothing that the program could see; every x86-64 processor has the instruction.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) }
    }

    instructions! {
        fn splat(value: f32) -> __m512 { _mm512_set1_ps(value) }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn min(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn zero_below(x: __m512, limit: __m512, value: __m512) -> __m512 {
            _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), value)
        }
        fn add_exponent(values: __m512, steps: __m512) -> __m512 {{
            let steps = _mm512_slli_epi32::<23>(_mm512_castps_si512(steps));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(values), steps))
        }}
        fn sum(values: __m512) -> f32 {{
            let eight = _mm256_add_ps(_mm512_castps512_ps256(values), _mm512_extractf32x8_ps::<1>(values));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }}
        fn largest(values: __m512) -> f32 {{
            let eight = _mm256_max_ps(_mm512_castps512_ps256(values), _mm512_extractf32x8_ps::<1>(values));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }}
        fn largest_magnitude(a: __m512, b: __m512) -> f32 {{
            let mask = _mm512_set1_epi32(0x7fff_ffff);
            let [a, b] = [_mm512_castps_si512(a), _mm512_castps_si512(b)];
            let largest = _mm512_max_epu32(_mm512_and_si512(a, mask), _mm512_and_si512(b, mask));
            f32::from_bits(_mm512_reduce_max_epu32(largest))
        }}
        fn low_bytes(values: __m512) -> [i32; 4] {{
            let bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(values));
            [
                _mm_extract_epi32::<0>(bytes),
                _mm_extract_epi32::<1>(bytes),
                _mm_extract_epi32::<2>(bytes),
                _mm_extract_epi32::<3>(bytes),
            ]
        }}
        fn splat_i32(value: i32) -> __m512i { _mm512_set1_epi32(value) }
        fn to_f32(values: __m512i) -> __m512 { _mm512_cvtepi32_ps(values) }
        // Words are shifted; what comes from the byte above is not in the mask.
        fn bits(bytes: __m512i, shift: u32, mask: u8) -> __m512i {{
            let shifted = _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8))
        }}
        fn or(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn dot_small(sums: __m512i, codes: __m512i, quad: i32) -> __m512i {
            _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(quad))
        }
        fn dot_bytes(sums: __m512i, codes: __m512i, quad: i32) -> __m512i {
            _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(quad))
        }
    }
}

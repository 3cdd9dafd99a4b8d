//! AMX: tiles, which multiply 16 rows of activations with 16 outputs at once.
//!
//! Per run of 32 inputs, activations `[n_rows, 32]` times the panel's codes, offset taken off, `[8 quads, 16 outputs, 4]`
//! give 16 outputs of integers a row, exactly those of [`SumFormat`](crate::cpu::matmul). What is left, turning them into
//! scaled floats, is done with the same operations in the same order, so the bits are the same, too. It takes longer
//! than the products themselves, so a run is multiplied while the one before is scaled.
//!
//! The compiler knows nothing of tiles: they are set up, used and let go within one call.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::avx512::Avx512;
use crate::cpu::activations::{ActivationBlock, STRIP};
use crate::cpu::matmul::{Multiplication, Panel, Place, add_group};
use crate::cpu::simd::{LANES, Simd, unrolled};
use crate::packed::{BLOCK, Integers, Line};
use crate::sum_tree::MAX_PENDING;

/// Rows of a strip from which on tiles are faster: fewer leave most of a tile empty.
const MIN_ROWS: usize = 8;

/// The proof that this processor and system have AMX with 8-bit integers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles(());

/// Shapes of the tiles (Intel SDM volume 1, section 18.2, palette 1).
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_a_row: [u16; 16],
    rows: [u8; 16],
}

/// Integer products of one run of 32 inputs: of all of them, or of either half.
type Dots = [[[i32; LANES]; STRIP]; 2];

/// The products of a panel and the rows of a strip, `N` or less.
struct SumTiles<'a, const N: usize, const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool> {
    product: Multiplication<'a>,
    panel: Panel<'a>,
    place: Place,
    /// The strip, `[n_in / 32, n_rows]`.
    blocks: &'a [ActivationBlock],
}

// === impl Tiles ===

impl Tiles {
    /// The proof, if the processor has the instructions and the system lets this process use them.
    pub(crate) fn detect() -> Option<Self> {
        const OS_SAVES_STATE: u32 = 1 << 27;
        const TILES_AND_INT8: u32 = 1 << 24 | 1 << 25;
        let features = __cpuid(1).ecx;
        let tiles = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
        let there = features & OS_SAVES_STATE != 0 && tiles & TILES_AND_INT8 == TILES_AND_INT8;
        (there && ask_system()).then_some(Self(()))
    }

    /// Computes a panel's outputs for the rows of a strip; does nothing and says so where vectors are as fast.
    pub(crate) fn sum(self, simd: Avx512, product: &Multiplication<'_>, integers: &Integers, place: Place) -> bool {
        if place.n_rows < MIN_ROWS {
            return false;
        }
        let panel = Panel { integers, panel_idx: integers.place(place.panel_idx) };
        let format = integers.format;
        match (format.bits, format.codebook, format.group_len, format.has_minimum) {
            (4, None, 32, false) => sum_format::<4, false, false, false>(simd, product, panel, place),
            (4, None, 32, true) => sum_format::<4, false, false, true>(simd, product, panel, place),
            (4, None, _, false) => sum_format::<4, false, true, false>(simd, product, panel, place),
            (4, None, _, true) => sum_format::<4, false, true, true>(simd, product, panel, place),
            (4, Some(_), ..) => sum_format::<4, true, false, false>(simd, product, panel, place),
            (5, _, _, false) => sum_format::<5, false, false, false>(simd, product, panel, place),
            (5, _, _, true) => sum_format::<5, false, false, true>(simd, product, panel, place),
            (6, ..) => sum_format::<6, false, true, false>(simd, product, panel, place),
            _ => sum_format::<8, false, false, false>(simd, product, panel, place),
        }
        true
    }
}

/// Asks Linux for the right to use tiles, which it grants to a process once and for all (its documentation,
/// arch/x86/xstate.rst).
fn ask_system() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result = ARCH_PRCTL;
    if cfg!(all(target_os = "linux", not(miri))) {
        // SAFETY: a system call that reads its two numbers and no memory; the kernel changes these registers alone.
        unsafe {
            asm!("syscall", inlateout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XFEATURE_XTILEDATA,
                lateout("rcx") _, lateout("r11") _, options(nostack));
        }
    }
    result == 0
}

fn sum_format<const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool>(
    simd: Avx512,
    product: &Multiplication<'_>,
    panel: Panel<'_>,
    place: Place,
) {
    let blocks = product.strip(panel, place);
    let product = *product;
    // SAFETY: `simd` proves that the processor has the vector instructions, and this module is reached through `Tiles`.
    unsafe {
        match place.n_rows {
            8 => run(simd, SumTiles::<8, BITS, CODEBOOK, HALVES, MINIMUM> { product, panel, place, blocks }),
            9..=12 => run(simd, SumTiles::<12, BITS, CODEBOOK, HALVES, MINIMUM> { product, panel, place, blocks }),
            _ => run(simd, SumTiles::<STRIP, BITS, CODEBOOK, HALVES, MINIMUM> { product, panel, place, blocks }),
        }
    }
}

/// # Safety
/// The processor must have the features of [`Avx512`] and [`Tiles`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn run<const N: usize, const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool>(
    simd: Avx512,
    task: SumTiles<'_, N, BITS, CODEBOOK, HALVES, MINIMUM>,
) {
    task.run(simd);
}

// === impl SumTiles ===

impl<const N: usize, const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool>
    SumTiles<'_, N, BITS, CODEBOOK, HALVES, MINIMUM>
{
    #[inline(always)]
    fn run(&self, simd: Avx512) {
        let (n_rows, n_parts) = (self.place.n_rows as u8, if HALVES { 2 } else { 1 });
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], bytes_a_row: [0; 16], rows: [0; 16] };
        shapes.bytes_a_row[..3].copy_from_slice(&[64, BLOCK as u16 / n_parts, 64]);
        shapes.rows[..3].copy_from_slice(&[n_rows, n_rows, 8 / n_parts as u8]);
        // SAFETY: the processor has tiles (`Tiles::detect`), and these shapes are within palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
        // Cleared once a panel: a segment may be short.
        let mut dots: [Dots; 2] = [[[[0; LANES]; STRIP]; 2]; 2];
        for (plane_idx, segments) in self.product.matrix.plan().subtrees().enumerate() {
            let mut pending = [const { MaybeUninit::uninit() }; MAX_PENDING];
            let mut n_pending = 0;
            let mut sums = [simd.splat(0.0); N];
            for segment in segments {
                sums = self.sum_segment(simd, &segment.cols, &mut dots);
                for _ in 0..segment.n_merges {
                    n_pending -= 1;
                    // SAFETY: the entries below `n_pending` were written when it passed them, and it was above this one.
                    let left: [__m512; N] = unsafe { pending[n_pending].assume_init() };
                    unrolled!(i in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], N { sums[i] = simd.add(left[i], sums[i]) });
                }
                pending[n_pending] = MaybeUninit::new(sums);
                n_pending += 1;
            }
            for (i, sums) in sums.iter().enumerate().take(self.place.n_rows) {
                self.product.store(simd, plane_idx, self.place, i, *sums);
            }
        }
        // SAFETY: as above. A thread that holds no tiles is cheap to switch.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    #[inline(always)]
    fn sum_segment(&self, simd: Avx512, cols: &Range<usize>, dots: &mut [Dots; 2]) -> [__m512; N] {
        let parts = cols.start / BLOCK..cols.end / BLOCK;
        let mut sums = [simd.splat(0.0); N];
        self.multiply(simd, parts.start, &mut dots[parts.start % 2]);
        for part_idx in parts.clone() {
            if part_idx + 1 < parts.end {
                self.multiply(simd, part_idx + 1, &mut dots[(part_idx + 1) % 2]);
            }
            self.scale(simd, part_idx, &dots[part_idx % 2], &mut sums);
        }
        sums
    }

    /// The integers of one run of 32 inputs.
    #[inline(always)]
    fn multiply(&self, simd: Avx512, part_idx: usize, dots: &mut Dots) {
        self.panel.prefetch::<Avx512, BITS>(simd, part_idx);
        let codes = self.panel.codes::<Avx512, BITS, CODEBOOK>(simd, part_idx);
        let offset = self.panel.offset() as i8;
        let mut lines = [Line([0; 64]); 8];
        for (line, codes) in lines.iter_mut().zip(codes) {
            // SAFETY: a line is 64 bytes on a boundary of 64, and `simd` proves the features.
            unsafe {
                let codes = if MINIMUM { codes } else { _mm512_sub_epi8(codes, _mm512_set1_epi8(offset)) };
                _mm512_store_si512(line.0.as_mut_ptr().cast(), codes);
            }
        }
        let n_rows = self.place.n_rows;
        let blocks = &self.blocks[part_idx * n_rows..(part_idx + 1) * n_rows];
        let half = BLOCK / 2;
        // SAFETY: a block begins with its 32 codes, and there are `n_rows` of them, 64 bytes apart; the second half begins
        // 16 bytes and four quads further.
        unsafe {
            let codes: *const u8 = blocks.as_ptr().cast();
            multiply_tiles(codes, &lines[0], &mut dots[0]);
            if HALVES {
                multiply_tiles(codes.add(half), &lines[half / 4], &mut dots[1]);
            }
        }
    }

    #[inline(always)]
    fn scale(&self, simd: Avx512, part_idx: usize, dots: &Dots, sums: &mut [__m512; N]) {
        let n_rows = self.place.n_rows;
        let blocks = &self.blocks[part_idx * n_rows..(part_idx + 1) * n_rows];
        let dot = |half: usize, row_idx: usize| {
            let dots = &dots[half][row_idx];
            // SAFETY: the reference covers the 64 bytes read; unaligned loads are allowed; `simd` proves the feature.
            unsafe { _mm512_loadu_si512(dots.as_ptr().cast()) }
        };
        if HALVES {
            let first = self.panel.group::<Avx512, MINIMUM>(simd, 2 * part_idx);
            let second = self.panel.group::<Avx512, MINIMUM>(simd, 2 * part_idx + 1);
            unrolled!(i in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], N {
                // What has no row repeats the last one and is dropped.
                let x = &blocks[i.min(n_rows - 1)];
                let sum = add_group::<_, MINIMUM>(simd, sums[i], first, dot(0, i), x.scale, x.scaled_half_sums[0]);
                sums[i] = add_group::<_, MINIMUM>(simd, sum, second, dot(1, i), x.scale, x.scaled_half_sums[1]);
            });
        } else {
            let group = self.panel.group::<Avx512, MINIMUM>(simd, part_idx);
            unrolled!(i in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], N {
                let x = &blocks[i.min(n_rows - 1)];
                sums[i] = add_group::<_, MINIMUM>(simd, sums[i], group, dot(0, i), x.scale, x.scaled_sum);
            });
        }
    }
}

/// Signed bytes times signed bytes, in the shapes that were set up.
///
/// # Safety
/// As many rows of codes and lines as the shapes say must be there, 64 bytes apart, and tiles set up.
#[inline(always)]
unsafe fn multiply_tiles(codes: *const u8, lines: *const Line, dots: &mut [[i32; LANES]; STRIP]) {
    // SAFETY: by the caller's promise; the rows of `dots` are 64 bytes apart, and there are as many as a tile may have.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm1, [{codes} + {stride}]",
            "tileloadd tmm2, [{lines} + {stride}]",
            "tdpbssd tmm0, tmm1, tmm2",
            "tilestored [{dots} + {stride}], tmm0",
            codes = in(reg) codes,
            lines = in(reg) lines,
            dots = in(reg) dots.as_mut_ptr(),
            stride = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _,
            options(nostack),
        );
    }
}

//! AMX: tiles, which multiply 16 rows of activations with 16 outputs at once.
//!
//! Per run of 32 inputs, activations `[n_rows, 32]` times the panel's codes, offset taken off, `[8 quads, 16 outputs, 4]`
//! give 16 outputs of integers a row, exactly those of [`SumFormat`](crate::cpu::matmul). What is left, turning them into
//! scaled floats, is done with the same operations in the same order, so the bits are the same, too. It takes longer
//! than the products themselves, so runs are multiplied while those before are scaled, and what a panel needs is
//! unpacked once for all strips that it goes through.
//!
//! The compiler knows nothing of tiles: whoever multiplies with them sees to it that they have the right shapes. Nothing
//! else in a process uses them. Where a processor has none, the tests emulate the instructions
//! (`tests/conformance/emulated_amx.rs`), those that are here and no others.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::avx512::Avx512;
use crate::cpu::activations::{ActivationBlock, STRIP};
use crate::cpu::matmul::{MAX_TURNS, Multiplication, Panel, Place, Turn, add_group, has_offset};
use crate::cpu::simd::{Kernel, LANES, Simd, unrolled};
use crate::packed::{BLOCK, Integers, Line, QUADS};
use crate::sum_tree::MAX_PENDING;

/// Rows of a strip from which on tiles are faster: fewer leave most of a tile empty.
const MIN_ROWS: usize = 8;

/// The proof that AMX with 8-bit integers is there: this processor and system have it, or somebody has promised as much.
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

/// A run of 32 inputs of a panel, unpacked.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Run {
    /// Codes by quads, signed: the offset is taken off.
    quads: [Line; QUADS],
    /// Scales of all inputs, or of either half.
    scales: [[f32; LANES]; 2],
    /// Minimums likewise.
    minimums: [[f32; LANES]; 2],
}

/// Integer products of one run: of all its inputs, or of either half.
type Dots = [[[i32; LANES]; STRIP]; 2];

/// Runs that are multiplied before one is scaled: what is stored can be loaded into tiles, and from them, only after tens
/// of cycles.
const AHEAD: usize = 2;

/// Places that runs ahead use in turn; more than [`AHEAD`].
const RING: usize = 4;

/// What a thread has for its strips.
#[derive(Default)]
struct Scratch {
    /// Unpacked panels, one for each that goes through strips in turn: all its runs, or if there is one strip, a ring.
    panels: [Vec<Run>; MAX_TURNS],
    /// A ring.
    dots: [Dots; RING],
}

/// A panel and a strip that it meets.
struct Strip<'a> {
    simd: Avx512,
    product: Multiplication<'a>,
    panel: Panel<'a>,
    place: Place,
    /// The strip, `[n_in / 32, n_rows]`.
    blocks: &'a [ActivationBlock],
    /// The panel's runs, or a ring of them.
    runs: &'a mut [Run],
    dots: &'a mut [Dots; RING],
}

/// The products of a panel and the rows of a strip: `N`, or if it is not `FULL`, fewer.
struct SumTiles<
    'a,
    const N: usize,
    const FULL: bool,
    const BITS: usize,
    const CODEBOOK: bool,
    const HALVES: bool,
    const MINIMUM: bool,
>(Strip<'a>);

thread_local! {
    /// Made by the first strip. Grows to what the largest matrix needs.
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
    /// Rows of activations and parts of a run that the tiles of this thread are set up for. They stay so: a thread's tiles
    /// cost little when it is switched, and setting them up anew for every panel would cost more.
    static SET_UP_FOR: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
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

    /// The proof, on the caller's word.
    ///
    /// # Safety
    /// This process's threads must be able to execute the instructions.
    pub(crate) unsafe fn promised() -> Self {
        Self(())
    }

    /// Computes a panel's outputs for the rows of a strip; does nothing and says so where vectors are as fast.
    pub(crate) fn sum(
        self,
        simd: Avx512,
        product: &Multiplication<'_>,
        integers: &Integers,
        place: Place,
        turn_idx: usize,
    ) -> bool {
        if place.n_rows < MIN_ROWS {
            return false;
        }
        let panel = Panel { integers, panel_idx: integers.place(place.panel_idx) };
        let mut scratch = SCRATCH.take().unwrap_or_default();
        let Scratch { panels, dots } = &mut *scratch;
        let n_runs = if place.turn == Turn::Only { RING } else { integers.n_parts() };
        if panels[turn_idx].len() < n_runs {
            panels[turn_idx].resize(n_runs, Run::EMPTY);
        }
        let (blocks, runs) = (product.strip(panel, place), &mut panels[turn_idx][..]);
        let strip = Strip { simd, product: *product, panel, place, blocks, runs, dots };
        let format = integers.format;
        match (format.bits, format.codebook, format.group_len, format.has_minimum) {
            (4, None, 32, false) => strip.sum::<4, false, false, false>(),
            (4, None, 32, true) => strip.sum::<4, false, false, true>(),
            (4, None, _, false) => strip.sum::<4, false, true, false>(),
            (4, None, _, true) => strip.sum::<4, false, true, true>(),
            (4, Some(_), ..) => strip.sum::<4, true, false, false>(),
            (5, _, _, false) => strip.sum::<5, false, false, false>(),
            (5, _, _, true) => strip.sum::<5, false, false, true>(),
            (6, ..) => strip.sum::<6, false, true, false>(),
            (_, _, _, false) => strip.sum::<8, false, false, false>(),
            (_, _, _, true) => strip.sum::<8, false, false, true>(),
        }
        SCRATCH.set(Some(scratch));
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

impl Strip<'_> {
    fn sum<const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool>(self) {
        let simd = self.simd;
        match self.place.n_rows {
            8 => simd.vectorize(SumTiles::<8, true, BITS, CODEBOOK, HALVES, MINIMUM>(self)),
            STRIP => simd.vectorize(SumTiles::<STRIP, true, BITS, CODEBOOK, HALVES, MINIMUM>(self)),
            _ => simd.vectorize(SumTiles::<STRIP, false, BITS, CODEBOOK, HALVES, MINIMUM>(self)),
        }
    }
}

/// Gives this thread's tiles the shapes for a strip of `n_rows` and runs in `n_parts` parts.
fn set_up(n_rows: usize, n_parts: usize) {
    if SET_UP_FOR.get() == (n_rows, n_parts) {
        return;
    }
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], bytes_a_row: [0; 16], rows: [0; 16] };
    shapes.bytes_a_row[..3].copy_from_slice(&[64, (BLOCK / n_parts) as u16, 64]);
    shapes.rows[..3].copy_from_slice(&[n_rows as u8, n_rows as u8, (QUADS / n_parts) as u8]);
    // SAFETY: this module is reached through `Tiles`, so there are tiles, and these shapes are within palette 1.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly)) };
    SET_UP_FOR.set((n_rows, n_parts));
}

// === impl Run ===

impl Run {
    const EMPTY: Self = Self { quads: [Line([0; 64]); QUADS], scales: [[0.0; LANES]; 2], minimums: [[0.0; LANES]; 2] };
}

// === impl SumTiles ===

impl<const N: usize, const FULL: bool, const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool>
    Kernel for SumTiles<'_, N, FULL, BITS, CODEBOOK, HALVES, MINIMUM>
{
    /// As [`SegmentPlan::sum`](crate::segments::SegmentPlan::sum), written out so that sums stay in registers.
    #[inline(always)]
    fn run<S: Simd>(mut self, _avx512: S) {
        let simd = self.0.simd;
        set_up(self.0.place.n_rows, if HALVES { 2 } else { 1 });
        let product = self.0.product;
        for (plane_idx, segments) in product.matrix.plan().subtrees().enumerate() {
            let mut pending = [const { MaybeUninit::uninit() }; MAX_PENDING];
            let mut n_pending = 0;
            let mut sums = [simd.splat(0.0); N];
            for segment in segments {
                sums = self.sum_segment(simd, &segment.cols);
                for _ in 0..segment.n_merges {
                    n_pending -= 1;
                    // SAFETY: the entries below `n_pending` were written when it passed them, and it was above this one.
                    let left: [__m512; N] = unsafe { pending[n_pending].assume_init() };
                    unrolled!(i in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], N { sums[i] = simd.add(left[i], sums[i]) });
                }
                pending[n_pending] = MaybeUninit::new(sums);
                n_pending += 1;
            }
            for (i, sums) in sums.iter().enumerate().take(self.0.place.n_rows) {
                product.store(simd, plane_idx, self.0.place, i, *sums);
            }
        }
    }
}

impl<const N: usize, const FULL: bool, const BITS: usize, const CODEBOOK: bool, const HALVES: bool, const MINIMUM: bool>
    SumTiles<'_, N, FULL, BITS, CODEBOOK, HALVES, MINIMUM>
{
    #[inline(always)]
    fn sum_segment(&mut self, simd: Avx512, cols: &Range<usize>) -> [__m512; N] {
        let runs = cols.start / BLOCK..cols.end / BLOCK;
        let mut sums = [simd.splat(0.0); N];
        for run_idx in runs.clone().take(AHEAD) {
            self.multiply(simd, run_idx);
        }
        for run_idx in runs.clone() {
            if run_idx + AHEAD < runs.end {
                self.multiply(simd, run_idx + AHEAD);
            }
            self.scale(simd, run_idx, &mut sums);
        }
        sums
    }

    /// Where a run is unpacked.
    #[inline(always)]
    fn place_of(&self, run_idx: usize) -> usize {
        if self.0.place.turn == Turn::Only { run_idx % RING } else { run_idx }
    }

    /// The strip's rows of a run's inputs. Their number is a constant if it is full.
    #[inline(always)]
    fn rows(&self, run_idx: usize) -> &[ActivationBlock] {
        let n_rows = if FULL { N } else { self.0.place.n_rows };
        &self.0.blocks[run_idx * n_rows..][..n_rows]
    }

    /// The integers of one run of 32 inputs.
    #[inline(always)]
    fn multiply(&mut self, simd: Avx512, run_idx: usize) {
        if self.0.place.turn != Turn::Later {
            self.unpack(simd, run_idx);
        }
        let codes: *const u8 = self.rows(run_idx).as_ptr().cast();
        let (quads, dots) = (&self.0.runs[self.place_of(run_idx)].quads, &mut self.0.dots[run_idx % RING]);
        let half = BLOCK / 2;
        // SAFETY: a block begins with its 32 codes, and there are as many as the tiles are set up for, 64 bytes apart; the
        // second half begins 16 bytes and four quads further.
        unsafe {
            multiply_tiles(codes, &quads[0], &mut dots[0]);
            if HALVES {
                multiply_tiles(codes.add(half), &quads[half / 4], &mut dots[1]);
            }
        }
    }

    #[inline(always)]
    fn unpack(&mut self, simd: Avx512, run_idx: usize) {
        let (panel, place) = (self.0.panel, self.place_of(run_idx));
        let run = &mut self.0.runs[place];
        panel.prefetch::<Avx512, BITS>(simd, run_idx);
        let offset = panel.offset() as i8;
        for (line, codes) in run.quads.iter_mut().zip(panel.codes::<Avx512, BITS, CODEBOOK>(simd, run_idx)) {
            // SAFETY: a line is 64 bytes on a boundary of 64, and `simd` proves the features.
            unsafe {
                let codes =
                    if has_offset(BITS, MINIMUM) { _mm512_sub_epi8(codes, _mm512_set1_epi8(offset)) } else { codes };
                _mm512_store_si512(line.0.as_mut_ptr().cast(), codes);
            }
        }
        let n_groups = if HALVES { 2 } else { 1 };
        for i in 0..n_groups {
            let (scale, minimum) = panel.group::<Avx512, MINIMUM>(simd, n_groups * run_idx + i);
            simd.store(scale, &mut run.scales[i]);
            if MINIMUM {
                simd.store(minimum, &mut run.minimums[i]);
            }
        }
    }

    #[inline(always)]
    fn scale(&self, simd: Avx512, run_idx: usize, sums: &mut [__m512; N]) {
        let (run, blocks) = (&self.0.runs[self.place_of(run_idx)], self.rows(run_idx));
        let dots = &self.0.dots[run_idx % RING];
        let group = |half: usize| (simd.load(&run.scales[half]), simd.load(&run.minimums[half]));
        let dot = |half: usize, row_idx: usize| {
            let dots = &dots[half][row_idx];
            // SAFETY: the reference covers the 64 bytes read; unaligned loads are allowed; `simd` proves the feature.
            unsafe { _mm512_loadu_si512(dots.as_ptr().cast()) }
        };
        // What has no row repeats the last one and is dropped.
        let last = blocks.len() - 1;
        if HALVES {
            let (first, second) = (group(0), group(1));
            unrolled!(i in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], N {
                let x = &blocks[i.min(last)];
                let sum = add_group::<_, MINIMUM>(simd, sums[i], first, dot(0, i), x.scale, x.scaled_half_sums[0]);
                sums[i] = add_group::<_, MINIMUM>(simd, sum, second, dot(1, i), x.scale, x.scaled_half_sums[1]);
            });
        } else {
            let group = group(0);
            unrolled!(i in [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], N {
                let x = &blocks[i.min(last)];
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

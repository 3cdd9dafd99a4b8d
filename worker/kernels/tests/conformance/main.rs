//! The conformance table: every op, on every instruction set that the processor has (or that is emulated, as AMX is on
//! Linux), with several numbers of threads and rows, gives the bits of its plain twin; and the plain twins agree with f64
//! arithmetic and with candle.

mod attention;
mod elementwise;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod emulated_amx;
mod encodings;
mod products;
mod random;
mod ranks;

use lockstep_kernels::{Cpu, Isa};

/// Row counts: one, a few, odd ones, and past every number of rows that kernels take at once.
const ROW_COUNTS: [usize; 11] = [1, 2, 3, 5, 7, 8, 11, 13, 16, 28, 33];

/// Runs `check` on every instruction set that can be had, with one, two and three threads.
fn on_every_cpu(mut check: impl FnMut(&mut Cpu)) {
    for isa in Isa::ALL {
        for n_threads in 1..=3 {
            let Some(mut cpu) = cpu(n_threads, isa) else { continue };
            assert_eq!(cpu.isa(), isa);
            check(&mut cpu);
        }
    }
}

/// Threads with an instruction set, if the processor has it or it can be emulated.
fn cpu(n_threads: usize, isa: Isa) -> Option<Cpu> {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    if isa == Isa::Amx && !isa.is_supported() {
        return emulated_amx::cpu(n_threads);
    }
    Cpu::with_isa(n_threads, isa).ok()
}

/// Asserts that two results have the same bits, and says where they first differ.
#[track_caller]
fn assert_same_bits(actual: &[f32], expected: &[f32], what: &dyn std::fmt::Display) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let difference = actual.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = difference {
        panic!("{what}: element {i} of {} is {:e}, should be {:e}", actual.len(), actual[i], expected[i]);
    }
}

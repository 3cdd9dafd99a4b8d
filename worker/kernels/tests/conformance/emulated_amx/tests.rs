//! Instructions on tiles do what the manual says: executed by the processor where it has them, otherwise emulated.

use std::arch::asm;
use std::ffi::c_int;
use std::io::Read;
use std::os::fd::AsRawFd;

use lockstep_kernels::Isa;
use rand::RngExt;

use super::ensure_tiles;
use crate::random;

/// What `ldtilecfg` reads: tiles with numbers, rows and bytes a row; no others.
const fn config<const N: usize>(shapes: [(usize, u8, u8); N]) -> [u8; 64] {
    let mut config = [0; 64];
    config[0] = 1;
    let mut i = 0;
    while i < N {
        let (tile, n_rows, row_bytes) = shapes[i];
        config[16 + 2 * tile] = row_bytes;
        config[48 + tile] = n_rows;
        i += 1;
    }
    config
}

#[test]
fn amx_takes_part_wherever_there_is_avx512() {
    assert_eq!(crate::cpu(1, Isa::Amx).is_some(), Isa::Avx512.is_supported());
}

#[test]
fn a_product_of_tiles_is_the_sum_of_products_of_bytes() {
    ensure_tiles();
    let rng = &mut random::seeded(50);
    // As small as they get, odd, and full.
    for (n_rows, n_quads, n_out) in [(1, 1, 1), (5, 7, 3), (16, 8, 16), (13, 4, 16), (16, 16, 16)] {
        let mut random = || -> Vec<i8> { (0..16 * 64).map(|_| rng.random()).collect() };
        let (mut left, mut right) = (random(), random());
        // One sum is the largest there is.
        left[..64].fill(i8::MIN);
        right.chunks_mut(64).for_each(|row| row[..4].fill(i8::MIN));
        let mut sums: Vec<i32> = (0..16 * 16).map(|_| rng.random()).collect();
        let mut expected = sums.clone();
        for (m, n) in (0..n_rows).flat_map(|m| (0..n_out).map(move |n| (m, n))) {
            let terms = (0..4 * n_quads).map(|i| (left[64 * m + i], right[64 * (i / 4) + 4 * n + i % 4]));
            let sum: i32 = terms.map(|(left, right)| i32::from(left) * i32::from(right)).sum();
            expected[16 * m + n] = expected[16 * m + n].wrapping_add(sum);
        }
        let [rows, quads, out] = [n_rows, n_quads, n_out].map(|n| n as u8);
        let config = config([(0, rows, 4 * out), (6, rows, 4 * quads), (7, quads, 4 * out)]);
        // SAFETY: rows of tiles are 64 bytes apart, and each array has 16.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tileloadd tmm0, [{sums} + {stride}]",
                "tileloadd tmm6, [{left} + {stride}]",
                "tileloadd tmm7, [{right} + {stride}]",
                "tdpbssd tmm0, tmm6, tmm7",
                "tilestored [{sums} + {stride}], tmm0",
                "tilerelease",
                config = in(reg) config.as_ptr(),
                sums = in(reg) sums.as_mut_ptr(),
                left = in(reg) left.as_ptr(),
                right = in(reg) right.as_ptr(),
                stride = in(reg) 64usize,
                out("tmm0") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        assert_eq!(sums, expected, "{n_rows} rows, {n_quads} quads, {n_out} outputs");
    }
}

/// Loads a tile of 3 rows of 4 bytes through an operand and its registers, and stores it where rows are 8 bytes apart.
macro_rules! load {
    ($operand:literal, $($registers:tt)*) => {{
        static CONFIG: [u8; 64] = config([(3, 3, 4)]);
        let mut rows = [[0xff; 8]; 4];
        // SAFETY: the test names memory with 3 rows of 4 bytes, and `rows` has more.
        unsafe {
            asm!(
                "ldtilecfg [rip + {config}]",
                concat!("tileloadd tmm3, ", $operand),
                "tilestored [rsi + rdi], tmm3",
                "tilerelease",
                config = sym CONFIG,
                in("rsi") rows.as_mut_ptr(),
                in("rdi") 8usize,
                $($registers)*,
                out("tmm3") _,
                options(nostack),
            );
        }
        rows
    }};
}

#[test]
fn rows_are_found_through_base_index_and_displacement() {
    ensure_tiles();
    let bytes: [u8; 256] = std::array::from_fn(|i| i as u8);
    let at = |i: usize| bytes[i..].as_ptr();
    let check = |rows: [[u8; 8]; 4], starts: [u8; 3]| {
        let row = |start| std::array::from_fn(|i| if i < 4 { start + i as u8 } else { 0xff });
        assert_eq!(rows[..3], starts.map(row));
        assert_eq!(rows[3], [0xff; 8]);
    };
    check(load!("[rax + rcx]", in("rax") at(1), in("rcx") 70usize), [1, 71, 141]);
    check(load!("[rdx + r8*2 + 9]", in("rdx") at(0), in("r8") 20usize), [9, 49, 89]);
    check(load!("[r9 + r10*4 - 9]", in("r9") at(10), in("r10") 5usize), [1, 21, 41]);
    check(load!("[r11 + rax*8 + 500]", in("r11") at(4).wrapping_sub(500), in("rax") 10usize), [4, 84, 164]);
    check(load!("[r14 + r15 - 500]", in("r14") at(66).wrapping_add(500), in("r15") -3isize), [66, 63, 60]);
    // Numbers that mean something else in other places.
    check(load!("[r12 + r13]", in("r12") at(2), in("r13") 11usize), [2, 13, 24]);
    check(load!("[r13 + r12*2]", in("r13") at(3), in("r12") 30usize), [3, 63, 123]);
}

/// Runs `die` in a process of its own; the signal that ended it, and what it wrote to standard error.
fn end_of(die: fn()) -> (c_int, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut status = 0;
    // SAFETY: the new process has this thread alone, takes no lock of another, and ends here.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above, and both files are open.
        unsafe { libc::dup2(writer.as_raw_fd(), libc::STDERR_FILENO) };
        // Its end is no news to anybody.
        // SAFETY: as above.
        unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) };
        die();
        // SAFETY: as above.
        unsafe { libc::_exit(0) };
    }
    drop(writer);
    let mut written = String::new();
    reader.read_to_string(&mut written).unwrap();
    // SAFETY: `status` is there to be written.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFSIGNALED(status), "{status:#x}");
    (libc::WTERMSIG(status), written)
}

#[test]
fn what_cannot_be_executed_ends_the_process() {
    ensure_tiles();
    // SAFETY: the process ends.
    let unknown = || unsafe { asm!("ud2") };
    assert_eq!(end_of(unknown), (libc::SIGILL, String::new()));
    if !Isa::Amx.is_supported() {
        // SAFETY: as above.
        let refused = || unsafe { asm!("tilerelease", "tilezero tmm5", out("tmm5") _) };
        let message = "emulated AMX: tilezero tmm5: tiles are not configured\n".to_owned();
        assert_eq!(end_of(refused), (libc::SIGABRT, message));
    }
}

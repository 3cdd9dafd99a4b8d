//! Instructions on tiles, read from machine code (Intel SDM volume 2, sections 2.1.5, 2.3.5 and the pages of each).

use std::fmt;

/// What stands in the bytes before the opcode: VEX, the map 0F38, and no operand of 64 or 256 bits.
const VEX: u8 = 0xc4;
const MAP_0F38: u8 = 2;

/// One of the instructions that `src/cpu/x86/amx.rs` is made of. Tiles are numbered as the code has them, up to 15.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Instruction {
    /// `ldtilecfg [at]`
    LoadConfig { at: usize },
    /// `tilerelease`
    Release,
    /// `tilezero tile`
    Zero { tile: usize },
    /// `tileloadd tile, [rows]`
    Load { tile: usize, rows: Rows },
    /// `tilestored [rows], tile`
    Store { tile: usize, rows: Rows },
    /// `tdpbssd sums, left, right`
    Multiply { sums: usize, left: usize, right: usize },
}

/// Where the rows of a tile are in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rows {
    /// The first, base and displacement.
    pub(crate) start: usize,
    /// From one to the next, the scaled index: a negative number if it wraps around.
    pub(crate) stride: usize,
}

/// A thread's registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Registers {
    /// Those of general purpose, in the order of their numbers in machine code.
    pub(crate) general: [usize; 16],
    /// Where the instruction begins.
    pub(crate) rip: usize,
}

/// Machine code that is being read.
struct Code<F> {
    byte: F,
    len: usize,
}

// === impl Instruction ===

impl Instruction {
    /// The instruction at `registers.rip`, whose bytes `byte` gives, and its length; none if it is any other than these.
    pub(crate) fn decode(byte: impl Fn(usize) -> u8, registers: &Registers) -> Option<(Self, usize)> {
        let mut code = Code { byte, len: 0 };
        if code.next() != VEX {
            return None;
        }
        let [extensions, rest, opcode, operands] = std::array::from_fn(|_| code.next());
        // The map, then W and L, which are 0.
        if extensions & 0x1f != MAP_0F38 || rest & 0b1000_0100 != 0 {
            return None;
        }
        // These are inverted.
        let [r, x, b] = [7, 6, 5].map(|bit| usize::from(!extensions >> bit & 1) << 3);
        let third = usize::from(!rest >> 3 & 15);
        let prefix = match rest & 3 {
            0 => "none",
            1 => "66",
            2 => "F3",
            _ => "F2",
        };
        let (mode, low) = (operands >> 6, operands & 7);
        let (reg, rm) = (r | usize::from(operands >> 3 & 7), b | usize::from(low));
        let in_memory = mode != 3;
        let has_sib = in_memory && low == 4;
        let rows = |code: &mut Code<_>| code.address(registers, mode, low, x, b);
        let instruction = match (prefix, opcode, third) {
            ("none", 0x49, 0) if in_memory && reg & 7 == 0 => {
                let Rows { start, stride } = rows(&mut code);
                Self::LoadConfig { at: start.wrapping_add(stride) }
            }
            ("none", 0x49, 0) if operands == 0xc0 => Self::Release,
            ("F2", 0x49, 0) if !in_memory && low == 0 => Self::Zero { tile: reg },
            ("F2", 0x4b, 0) if has_sib => Self::Load { tile: reg, rows: rows(&mut code) },
            ("F3", 0x4b, 0) if has_sib => Self::Store { tile: reg, rows: rows(&mut code) },
            ("F2", 0x5e, _) if !in_memory => Self::Multiply { sums: reg, left: rm, right: third },
            _ => return None,
        };
        Some((instruction, code.len))
    }
}

/// As an assembler has it.
impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LoadConfig { at } => write!(f, "ldtilecfg [{at:#x}]"),
            Self::Release => write!(f, "tilerelease"),
            Self::Zero { tile } => write!(f, "tilezero tmm{tile}"),
            Self::Load { tile, rows } => write!(f, "tileloadd tmm{tile}, {rows}"),
            Self::Store { tile, rows } => write!(f, "tilestored {rows}, tmm{tile}"),
            Self::Multiply { sums, left, right } => write!(f, "tdpbssd tmm{sums}, tmm{left}, tmm{right}"),
        }
    }
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x} + {:#x} a row]", self.start, self.stride)
    }
}

// === impl Code ===

impl<F: Fn(usize) -> u8> Code<F> {
    fn next(&mut self) -> u8 {
        let byte = (self.byte)(self.len);
        self.len += 1;
        byte
    }

    fn next_i32(&mut self) -> usize {
        i32::from_le_bytes(std::array::from_fn(|_| self.next())) as usize
    }

    /// The operand in memory of a ModRM byte with `mode` and `low`; `x` and `b` extend the numbers of index and base.
    fn address(&mut self, registers: &Registers, mode: u8, low: u8, x: usize, b: usize) -> Rows {
        let (mut base, mut stride) = (low, 0);
        if low == 4 {
            let sib = self.next();
            base = sib & 7;
            let index = x | usize::from(sib >> 3 & 7);
            // The stack pointer's number stands for none.
            stride = if index == 4 { 0 } else { registers.general[index] << (sib >> 6) };
        }
        let start = match (mode, base) {
            (0, 5) => {
                let displacement = self.next_i32();
                // No instruction here has anything behind its displacement.
                let from = if low == 4 { 0 } else { registers.rip + self.len };
                from.wrapping_add(displacement)
            }
            (0, _) => registers.general[b | usize::from(base)],
            (1, _) => registers.general[b | usize::from(base)].wrapping_add(self.next() as i8 as usize),
            _ => registers.general[b | usize::from(base)].wrapping_add(self.next_i32()),
        };
        Rows { start, stride }
    }
}

#[cfg(test)]
mod tests {
    use std::arch::global_asm;
    use std::slice;

    use super::{Instruction, Registers, Rows};

    // Never executed: the assembler says how each base goes with each index.
    global_asm!(
        ".pushsection .rodata",
        "tile_loads:",
        ".irp base, rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15",
        ".irp index, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15",
        "tileloadd tmm1, [\\base + \\index]",
        "tileloadd tmm2, [\\base + \\index*2 - 3]",
        "tileloadd tmm3, [\\base + \\index*8 + 0x123456]",
        ".endr",
        "tileloadd tmm4, [\\base]",
        ".endr",
        "tileloadd tmm5, [r9*4 - 9]",
        "ldtilecfg [rip + 0x1000]",
        "tile_loads_end:",
        ".popsection",
    );

    unsafe extern "C" {
        static tile_loads: u8;
        static tile_loads_end: u8;
    }

    #[test]
    fn operands_are_those_that_were_assembled() {
        // SAFETY: both are labels of one section, with bytes between them.
        let code = unsafe {
            let len = (&raw const tile_loads_end).offset_from_unsigned(&raw const tile_loads);
            slice::from_raw_parts(&raw const tile_loads, len)
        };
        let mut registers = Registers { general: std::array::from_fn(|i| 1_000_000 + 1_000 * i), rip: 0x7000_0000 };
        let first_rip = registers.rip;
        let general = registers.general;
        let mut check = |expected: Instruction| {
            let code = &code[registers.rip - first_rip..];
            let (actual, len) = Instruction::decode(|i| code[i], &registers).expect("an instruction on tiles");
            assert_eq!(actual, expected);
            registers.rip += len;
            registers.rip
        };
        for base in general {
            // The stack pointer, the fourth, is no index.
            for index in general.iter().enumerate().filter(|(i, _)| *i != 4).map(|(_, index)| *index) {
                check(Instruction::Load { tile: 1, rows: Rows { start: base, stride: index } });
                check(Instruction::Load { tile: 2, rows: Rows { start: base - 3, stride: 2 * index } });
                check(Instruction::Load { tile: 3, rows: Rows { start: base + 0x12_3456, stride: 8 * index } });
            }
            check(Instruction::Load { tile: 4, rows: Rows { start: base, stride: 0 } });
        }
        let rows = Rows { start: 0usize.wrapping_sub(9), stride: 4 * general[9] };
        let rip = check(Instruction::Load { tile: 5, rows });
        // Counted from its end.
        let rip = check(Instruction::LoadConfig { at: rip + 9 + 0x1000 });
        assert_eq!(rip - first_rip, code.len());
    }
}

//! A thread's tiles, and what instructions do to them (Intel SDM volume 2, the pages of each, for palette 1).

use std::ptr::with_exposed_provenance as at_address;
use std::ptr::with_exposed_provenance_mut as at_address_mut;

use super::instruction::{Instruction, Rows};

const N_TILES: usize = 8;
const MAX_ROWS: usize = 16;
const MAX_ROW_BYTES: usize = 64;

/// Tiles, configured or not.
#[derive(Debug)]
pub(crate) struct TileUnit {
    is_configured: bool,
    shapes: [Shape; N_TILES],
    /// 0 beyond the rows and bytes of a tile's shape.
    tiles: [Tile; N_TILES],
}

type Tile = [[u8; MAX_ROW_BYTES]; MAX_ROWS];

#[derive(Clone, Copy, Debug)]
struct Shape {
    n_rows: usize,
    row_bytes: usize,
}

/// Why the processor would have raised an exception.
type Refusal = &'static str;

// === impl TileUnit ===

impl TileUnit {
    /// As it is before anything is configured.
    pub(crate) const RELEASED: Self = Self {
        is_configured: false,
        shapes: [Shape { n_rows: 0, row_bytes: 0 }; N_TILES],
        tiles: [[[0; MAX_ROW_BYTES]; MAX_ROWS]; N_TILES],
    };

    /// Executes an instruction, or does nothing and says what is wrong.
    ///
    /// # Safety
    /// The memory that the instruction reads or writes must be there for it.
    pub(crate) unsafe fn execute(&mut self, instruction: Instruction) -> Result<(), Refusal> {
        match instruction {
            Instruction::LoadConfig { at } => {
                // SAFETY: the caller's promise.
                let config = unsafe { at_address::<[u8; 64]>(at).read_unaligned() };
                self.configure(&config)?;
            }
            Instruction::Release => *self = Self::RELEASED,
            Instruction::Zero { tile } => {
                self.shape(tile)?;
                self.tiles[tile] = Self::RELEASED.tiles[tile];
            }
            Instruction::Load { tile, rows } => {
                let shape = self.shape_of_quads(tile)?;
                self.tiles[tile] = Self::RELEASED.tiles[tile];
                for (row_idx, row) in self.tiles[tile][..shape.n_rows].iter_mut().enumerate() {
                    // SAFETY: the caller's promise, and a row of a shape is no longer than one of a tile.
                    unsafe { at_address::<u8>(rows.at(row_idx)).copy_to(row.as_mut_ptr(), shape.row_bytes) };
                }
            }
            Instruction::Store { tile, rows } => {
                let shape = self.shape_of_quads(tile)?;
                for (row_idx, row) in self.tiles[tile][..shape.n_rows].iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { at_address_mut::<u8>(rows.at(row_idx)).copy_from(row.as_ptr(), shape.row_bytes) };
                }
            }
            Instruction::Multiply { sums, left, right } => self.multiply(sums, left, right)?,
        }
        Ok(())
    }

    /// Takes the shapes of tiles in, and clears them.
    fn configure(&mut self, config: &[u8; 64]) -> Result<(), Refusal> {
        let (palette, start_row) = (config[0], config[1]);
        if palette == 0 {
            *self = Self::RELEASED;
            return Ok(());
        }
        let unit = Self {
            is_configured: true,
            shapes: std::array::from_fn(|i| Shape {
                n_rows: usize::from(config[48 + i]),
                row_bytes: usize::from(u16::from_le_bytes([config[16 + 2 * i], config[17 + 2 * i]])),
            }),
            ..Self::RELEASED
        };
        let reserved = [&config[2..16], &config[16 + 2 * N_TILES..48], &config[48 + N_TILES..]];
        if palette != 1 {
            Err("there is no such palette")
        } else if start_row != 0 {
            Err("begins at another row than the first: only for loads that were interrupted, and not emulated")
        } else if reserved.into_iter().flatten().any(|byte| *byte != 0) {
            Err("reserved bytes are not 0")
        } else if unit.shapes.iter().any(|shape| shape.n_rows > MAX_ROWS || shape.row_bytes > MAX_ROW_BYTES) {
            Err("a tile has over 16 rows or 64 bytes a row")
        } else if unit.shapes.iter().any(|shape| (shape.n_rows == 0) != (shape.row_bytes == 0)) {
            Err("a tile has rows of no bytes, or no rows")
        } else {
            *self = unit;
            Ok(())
        }
    }

    /// The shape of a tile, if it may be used.
    fn shape(&self, tile: usize) -> Result<Shape, Refusal> {
        match self.shapes.get(tile) {
            _ if !self.is_configured => Err("tiles are not configured"),
            None => Err("there is no such tile"),
            Some(shape) if shape.n_rows == 0 => Err("a tile without rows"),
            Some(shape) => Ok(*shape),
        }
    }

    /// As [`TileUnit::shape`], for instructions to which a row is a number of quads.
    fn shape_of_quads(&self, tile: usize) -> Result<Shape, Refusal> {
        let shape = self.shape(tile)?;
        if shape.row_bytes.is_multiple_of(4) { Ok(shape) } else { Err("a row is no whole number of four bytes") }
    }

    /// `sums[m][n] += Σ left[m][k][i] * right[k][n][i]`, `i` over four signed bytes.
    fn multiply(&mut self, sums: usize, left: usize, right: usize) -> Result<(), Refusal> {
        let [of_sums, of_left, of_right] =
            [self.shape_of_quads(sums)?, self.shape_of_quads(left)?, self.shape_of_quads(right)?];
        if sums == left || sums == right || left == right {
            return Err("two operands are one tile");
        }
        if of_sums.n_rows != of_left.n_rows || of_sums.row_bytes != of_right.row_bytes {
            return Err("the shape of the sums is not that of the product");
        }
        if of_left.row_bytes / 4 != of_right.n_rows {
            return Err("the left rows do not fit the right columns");
        }
        let (left, right) = (self.tiles[left], self.tiles[right]);
        for (sums, left) in self.tiles[sums].iter_mut().zip(&left).take(of_sums.n_rows) {
            for (left, right) in left.as_chunks::<4>().0.iter().zip(&right).take(of_right.n_rows) {
                // Beyond the sums' columns the right tile holds 0.
                for (sum, right) in sums.as_chunks_mut::<4>().0.iter_mut().zip(right.as_chunks::<4>().0) {
                    let dot: i32 = (0..4).map(|i| i32::from(left[i] as i8) * i32::from(right[i] as i8)).sum();
                    *sum = i32::from_le_bytes(*sum).wrapping_add(dot).to_le_bytes();
                }
            }
        }
        Ok(())
    }
}

// === impl Rows ===

impl Rows {
    fn at(self, row_idx: usize) -> usize {
        self.start.wrapping_add(self.stride.wrapping_mul(row_idx))
    }
}

#[cfg(test)]
mod tests {
    use super::{Refusal, TileUnit};
    use crate::emulated_amx::instruction::{Instruction, Rows};

    /// Sums of 3 rows and 2 columns, from 4 quads; and a tile whose rows are no whole quads.
    fn configured() -> [u8; 64] {
        let mut config = [0; 64];
        config[0] = 1;
        for (tile, n_rows, row_bytes) in [(0, 3, 8), (1, 3, 16), (2, 4, 8), (3, 3, 6)] {
            (config[48 + tile], config[16 + 2 * tile]) = (n_rows, row_bytes);
        }
        config
    }

    fn refusal(config: &[u8; 64], instruction: Instruction) -> Option<Refusal> {
        let mut unit = TileUnit::RELEASED;
        let at = config.as_ptr().expose_provenance();
        // SAFETY: the configuration is there, and no test comes to any other memory.
        let execute = |instruction| unsafe { unit.execute(instruction) };
        [Instruction::LoadConfig { at }, instruction].into_iter().map(execute).find_map(Result::err)
    }

    #[test]
    fn shapes_beyond_those_of_the_palette_are_refused() {
        let check = |at: usize, byte: u8, expected: Refusal| {
            let mut config = configured();
            config[at] = byte;
            assert_eq!(refusal(&config, Instruction::Zero { tile: 0 }), Some(expected), "byte {at} is {byte}");
        };
        check(0, 0, "tiles are not configured");
        check(0, 2, "there is no such palette");
        check(1, 1, "begins at another row than the first: only for loads that were interrupted, and not emulated");
        for at in [2, 15, 32, 47, 56, 63] {
            check(at, 1, "reserved bytes are not 0");
        }
        for (at, byte) in [(16, 65), (17, 1), (30, 65), (48, 17), (55, 17)] {
            check(at, byte, "a tile has over 16 rows or 64 bytes a row");
        }
        check(16, 0, "a tile has rows of no bytes, or no rows");
        check(48, 0, "a tile has rows of no bytes, or no rows");
    }

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        let check = |instruction: Instruction, expected: Option<Refusal>| {
            assert_eq!(refusal(&configured(), instruction), expected, "{instruction}");
        };
        let multiply = |sums, left, right| Instruction::Multiply { sums, left, right };
        check(multiply(0, 1, 2), None);
        for (sums, left, right) in [(0, 0, 2), (0, 1, 0), (0, 1, 1)] {
            check(multiply(sums, left, right), Some("two operands are one tile"));
        }
        let rows = Rows { start: 0, stride: 64 };
        for instruction in [
            multiply(3, 1, 2),
            multiply(0, 3, 2),
            multiply(0, 1, 3),
            Instruction::Load { tile: 3, rows },
            Instruction::Store { tile: 3, rows },
        ] {
            check(instruction, Some("a row is no whole number of four bytes"));
        }
        check(Instruction::Zero { tile: 3 }, None);
        check(multiply(0, 2, 1), Some("the shape of the sums is not that of the product"));
        check(multiply(1, 2, 0), Some("the shape of the sums is not that of the product"));
        check(multiply(2, 0, 1), Some("the shape of the sums is not that of the product"));
        for tile in [4, 7] {
            check(Instruction::Zero { tile }, Some("a tile without rows"));
            check(Instruction::Load { tile, rows }, Some("a tile without rows"));
            check(Instruction::Store { tile, rows }, Some("a tile without rows"));
            check(multiply(0, 1, tile), Some("a tile without rows"));
        }
        check(Instruction::Zero { tile: 8 }, Some("there is no such tile"));
        check(Instruction::Release, None);
    }
}

//! Codes: where the integers of a panel's run of 32 inputs lie.
//!
//! Codes of `b` bits (4, 5, 6 or 8) take `b` lines. Byte `4 * o + k` of line `i` has, in its low `b` bits, the code of
//! output `o` and input `k` of quad `i`. The quads from `b` on go to the bits on top: strung together, lowest bit first,
//! `8 - b` of their bits to each line. `q[i..j]` being bits `i` to `j - 1` of the codes of quad `q`, the high bits are
//!
//! | bits | line 0 | line 1 | line 2 | line 3 | line 4 | line 5 |
//! |---|---|---|---|---|---|---|
//! | 4 | `4[0..4]` | `5[0..4]` | `6[0..4]` | `7[0..4]` | | |
//! | 5 | `5[0..3]` | `5[3..5]`, `6[0..1]` | `6[1..4]` | `6[4..5]`, `7[0..2]` | `7[2..5]` | |
//! | 6 | `6[0..2]` | `6[2..4]` | `6[4..6]` | `7[0..2]` | `7[2..4]` | `7[4..6]` |

use crate::cpu::simd::unrolled;
use crate::packed::PANEL;
use crate::quant::Block;

/// Quads in a run of 32 inputs.
pub(crate) const QUADS: usize = 8;

/// 64 bytes that start on a cache line: 16 outputs times 4 inputs.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// Some bits of a quad's codes: those of `mask` in the bytes of a line, shifted down by `shift`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) line: usize,
    pub(crate) shift: u32,
    pub(crate) mask: u8,
}

/// The pieces that make up the codes of each quad; where there are fewer than three, the others are empty.
pub(crate) type Layout = [[Piece; 3]; QUADS];

/// How codes of `n_bits` bits lie.
pub(crate) const fn layout(n_bits: usize) -> Layout {
    let (low, n_spare) = (0xff >> (8 - n_bits), 8 - n_bits);
    let mut layout = [[Piece { line: 0, shift: 0, mask: 0 }; 3]; QUADS];
    let mut quad_idx = 0;
    while quad_idx < QUADS {
        if quad_idx < n_bits {
            layout[quad_idx][0] = Piece { line: quad_idx, shift: 0, mask: low };
        } else {
            // Where the code begins among the bits on top.
            let first = (quad_idx - n_bits) * n_bits;
            let (mut line, mut i) = (first / n_spare, 0);
            while line * n_spare < first + n_bits {
                let shift = n_bits + first - line * n_spare;
                layout[quad_idx][i] = Piece { line, shift: shift as u32, mask: !low >> shift & low };
                (line, i) = (line + 1, i + 1);
            }
        }
        quad_idx += 1;
    }
    layout
}

/// Writes the codes of run `part_idx` of the blocks of every lane.
pub(super) fn put<const BITS: usize>(lines: &mut [Line], blocks: &[Block; PANEL], part_idx: usize) {
    for (lane, block) in blocks.iter().enumerate() {
        let quads = &block.codes.as_chunks::<4>().0.as_chunks::<QUADS>().0[part_idx];
        let layout = const { &layout(BITS) };
        let mut words = [0; BITS];
        // Written out, as the compiler would not, all of the layout is constants.
        unrolled!(quad_idx in 0..QUADS {
            let quad = u32::from_le_bytes(quads[quad_idx]);
            let put = |piece: Piece| (quad & u32::from_le_bytes([piece.mask; 4])) << piece.shift;
            let [first, second, third] = layout[quad_idx];
            words[first.line] |= put(first);
            words[second.line] |= put(second);
            words[third.line] |= put(third);
        });
        lines.iter_mut().zip(words).for_each(|(line, word)| line.0.as_chunks_mut().0[lane] = word.to_le_bytes());
    }
}

/// Reads the codes of a quad of one lane, of which [`layout`] has the pieces.
pub(super) fn get(lines: &[Line], pieces: &[Piece; 3], lane: usize) -> [u8; 4] {
    let word = |piece: &Piece| u32::from_le_bytes(lines[piece.line].0.as_chunks().0[lane]);
    let bits = |piece: &Piece| word(piece) >> piece.shift & u32::from_le_bytes([piece.mask; 4]);
    pieces.iter().fold(0, |codes, piece| codes | bits(piece)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::{Piece, layout};

    /// The pieces of a quad, as the module's table has them.
    #[track_caller]
    fn check(n_bits: usize, quad_idx: usize, expected: &[(usize, u32, u8)]) {
        let pieces = layout(n_bits)[quad_idx].into_iter().filter(|piece| piece.mask != 0);
        let pieces: Vec<_> = pieces.map(|Piece { line, shift, mask }| (line, shift, mask)).collect();
        assert_eq!(pieces, expected, "quad {quad_idx} of {n_bits} bits");
    }

    #[test]
    fn codes_lie_as_documented() {
        check(4, 3, &[(3, 0, 0b1111)]);
        check(4, 7, &[(3, 4, 0b1111)]);
        check(5, 4, &[(4, 0, 0b11111)]);
        check(5, 5, &[(0, 5, 0b00111), (1, 2, 0b11000)]);
        check(5, 6, &[(1, 7, 0b00001), (2, 4, 0b01110), (3, 1, 0b10000)]);
        check(5, 7, &[(3, 6, 0b00011), (4, 3, 0b11100)]);
        check(6, 5, &[(5, 0, 0b111111)]);
        check(6, 6, &[(0, 6, 0b000011), (1, 4, 0b001100), (2, 2, 0b110000)]);
        check(6, 7, &[(3, 6, 0b000011), (4, 4, 0b001100), (5, 2, 0b110000)]);
        check(8, 7, &[(7, 0, 0xff)]);
    }
}

//! A block: the integers of one block, unpacked from the bits of its encoding.
//!
//! The bit layouts are those of llama.cpp's `ggml-common.h` (structs `block_q4_0` to `block_iq4_xs`) and the meaning that
//! its `ggml-quants.c` gives them; those that GGML lacks are in its manner (`checkpoint::Encoding`).

use half::f16;
use lockstep_checkpoint::Encoding;

/// Values in the largest block.
const MAX_BLOCK_LEN: usize = 256;
/// Groups in the block with the most.
const MAX_GROUPS: usize = 16;

/// An unpacked block. Only the first `block_len` codes and the first `block_len / group_len` groups mean anything.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// Unsigned codes, as they are stored: nothing is looked up, and the format's offset is not taken off.
    pub(crate) codes: [u8; MAX_BLOCK_LEN],
    /// Scale of the block.
    pub(crate) scale: f16,
    /// Minimum of the block, to be added (K-quants store it negated).
    pub(crate) minimum: f16,
    /// What multiplies the block's scale in each group; 1 where the format has one level.
    pub(crate) sub_scales: [i8; MAX_GROUPS],
    /// What multiplies the block's minimum in each group; 1 where the format has one level.
    pub(crate) sub_minimums: [i8; MAX_GROUPS],
}

// === impl Block ===

impl Default for Block {
    fn default() -> Self {
        Self {
            codes: [0; MAX_BLOCK_LEN],
            scale: f16::ZERO,
            minimum: f16::ZERO,
            sub_scales: [1; MAX_GROUPS],
            sub_minimums: [1; MAX_GROUPS],
        }
    }
}

impl Block {
    /// The scale of a group, exact.
    pub(crate) fn group_scale(&self, group_idx: usize) -> f32 {
        self.scale.to_f32() * f32::from(self.sub_scales[group_idx])
    }

    /// The minimum of a group, exact.
    pub(crate) fn group_minimum(&self, group_idx: usize) -> f32 {
        self.minimum.to_f32() * f32::from(self.sub_minimums[group_idx])
    }
}

/// What unpacks the blocks of a quantized encoding, one at a call: exactly its bytes.
///
/// # Panics
/// If the encoding stores floats.
pub(crate) fn decoder(encoding: Encoding) -> fn(&[u8], &mut Block) {
    match encoding {
        Encoding::Q4_0 | Encoding::IQ4_NL | Encoding::NF4 | Encoding::FP4 => decode_q4::<2>,
        Encoding::Q4_1 => decode_q4::<4>,
        Encoding::Q5_0 => decode_q5::<2>,
        Encoding::Q5_1 => decode_q5::<4>,
        Encoding::Q8_0 => decode_q8,
        Encoding::Q2K => decode_q2k,
        Encoding::Q3K => decode_q3k,
        Encoding::Q4K => decode_q4k,
        Encoding::Q5K => decode_q5k,
        Encoding::Q6K => decode_q6k,
        Encoding::IQ4_XS => decode_iq4_xs,
        Encoding::U4_32 => decode_u4::<32>,
        Encoding::U4_64 => decode_u4::<64>,
        Encoding::U4_128 => decode_u4::<128>,
        Encoding::I8_32 => decode_i8,
        Encoding::F32 | Encoding::F16 | Encoding::BF16 => panic!("{encoding} has no blocks"),
    }
}

fn f16_at(bytes: &[u8], start: usize) -> f16 {
    f16::from_le_bytes([bytes[start], bytes[start + 1]])
}

/// Scale, minimum if the header is 4 bytes, then 16 bytes: low nibbles are values 0..16, high ones 16..32.
fn decode_q4<const HEADER: usize>(bytes: &[u8], block: &mut Block) {
    block.scale = f16_at(bytes, 0);
    block.minimum = if HEADER == 4 { f16_at(bytes, 2) } else { f16::ZERO };
    split_nibbles(part::<16>(bytes, HEADER), &mut block.codes[..32]);
}

/// As [`decode_q4`], with the fifth bits of all 32 values in a word before the nibbles.
fn decode_q5<const HEADER: usize>(bytes: &[u8], block: &mut Block) {
    block.scale = f16_at(bytes, 0);
    block.minimum = if HEADER == 4 { f16_at(bytes, 2) } else { f16::ZERO };
    split_nibbles(part::<16>(bytes, HEADER + 4), &mut block.codes[..32]);
    for (codes, fifth_bits) in block.codes.as_chunks_mut::<8>().0.iter_mut().zip(part::<4>(bytes, HEADER)) {
        codes.iter_mut().enumerate().for_each(|(i, code)| *code |= (fifth_bits >> i & 1) << 4);
    }
}

/// Scale, then 32 signed bytes.
fn decode_q8(bytes: &[u8], block: &mut Block) {
    block.scale = f16_at(bytes, 0);
    for (code, byte) in block.codes.iter_mut().zip(part::<32>(bytes, 2)) {
        *code = byte ^ 0x80;
    }
}

/// 16 bytes of group scale (low nibble) and minimum (high), 64 bytes of 2-bit codes, scale, minimum.
fn decode_q2k(bytes: &[u8], block: &mut Block) {
    let (groups, rest) = bytes.split_at(16);
    for (group_idx, byte) in groups.iter().enumerate() {
        block.sub_scales[group_idx] = (byte & 15) as i8;
        block.sub_minimums[group_idx] = (byte >> 4) as i8;
    }
    let (codes, rest) = rest.split_at(64);
    put_crumbs(codes, block);
    block.scale = f16_at(rest, 0);
    block.minimum = -f16_at(rest, 2);
}

/// 32 bytes of third bits, 64 bytes of low 2-bit codes, 12 bytes of 6-bit group scales less 32, scale.
fn decode_q3k(bytes: &[u8], block: &mut Block) {
    let (third_bits, rest) = bytes.split_at(32);
    let (low_bits, rest) = rest.split_at(64);
    put_crumbs(low_bits, block);
    add_bits::<1>(part(third_bits, 0), &mut block.codes, 2);
    for (group_idx, scale) in block.sub_scales.iter_mut().enumerate() {
        let low = nibble(rest[group_idx % 8], group_idx / 8);
        let high = rest[8 + group_idx % 4] >> (2 * (group_idx / 4)) & 3;
        *scale = (low | high << 4) as i8 - 32;
    }
    block.scale = f16_at(rest, 12);
    block.minimum = f16::ZERO;
}

/// Scale, minimum, 12 bytes of 6-bit group scales and minimums, 128 bytes of nibbles: 32 bytes hold the low nibbles of
/// one group of 32 and the high nibbles of the next.
fn decode_q4k(bytes: &[u8], block: &mut Block) {
    decode_k_header(bytes, block);
    put_nibbles::<32>(&bytes[16..], block);
}

/// As [`decode_q4k`], with 32 bytes of fifth bits (one bit a group) before the nibbles.
fn decode_q5k(bytes: &[u8], block: &mut Block) {
    decode_k_header(bytes, block);
    put_nibbles::<32>(&bytes[48..], block);
    add_bits::<1>(part(bytes, 16), &mut block.codes, 4);
}

/// 128 bytes of low nibbles, 64 bytes of high 2 bits, 16 signed group scales, scale. Each half of the block has 64 bytes
/// of nibbles (low ones first) and 32 bytes of high bits.
fn decode_q6k(bytes: &[u8], block: &mut Block) {
    let (nibbles, rest) = bytes.split_at(128);
    let (high_bits, rest) = rest.split_at(64);
    put_nibbles::<64>(nibbles, block);
    for (codes, high_bits) in block.codes.as_chunks_mut::<128>().0.iter_mut().zip(high_bits.as_chunks().0) {
        add_bits::<2>(high_bits, codes, 4);
    }
    for (scale, byte) in block.sub_scales.iter_mut().zip(rest) {
        *scale = *byte as i8;
    }
    block.scale = f16_at(rest, 16);
    block.minimum = f16::ZERO;
}

/// Scale, the high 2 bits of eight 6-bit group scales in a word, their low 4 bits, 128 bytes of nibbles, 16 for each group
/// (low ones first). Group scales are less 32.
fn decode_iq4_xs(bytes: &[u8], block: &mut Block) {
    block.scale = f16_at(bytes, 0);
    block.minimum = f16::ZERO;
    for (group_idx, scale) in block.sub_scales[..8].iter_mut().enumerate() {
        let high = bytes[2 + group_idx / 4] >> (2 * (group_idx % 4)) & 3;
        *scale = (nibble(bytes[4 + group_idx / 2], group_idx % 2) | high << 4) as i8 - 32;
    }
    put_nibbles::<16>(&bytes[8..], block);
}

/// Scale, zero point, then 16 bytes for each group of 32, low nibbles first.
fn decode_u4<const LEN: usize>(bytes: &[u8], block: &mut Block) {
    block.scale = f16_at(bytes, 0);
    block.minimum = -block.scale;
    block.sub_minimums[..LEN / 32].fill(bytes[2].cast_signed());
    for (codes, bytes) in block.codes[..LEN].chunks_exact_mut(32).zip(bytes[3..].as_chunks::<16>().0) {
        split_nibbles(bytes, codes);
    }
}

/// Scale, zero point, then 32 signed bytes.
fn decode_i8(bytes: &[u8], block: &mut Block) {
    block.scale = f16_at(bytes, 0);
    block.minimum = -block.scale;
    block.sub_minimums[0] = bytes[2].cast_signed();
    for (code, byte) in block.codes.iter_mut().zip(part::<32>(bytes, 3)) {
        *code = byte ^ 0x80;
    }
}

/// Scale, minimum and the eight 6-bit pairs of Q4_K and Q5_K: the first four have their low bits in plain order, the
/// last four are put together from nibbles and the top bits of the first.
fn decode_k_header(bytes: &[u8], block: &mut Block) {
    block.scale = f16_at(bytes, 0);
    block.minimum = -f16_at(bytes, 2);
    let packed = &bytes[4..16];
    for i in 0..4 {
        block.sub_scales[i] = (packed[i] & 63) as i8;
        block.sub_minimums[i] = (packed[i + 4] & 63) as i8;
        block.sub_scales[i + 4] = (packed[i + 8] & 15 | packed[i] >> 6 << 4) as i8;
        block.sub_minimums[i + 4] = (packed[i + 8] >> 4 | packed[i + 4] >> 6 << 4) as i8;
    }
}

/// `N` bytes from `start` on: a length that the compiler knows, which makes vectors of the loops over it.
fn part<const N: usize>(bytes: &[u8], start: usize) -> &[u8; N] {
    bytes[start..].first_chunk().expect("the block's length was checked")
}

/// The codes of a block, `N` bytes at a time: low nibbles first, then high ones.
fn put_nibbles<const N: usize>(bytes: &[u8], block: &mut Block) {
    let runs = block.codes.chunks_exact_mut(2 * N);
    runs.zip(bytes.as_chunks::<N>().0).for_each(|(codes, bytes)| split_nibbles(bytes, codes));
}

/// The codes of a block of 2 bits: each half of it has 32 bytes.
fn put_crumbs(bytes: &[u8], block: &mut Block) {
    block.codes.fill(0);
    let halves = block.codes.as_chunks_mut::<128>().0.iter_mut();
    halves.zip(bytes.as_chunks().0).for_each(|(codes, bytes)| add_bits::<2>(bytes, codes, 0));
}

/// Adds bits to codes, from bit `at` on: `WIDTH` bits of every byte to the first 32 codes, the next `WIDTH` to the next 32
/// and so on, low ones first.
fn add_bits<const WIDTH: usize>(bytes: &[u8; 32], codes: &mut [u8], at: usize) {
    for (run_idx, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let bits = |byte: &u8| byte >> (WIDTH * run_idx) & ((1 << WIDTH) - 1);
        codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code |= bits(byte) << at);
    }
}

/// Low nibbles to the first half of `codes`, high ones to the second.
fn split_nibbles<const N: usize>(bytes: &[u8; N], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(N);
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

fn nibble(byte: u8, idx: usize) -> u8 {
    byte >> (4 * idx) & 15
}

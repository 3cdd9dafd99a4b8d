//! Quantized blocks: what the bytes of every encoding mean.
//!
//! A quantized value is `scale * (code - offset) + minimum`. The code is an unsigned integer, or what the encoding's
//! codebook has in its place; the offset is one for the whole encoding; scale and minimum belong to a group of 16 or 32
//! neighbours. In GGML's super-blocks of 256 a group's scale is itself a small integer times an f16 of the block ("two
//! levels"), and so is its minimum. An encoding of fewer than 8 bits has either an offset or minimums.
//!
//! A zero point of its own for each block, as GPTQ and AWQ have it, is two levels, too: `scale * 1 * code + (-scale) *
//! zero`, of which the sum is exact.
//!
//! [`dequantize`] is exact: the scale is exact in f32 (at most 11 + 8 bits), and the value is rounded once, when the
//! minimum is added (or, for Q6_K alone, when a 19-bit scale meets a 6-bit code).

mod blocks;

use half::{bf16, f16, slice::HalfFloatSliceExt};
use lockstep_checkpoint::Encoding;

pub(crate) use blocks::{Block, decoder};

/// What all blocks of a quantized encoding have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// Values that share a scale: 16 or 32.
    pub(crate) group_len: usize,
    /// Bits that a code takes in memory: 4, 5, 6 or 8.
    pub(crate) bits: usize,
    /// What codes of 4 bits stand for, if not for themselves.
    pub(crate) codebook: Option<&'static [u8; 16]>,
    /// What is subtracted from a code, or from what the codebook has for it.
    pub(crate) offset: u8,
    /// Whether groups have minimums. If so, `offset` is 0, or 128 for codes of 8 bits.
    pub(crate) has_minimum: bool,
    /// Whether a group's scale and minimum are small integers times those of the block.
    pub(crate) two_level: bool,
}

/// The codebook of IQ4_NL and IQ4_XS (`kvalues_iq4nl` in `ggml-common.h`, -127 to 113), 128 added.
const IQ4: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// The codebook of NF4, -112 to 112, 128 added: the levels of bitsandbytes (`create_normal_map`) times 112. Of all factors
/// that leave them within 8 bits it is the one after which rounding them to integers moves them least.
const NF4: [u8; 16] = [16, 50, 69, 84, 96, 107, 118, 128, 137, 146, 156, 166, 177, 191, 209, 240];

/// The codebook of FP4, 128 added: the levels of bitsandbytes times 120, of which only the smallest is then rounded (from
/// 0.625 to 1).
const FP4: [u8; 16] = [128, 129, 208, 248, 168, 188, 148, 158, 128, 127, 48, 8, 88, 68, 108, 98];

// === impl Format ===

impl Format {
    /// The format of `encoding`; `None` for the three that store floats.
    #[rustfmt::skip]
    pub(crate) const fn of(encoding: Encoding) -> Option<Format> {
        let (group_len, bits, offset, has_minimum, two_level) = match encoding {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => return None,
            Encoding::Q4_0   => (32, 4,   8, false, false),
            Encoding::Q4_1   => (32, 4,   0, true,  false),
            Encoding::Q5_0   => (32, 5,  16, false, false),
            Encoding::Q5_1   => (32, 5,   0, true,  false),
            Encoding::Q8_0   => (32, 8, 128, false, false),
            Encoding::Q2K    => (16, 4,   0, true,  true),
            Encoding::Q3K    => (16, 4,   4, false, true),
            Encoding::Q4K    => (32, 4,   0, true,  true),
            Encoding::Q5K    => (32, 5,   0, true,  true),
            Encoding::Q6K    => (16, 6,  32, false, true),
            Encoding::IQ4_NL => (32, 4, 128, false, false),
            Encoding::IQ4_XS => (32, 4, 128, false, true),
            Encoding::U4_32 | Encoding::U4_64 | Encoding::U4_128 => (32, 4, 0, true, true),
            Encoding::I8_32  => (32, 8, 128, true,  true),
            Encoding::NF4    => (32, 4, 128, false, false),
            Encoding::FP4    => (32, 4, 128, false, false),
        };
        let codebook = match encoding {
            Encoding::IQ4_NL | Encoding::IQ4_XS => Some(&IQ4),
            Encoding::NF4 => Some(&NF4),
            Encoding::FP4 => Some(&FP4),
            _ => None,
        };
        Some(Format { group_len, bits, codebook, offset, has_minimum, two_level })
    }

    /// What a code is worth in steps of the scale.
    pub(crate) fn steps(&self, code: u8) -> i16 {
        let code = self.codebook.map_or(code, |codebook| codebook[usize::from(code)]);
        i16::from(code) - i16::from(self.offset)
    }

    /// The value of a code, from its group's scale and minimum.
    pub(crate) fn value(&self, code: u8, scale: f32, minimum: f32) -> f32 {
        let steps = f32::from(self.steps(code));
        if self.has_minimum { scale.mul_add(steps, minimum) } else { scale * steps }
    }
}

/// Decodes `bytes`, whole blocks of `encoding`, to the values they stand for.
///
/// # Panics
/// If `bytes` is not exactly the encoding of `out.len()` values.
pub fn dequantize(encoding: Encoding, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(Some(bytes.len()), encoding.row_bytes(out.len()), "bytes of {} {encoding} values", out.len());
    match encoding {
        Encoding::F32 => {
            let (words, _) = bytes.as_chunks::<4>();
            out.iter_mut().zip(words).for_each(|(value, word)| *value = f32::from_le_bytes(*word));
        }
        Encoding::F16 => {
            let mut halves = [f16::ZERO; 64];
            for (values, words) in out.chunks_mut(halves.len()).zip(bytes.as_chunks::<2>().0.chunks(halves.len())) {
                let halves = &mut halves[..words.len()];
                halves.iter_mut().zip(words).for_each(|(half, word)| *half = f16::from_le_bytes(*word));
                // Processors convert many at once.
                halves.convert_to_f32_slice(values);
            }
        }
        Encoding::BF16 => {
            let (words, _) = bytes.as_chunks::<2>();
            out.iter_mut().zip(words).for_each(|(value, word)| *value = bf16::from_le_bytes(*word).to_f32());
        }
        _ => dequantize_blocks(encoding, bytes, out),
    }
}

fn dequantize_blocks(encoding: Encoding, bytes: &[u8], out: &mut [f32]) {
    let format = Format::of(encoding).expect("floats are handled by the caller");
    let (decode, mut block) = (decoder(encoding), Block::default());
    for (bytes, out) in bytes.chunks_exact(encoding.block_bytes()).zip(out.chunks_exact_mut(encoding.block_len())) {
        decode(bytes, &mut block);
        for (group_idx, (out, codes)) in
            out.chunks_exact_mut(format.group_len).zip(block.codes.chunks_exact(format.group_len)).enumerate()
        {
            let (scale, minimum) = (block.group_scale(group_idx), block.group_minimum(group_idx));
            out.iter_mut().zip(codes).for_each(|(value, code)| *value = format.value(*code, scale, minimum));
        }
    }
}

//! Dequantization: what the bytes of a tensor row mean, exactly.
//!
//! Every value is a product of a half float and a few small integers, plus at most one more such product, so `f64`
//! holds it without rounding. Written from the formats' definition (`ggml-common.h` of llama.cpp) with one index
//! formula a field, and independent of the kernels, whose dequantization it checks.

use half::{bf16, f16};
use lockstep_checkpoint::Encoding;

/// The values of a row.
///
/// # Panics
/// If `bytes` is not a whole number of blocks.
pub fn dequantize(encoding: Encoding, bytes: &[u8]) -> Vec<f64> {
    let blocks = bytes.chunks_exact(encoding.block_bytes());
    assert!(blocks.remainder().is_empty(), "{} bytes are not whole {encoding} blocks", bytes.len());
    blocks.flat_map(|block| (0..encoding.block_len()).map(move |i| value(encoding, block, i))).collect()
}

/// What the codes of IQ4_NL and IQ4_XS stand for.
const IQ4_LEVELS: [f64; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// What the codes of NF4 stand for: bitsandbytes' levels in steps of 1/112, rounded.
const NF4_LEVELS: [f64; 16] =
    [-112.0, -78.0, -59.0, -44.0, -32.0, -21.0, -10.0, 0.0, 9.0, 18.0, 28.0, 38.0, 49.0, 63.0, 81.0, 112.0];

/// What the first codes of FP4 stand for, in steps of 1/120; the others are negative.
const FP4_LEVELS: [f64; 8] = [0.0, 1.0, 80.0, 120.0, 40.0, 60.0, 20.0, 30.0];

/// Value `i` of a block.
fn value(encoding: Encoding, block: &[u8], i: usize) -> f64 {
    match encoding {
        Encoding::F32 => f32::from_le_bytes([block[0], block[1], block[2], block[3]]).into(),
        Encoding::F16 => half_at(block, 0),
        Encoding::BF16 => bf16::from_le_bytes([block[0], block[1]]).to_f64(),
        Encoding::Q4_0 => half_at(block, 0) * (nibble(&block[2..], i) - 8.0),
        Encoding::Q4_1 => half_at(block, 0) * nibble(&block[4..], i) + half_at(block, 2),
        Encoding::Q5_0 => half_at(block, 0) * (nibble(&block[6..], i) + 16.0 * bit(&block[2..], i) - 16.0),
        Encoding::Q5_1 => half_at(block, 0) * (nibble(&block[8..], i) + 16.0 * bit(&block[4..], i)) + half_at(block, 2),
        Encoding::Q8_0 => half_at(block, 0) * f64::from(block[2 + i].cast_signed()),
        Encoding::Q2K => {
            let (scale, minimum) = (block[i / 16] & 15, block[i / 16] >> 4);
            let q = two_bits(&block[16..], i);
            half_at(block, 80) * f64::from(scale) * q - half_at(block, 82) * f64::from(minimum)
        }
        Encoding::Q3K => {
            let high = f64::from(block[i % 32] >> (i / 32) & 1);
            let q = two_bits(&block[32..], i) + 4.0 * high - 4.0;
            half_at(block, 108) * signed_scale(&block[96..], i / 16) * q
        }
        Encoding::Q4K => {
            let (scale, minimum) = scale_and_minimum(&block[4..], i / 32);
            half_at(block, 0) * scale * nibble_of_64(&block[16..], i) - half_at(block, 2) * minimum
        }
        Encoding::Q5K => {
            let (scale, minimum) = scale_and_minimum(&block[4..], i / 32);
            let high = f64::from(block[16 + i % 32] >> (i / 32) & 1);
            let q = nibble_of_64(&block[48..], i) + 16.0 * high;
            half_at(block, 0) * scale * q - half_at(block, 2) * minimum
        }
        Encoding::Q6K => {
            let q = nibble_of_128(block, i) + 16.0 * two_bits(&block[128..], i) - 32.0;
            half_at(block, 208) * f64::from(block[192 + i / 16].cast_signed()) * q
        }
        Encoding::IQ4_NL => half_at(block, 0) * IQ4_LEVELS[nibble(&block[2..], i) as usize],
        Encoding::IQ4_XS => {
            let group = i / 32;
            let low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
            let high = block[2 + group / 4] >> (2 * (group % 4)) & 3;
            let level = IQ4_LEVELS[nibble(&block[8 + 16 * group..], i % 32) as usize];
            half_at(block, 0) * (f64::from(low | high << 4) - 32.0) * level
        }
        Encoding::U4_32 | Encoding::U4_64 | Encoding::U4_128 => with_zero_point(block, i),
        Encoding::I8_32 => {
            let (q, zero) = (block[3 + i].cast_signed(), block[2].cast_signed());
            half_at(block, 0) * (f64::from(q) - f64::from(zero))
        }
        Encoding::NF4 => half_at(block, 0) * NF4_LEVELS[nibble(&block[2..], i) as usize],
        Encoding::FP4 => {
            let code = nibble(&block[2..], i) as usize;
            half_at(block, 0) * FP4_LEVELS[code % 8] * if code < 8 { 1.0 } else { -1.0 }
        }
    }
}

/// A block with a zero point: nibbles in groups of 32.
fn with_zero_point(block: &[u8], i: usize) -> f64 {
    let q = nibble(&block[3 + i / 32 * 16..], i % 32);
    half_at(block, 0) * (q - f64::from(block[2].cast_signed()))
}

fn half_at(block: &[u8], offset: usize) -> f64 {
    f16::from_le_bytes([block[offset], block[offset + 1]]).to_f64()
}

/// 4 bits of a block of 32: the first half in the low nibbles, the second in the high ones.
fn nibble(quants: &[u8], i: usize) -> f64 {
    f64::from(quants[i % 16] >> (4 * (i / 16)) & 15)
}

/// 1 bit of a block of 32, in order.
fn bit(quants: &[u8], i: usize) -> f64 {
    f64::from(quants[i / 8] >> (i % 8) & 1)
}

/// 2 bits of a super-block: 32 bytes hold 128 values, a quarter of them in each pair of bits.
fn two_bits(quants: &[u8], i: usize) -> f64 {
    f64::from(quants[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3)
}

/// 4 bits of a super-block: 32 bytes hold 64 values, half of them in the low nibbles.
fn nibble_of_64(quants: &[u8], i: usize) -> f64 {
    f64::from(quants[32 * (i / 64) + i % 32] >> (4 * (i % 64 / 32)) & 15)
}

/// 4 bits of a super-block: 64 bytes hold 128 values, half of them in the low nibbles.
fn nibble_of_128(quants: &[u8], i: usize) -> f64 {
    f64::from(quants[64 * (i / 128) + i % 64] >> (4 * (i % 128 / 64)) & 15)
}

/// Signed 6-bit scale `group` of 16 in 12 bytes (Q3_K): low nibbles in the first 8 bytes, high pairs in the last 4.
fn signed_scale(scales: &[u8], group: usize) -> f64 {
    let low = scales[group % 8] >> (4 * (group / 8)) & 15;
    let high = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
    f64::from(low | high << 4) - 32.0
}

/// 6-bit scale and minimum `group` of 8 in 12 bytes (Q4_K, Q5_K). The first four of each lie whole in the first 8
/// bytes; of the last four, the high pairs fill those bytes' top bits and the nibbles share the last 4 bytes.
fn scale_and_minimum(scales: &[u8], group: usize) -> (f64, f64) {
    let (scale, minimum) = if group < 4 {
        (scales[group] & 63, scales[group + 4] & 63)
    } else {
        let low = scales[group + 4];
        (low & 15 | scales[group - 4] >> 6 << 4, low >> 4 | scales[group] >> 6 << 4)
    };
    (scale.into(), minimum.into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use lockstep_checkpoint::Encoding;
    use serde::Deserialize;

    use super::dequantize;

    #[derive(Deserialize)]
    struct Sample {
        bytes: String,
        values: Vec<f32>,
    }

    #[test]
    fn every_encoding_means_what_the_gguf_package_says() {
        let table: BTreeMap<String, Sample> =
            serde_json::from_str(include_str!("../../data/dequantized.json")).unwrap();
        for encoding in Encoding::ALL {
            // Plain floats that numpy has no say in, and what GGUF files do not have.
            if matches!(encoding, Encoding::F32 | Encoding::BF16) || encoding.ggml_type().is_none() {
                continue;
            }
            let sample = &table[encoding.name()];
            let digits: Vec<u8> =
                sample.bytes.bytes().map(|digit| (digit as char).to_digit(16).unwrap() as u8).collect();
            let bytes: Vec<u8> = digits.as_chunks::<2>().0.iter().map(|[high, low]| high << 4 | low).collect();
            let values: Vec<f32> = dequantize(encoding, &bytes).into_iter().map(|value| value as f32).collect();
            assert_eq!(values, sample.values, "{encoding}");
        }
    }

    #[test]
    fn floats_are_taken_as_they_are() {
        assert_eq!(dequantize(Encoding::F32, &[0, 0, 0x80, 0x3F, 0, 0, 0x20, 0xC0]), [1.0, -2.5]);
        assert_eq!(dequantize(Encoding::BF16, &[0x80, 0x3F, 0x20, 0xC0]), [1.0, -2.5]);
    }
}

//! Quantization: the plainest encoder of each encoding.
//!
//! Scales are taken from the extremes of a group and every value is rounded to the nearest step; nothing is searched.
//! Good enough for random weights, whose values mean nothing, and easy to hold against the decoder.

use half::{bf16, f16};
use lockstep_checkpoint::Encoding;

/// Encodes rows that lie one after another.
///
/// # Panics
/// If `values` is not a whole number of blocks.
pub fn quantize(encoding: Encoding, values: &[f32]) -> Vec<u8> {
    let blocks = values.chunks_exact(encoding.block_len());
    assert!(blocks.remainder().is_empty(), "{} values are not whole {encoding} blocks", values.len());
    let mut bytes = Vec::with_capacity(values.len() / encoding.block_len() * encoding.block_bytes());
    for x in blocks {
        let block = match encoding {
            Encoding::F32 => x[0].to_le_bytes().to_vec(),
            Encoding::F16 => f16::from_f32(x[0]).to_le_bytes().to_vec(),
            Encoding::BF16 => bf16::from_f32(x[0]).to_le_bytes().to_vec(),
            Encoding::Q4_0 => symmetric_32(x, 4),
            Encoding::Q4_1 => affine_32(x, 4),
            Encoding::Q5_0 => symmetric_32(x, 5),
            Encoding::Q5_1 => affine_32(x, 5),
            Encoding::Q8_0 => q8_0(x),
            Encoding::Q2K => q2_k(x),
            Encoding::Q3K => q3_k(x),
            Encoding::Q4K => q4_k(x),
            Encoding::Q5K => q5_k(x),
            Encoding::Q6K => q6_k(x),
            Encoding::IQ4_NL => iq4_nl(x),
            Encoding::IQ4_XS => iq4_xs(x),
            Encoding::U4_32 | Encoding::U4_64 | Encoding::U4_128 | Encoding::I8_32 => zero_point(encoding, x),
            Encoding::NF4 => codebook_32(x, &NF4_LEVELS),
            Encoding::FP4 => codebook_32(x, &FP4_LEVELS),
        };
        debug_assert_eq!(block.len(), encoding.block_bytes());
        bytes.extend(block);
    }
    bytes
}

// === Blocks of 32 ===

/// Q4_0 and Q5_0: value = (q - half) * scale. The largest magnitude becomes q = 0, which reaches further than the top.
fn symmetric_32(x: &[f32], n_bits: u32) -> Vec<u8> {
    let half = (1 << (n_bits - 1)) as f32;
    let scale = f16::from_f32(-extreme(x) / half);
    let q: Vec<u8> = x.iter().map(|x| nearest(x / scale.to_f32() + half, 2.0 * half - 1.0)).collect();
    [&scale.to_le_bytes()[..], &fifth_bits(&q)[..4 * (n_bits as usize - 4)], &nibbles_32(&q)].concat()
}

/// Q4_1 and Q5_1: value = q * scale + minimum.
fn affine_32(x: &[f32], n_bits: u32) -> Vec<u8> {
    let (smallest, largest) = range(x);
    let top = ((1 << n_bits) - 1) as f32;
    let (scale, minimum) = (f16::from_f32((largest - smallest) / top), f16::from_f32(smallest));
    let q: Vec<u8> = x.iter().map(|x| nearest((x - minimum.to_f32()) / scale.to_f32(), top)).collect();
    let high = &fifth_bits(&q)[..4 * (n_bits as usize - 4)];
    [&scale.to_le_bytes()[..], &minimum.to_le_bytes(), high, &nibbles_32(&q)].concat()
}

/// Q8_0: value = q * scale.
fn q8_0(x: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(extreme(x).abs() / 127.0);
    let q = x.iter().map(|x| (nearest(x / scale.to_f32() + 127.0, 254.0) as i16 - 127) as u8);
    scale.to_le_bytes().into_iter().chain(q).collect()
}

/// IQ4_NL: value = level(q) * scale.
fn iq4_nl(x: &[f32]) -> Vec<u8> {
    let scale = f16::from_f32(extreme(x) / IQ4_LEVELS[0]);
    let q: Vec<u8> = x.iter().map(|x| nearest_level(x / scale.to_f32(), &IQ4_LEVELS)).collect();
    [&scale.to_le_bytes()[..], &nibbles_32(&q)].concat()
}

/// NF4 and FP4: value = level(q) * scale, and there is a level of the largest magnitude with either sign.
fn codebook_32(x: &[f32], levels: &[f32; 16]) -> Vec<u8> {
    let scale = f16::from_f32(extreme(x).abs() / extreme(levels).abs());
    let q: Vec<u8> = x.iter().map(|x| nearest_level(x / scale.to_f32(), levels)).collect();
    [&scale.to_le_bytes()[..], &nibbles_32(&q)].concat()
}

/// U4, in blocks of 32 or more, and I8, whose codes and zero points are stored less 128: value = (q - zero) * scale.
fn zero_point(encoding: Encoding, x: &[f32]) -> Vec<u8> {
    let (smallest, largest) = range(x);
    let (smallest, largest) = (smallest.min(0.0), largest.max(0.0));
    let top = if encoding == Encoding::I8_32 { 255.0 } else { 15.0 };
    let scale = f16::from_f32((largest - smallest) / top);
    let zero = nearest(-smallest / scale.to_f32(), top);
    let q: Vec<u8> = x.iter().map(|x| nearest(x / scale.to_f32() + f32::from(zero), top)).collect();
    if encoding == Encoding::I8_32 {
        let signed = [zero].into_iter().chain(q).map(|q| q ^ 0x80);
        return scale.to_le_bytes().into_iter().chain(signed).collect();
    }
    let nibbles = q.chunks_exact(32).flat_map(nibbles_32);
    scale.to_le_bytes().into_iter().chain([zero]).chain(nibbles).collect()
}

/// The low 4 bits: the first half in the low nibbles, the second in the high ones.
fn nibbles_32(q: &[u8]) -> Vec<u8> {
    (0..16).map(|i| q[i] & 15 | (q[i + 16] & 15) << 4).collect()
}

/// Bit 4 of each of 32 values, in order.
fn fifth_bits(q: &[u8]) -> [u8; 4] {
    q.iter().enumerate().fold(0u32, |bits, (i, q)| bits | u32::from(q >> 4 & 1) << i).to_le_bytes()
}

// === Super-blocks of 256 ===

/// A super-block whose groups have scales and minimums, which are multiples of two half floats:
/// value = scale * scales[g] * q - minimum * minimums[g].
struct AffineGroups {
    scale: f16,
    minimum: f16,
    scales: Vec<u8>,
    minimums: Vec<u8>,
    q: Vec<u8>,
}

/// A super-block whose groups have signed scales: value = scale * scales[g] * (q - half).
struct SymmetricGroups {
    scale: f16,
    scales: Vec<i8>,
    q: Vec<u8>,
}

fn q2_k(x: &[f32]) -> Vec<u8> {
    let groups = AffineGroups::new(x, 16, 3.0, 15.0);
    let scales = groups.scales.iter().zip(&groups.minimums).map(|(scale, minimum)| scale | minimum << 4);
    let mut block: Vec<u8> = scales.collect();
    block.extend(two_bits(&groups.q));
    block.extend(groups.scale.to_le_bytes());
    block.extend(groups.minimum.to_le_bytes());
    block
}

fn q3_k(x: &[f32]) -> Vec<u8> {
    let groups = SymmetricGroups::new(x, 4.0, 31);
    let high_bit = |i: usize| (0..8).fold(0, |byte, bit| byte | (groups.q[32 * bit + i] >> 2 & 1) << bit);
    let mut block: Vec<u8> = (0..32).map(high_bit).collect();
    block.extend(two_bits(&groups.q));
    let scale = |group: usize| (groups.scales[group] + 32) as u8;
    block.extend((0..8).map(|group| scale(group) & 15 | (scale(group + 8) & 15) << 4));
    block.extend((0..4).map(|group| (0..4).fold(0, |byte, k| byte | scale(group + 4 * k) >> 4 << (2 * k))));
    block.extend(groups.scale.to_le_bytes());
    block
}

fn q4_k(x: &[f32]) -> Vec<u8> {
    let groups = AffineGroups::new(x, 32, 15.0, 63.0);
    [groups.head_of_k4_and_k5(), nibbles_of_64(&groups.q)].concat()
}

fn q5_k(x: &[f32]) -> Vec<u8> {
    let groups = AffineGroups::new(x, 32, 31.0, 63.0);
    let high_bit = |i: usize| (0..8).fold(0, |byte, bit| byte | (groups.q[32 * bit + i] >> 4 & 1) << bit);
    [groups.head_of_k4_and_k5(), (0..32).map(high_bit).collect(), nibbles_of_64(&groups.q)].concat()
}

fn q6_k(x: &[f32]) -> Vec<u8> {
    let groups = SymmetricGroups::new(x, 32.0, 127);
    let q = &groups.q;
    let low = |i: usize| q[128 * (i / 64) + i % 64] & 15 | (q[128 * (i / 64) + 64 + i % 64] & 15) << 4;
    let mut block: Vec<u8> = (0..128).map(low).collect();
    block.extend(two_bits(&q.iter().map(|q| q >> 4).collect::<Vec<u8>>()));
    block.extend(groups.scales.iter().map(|scale| scale.cast_unsigned()));
    block.extend(groups.scale.to_le_bytes());
    block
}

/// IQ4_XS: value = scale * scales[g] * level(q).
fn iq4_xs(x: &[f32]) -> Vec<u8> {
    let wanted: Vec<f32> = x.chunks_exact(32).map(|group| extreme(group) / IQ4_LEVELS[0]).collect();
    let scale = f16::from_f32(extreme(&wanted).abs() / 31.0);
    let scales: Vec<u8> = wanted.iter().map(|wanted| nearest(wanted / scale.to_f32() + 32.0, 63.0)).collect();
    let mut block = scale.to_le_bytes().to_vec();
    block.extend((0..2).map(|i| (0..4).fold(0, |byte, k| byte | scales[4 * i + k] >> 4 << (2 * k))));
    block.extend((0..4).map(|i| scales[2 * i] & 15 | (scales[2 * i + 1] & 15) << 4));
    for (x, group_scale) in x.chunks_exact(32).zip(&scales) {
        let step = scale.to_f32() * (f32::from(*group_scale) - 32.0);
        block.extend(nibbles_32(&x.iter().map(|x| nearest_level(x / step, &IQ4_LEVELS)).collect::<Vec<u8>>()));
    }
    block
}

impl AffineGroups {
    /// Groups of `group_len` values with q up to `q_top` and scales and minimums up to `scale_top`.
    fn new(x: &[f32], group_len: usize, q_top: f32, scale_top: f32) -> Self {
        // A minimum is subtracted and cannot be negative, so zero belongs to every group's range.
        let ranges = x.chunks_exact(group_len).map(range).map(|(least, most)| (least.min(0.0), most.max(0.0)));
        let (minimums, spans): (Vec<f32>, Vec<f32>) = ranges.map(|(least, most)| (-least, most - least)).unzip();
        let scale = f16::from_f32(range(&spans).1 / q_top / scale_top);
        let minimum = f16::from_f32(range(&minimums).1 / scale_top);
        let scales: Vec<u8> = spans.iter().map(|span| nearest(span / q_top / scale.to_f32(), scale_top)).collect();
        let minimums: Vec<u8> = minimums.iter().map(|least| nearest(least / minimum.to_f32(), scale_top)).collect();
        let q = x.iter().enumerate().map(|(i, x)| {
            let offset = minimum.to_f32() * f32::from(minimums[i / group_len]);
            nearest((x + offset) / (scale.to_f32() * f32::from(scales[i / group_len])), q_top)
        });
        AffineGroups { q: q.collect(), scale, minimum, scales, minimums }
    }

    /// The first 16 bytes of Q4_K and Q5_K: two half floats, then 8 scales and 8 minimums of 6 bits in 12 bytes.
    fn head_of_k4_and_k5(&self) -> Vec<u8> {
        let (scales, minimums) = (&self.scales, &self.minimums);
        let mut head = [self.scale.to_le_bytes(), self.minimum.to_le_bytes()].concat();
        head.extend((0..4).map(|group| scales[group] | scales[group + 4] >> 4 << 6));
        head.extend((0..4).map(|group| minimums[group] | minimums[group + 4] >> 4 << 6));
        head.extend((4..8).map(|group| scales[group] & 15 | (minimums[group] & 15) << 4));
        head
    }
}

impl SymmetricGroups {
    /// Groups of 16 values with q below `2 * half` and scales of magnitude up to `scale_top`.
    fn new(x: &[f32], half: f32, scale_top: i8) -> Self {
        let wanted: Vec<f32> = x.chunks_exact(16).map(|group| -extreme(group) / half).collect();
        let top = f32::from(scale_top);
        let scale = f16::from_f32(extreme(&wanted).abs() / top);
        let round = |wanted: &f32| nearest(wanted / scale.to_f32() + top, 2.0 * top) as i16 - i16::from(scale_top);
        let scales: Vec<i8> = wanted.iter().map(|wanted| round(wanted) as i8).collect();
        let q = x
            .iter()
            .enumerate()
            .map(|(i, x)| nearest(x / (scale.to_f32() * f32::from(scales[i / 16])) + half, 2.0 * half - 1.0));
        SymmetricGroups { q: q.collect(), scale, scales }
    }
}

/// The low 2 bits: 32 bytes hold 128 values, a quarter of them in each pair of bits.
fn two_bits(q: &[u8]) -> Vec<u8> {
    let byte = |i: usize| (0..4).fold(0, |byte, k| byte | (q[128 * (i / 32) + 32 * k + i % 32] & 3) << (2 * k));
    (0..64).map(byte).collect()
}

/// The low 4 bits: 32 bytes hold 64 values, half of them in the low nibbles.
fn nibbles_of_64(q: &[u8]) -> Vec<u8> {
    (0..128).map(|i| q[64 * (i / 32) + i % 32] & 15 | (q[64 * (i / 32) + 32 + i % 32] & 15) << 4).collect()
}

// === Numbers ===

/// What the codes of IQ4_NL and IQ4_XS stand for. The first reaches furthest.
const IQ4_LEVELS: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// What the codes of NF4 stand for.
const NF4_LEVELS: [f32; 16] =
    [-112.0, -78.0, -59.0, -44.0, -32.0, -21.0, -10.0, 0.0, 9.0, 18.0, 28.0, 38.0, 49.0, 63.0, 81.0, 112.0];

/// What the codes of FP4 stand for.
const FP4_LEVELS: [f32; 16] =
    [0.0, 1.0, 80.0, 120.0, 40.0, 60.0, 20.0, 30.0, 0.0, -1.0, -80.0, -120.0, -40.0, -60.0, -20.0, -30.0];

/// The code of the nearest level; any if `x` is no number.
fn nearest_level(x: f32, levels: &[f32; 16]) -> u8 {
    let distance = |q: &u8| (levels[usize::from(*q)] - x).abs();
    (0..16).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or_default()
}

/// The nearest integer from 0 to `top`. A scale of zero makes `x` NaN or infinite, where any integer means zero: NaN
/// becomes 0.
fn nearest(x: f32, top: f32) -> u8 {
    x.round().clamp(0.0, top) as u8
}

/// The value of the largest magnitude, with its sign.
fn extreme(x: &[f32]) -> f32 {
    x.iter().copied().fold(0.0, |extreme: f32, x| if x.abs() > extreme.abs() { x } else { extreme })
}

fn range(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), &x| (least.min(x), most.max(x)))
}

#[cfg(test)]
mod tests {
    use lockstep_checkpoint::Encoding;
    use rand::RngExt;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::quantize;
    use crate::oracle::dequantize::dequantize;

    /// The largest error of a value in a block of this largest magnitude: half a step, or a whole one where the range
    /// is lopsided by a step, plus a little because scales are rounded too.
    fn error_bound(encoding: Encoding, magnitude: f64) -> f64 {
        match encoding {
            Encoding::F32 => 0.0,
            Encoding::F16 => magnitude / 2048.0,
            Encoding::BF16 => magnitude / 256.0,
            // The other extreme may lie one step beyond the top.
            Encoding::Q4_0 => 1.01 * magnitude / 8.0,
            Encoding::Q5_0 => 1.01 * magnitude / 16.0,
            Encoding::Q4_1 => 0.51 * 2.0 * magnitude / 15.0,
            Encoding::Q5_1 => 0.53 * 2.0 * magnitude / 31.0,
            Encoding::Q8_0 => 0.57 * magnitude / 127.0,
            // Half a step, half a unit of the 4-bit minimum (1/15 of the magnitude) and half of the 4-bit scale.
            Encoding::Q2K => 2.0 * magnitude * (0.5 / 3.0 + 0.5 / 15.0 + 0.5 / 15.0),
            Encoding::Q3K => magnitude * (1.0 / 4.0 + 0.5 / 31.0),
            Encoding::Q4K => 2.0 * magnitude * (0.5 / 15.0 + 0.5 / 63.0 + 0.5 / 63.0),
            Encoding::Q5K => 2.0 * magnitude * (0.5 / 31.0 + 0.5 / 63.0 + 0.5 / 63.0),
            Encoding::Q6K => magnitude * (1.0 / 32.0 + 0.5 / 127.0),
            // The other extreme may lie 14 steps beyond the top.
            Encoding::IQ4_NL => 1.01 * magnitude * 14.0 / 127.0,
            Encoding::IQ4_XS => 1.01 * magnitude * (14.0 / 127.0 + 0.5 / 31.0),
            // Half a step, and another where the zero point was rounded away from an end.
            Encoding::U4_32 | Encoding::U4_64 | Encoding::U4_128 => 1.01 * 2.0 * magnitude / 15.0,
            // As far as the scale's rounding takes the last of 255 steps.
            Encoding::I8_32 => (1.0 + 255.0 / 2048.0) * 2.0 * magnitude / 255.0,
            // Half of the widest gap.
            Encoding::NF4 => 1.01 * magnitude * 17.0 / 112.0,
            Encoding::FP4 => 1.01 * magnitude * 20.0 / 120.0,
        }
    }

    #[track_caller]
    fn check(encoding: Encoding, values: &[f32]) {
        let bytes = quantize(encoding, values);
        assert_eq!(Some(bytes.len()), encoding.row_bytes(values.len()));
        let magnitude = values.iter().fold(0.0f32, |most, x| most.max(x.abs())).into();
        let bound = error_bound(encoding, magnitude);
        for (i, (decoded, &value)) in dequantize(encoding, &bytes).into_iter().zip(values).enumerate() {
            let error = (decoded - f64::from(value)).abs();
            assert!(error <= bound, "{encoding} value {i}: {value} became {decoded}, more than {bound} away");
        }
    }

    #[test]
    fn every_encoding_returns_what_it_was_given_within_its_step() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for encoding in Encoding::ALL {
            for _ in 0..200 {
                let magnitude = rng.random_range(0.01..4.0f32);
                let values: Vec<f32> = (0..256).map(|_| rng.random_range(-magnitude..magnitude)).collect();
                check(encoding, &values);
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for encoding in Encoding::ALL {
            check(encoding, &[0.0; 256]);
        }
    }

    #[test]
    fn one_sided_and_sparse_blocks_survive() {
        for encoding in Encoding::ALL {
            let ramp: Vec<f32> = (0..256).map(|i| i as f32 / 256.0).collect();
            check(encoding, &ramp);
            check(encoding, &ramp.iter().map(|x| -x).collect::<Vec<f32>>());
            let spike: Vec<f32> = (0..256).map(|i| if i == 100 { -2.0 } else { 0.0 }).collect();
            check(encoding, &spike);
        }
    }
}

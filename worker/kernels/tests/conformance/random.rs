//! Random inputs, the same on every run.

use half::{bf16, f16};
use lockstep_checkpoint::Encoding;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A generator for one test.
pub(crate) fn seeded(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Floats between -1 and 1, some of them a hundred times larger: activations have outliers.
pub(crate) fn floats(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0f32..1.0) * if rng.random_ratio(1, 50) { 100.0 } else { 1.0 }).collect()
}

/// The bytes of a random matrix. Every bit of a quantized block is random but for the scales and minimums of blocks,
/// which are small numbers of either sign.
pub(crate) fn weights(rng: &mut ChaCha8Rng, encoding: Encoding, n_rows: usize, n_cols: usize) -> Vec<u8> {
    let n_blocks = n_rows * n_cols / encoding.block_len();
    (0..n_blocks).flat_map(|_| block(rng, encoding)).collect()
}

fn block(rng: &mut ChaCha8Rng, encoding: Encoding) -> Vec<u8> {
    let value = rng.random_range(-0.1f32..0.1);
    match encoding {
        Encoding::F32 => return value.to_le_bytes().to_vec(),
        Encoding::F16 => return f16::from_f32(value).to_le_bytes().to_vec(),
        Encoding::BF16 => return bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => {}
    }
    let mut bytes: Vec<u8> = (0..encoding.block_bytes()).map(|_| rng.random()).collect();
    for start in halves(encoding) {
        bytes[*start..start + 2].copy_from_slice(&f16::from_f32(rng.random_range(-0.01f32..0.01)).to_le_bytes());
    }
    bytes
}

/// Where the f16 numbers of a block stand.
pub(crate) fn halves(encoding: Encoding) -> &'static [usize] {
    match encoding {
        Encoding::F32 | Encoding::F16 | Encoding::BF16 => &[],
        Encoding::Q4_0 | Encoding::Q5_0 | Encoding::Q8_0 | Encoding::IQ4_NL | Encoding::IQ4_XS => &[0],
        Encoding::U4_32 | Encoding::U4_64 | Encoding::U4_128 | Encoding::I8_32 | Encoding::NF4 | Encoding::FP4 => &[0],
        Encoding::Q4_1 | Encoding::Q5_1 | Encoding::Q4K | Encoding::Q5K => &[0, 2],
        Encoding::Q2K => &[80, 82],
        Encoding::Q3K => &[108],
        Encoding::Q6K => &[208],
    }
}

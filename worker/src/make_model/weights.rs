//! Weights drawn as they are stored: random codes under scales that give their values the wanted size. Nothing is
//! quantized, so a file is drawn about as fast as a disk takes it.

use half::f16;
use lockstep_checkpoint::Encoding;

/// A stream of random weights: SplitMix64 (Steele, Lea, Flood 2014), always from the same seed.
#[derive(Debug)]
pub(super) struct Weights {
    state: u64,
}

// === impl Weights ===

impl Weights {
    pub(super) fn new() -> Self {
        Self { state: 0 }
    }

    /// Fills `bytes`, whole blocks of `encoding`, with values around 0 of this standard deviation.
    ///
    /// # Panics
    /// If no mix uses the encoding.
    pub(super) fn draw(&mut self, encoding: Encoding, deviation: f32, bytes: &mut [u8]) {
        self.fill(bytes);
        if encoding == Encoding::F16 {
            bytes.as_chunks_mut().0.iter_mut().for_each(|word| *word = half(uniform(*word) * deviation));
            return;
        }
        // Random codes are uniform: `n` of them, a step apart, have a standard deviation of n / sqrt(12) steps.
        let step_of = |n_codes: f32| deviation / n_codes * 12f32.sqrt();
        for block in bytes.chunks_exact_mut(encoding.block_bytes()) {
            match encoding {
                Encoding::Q4_0 => set_scale(block, step_of(16.0)),
                Encoding::Q5_0 => set_scale(block, step_of(32.0)),
                Encoding::Q8_0 => set_scale(block, step_of(256.0)),
                Encoding::Q4_1 => {
                    block[..2].copy_from_slice(&half(step_of(16.0)));
                    block[2..4].copy_from_slice(&half(-7.5 * step_of(16.0)));
                }
                // Six random bits are 36.5 in the root mean square.
                Encoding::Q4K => set_scales_k(block, step_of(16.0) / 36.5, 7.5),
                Encoding::Q5K => set_scales_k(block, step_of(32.0) / 36.5, 15.5),
                // The scales of groups are uniform, too, and signed.
                Encoding::Q6K => block[208..].copy_from_slice(&half(step_of(64.0) * 12f32.sqrt() / 256.0)),
                // The entries of the codebook are 67.4 in the root mean square, six bits less 32 are 18.5.
                Encoding::IQ4_NL => set_scale(block, deviation / 67.4),
                Encoding::IQ4_XS => set_scale(block, deviation / 67.4 / 18.5),
                other => panic!("{other} is not drawn"),
            }
        }
    }

    /// Fills `bytes` with the F32 weights of a norm: around 1.
    pub(super) fn draw_norm(&mut self, bytes: &mut [u8]) {
        self.fill(bytes);
        for word in bytes.as_chunks_mut::<4>().0 {
            *word = (1.0 + 0.1 * uniform([word[0], word[1]])).to_le_bytes();
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        let (words, rest) = bytes.as_chunks_mut::<8>();
        words.iter_mut().for_each(|word| *word = self.next());
        let n_rest = rest.len();
        rest.copy_from_slice(&self.next()[..n_rest]);
    }

    fn next(&mut self) -> [u8; 8] {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.state ^ self.state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ z >> 31).to_le_bytes()
    }
}

/// A number of mean 0 and standard deviation 1, uniform, from random bits.
fn uniform(bits: [u8; 2]) -> f32 {
    f32::from(i16::from_le_bytes(bits)) / 32_768.0 * 3f32.sqrt()
}

fn half(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

/// Sets the scale at the start of a block. Its codes lie half a step off balance; with either sign as often that
/// averages out, where it would otherwise add up to a direction that all outputs share.
fn set_scale(block: &mut [u8], step: f32) {
    let sign = if block[0] & 1 == 0 { 1.0 } else { -1.0 };
    block[..2].copy_from_slice(&half(sign * step));
}

/// Sets scale and minimum of a Q4_K or Q5_K block whose group scales are random, and makes each group's minimum equal to
/// its scale: with a minimum of the middle code every group is balanced. (Layout: `decode_k_header` of the kernels.)
fn set_scales_k(block: &mut [u8], step: f32, middle: f32) {
    block[..2].copy_from_slice(&half(step));
    block[2..4].copy_from_slice(&half(middle * step));
    let groups = &mut block[4..16];
    for i in 0..4 {
        groups[i + 4] = groups[i];
        groups[i + 8] = groups[i + 8] & 15 | groups[i + 8] << 4;
    }
}

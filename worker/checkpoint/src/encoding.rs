//! An encoding: how the values of one tensor row are stored as bytes.
//!
//! A row is a run of blocks, each holding `block_len` consecutive values in `block_bytes` bytes. Block layouts are
//! GGML's (`ggml-common.h` of llama.cpp, the structs `block_q4_0` to `block_iq4_xs`), or, where it has none that states
//! the same numbers, our own in its manner, which no file has: weights of other quantizers are turned into them when they
//! are read. What the bytes mean is the business of the kernels.

use std::fmt;

/// How the values of a tensor are stored. The variants carry GGML's own names, as far as it has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(
    non_camel_case_types,
    reason = "GGML's names; without the underscore Q4_0 and Q4_1 read as forty and forty-one"
)]
pub enum Encoding {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// 4 bits, blocks of 32: f16 scale; value = (q - 8) * scale.
    Q4_0,
    /// 4 bits, blocks of 32: f16 scale and minimum; value = q * scale + minimum.
    Q4_1,
    /// 5 bits, blocks of 32: f16 scale; value = (q - 16) * scale.
    Q5_0,
    /// 5 bits, blocks of 32: f16 scale and minimum; value = q * scale + minimum.
    Q5_1,
    /// 8 bits, blocks of 32: f16 scale; value = q * scale.
    Q8_0,
    /// 2 bits, super-blocks of 256 in 16 groups with 4-bit scales and minimums.
    Q2K,
    /// 3 bits, super-blocks of 256 in 16 groups with 6-bit scales.
    Q3K,
    /// 4 bits, super-blocks of 256 in 8 groups with 6-bit scales and minimums.
    Q4K,
    /// 5 bits, super-blocks of 256 in 8 groups with 6-bit scales and minimums.
    Q5K,
    /// 6 bits, super-blocks of 256 in 16 groups with 8-bit scales.
    Q6K,
    /// 4 bits that stand for 16 uneven levels, blocks of 32: f16 scale; value = level * scale.
    IQ4_NL,
    /// 4 bits that stand for the same levels, super-blocks of 256 in 8 groups with 6-bit scales.
    IQ4_XS,
    /// 4 bits, blocks of 32: f16 scale, i8 zero point; value = (q - zero point) * scale. Of GPTQ and AWQ.
    U4_32,
    /// The same in blocks of 64.
    U4_64,
    /// The same in blocks of 128.
    U4_128,
    /// 8 bits, blocks of 32: f16 scale, i8 zero point; value = (q - zero point) * scale. Of GPTQ.
    I8_32,
    /// 4 bits that stand for the 16 levels of bitsandbytes' NF4, in steps of 1/112, blocks of 32: f16 scale;
    /// value = level * scale.
    NF4,
    /// The same for its FP4, in steps of 1/120.
    FP4,
}

// === impl Encoding ===

impl Encoding {
    /// Every encoding, for tables and tests that must not miss one.
    pub const ALL: [Encoding; 21] = [
        Encoding::F32,
        Encoding::F16,
        Encoding::BF16,
        Encoding::Q4_0,
        Encoding::Q4_1,
        Encoding::Q5_0,
        Encoding::Q5_1,
        Encoding::Q8_0,
        Encoding::Q2K,
        Encoding::Q3K,
        Encoding::Q4K,
        Encoding::Q5K,
        Encoding::Q6K,
        Encoding::IQ4_NL,
        Encoding::IQ4_XS,
        Encoding::U4_32,
        Encoding::U4_64,
        Encoding::U4_128,
        Encoding::I8_32,
        Encoding::NF4,
        Encoding::FP4,
    ];

    /// Values in a block: 1, 32, 64, 128 or 256.
    pub const fn block_len(self) -> usize {
        match self {
            Encoding::F32 | Encoding::F16 | Encoding::BF16 => 1,
            Encoding::Q4_0 | Encoding::Q4_1 | Encoding::Q5_0 | Encoding::Q5_1 | Encoding::Q8_0 => 32,
            Encoding::IQ4_NL | Encoding::U4_32 | Encoding::I8_32 | Encoding::NF4 | Encoding::FP4 => 32,
            Encoding::U4_64 => 64,
            Encoding::U4_128 => 128,
            Encoding::Q2K | Encoding::Q3K | Encoding::Q4K | Encoding::Q5K | Encoding::Q6K => 256,
            Encoding::IQ4_XS => 256,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Encoding::F32 => 4,
            Encoding::F16 | Encoding::BF16 => 2,
            Encoding::Q4_0 => 18,
            Encoding::Q4_1 => 20,
            Encoding::Q5_0 => 22,
            Encoding::Q5_1 => 24,
            Encoding::Q8_0 => 34,
            Encoding::Q2K => 84,
            Encoding::Q3K => 110,
            Encoding::Q4K => 144,
            Encoding::Q5K => 176,
            Encoding::Q6K => 210,
            Encoding::IQ4_NL | Encoding::NF4 | Encoding::FP4 => 18,
            Encoding::U4_32 => 19,
            Encoding::U4_64 => 35,
            Encoding::U4_128 => 67,
            Encoding::I8_32 => 35,
            Encoding::IQ4_XS => 136,
        }
    }

    /// Bytes of a row of `n_cols` values; `None` if `n_cols` is not a whole number of blocks or the size overflows.
    pub const fn row_bytes(self, n_cols: usize) -> Option<usize> {
        if !n_cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (n_cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// GGML's type number (`enum ggml_type`), by which GGUF files name it; `None` if no file has it.
    pub const fn ggml_type(self) -> Option<u32> {
        Some(match self {
            Encoding::F32 => 0,
            Encoding::F16 => 1,
            Encoding::Q4_0 => 2,
            Encoding::Q4_1 => 3,
            Encoding::Q5_0 => 6,
            Encoding::Q5_1 => 7,
            Encoding::Q8_0 => 8,
            Encoding::Q2K => 10,
            Encoding::Q3K => 11,
            Encoding::Q4K => 12,
            Encoding::Q5K => 13,
            Encoding::Q6K => 14,
            Encoding::IQ4_NL => 20,
            Encoding::IQ4_XS => 23,
            Encoding::BF16 => 30,
            Encoding::U4_32 | Encoding::U4_64 | Encoding::U4_128 | Encoding::I8_32 => return None,
            Encoding::NF4 | Encoding::FP4 => return None,
        })
    }

    /// GGML's name, as users know it from file names, or ours.
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::F32 => "F32",
            Encoding::F16 => "F16",
            Encoding::BF16 => "BF16",
            Encoding::Q4_0 => "Q4_0",
            Encoding::Q4_1 => "Q4_1",
            Encoding::Q5_0 => "Q5_0",
            Encoding::Q5_1 => "Q5_1",
            Encoding::Q8_0 => "Q8_0",
            Encoding::Q2K => "Q2_K",
            Encoding::Q3K => "Q3_K",
            Encoding::Q4K => "Q4_K",
            Encoding::Q5K => "Q5_K",
            Encoding::Q6K => "Q6_K",
            Encoding::IQ4_NL => "IQ4_NL",
            Encoding::IQ4_XS => "IQ4_XS",
            Encoding::U4_32 => "U4_32",
            Encoding::U4_64 => "U4_64",
            Encoding::U4_128 => "U4_128",
            Encoding::I8_32 => "I8_32",
            Encoding::NF4 => "NF4",
            Encoding::FP4 => "FP4",
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::Encoding;

    #[test]
    fn a_row_is_a_whole_number_of_blocks_or_nothing() {
        assert_eq!(Encoding::Q4_1.row_bytes(576), Some(360));
        assert_eq!(Encoding::Q6K.row_bytes(512), Some(420));
        assert_eq!(Encoding::BF16.row_bytes(3), Some(6));
        assert_eq!(Encoding::F32.row_bytes(0), Some(0));
        assert_eq!(Encoding::Q8_0.row_bytes(33), None);
        assert_eq!(Encoding::Q4K.row_bytes(32), None);
        assert_eq!(Encoding::F32.row_bytes(usize::MAX), None);
    }

    #[test]
    fn names_are_distinct() {
        let mut names: Vec<&str> = Encoding::ALL.iter().map(|encoding| encoding.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Encoding::ALL.len());
    }
}

//! Rotary position embeddings: the table of angles, and the two ways in which models pair up a head's dimensions.
//!
//! Dimension pair `i` of `rope_dim / 2` is turned by `position * base^(-2i / rope_dim) / factor_i` radians (Su et al.,
//! RoFormer, arXiv 2104.09864; the factors are Llama 3.1's `rope_freqs`). Angles are computed in f64; their cosines and
//! sines are rounded to f32 once.

use crate::KernelError;

/// The largest table: 1 GiB, a context of a million tokens at a head dimension of 128.
pub const MAX_TABLE_BYTES: usize = 1 << 30;

/// Which dimensions of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `2i` with `2i + 1`: Llama weights as they are in GGUF files.
    Adjacent,
    /// `i` with `i + rope_dim / 2`: Hugging Face weights.
    Halves,
}

/// Cosines and sines for every position below `max_position`.
#[derive(Debug)]
pub struct RopeTable {
    head_dim: usize,
    rope_dim: usize,
    style: RopeStyle,
    /// `[max_position, rope_dim / 2]` of (cosine, sine).
    turns: Vec<[f32; 2]>,
}

// === impl RopeTable ===

impl RopeTable {
    /// The table for heads of `head_dim`, whose first `rope_dim` dimensions are turned and whose others stay.
    /// `freq_factors`, one for each pair, divide the frequencies.
    ///
    /// # Errors
    /// If `rope_dim` is odd, 0 or over `head_dim`, `base` or a factor is not positive and finite, there are not
    /// `rope_dim / 2` factors, or the table is empty or over [`MAX_TABLE_BYTES`].
    pub fn new(
        head_dim: usize,
        rope_dim: usize,
        base: f32,
        freq_factors: Option<&[f32]>,
        max_position: usize,
        style: RopeStyle,
    ) -> Result<Self, KernelError> {
        let error = |reason: String| Err(KernelError::RopeTable { reason });
        if rope_dim == 0 || !rope_dim.is_multiple_of(2) || rope_dim > head_dim {
            return error(format!("{rope_dim} turned dimensions in a head of {head_dim}"));
        }
        if !(base.is_finite() && base > 0.0) {
            return error(format!("base {base} is not positive and finite"));
        }
        let n_pairs = rope_dim / 2;
        if let Some(factors) = freq_factors {
            if factors.len() != n_pairs {
                return error(format!("{} frequency factors for {n_pairs} pairs", factors.len()));
            }
            if let Some(factor) = factors.iter().find(|factor| !(factor.is_finite() && **factor > 0.0)) {
                return error(format!("frequency factor {factor} is not positive and finite"));
            }
        }
        let size_bytes = max_position.checked_mul(n_pairs).and_then(|n| n.checked_mul(size_of::<[f32; 2]>()));
        if max_position == 0 || size_bytes.is_none_or(|size_bytes| size_bytes > MAX_TABLE_BYTES) {
            return error(format!(
                "{max_position} positions of {n_pairs} pairs are none or over {MAX_TABLE_BYTES} bytes"
            ));
        }
        let frequency = |pair_idx: usize| {
            let factor = freq_factors.map_or(1.0, |factors| f64::from(factors[pair_idx]));
            f64::from(base).powf(-2.0 * pair_idx as f64 / rope_dim as f64) / factor
        };
        let frequencies: Vec<f64> = (0..n_pairs).map(frequency).collect();
        let turn = |angle: f64| [angle.cos() as f32, angle.sin() as f32];
        let turns_at = |position: usize| frequencies.iter().map(move |frequency| turn(position as f64 * frequency));
        Ok(Self { head_dim, rope_dim, style, turns: (0..max_position).flat_map(turns_at).collect() })
    }

    /// Values in a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Dimensions of a head that are turned.
    pub(crate) fn rope_dim(&self) -> usize {
        self.rope_dim
    }

    /// Which dimensions turn together.
    pub(crate) fn style(&self) -> RopeStyle {
        self.style
    }

    /// `[max_position, rope_dim / 2]` of (cosine, sine).
    pub(crate) fn turns(&self) -> &[[f32; 2]] {
        &self.turns
    }

    /// Positions the table covers.
    pub fn max_position(&self) -> usize {
        self.turns.len() / (self.rope_dim / 2)
    }

    /// Turns one head, `[head_dim]`, to `position`: a pair `(a, b)` becomes `(a cos - b sin, a sin + b cos)`, where the
    /// second product is rounded and the first is part of a fused multiply-add.
    ///
    /// # Panics
    /// If `position` is not below `max_position` or `head` has another length.
    #[inline(always)]
    pub(crate) fn turn(&self, head: &mut [f32], position: usize) {
        assert_eq!(head.len(), self.head_dim, "one head");
        let n_pairs = self.rope_dim / 2;
        let turns = &self.turns[position * n_pairs..(position + 1) * n_pairs];
        let turned = &mut head[..self.rope_dim];
        match self.style {
            RopeStyle::Adjacent => {
                let (pairs, _) = turned.as_chunks_mut::<2>();
                pairs.iter_mut().zip(turns).for_each(|([a, b], turn)| (*a, *b) = turn_pair(*a, *b, turn));
            }
            RopeStyle::Halves => {
                let (first, second) = turned.split_at_mut(n_pairs);
                let pairs = first.iter_mut().zip(second);
                pairs.zip(turns).for_each(|((a, b), turn)| (*a, *b) = turn_pair(*a, *b, turn));
            }
        }
    }
}

#[inline(always)]
fn turn_pair(a: f32, b: f32, [cos, sin]: &[f32; 2]) -> (f32, f32) {
    (a.mul_add(*cos, -(b * sin)), a.mul_add(*sin, b * cos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_styles_turn_the_same_pairs() {
        let factors = [1.0, 2.0, 4.0, 8.0];
        let adjacent = RopeTable::new(10, 8, 10_000.0, Some(&factors), 50, RopeStyle::Adjacent).unwrap();
        let halves = RopeTable::new(10, 8, 10_000.0, Some(&factors), 50, RopeStyle::Halves).unwrap();
        assert_eq!(adjacent.max_position(), 50);
        let mut in_pairs: Vec<f32> = (0..10).map(|i| 1.0 + i as f32).collect();
        let mut in_halves = [1.0, 3.0, 5.0, 7.0, 2.0, 4.0, 6.0, 8.0, 9.0, 10.0];
        adjacent.turn(&mut in_pairs, 49);
        halves.turn(&mut in_halves, 49);
        for i in 0..4 {
            let angle = 49.0 * 10_000f64.powf(-(i as f64) / 4.0) / f64::from(factors[i]);
            let (a, b) = (1.0 + 2.0 * i as f64, 2.0 + 2.0 * i as f64);
            assert!((f64::from(in_pairs[2 * i]) - (a * angle.cos() - b * angle.sin())).abs() < 2e-6);
            assert!((f64::from(in_pairs[2 * i + 1]) - (a * angle.sin() + b * angle.cos())).abs() < 2e-6);
            assert_eq!((in_pairs[2 * i], in_pairs[2 * i + 1]), (in_halves[i], in_halves[i + 4]));
        }
        assert_eq!(in_pairs[8..], [9.0, 10.0]);
        assert_eq!(in_halves[8..], [9.0, 10.0]);
    }

    #[test]
    fn absurd_tables_are_refused() {
        let check = |rope_dim, base, factors: Option<&[f32]>, max_position, message: &str| {
            let result = RopeTable::new(64, rope_dim, base, factors, max_position, RopeStyle::Halves);
            assert_eq!(result.unwrap_err().to_string(), format!("rotary table: {message}"));
        };
        check(66, 1e4, None, 8, "66 turned dimensions in a head of 64");
        check(7, 1e4, None, 8, "7 turned dimensions in a head of 64");
        check(64, 0.0, None, 8, "base 0 is not positive and finite");
        check(64, f32::NAN, None, 8, "base NaN is not positive and finite");
        check(4, 1e4, Some(&[1.0]), 8, "1 frequency factors for 2 pairs");
        check(4, 1e4, Some(&[1.0, -1.0]), 8, "frequency factor -1 is not positive and finite");
        check(64, 1e4, None, 0, "0 positions of 32 pairs are none or over 1073741824 bytes");
        check(
            64,
            1e4,
            None,
            usize::MAX,
            "18446744073709551615 positions of 32 pairs are none or over 1073741824 bytes",
        );
    }
}

//! The exponential function of softmax and SiLU: one sequence of operations, so that every processor and every library
//! gives the same bits.
//!
//! `e^x = 2^n * e^r`, where `n` is the integer nearest to `x / ln 2` and `r = x - n * ln 2`, taken off in two parts
//! (Cody and Waite, 1980); `e^r` is its Taylor polynomial of degree 7 in Horner form, whose truncation is below 2^-27 of
//! the result for `|r| <= ln(2) / 2`. The error against the exact value stays below 1.5 units in the last place.

use crate::int8::ROUNDER;

/// Below this the result is 0. e^-87 is still a normal float.
pub(crate) const LOWEST: f32 = -87.0;
/// Above this the argument counts as this: e^88 is the largest power of e with an exponent that can be added in one go.
pub(crate) const HIGHEST: f32 = 88.0;
/// 1 / ln 2.
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// The leading 15 bits of ln 2, so that `n * LN2_HIGH` is exact.
pub(crate) const LN2_HIGH: f32 = 0.693_145_75;
/// What is left of ln 2.
pub(crate) const LN2_LOW: f32 = 1.428_606_8e-6;
/// 1/7!, 1/6!, ... 1/1!, 1/0!.
pub(crate) const TAYLOR: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// e^x. NaN for NaN, 0 below -87, e^88 above 88.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = if LOWEST > x { LOWEST } else { x };
    let clamped = if HIGHEST < clamped { HIGHEST } else { clamped };
    let steps = clamped.mul_add(LOG2_E, ROUNDER);
    let n = steps - ROUNDER;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let power = TAYLOR[1..].iter().fold(TAYLOR[0], |sum, term| sum.mul_add(r, *term));
    let scaled = f32::from_bits(power.to_bits().wrapping_add(steps.to_bits() << 23));
    if x < LOWEST { 0.0 } else { scaled }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ln2_is_split_exactly() {
        assert_eq!(LN2_HIGH.to_bits() & 0x1ff, 0);
        let error = f64::from(LN2_HIGH) + f64::from(LN2_LOW) - std::f64::consts::LN_2;
        assert!(error.abs() < 1e-13, "{error:e}");
    }

    #[test]
    fn the_error_stays_below_one_and_a_half_ulp() {
        let mut worst = 0.0f64;
        let step = if cfg!(miri) { 100_003 } else { 97 };
        for bits in (0..=HIGHEST.to_bits()).step_by(step) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                if x < LOWEST {
                    continue;
                }
                let exact = f64::from(x).exp();
                let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
            }
        }
        assert!(worst < 1.5, "{worst} ulp");
    }

    #[test]
    fn the_ends_are_as_documented() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(f32::INFINITY), exp(88.0));
        assert!(exp(88.0).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }
}

//! Softmax weights: `exp` of what is never above 0, the same bits on every machine; in f64 for log-probabilities, and in
//! integers for what is drawn, so that sums of weights are exact in whatever order.
//!
//! The standard library's `exp` is the platform's, and platforms differ in the last bit: enough for two replicas to
//! sample different tokens. This one uses only additions, multiplications and shifts, whose results are defined to the
//! last bit, and has no branches, so that it vectorizes. `worker/kernels/cuda/choose.cu` has it once more, for GPUs.

/// Below this the result is 0. (The last normal number is near `exp(-708.4)`.)
const MIN_EXPONENT: f64 = -708.0;
/// Adding and subtracting it rounds a small number to an integer, which is left in the low bits of the sum.
const ROUNDER: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
/// ln 2 in two parts, the first with enough trailing zeros that multiples of it are exact (as in FreeBSD's `e_exp.c`).
const LN_2_HI: f64 = 6.931_471_803_691_238e-1;
const LN_2_LO: f64 = 1.908_214_929_270_587_7e-10;

/// `exp(x)` for `x <= 0`, to within 4e-16 of its value; 0 below -708 and for `-inf`.
#[inline]
pub(super) fn exp(x: f64) -> f64 {
    let clamped = x.max(MIN_EXPONENT);
    // x = n * ln 2 + r with |r| <= ln 2 / 2.
    let rounded = clamped * std::f64::consts::LOG2_E + ROUNDER;
    let n = rounded - ROUNDER;
    let r = (clamped - n * LN_2_HI) - n * LN_2_LO;
    // Its Taylor series: the first term left out is below 5e-18.
    let mut series = 1.0 / 6_227_020_800.0;
    for factorial in [479_001_600.0, 39_916_800.0, 3_628_800.0, 362_880.0, 40_320.0, 5_040.0, 720.0, 120.0, 24.0, 6.0] {
        series = series * r + 1.0 / factorial;
    }
    let series = ((series * r + 0.5) * r) * r + r + 1.0;
    // 2^n by its bits: n is in the low bits of `rounded`, and 1023 + n is positive.
    let power = f64::from_bits(rounded.to_bits().wrapping_add(1023) << 52);
    if x < MIN_EXPONENT { 0.0 } else { series * power }
}

/// How many numbers [`exp_block`] takes: enough to fill vectors, few enough to stay in registers and L1.
pub(super) const BLOCK_LEN: usize = 32;

/// [`exp`] of each. In a loop of its own, apart from loading and storing, it vectorizes: log-probabilities over 128,256
/// logits take 0.62 ms instead of 1.09 on a Zen 5 core.
#[inline]
pub(super) fn exp_block(xs: &mut [f64; BLOCK_LEN]) {
    for x in xs {
        *x = exp(*x);
    }
}

/// The weight of the likeliest token. Those of 2^18 tokens add up to less than 2^63.
pub(super) const FULL_WEIGHT: u64 = 1 << 44;
/// A number below it that is added to it is rounded to an integer, ties to even, which is left in the low bits.
const TO_INTEGER: f64 = 4_503_599_627_370_496.0; // 2^52

/// `exp` of each, times [`FULL_WEIGHT`], rounded to the next integer, ties to even.
#[inline]
pub(super) fn weigh_block(xs: &[f64; BLOCK_LEN]) -> [u64; BLOCK_LEN] {
    xs.map(|x| (exp(x) * FULL_WEIGHT as f64 + TO_INTEGER).to_bits() - TO_INTEGER.to_bits())
}

/// A logit as the sampler reads it: NaN is as good as impossible, and an infinite one as the largest number.
#[inline]
pub(super) fn clean(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_platform_to_the_last_bits() {
        let mut worst: f64 = 0.0;
        for step in 0..1_000_000 {
            let x = -f64::from(step) * 7.08e-4;
            worst = worst.max((exp(x) / x.exp() - 1.0).abs());
        }
        assert!(worst <= 4e-16, "{worst:e}");
    }

    #[test]
    fn exp_is_exact_at_zero_and_nothing_far_below() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-1e-300), 1.0);
        assert!(exp(-708.0) > 0.0);
        assert_eq!((exp(-708.1), exp(f64::MIN), exp(f64::NEG_INFINITY)), (0.0, 0.0, 0.0));
    }

    #[test]
    fn weights_are_rounded_to_the_next_integer() {
        let full = FULL_WEIGHT as f64;
        let mut xs: [f64; BLOCK_LEN] = std::array::from_fn(|i| -(i as f64));
        xs[31] = f64::NEG_INFINITY;
        for (x, weight) in xs.iter().zip(weigh_block(&xs)) {
            assert!((weight as f64 - exp(*x) * full).abs() <= 0.5, "{x}: {weight}");
        }
        assert_eq!(weigh_block(&[0.0; BLOCK_LEN])[0], FULL_WEIGHT);
        // Half of the smallest weight, and a little more.
        let half = -45.0 * std::f64::consts::LN_2;
        let [none, one, ..] = weigh_block(&std::array::from_fn(|i| half + [-1e-9, 1e-9][i % 2]));
        assert_eq!((none, one), (0, 1));
    }

    #[test]
    fn exp_never_falls_while_its_argument_rises() {
        let (mut x, mut last) = (-40.0, 0.0);
        while x <= 0.0 {
            let y = exp(x);
            assert!(y >= last, "at {x}");
            (x, last) = (x + 1e-4, y);
        }
    }
}

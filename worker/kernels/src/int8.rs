//! Signed 8-bit codes: values that share one scale, which is what a step of the codes is worth.
//!
//! The scale is the largest magnitude divided by 127, the codes are the values times `127 / largest`, rounded to the
//! nearest integer, ties to even. Zeros, or magnitudes so small (below 2^-121) that the factor overflows, have the
//! scale 0. If a value is not finite, the scale is NaN and the codes are zero: whatever is made of them is NaN, too.

/// Adding and subtracting this rounds a float below 2^22 to an integer, ties to even: 1.5 * 2^23 is where the spacing of
/// floats is one.
pub(crate) const ROUNDER: f32 = 12_582_912.0;

/// Writes the codes of `values`, as many, and returns their scale. Inlined, so that it is compiled for the instruction
/// set of its caller; a loop over lanes gives the same bits with any.
#[inline(always)]
pub(crate) fn quantize(values: &[f32], codes: &mut [i8]) -> f32 {
    // As integers, magnitudes have the order of the floats, with NaN above infinity; so the largest finds either.
    let largest = values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    let steps_per_one = 127.0 / largest;
    if !largest.is_finite() || !steps_per_one.is_finite() {
        codes.fill(0);
        return if largest.is_finite() { 0.0 } else { f32::NAN };
    }
    for (code, value) in codes.iter_mut().zip(values) {
        // The integer stands in the low bits of the sum.
        *code = (value * steps_per_one + ROUNDER).to_bits() as i8;
    }
    largest / 127.0
}

#[cfg(test)]
mod tests {
    use super::quantize;

    fn check(values: &[f32], expected_codes: &[i8], expected_scale: f32) {
        let mut codes = vec![99; values.len()];
        let scale = quantize(values, &mut codes);
        assert_eq!(codes, expected_codes, "{values:?}");
        assert_eq!(scale.to_bits(), expected_scale.to_bits(), "{values:?}: {scale}");
    }

    #[test]
    fn codes_are_the_nearest_multiples_of_the_scale() {
        check(&[127.0, -3.4, 0.6, -0.0], &[127, -3, 1, 0], 1.0);
        check(&[-254.0, 1.0, 3.0, 5.0, -1.0], &[-127, 0, 2, 2, 0], 2.0);
        check(&[f32::MAX, f32::MIN, 0.0], &[127, -127, 0], f32::MAX / 127.0);
    }

    #[test]
    fn what_has_no_scale_is_zero() {
        check(&[0.0, -0.0], &[0, 0], 0.0);
        check(&[1e-37, -1e-38, 0.0], &[0, 0, 0], 0.0);
    }

    #[test]
    fn what_is_not_finite_takes_all_along() {
        check(&[1.0, f32::NAN, 2.0], &[0, 0, 0], f32::NAN);
        check(&[1.0, f32::NEG_INFINITY], &[0, 0], f32::NAN);
    }
}

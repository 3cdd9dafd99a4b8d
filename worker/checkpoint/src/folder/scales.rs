//! Scales: the numbers that a quantized weight's codes are multiplied with, as half floats, in which blocks have them.

use half::{bf16, f16};

use super::safetensors::Dtype;

/// A matrix whose largest scale is below this is refused: rounded to a multiple of 2^-24, it may be off by more than
/// 1/256 of itself. (A weight that small adds nothing, and real ones are thousands of times larger.) In other matrices,
/// an output whose own scales are below this may be off by that much of itself, which is at most 2^-25 for each step of a
/// code: nothing beside the outputs that are larger.
const LARGEST_MIN: f32 = 1.0 / (1 << 17) as f32;

/// Scales as a file has them, as half floats. Those of other types are rounded, by at most 2^-11 of their value or 2^-25.
pub(super) fn to_halves(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f16>, String> {
    if dtype == Dtype::F16 {
        let halves: Vec<f16> = bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect();
        let other = halves.iter().find(|half| !half.is_finite());
        return other.map_or(Ok(()), |half| Err(format!("a scale of {half} is not finite"))).map(|()| halves);
    }
    round(&floats(dtype, bytes))
}

/// Floats as a file has them.
pub(super) fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::I32 | Dtype::I8 | Dtype::U8 => unreachable!("the caller has checked the type"),
    }
}

/// Half floats.
pub(super) fn round(scales: &[f32]) -> Result<Vec<f16>, String> {
    let halves: Vec<f16> = scales.iter().map(|scale| f16::from_f32(*scale)).collect();
    if let Some((scale, _)) = scales.iter().zip(&halves).find(|(_, half)| !half.is_finite()) {
        return Err(format!("a scale of {scale:e} is beyond half floats, which go up to 65504"));
    }
    let largest = scales.iter().fold(0.0f32, |largest, scale| largest.max(scale.abs()));
    if largest > 0.0 && largest < LARGEST_MIN {
        return Err(format!("scales of up to {largest:e} are too small for half floats"));
    }
    Ok(halves)
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::{Dtype, round, to_halves};

    #[test]
    fn scales_that_half_floats_cannot_hold_are_refused() {
        assert_eq!(round(&[0.5, -0.25, 0.0]), Ok(vec![f16::from_f32(0.5), f16::from_f32(-0.25), f16::ZERO]));
        assert_eq!(round(&[0.0]), Ok(vec![f16::ZERO]));
        assert_eq!(round(&[1.0, 1e-6]), Ok(vec![f16::ONE, f16::from_f32(1e-6)]));
        let refusal = |scales: &[f32]| round(scales).expect_err("refused");
        assert_eq!(refusal(&[1.0, 7e4]), "a scale of 7e4 is beyond half floats, which go up to 65504");
        assert_eq!(refusal(&[f32::NAN]), "a scale of NaN is beyond half floats, which go up to 65504");
        let infinite = [f16::ONE, f16::INFINITY].map(f16::to_le_bytes).concat();
        assert_eq!(to_halves(Dtype::F16, &infinite), Err("a scale of inf is not finite".to_owned()));
        assert_eq!(refusal(&[1e-6, 2e-6]), "scales of up to 2e-6 are too small for half floats");
    }
}

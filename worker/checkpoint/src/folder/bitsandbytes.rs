//! What bitsandbytes makes of a weight `[n_out, n_in]`: NF4 and FP4 (4 bits), and LLM.int8 (8 bits).
//!
//! | tensor | 4 bits |
//! |---|---|
//! | `weight` | codes row after row, two a byte, the first in the high nibble |
//! | `weight.absmax` | F32, one for each `blocksize` values; or, with double quantization, U8 codes of it |
//! | `weight.nested_absmax`, `weight.nested_quant_map` | what those codes mean: `map[code] * nested_absmax[i / nested_blocksize] + nested_offset` |
//! | `weight.quant_map` | what the 16 codes of values stand for, at most 1 |
//! | `weight.quant_state.bitsandbytes__nf4` (or `__fp4`) | the rest, as JSON |
//!
//! With 8 bits, `weight` is I8 and `SCB` has 127 steps of each output.
//!
//! 8 bits become blocks of [`Encoding::Q8_0`], with SCB / 127 rounded to a half float. 4 bits become blocks of
//! [`Encoding::NF4`] or [`Encoding::FP4`], whose codes stand for integers: the 16 levels are rounded to multiples of
//! 1/112 (NF4) or 1/120 (FP4) of absmax. Normally distributed weights in blocks of 64 are moved by 0.5 % or 0.35 % of
//! their root mean square, beside the 9.2 % or 12.2 % by which NF4 or FP4 has moved them. absmax is rounded to a half
//! float (0.05 % at most) when it is divided by that.
//!
//! Layouts: `bitsandbytes/functional.py` (`QuantState`) and `nn/modules.py` of bitsandbytes 0.50.

use half::f16;
use memmap2::Mmap;
use serde::Deserialize;

use super::safetensors::{Dtype, RawTensor};
use super::scales::{floats, round};
use super::{Parts, required};
use crate::encoding::Encoding;
use crate::error::FolderError;
use crate::tensor::Piece;

/// What goes with a `weight` of 4 bits.
pub(super) const FOUR_BIT_PARTS: [&str; 6] = [
    "weight.absmax",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
];

/// What goes with a `weight` of 8 bits.
pub(super) const EIGHT_BIT_PARTS: [&str; 2] = ["SCB", "weight_format"];

/// Values in a block of the encodings that come out.
const BLOCK: usize = 32;

/// What codes of NF4 stand for, times absmax (`create_normal_map`).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// What codes of FP4 stand for, times absmax (`create_fp8_map` with 2 exponent bits and 1 of precision).
const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    -0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// Steps of a block's scale in its absmax.
const NF4_STEPS: f32 = 112.0;
const FP4_STEPS: f32 = 120.0;
const INT8_STEPS: f32 = 127.0;

/// A weight of 4 bits, checked.
#[derive(Debug)]
pub(crate) struct FourBit {
    encoding: Encoding,
    n_rows: usize,
    n_cols: usize,
    /// Values that share an absmax.
    block_size: usize,
    codes: Piece,
    absmax: Absmax,
}

/// A weight of 8 bits, checked.
#[derive(Debug)]
pub(crate) struct EightBit {
    n_rows: usize,
    n_cols: usize,
    codes: Piece,
    scales: Piece,
}

/// The largest magnitude of each block.
#[derive(Debug)]
enum Absmax {
    Plain(Piece),
    Nested {
        codes: Piece,
        /// What the 256 codes stand for.
        map: Piece,
        scales: Piece,
        block_size: usize,
        offset: f32,
    },
}

/// The JSON of `quant_state`.
#[derive(Deserialize)]
struct QuantState {
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

// === impl FourBit ===

impl FourBit {
    /// Checks the tensors of a layer, of which `weight` is one.
    pub(super) fn new(weight: &RawTensor, parts: &Parts<'_>, maps: &[Mmap]) -> Result<Self, FolderError> {
        let state = |kind: &str| parts.get(format!("weight.quant_state.bitsandbytes__{kind}").as_str());
        let (encoding, levels, state_tensor) = match (state("nf4"), state("fp4")) {
            (Some(_), Some(_)) => return Err(weight.error("there are quant_states of both NF4 and FP4 for it")),
            (Some(state), None) => (Encoding::NF4, NF4, *state),
            (None, Some(state)) => (Encoding::FP4, FP4, *state),
            (None, None) => return Err(weight.error("there is no quant_state of bitsandbytes' NF4 or FP4 for it")),
        };
        let state: QuantState = serde_json::from_slice(state_tensor.piece.of(maps))
            .map_err(|cause| state_tensor.error(&cause.to_string()))?;
        let [n_rows, n_cols] = *state.shape.as_slice() else {
            return Err(state_tensor.error(&format!("the shape {:?} is no matrix", state.shape)));
        };
        let n_values = n_rows.checked_mul(n_cols).filter(|n_values| *n_values > 0);
        let n_values = n_values.filter(|n_values| n_values / 2 == weight.piece.range.len());
        let n_values = n_values.ok_or_else(|| {
            weight.error(&format!("{} bytes are not 4 bits for each of {:?}", weight.piece.range.len(), state.shape))
        })?;
        if !n_cols.is_multiple_of(BLOCK) || state.blocksize == 0 || !state.blocksize.is_multiple_of(BLOCK) {
            let why = format!("rows of {n_cols} values in blocks of {} are not whole runs of {BLOCK}", state.blocksize);
            return Err(state_tensor.error(&why));
        }
        let quant_map = required(weight, parts, "weight.quant_map")?;
        quant_map.check_type(&[Dtype::F32])?;
        quant_map.check_shape(&[16])?;
        let found = floats(Dtype::F32, quant_map.piece.of(maps));
        // Both are of at most 1. Versions differ in the last bits.
        if !found.iter().zip(levels).all(|(found, level)| (found - level).abs() < 1e-5) {
            return Err(quant_map.error(&format!("it is not the map of {encoding}")));
        }
        let n_blocks = n_values.div_ceil(state.blocksize);
        let absmax = Absmax::new(weight, parts, &state, n_blocks)?;
        Ok(FourBit { encoding, n_rows, n_cols, block_size: state.blocksize, codes: weight.piece.clone(), absmax })
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        vec![self.n_rows, self.n_cols]
    }

    pub(super) fn encoding(&self) -> Encoding {
        self.encoding
    }

    pub(crate) fn pieces(&self) -> Vec<&Piece> {
        let mut pieces = vec![&self.codes];
        match &self.absmax {
            Absmax::Plain(absmax) => pieces.push(absmax),
            Absmax::Nested { codes, map, scales, .. } => pieces.extend([codes, map, scales]),
        }
        pieces
    }

    /// The matrix in its encoding, row after row.
    pub(crate) fn reblock(&self, maps: &[Mmap]) -> Result<Vec<u8>, String> {
        let steps = if self.encoding == Encoding::NF4 { NF4_STEPS } else { FP4_STEPS };
        let mut scales = self.absmax.read(maps);
        scales.iter_mut().for_each(|absmax| *absmax /= steps);
        let scales = round(&scales)?;
        let codes = self.codes.of(maps).as_chunks::<{ BLOCK / 2 }>().0;
        let mut bytes = Vec::with_capacity(codes.len() * self.encoding.block_bytes());
        for (block_idx, codes) in codes.iter().enumerate() {
            bytes.extend(scales[block_idx * BLOCK / self.block_size].to_le_bytes());
            bytes.extend(nibbles(codes));
        }
        Ok(bytes)
    }
}

/// Codes of neighbours, the first in the high nibble, as an encoding has them: the first half in the low nibbles.
fn nibbles(pairs: &[u8; BLOCK / 2]) -> [u8; BLOCK / 2] {
    let code = |i: usize| pairs[i / 2] >> (4 * (1 - i % 2)) & 15;
    std::array::from_fn(|i| code(i) | code(i + BLOCK / 2) << 4)
}

// === impl Absmax ===

impl Absmax {
    fn new(weight: &RawTensor, parts: &Parts<'_>, state: &QuantState, n_blocks: usize) -> Result<Self, FolderError> {
        let absmax = required(weight, parts, "weight.absmax")?;
        absmax.check_shape(&[n_blocks])?;
        absmax.check_type(&[Dtype::F32, Dtype::U8])?;
        if absmax.dtype == Dtype::F32 {
            return Ok(Absmax::Plain(absmax.piece.clone()));
        }
        let (Some(block_size), Some(offset)) = (state.nested_blocksize.filter(|size| *size > 0), state.nested_offset)
        else {
            return Err(absmax.error("its quant_state has no nested_blocksize and nested_offset"));
        };
        let (scales, map) =
            (required(weight, parts, "weight.nested_absmax")?, required(weight, parts, "weight.nested_quant_map")?);
        scales.check_type(&[Dtype::F32])?;
        scales.check_shape(&[n_blocks.div_ceil(block_size)])?;
        map.check_type(&[Dtype::F32])?;
        map.check_shape(&[256])?;
        let (codes, map, scales) = (absmax.piece.clone(), map.piece.clone(), scales.piece.clone());
        Ok(Absmax::Nested { codes, map, scales, block_size, offset })
    }

    fn read(&self, maps: &[Mmap]) -> Vec<f32> {
        match self {
            Absmax::Plain(absmax) => floats(Dtype::F32, absmax.of(maps)),
            Absmax::Nested { codes, map, scales, block_size, offset } => {
                let (map, scales) = (floats(Dtype::F32, map.of(maps)), floats(Dtype::F32, scales.of(maps)));
                let codes = codes.of(maps).iter().enumerate();
                codes.map(|(i, code)| map[usize::from(*code)] * scales[i / block_size] + offset).collect()
            }
        }
    }
}

// === impl EightBit ===

impl EightBit {
    /// Checks the tensors of a layer, of which `weight` is one.
    pub(super) fn new(weight: &RawTensor, parts: &Parts<'_>, maps: &[Mmap]) -> Result<Self, FolderError> {
        weight.check_type(&[Dtype::I8])?;
        let [n_rows, n_cols] = weight.matrix()?;
        if !n_cols.is_multiple_of(BLOCK) {
            return Err(weight.error(&format!("rows of {n_cols} values are not whole runs of {BLOCK}")));
        }
        let scales = required(weight, parts, "SCB")?;
        scales.check_type(&[Dtype::F32])?;
        scales.check_shape(&[n_rows])?;
        // Others were meant for one family of GPUs each, and have long been given up.
        if let Some(format) = parts.get("weight_format")
            && format.piece.of(maps).iter().any(|byte| *byte != 0)
        {
            return Err(format.error("weights that are not row after row are not supported"));
        }
        Ok(EightBit { n_rows, n_cols, codes: weight.piece.clone(), scales: scales.piece.clone() })
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        vec![self.n_rows, self.n_cols]
    }

    pub(crate) fn pieces(&self) -> [&Piece; 2] {
        [&self.codes, &self.scales]
    }

    /// The matrix as Q8_0, row after row.
    pub(crate) fn reblock(&self, maps: &[Mmap]) -> Result<Vec<u8>, String> {
        let mut scales = floats(Dtype::F32, self.scales.of(maps));
        scales.iter_mut().for_each(|scale| *scale /= INT8_STEPS);
        let scales: Vec<f16> = round(&scales)?;
        let codes = self.codes.of(maps);
        let mut bytes = Vec::with_capacity(codes.len() / BLOCK * Encoding::Q8_0.block_bytes());
        for (row, scale) in codes.chunks_exact(self.n_cols).zip(scales) {
            for codes in row.as_chunks::<BLOCK>().0 {
                bytes.extend(scale.to_le_bytes());
                bytes.extend(codes);
            }
        }
        Ok(bytes)
    }
}

//! A tile: the keys and values of one KV head for 16 neighbouring slots, as codes and, where codes are integers, scales.

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use half::f16;

use super::MAX_HEAD_DIM;
use crate::cpu::simd::{LANES, Simd};
use crate::int8;

/// Slots in a tile: the unit in which attention visits keys, aligned to absolute positions.
pub(crate) const TILE: usize = LANES;

/// A key's or value's number as it is stored. Kernels are compiled for each.
pub(crate) trait Code: Pod + Default + Send + Sync {
    /// Whether the codes of a key, and those of a value, have a scale.
    const HAS_SCALES: bool;

    fn load<S: Simd>(simd: S, codes: &[Self; LANES]) -> S::F32;
    fn to_f32(self) -> f32;
    /// Writes the codes of a head's values, and returns their scale: 1 where there is none.
    fn encode<S: Simd>(simd: S, values: &[f32], codes: &mut [Self]) -> f32;
}

/// A tile to be read.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a, C> {
    /// `[head_dim, 16]`.
    pub(crate) keys: &'a [[C; LANES]],
    /// `[16, head_dim]`.
    pub(crate) values: &'a [[C; LANES]],
    scales: &'a [[f32; LANES]],
}

/// A tile to be written to, laid out as [`Tile`].
pub(crate) struct TileMut<'a, C> {
    keys: &'a mut [[C; LANES]],
    values: &'a mut [C],
    scales: &'a mut [[f32; LANES]],
}

/// Words of a tile before its scales.
#[inline(always)]
fn n_code_words<C: Code>(words: &[u32]) -> usize {
    words.len() - if C::HAS_SCALES { 2 * TILE } else { 0 }
}

// === impl Code ===

/// The bits of an f16.
impl Code for u16 {
    const HAS_SCALES: bool = false;

    #[inline(always)]
    fn load<S: Simd>(simd: S, codes: &[u16; LANES]) -> S::F32 {
        simd.load_f16(codes)
    }
    fn to_f32(self) -> f32 {
        f16::from_bits(self).to_f32()
    }
    #[inline(always)]
    fn encode<S: Simd>(simd: S, values: &[f32], codes: &mut [u16]) -> f32 {
        for (codes, values) in codes.as_chunks_mut().0.iter_mut().zip(values.as_chunks().0) {
            simd.store_f16(simd.load(values), codes);
        }
        1.0
    }
}

/// A step of 8 bits.
impl Code for i8 {
    const HAS_SCALES: bool = true;

    #[inline(always)]
    fn load<S: Simd>(simd: S, codes: &[i8; LANES]) -> S::F32 {
        simd.load_i8(codes)
    }
    fn to_f32(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    fn encode<S: Simd>(_simd: S, values: &[f32], codes: &mut [i8]) -> f32 {
        int8::quantize(values, codes)
    }
}

// === impl Tile ===

impl<'a, C: Code> Tile<'a, C> {
    #[inline(always)]
    pub(crate) fn new(words: &'a [u32]) -> Self {
        let (codes, scales) = words.split_at(n_code_words::<C>(words));
        let codes = cast_slice(codes).as_chunks().0;
        let (keys, values) = codes.split_at(codes.len() / 2);
        Self { keys, values, scales: cast_slice(scales).as_chunks().0 }
    }

    /// Of the 16 keys and of the 16 values. None is known to the compiler.
    #[inline(always)]
    pub(crate) fn scales(self) -> Option<[&'a [f32; LANES]; 2]> {
        match self.scales {
            [keys, values] if C::HAS_SCALES => Some([keys, values]),
            _ => None,
        }
    }

    /// Reads the key and value of one slot as they are stored, and returns the scales of either.
    pub(crate) fn get(self, lane: usize, k: &mut [f32], v: &mut [f32]) -> [f32; 2] {
        k.iter_mut().zip(self.keys).for_each(|(k, codes)| *k = codes[lane].to_f32());
        let values = &self.values.as_flattened()[lane * v.len()..];
        v.iter_mut().zip(values).for_each(|(v, code)| *v = code.to_f32());
        self.scales().map_or([1.0; 2], |scales| scales.map(|scales| scales[lane]))
    }
}

// === impl TileMut ===

impl<'a, C: Code> TileMut<'a, C> {
    #[inline(always)]
    pub(crate) fn new(words: &'a mut [u32]) -> Self {
        let (codes, scales) = words.split_at_mut(n_code_words::<C>(words));
        let codes: &mut [C] = cast_slice_mut(codes);
        let (keys, values) = codes.split_at_mut(codes.len() / 2);
        Self { keys: keys.as_chunks_mut().0, values, scales: cast_slice_mut(scales).as_chunks_mut().0 }
    }

    /// Writes the key and value of one slot, `[head_dim]` each.
    #[inline(always)]
    pub(crate) fn put<S: Simd>(&mut self, simd: S, lane: usize, k: &[f32], v: &[f32]) {
        let mut codes = [C::default(); MAX_HEAD_DIM];
        let codes = &mut codes[..k.len()];
        let key_scale = C::encode(simd, k, codes);
        self.keys.iter_mut().zip(codes).for_each(|(keys, code)| keys[lane] = *code);
        let value_scale = C::encode(simd, v, &mut self.values[lane * v.len()..(lane + 1) * v.len()]);
        if let [key_scales, value_scales] = &mut *self.scales {
            key_scales[lane] = key_scale;
            value_scales[lane] = value_scale;
        }
    }
}

//! The KV cache: keys and values of every layer for the slots of a block pool, as f16 or in 8 bits.
//!
//! A slot is the place of one token: `block * block_size + offset`. Slots are kept in tiles of 16, so a block is one or
//! more tiles. Per layer, tile and KV head there are the keys `[head_dim, 16]` (16 positions side by side, so that one
//! vector holds one dimension of all of them) and then the values `[16, head_dim]`. What is stored of a token depends on
//! that token alone:
//!
//! - f16: each number is rounded to the nearest, ties to even.
//! - int8: the key of a head has 8-bit codes and a scale, and so has its value ([`int8`](crate::int8) states how). The
//!   scales follow the tile's values: those of the 16 keys, then those of the 16 values.
//!
//! Scales are f32, which holds the 127th part of any f32; f16 does not, and would save 4 bytes of 136 for a head of 64. One
//! for each 32 numbers would bring SmolLM2's log-probabilities a fifth nearer to f16's (0.025 off on average in place of
//! 0.031), for 6 to 9 % more memory and more arithmetic.

mod tile;

use std::ops::Range;

use serde::{Deserialize, Serialize};

pub(crate) use tile::{Code, TILE, Tile, TileMut};

use crate::cpu::simd::Portable;
use crate::{KernelError, memory};

/// The largest head dimension: attention converts one tile of one head on its stack.
pub const MAX_HEAD_DIM: usize = 256;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvEncoding {
    /// Half-precision floats.
    #[default]
    F16,
    /// 8-bit integers with a scale for each key and each value of a head.
    Int8,
}

/// Keys and values of `n_layers` layers for `n_blocks` blocks.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    /// `[n_layers, n_tiles, n_kv_heads, words of a tile]`. Words, since the system provides them zeroed and all that a
    /// tile holds is aligned in them.
    words: Vec<u32>,
}

/// The sizes of a cache, and where in it things are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvLayout {
    pub(crate) n_layers: usize,
    pub(crate) n_blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) encoding: KvEncoding,
}

// === impl KvEncoding ===

impl KvEncoding {
    /// Every encoding.
    pub const ALL: [KvEncoding; 2] = [KvEncoding::F16, KvEncoding::Int8];

    /// Bytes of a token's key and value for one KV head of one layer.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        match self {
            KvEncoding::F16 => 2 * head_dim * size_of::<u16>(),
            KvEncoding::Int8 => 2 * (head_dim + size_of::<f32>()),
        }
    }
}

// === impl KvCache ===

impl KvCache {
    /// An empty cache. Pages of it are touched as slots are first written.
    ///
    /// # Errors
    /// If a size is 0, `block_size` is not a multiple of 16, `head_dim` is not one or is over [`MAX_HEAD_DIM`], or the
    /// whole overflows or cannot be allocated.
    pub fn new(
        n_layers: usize,
        n_blocks: usize,
        block_size: usize,
        n_kv_heads: usize,
        head_dim: usize,
        encoding: KvEncoding,
    ) -> Result<Self, KernelError> {
        let error = |reason: String| Err(KernelError::KvCache { reason });
        if n_layers == 0 || n_blocks == 0 || n_kv_heads == 0 {
            return error(format!("{n_layers} layers, {n_blocks} blocks, {n_kv_heads} heads: none may be 0"));
        }
        if block_size == 0 || !block_size.is_multiple_of(TILE) {
            return error(format!("a block of {block_size} slots is not a multiple of {TILE}"));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(TILE) || head_dim > MAX_HEAD_DIM {
            return error(format!("a head of {head_dim} is not a multiple of {TILE} up to {MAX_HEAD_DIM}"));
        }
        let layout = KvLayout { n_layers, n_blocks, block_size, n_kv_heads, head_dim, encoding };
        let size = [n_layers, n_blocks, block_size / TILE, n_kv_heads, layout.tile_words()]
            .into_iter()
            .try_fold(1usize, |size, factor| size.checked_mul(factor))
            .filter(|size| *size <= isize::MAX as usize / size_of::<u32>());
        let Some(size) = size else {
            return error(format!("{n_blocks} blocks of {block_size} slots do not fit the address space"));
        };
        // To ask first keeps a size beyond the machine an error; zeroed pages come from the system untouched.
        let mut probe: Vec<u32> = Vec::new();
        if probe.try_reserve_exact(size).is_err() {
            return error(format!("the system refuses {} bytes", size * size_of::<u32>()));
        }
        drop(probe);
        let mut words = vec![0; size];
        // SAFETY: the bytes are the vector's.
        unsafe { memory::advise_huge_pages(words.as_mut_ptr().cast(), size * size_of::<u32>()) };
        Ok(Self { layout, words })
    }

    /// Layers.
    pub fn n_layers(&self) -> usize {
        self.layout.n_layers
    }

    /// Blocks.
    pub fn n_blocks(&self) -> usize {
        self.layout.n_blocks
    }

    /// Slots in a block.
    pub fn block_size(&self) -> usize {
        self.layout.block_size
    }

    /// Heads of keys and values.
    pub fn n_kv_heads(&self) -> usize {
        self.layout.n_kv_heads
    }

    /// Values in a head.
    pub fn head_dim(&self) -> usize {
        self.layout.head_dim
    }

    /// How keys and values are stored.
    pub fn encoding(&self) -> KvEncoding {
        self.layout.encoding
    }

    /// Bytes of address space; memory is taken as slots are written.
    pub fn size_bytes(&self) -> usize {
        size_of_val(&self.words[..])
    }

    /// Writes the keys and values of one token, `[n_kv_heads, head_dim]` each.
    ///
    /// # Panics
    /// If `layer` or `slot` does not exist or a slice has another length.
    pub fn write(&mut self, layer: usize, slot: usize, k: &[f32], v: &[f32]) {
        let KvLayout { n_kv_heads, head_dim, .. } = self.layout;
        assert!(k.len() == n_kv_heads * head_dim && v.len() == k.len(), "keys and values of one token");
        for (head, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
            let tile = &mut self.words[self.layout.tile(layer, slot, head)];
            match self.layout.encoding {
                KvEncoding::F16 => TileMut::<u16>::new(tile).put(Portable, slot % TILE, k, v),
                KvEncoding::Int8 => TileMut::<i8>::new(tile).put(Portable, slot % TILE, k, v),
            }
        }
    }

    /// Reads one head's key and value of a slot to `k` and `v`, `[head_dim]` each.
    ///
    /// # Panics
    /// If `layer`, `slot` or `head` does not exist or a slice has another length.
    pub fn read(&self, layer: usize, slot: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let [k_scale, v_scale] = self.read_codes(layer, slot, head, k, v);
        k.iter_mut().for_each(|k| *k *= k_scale);
        v.iter_mut().for_each(|v| *v *= v_scale);
    }

    /// As [`KvCache::read`], but gives the codes, and returns the scales of the key and of the value: 1 in f16.
    pub(crate) fn read_codes(&self, layer: usize, slot: usize, head: usize, k: &mut [f32], v: &mut [f32]) -> [f32; 2] {
        let head_dim = self.layout.head_dim;
        assert!(k.len() == head_dim && v.len() == head_dim, "key and value of one head");
        match self.layout.encoding {
            KvEncoding::F16 => self.tile::<u16>(layer, slot, head).get(slot % TILE, k, v),
            KvEncoding::Int8 => self.tile::<i8>(layer, slot, head).get(slot % TILE, k, v),
        }
    }

    /// The tile that `slot` lies in. `C` must be what the encoding stores.
    #[inline(always)]
    pub(crate) fn tile<C: Code>(&self, layer: usize, slot: usize, head: usize) -> Tile<'_, C> {
        Tile::new(&self.words[self.layout.tile(layer, slot, head)])
    }

    pub(crate) fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Everything, for [`KvLayout::tile`] to find tiles in.
    pub(crate) fn words_mut(&mut self) -> &mut [u32] {
        &mut self.words
    }
}

// === impl KvLayout ===

impl KvLayout {
    /// Where one head's tile that `slot` lies in is: tiles of different heads never overlap.
    ///
    /// # Panics
    /// If `layer`, `slot` or `head` does not exist.
    pub(crate) fn tile(&self, layer: usize, slot: usize, head: usize) -> Range<usize> {
        let n_slots = self.n_blocks * self.block_size;
        let exists = layer < self.n_layers && slot < n_slots && head < self.n_kv_heads;
        assert!(exists, "layer {layer} slot {slot} head {head}");
        let len = self.tile_words();
        let start = ((layer * n_slots + slot) / TILE * self.n_kv_heads + head) * len;
        start..start + len
    }

    fn tile_words(&self) -> usize {
        TILE * self.encoding.head_bytes(self.head_dim) / size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_keeps_its_own() {
        for encoding in KvEncoding::ALL {
            let mut cache = KvCache::new(2, 3, 32, 2, 16, encoding).unwrap();
            // Of 127 and whole numbers below it, either encoding keeps every bit.
            let value = |layer: usize, slot: usize, i: usize| match i % 16 {
                0 => 127.0,
                _ => ((layer * 96 + slot) * 32 + i) as f32 % 127.0,
            };
            for layer in 0..2 {
                for slot in 0..96 {
                    let k: Vec<f32> = (0..32).map(|i| value(layer, slot, i)).collect();
                    let v: Vec<f32> = k.iter().map(|k| -k / 4.0).collect();
                    cache.write(layer, slot, &k, &v);
                }
            }
            let (mut k, mut v) = ([0.0; 16], [0.0; 16]);
            for (layer, slot, head) in (0..2).flat_map(|l| (0..96).flat_map(move |s| (0..2).map(move |h| (l, s, h)))) {
                cache.read(layer, slot, head, &mut k, &mut v);
                for i in 0..16 {
                    assert_eq!(k[i], value(layer, slot, head * 16 + i), "{encoding:?}");
                    assert_eq!(v[i], -k[i] / 4.0, "{encoding:?}");
                }
            }
        }
    }

    #[test]
    fn an_encoding_takes_the_bytes_it_says() {
        for (encoding, bytes) in [(KvEncoding::F16, 256), (KvEncoding::Int8, 136)] {
            assert_eq!(encoding.head_bytes(64), bytes);
            let cache = KvCache::new(3, 5, 32, 2, 64, encoding).unwrap();
            assert_eq!(cache.size_bytes(), 3 * 5 * 32 * 2 * bytes, "{encoding:?}");
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let check = |sizes: [usize; 5], message: &str| {
            let [n_layers, n_blocks, block_size, n_kv_heads, head_dim] = sizes;
            let cache = KvCache::new(n_layers, n_blocks, block_size, n_kv_heads, head_dim, KvEncoding::F16);
            assert_eq!(cache.unwrap_err().to_string(), message);
        };
        check([0, 1, 16, 1, 16], "KV cache: 0 layers, 1 blocks, 1 heads: none may be 0");
        check([1, 1, 24, 1, 16], "KV cache: a block of 24 slots is not a multiple of 16");
        check([1, 1, 16, 1, 20], "KV cache: a head of 20 is not a multiple of 16 up to 256");
        check([1, 1, 16, 1, 512], "KV cache: a head of 512 is not a multiple of 16 up to 256");
        check([1, 1 << 60, 16, 8, 64], "KV cache: 1152921504606846976 blocks of 16 slots do not fit the address space");
        check([1, 1 << 47, 16, 1, 16], "KV cache: the system refuses 144115188075855872 bytes");
    }
}

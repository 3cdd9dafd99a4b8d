//! The KV cache: keys and values of every layer for the slots of a block pool, in f16.
//!
//! A slot is the place of one token: `block * block_size + offset`. Slots are kept in tiles of 16, so a block is one or
//! more tiles. Per layer, tile and KV head there are the keys `[head_dim, 16]` (16 positions side by side, so that one
//! vector holds one dimension of all of them) and then the values `[16, head_dim]`.

use std::ops::Range;

use half::f16;

use crate::{KernelError, memory};

/// Slots in a tile: the unit in which attention visits keys, aligned to absolute positions.
pub(crate) const TILE: usize = 16;

/// The largest head dimension: attention converts one tile of one head on its stack.
pub const MAX_HEAD_DIM: usize = 256;

/// Keys and values of `n_layers` layers for `n_blocks` blocks.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    /// `[n_layers, n_tiles, n_kv_heads, 2 * head_dim * 16]`, f16 bits.
    bits: Vec<u16>,
}

/// The sizes of a cache, and where in it things are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvLayout {
    pub(crate) n_layers: usize,
    pub(crate) n_blocks: usize,
    pub(crate) block_size: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
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
        let size = [n_layers, n_blocks, block_size, n_kv_heads, 2 * head_dim]
            .into_iter()
            .try_fold(1usize, |size, factor| size.checked_mul(factor))
            .filter(|size| *size <= isize::MAX as usize / size_of::<u16>());
        let Some(size) = size else {
            return error(format!("{n_blocks} blocks of {block_size} slots do not fit the address space"));
        };
        // To ask first keeps a size beyond the machine an error; zeroed pages come from the system untouched.
        let mut probe: Vec<u16> = Vec::new();
        if probe.try_reserve_exact(size).is_err() {
            return error(format!("the system refuses {} bytes", size * size_of::<u16>()));
        }
        drop(probe);
        let layout = KvLayout { n_layers, n_blocks, block_size, n_kv_heads, head_dim };
        let mut bits = vec![0; size];
        // SAFETY: the bytes are the vector's.
        unsafe { memory::advise_huge_pages(bits.as_mut_ptr().cast(), size * size_of::<u16>()) };
        Ok(Self { layout, bits })
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

    /// Bytes of address space; memory is taken as slots are written.
    pub fn size_bytes(&self) -> usize {
        size_of_val(&self.bits[..])
    }

    /// Writes the keys and values of one token, `[n_kv_heads, head_dim]` each, rounded to f16 (nearest, ties to even).
    ///
    /// # Panics
    /// If `layer` or `slot` does not exist or a slice has another length.
    pub fn write(&mut self, layer: usize, slot: usize, k: &[f32], v: &[f32]) {
        let KvLayout { n_kv_heads, head_dim, .. } = self.layout;
        assert!(k.len() == n_kv_heads * head_dim && v.len() == k.len(), "keys and values of one token");
        for (head, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
            let tile = &mut self.bits[self.layout.tile(layer, slot, head)];
            let (keys, values) = tile.split_at_mut(head_dim * TILE);
            let lane = slot % TILE;
            keys.iter_mut().skip(lane).step_by(TILE).zip(k).for_each(|(bits, k)| *bits = f16::from_f32(*k).to_bits());
            let values = &mut values[lane * head_dim..(lane + 1) * head_dim];
            values.iter_mut().zip(v).for_each(|(bits, v)| *bits = f16::from_f32(*v).to_bits());
        }
    }

    /// Reads one head's key and value of a slot to `k` and `v`, `[head_dim]` each.
    ///
    /// # Panics
    /// If `layer`, `slot` or `head` does not exist or a slice has another length.
    pub fn read(&self, layer: usize, slot: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let head_dim = self.layout.head_dim;
        assert!(k.len() == head_dim && v.len() == head_dim, "key and value of one head");
        let (keys, values) = self.tile(layer, slot, head);
        let lane = slot % TILE;
        let bits = keys.iter().skip(lane).step_by(TILE);
        k.iter_mut().zip(bits).for_each(|(k, bits)| *k = f16::from_bits(*bits).to_f32());
        let bits = &values[lane * head_dim..];
        v.iter_mut().zip(bits).for_each(|(v, bits)| *v = f16::from_bits(*bits).to_f32());
    }

    /// Copies block `from` to block `to` in every layer: a sequence that shares a block gets its own before it writes.
    ///
    /// # Panics
    /// If a block does not exist.
    pub fn copy_block(&mut self, from: usize, to: usize) {
        let KvLayout { n_layers, n_blocks, block_size, n_kv_heads, head_dim } = self.layout;
        assert!(from < n_blocks && to < n_blocks, "blocks {from} and {to} of {n_blocks}");
        let len = block_size * n_kv_heads * 2 * head_dim;
        for layer in 0..n_layers {
            let first = layer * n_blocks;
            let source = (first + from) * len;
            self.bits.copy_within(source..source + len, (first + to) * len);
        }
    }

    /// Keys `[head_dim, 16]` and values `[16, head_dim]` of the tile that `slot` lies in.
    pub(crate) fn tile(&self, layer: usize, slot: usize, head: usize) -> (&[u16], &[u16]) {
        self.bits[self.layout.tile(layer, slot, head)].split_at(self.layout.head_dim * TILE)
    }

    pub(crate) fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Everything, for [`KvLayout::tile`] to find tiles in.
    pub(crate) fn bits_mut(&mut self) -> &mut [u16] {
        &mut self.bits
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
        let len = 2 * self.head_dim * TILE;
        let start = ((layer * n_slots + slot) / TILE * self.n_kv_heads + head) * len;
        start..start + len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_keeps_its_own() {
        let mut cache = KvCache::new(2, 3, 32, 2, 16).unwrap();
        let value = |layer: usize, slot: usize, i: usize| ((layer * 96 + slot) * 32 + i) as f32 / 4.0;
        for layer in 0..2 {
            for slot in 0..96 {
                let k: Vec<f32> = (0..32).map(|i| value(layer, slot, i) % 512.0).collect();
                let v: Vec<f32> = k.iter().map(|k| -k).collect();
                cache.write(layer, slot, &k, &v);
            }
        }
        cache.copy_block(0, 2);
        let (mut k, mut v) = ([0.0; 16], [0.0; 16]);
        for (layer, slot, head) in (0..2).flat_map(|l| (0..96).flat_map(move |s| (0..2).map(move |h| (l, s, h)))) {
            cache.read(layer, slot, head, &mut k, &mut v);
            let written = if slot >= 64 { slot - 64 } else { slot };
            for i in 0..16 {
                assert_eq!(k[i], value(layer, written, head * 16 + i) % 512.0);
                assert_eq!(v[i], -k[i]);
            }
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let check = |sizes: [usize; 5], message: &str| {
            let error = KvCache::new(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]).unwrap_err().to_string();
            assert_eq!(error, message);
        };
        check([0, 1, 16, 1, 16], "KV cache: 0 layers, 1 blocks, 1 heads: none may be 0");
        check([1, 1, 24, 1, 16], "KV cache: a block of 24 slots is not a multiple of 16");
        check([1, 1, 16, 1, 20], "KV cache: a head of 20 is not a multiple of 16 up to 256");
        check([1, 1, 16, 1, 512], "KV cache: a head of 512 is not a multiple of 16 up to 256");
        check([1, 1 << 60, 16, 8, 64], "KV cache: 1152921504606846976 blocks of 16 slots do not fit the address space");
        check([1, 1 << 47, 16, 1, 16], "KV cache: the system refuses 144115188075855872 bytes");
    }
}

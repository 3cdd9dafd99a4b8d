//! Writing keys and values to the cache: one task takes some KV heads of all tokens, since tokens share tiles and heads do
//! not.

use std::ops::Range;

use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::kv_cache::{KvLayout, TILE};

/// Writes some heads of all tokens, as [`KvCache::write`](crate::KvCache::write) does.
pub(crate) struct WriteHeads<'a> {
    pub(crate) layout: KvLayout,
    pub(crate) bits: SharedSlice<'a, u16>,
    pub(crate) layer: usize,
    pub(crate) heads: Range<usize>,
    pub(crate) slots: &'a [u32],
    /// `[n_tokens, n_kv_heads, head_dim]`.
    pub(crate) k: &'a [f32],
    /// As `k`.
    pub(crate) v: &'a [f32],
}

impl Kernel for WriteHeads<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let KvLayout { n_kv_heads, head_dim, .. } = self.layout;
        for (token_idx, slot) in self.slots.iter().enumerate() {
            for head in self.heads.clone() {
                let tile = self.layout.tile(self.layer, *slot as usize, head);
                // SAFETY: tiles of different heads do not overlap, the tasks of a job have heads of their own
                // (`Cpu::write_kv`), and this one holds a single tile at a time.
                let tile = unsafe { self.bits.part(tile) };
                let (keys, values) = tile.split_at_mut(head_dim * TILE);
                let lane = *slot as usize % TILE;
                let at = (token_idx * n_kv_heads + head) * head_dim;
                let mut bits = [0; LANES];
                for (keys, k) in keys.chunks_exact_mut(TILE * LANES).zip(self.k[at..at + head_dim].as_chunks().0) {
                    simd.store_f16(simd.load(k), &mut bits);
                    for (key, bits) in keys.iter_mut().skip(lane).step_by(TILE).zip(bits) {
                        *key = bits;
                    }
                }
                let values = values[lane * head_dim..(lane + 1) * head_dim].as_chunks_mut().0;
                for (value, v) in values.iter_mut().zip(self.v[at..at + head_dim].as_chunks().0) {
                    simd.store_f16(simd.load(v), value);
                }
            }
        }
    }
}

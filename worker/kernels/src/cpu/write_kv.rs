//! Writing keys and values to the cache: one task takes some KV heads of all tokens, since tokens share tiles and heads do
//! not.

use std::ops::Range;

use crate::RopeTable;
use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::kv_cache::{KvLayout, MAX_HEAD_DIM, TILE};

/// Writes some heads of all tokens, as [`KvCache::write`](crate::KvCache::write) does, keys turned to their positions.
pub(crate) struct WriteHeads<'a> {
    pub(crate) layout: KvLayout,
    pub(crate) bits: SharedSlice<'a, u16>,
    pub(crate) layer: usize,
    pub(crate) heads: Range<usize>,
    pub(crate) slots: &'a [u32],
    /// As `slots`.
    pub(crate) positions: &'a [u32],
    pub(crate) rope: &'a RopeTable,
    /// `[n_tokens, n_kv_heads, head_dim]`.
    pub(crate) k: &'a [f32],
    /// As `k`.
    pub(crate) v: &'a [f32],
}

impl Kernel for WriteHeads<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let KvLayout { n_kv_heads, head_dim, .. } = self.layout;
        let mut turned = [0.0; MAX_HEAD_DIM];
        let turned = &mut turned[..head_dim];
        for (token_idx, (slot, position)) in self.slots.iter().zip(self.positions).enumerate() {
            for head in self.heads.clone() {
                let tile = self.layout.tile(self.layer, *slot as usize, head);
                // SAFETY: tiles of different heads do not overlap, the tasks of a job have heads of their own
                // (`Cpu::write_kv`), and this one holds a single tile at a time.
                let tile = unsafe { self.bits.part(tile) };
                let (keys, values) = tile.split_at_mut(head_dim * TILE);
                let lane = *slot as usize % TILE;
                let at = (token_idx * n_kv_heads + head) * head_dim;
                turned.copy_from_slice(&self.k[at..at + head_dim]);
                self.rope.turn(turned, *position as usize);
                let mut bits = [0; LANES];
                for (keys, k) in keys.chunks_exact_mut(TILE * LANES).zip(turned.as_chunks().0) {
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

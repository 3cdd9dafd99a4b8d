//! Writing keys and values to the cache: one task takes some KV heads of all tokens, since tokens share tiles and heads do
//! not.

use std::marker::PhantomData;
use std::ops::Range;

use crate::RopeTable;
use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, Simd};
use crate::kv_cache::{Code, KvLayout, MAX_HEAD_DIM, TILE, TileMut};

/// Writes some heads of all tokens, as [`KvCache::write`](crate::KvCache::write) does, keys turned to their positions.
pub(crate) struct WriteHeads<'a, C> {
    pub(crate) layout: KvLayout,
    pub(crate) words: SharedSlice<'a, u32>,
    /// What the layout's encoding stores.
    pub(crate) code: PhantomData<C>,
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

impl<C: Code> Kernel for WriteHeads<'_, C> {
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
                let mut tile = TileMut::<C>::new(unsafe { self.words.part(tile) });
                let at = (token_idx * n_kv_heads + head) * head_dim;
                turned.copy_from_slice(&self.k[at..at + head_dim]);
                self.rope.turn(turned, *position as usize);
                tile.put(simd, *slot as usize % TILE, turned, &self.v[at..at + head_dim]);
            }
        }
    }
}

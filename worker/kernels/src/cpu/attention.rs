//! Attention over the paged KV cache: softmax in one pass over tiles of 16 positions.
//!
//! The rule, for each row and query head, with tiles in the order of their absolute positions (so that it makes no
//! difference how a prompt was cut into chunks):
//!
//! ```text
//! m = -inf; total = 16 lanes of 0; out = 0
//! for each tile of positions 16t .. 16t + 16, up to the row's own position:
//!     score[p] = (Σ even d: q[d] * k[p, d]  +  Σ odd d: q[d] * k[p, d]) / sqrt(head_dim)    two chains of fma, d ascending
//!     score[p] = -inf for p after the row's position
//!     m' = max(m, largest score);  decay = e^(m - m');  w[p] = e^(score[p] - m')
//!     total[p] = fma(total[p], decay, w[p])
//!     out[d] = out[d] * decay, then fma(w[p], v[p, d], out[d]) for p ascending up to the row's position
//! out[d] = out[d] / (the lanes of total, added as `sum_lanes` does)
//! ```
//!
//! Rows of one sequence and the query heads that share a KV head go through a tile together, so that it is converted
//! from f16 once.

use std::ops::Range;

use crate::cpu::elementwise::exp_lanes;
use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::kv_cache::{KvCache, MAX_HEAD_DIM, TILE};

/// One row of queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionRow {
    /// The row's position: it attends to positions 0 up to and including this one.
    pub position: u32,
    /// Which of the block tables is its sequence's.
    pub table: usize,
}

/// Queries (rows times heads) that go through a tile together.
pub(crate) const MAX_QUERIES: usize = 32;

/// Queries whose dot products share a loaded key.
const WIDTH: usize = 4;

/// One task: rows of one sequence, for one KV head and the query heads that share it.
pub(crate) struct HeadTimesRows<'a> {
    pub(crate) cache: &'a KvCache,
    pub(crate) layer: usize,
    pub(crate) kv_head: usize,
    pub(crate) n_heads: usize,
    /// `[n_rows, n_heads, head_dim]`.
    pub(crate) q: &'a [f32],
    pub(crate) all_rows: &'a [AttentionRow],
    pub(crate) rows: Range<usize>,
    /// The sequence's blocks.
    pub(crate) table: &'a [u32],
    /// As `q`.
    pub(crate) out: SharedSlice<'a, f32>,
}

/// A query on its way through the tiles. Its output accumulates in place.
struct Query<'a> {
    q: &'a [f32],
    out: &'a mut [f32],
    position: usize,
    largest: f32,
    total: [f32; LANES],
}

/// One tile of one KV head in f32.
struct Tile {
    /// `[head_dim, 16]`.
    keys: [[f32; TILE]; MAX_HEAD_DIM],
    /// `[16, head_dim / 16]`.
    values: [[[f32; LANES]; MAX_HEAD_DIM / LANES]; TILE],
}

impl Kernel for HeadTimesRows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let group_len = self.n_heads / self.cache.n_kv_heads();
        let heads_at_once = group_len.min(MAX_QUERIES / self.rows.len());
        let first_head = self.kv_head * group_len;
        let mut start = 0;
        while start < group_len {
            let end = group_len.min(start + heads_at_once);
            self.heads(simd, first_head + start..first_head + end);
            start = end;
        }
    }
}

// === impl HeadTimesRows ===

impl HeadTimesRows<'_> {
    /// All rows for some of the query heads.
    #[inline(always)]
    fn heads<S: Simd>(&self, simd: S, heads: Range<usize>) {
        let head_dim = self.cache.head_dim();
        let n_queries = self.rows.len() * heads.len();
        let mut queries: [Option<Query<'_>>; MAX_QUERIES] = [const { None }; MAX_QUERIES];
        let places = self.rows.clone().flat_map(|row_idx| heads.clone().map(move |head| (row_idx, head)));
        for (query, (row_idx, head)) in queries.iter_mut().zip(places) {
            let at = (row_idx * self.n_heads + head) * head_dim;
            // SAFETY: the tasks of a job divide rows and heads among them (`Cpu::attention`), and within this task every
            // pair of row and head is one query.
            let out = unsafe { self.out.part(at..at + head_dim) };
            out.fill(0.0);
            let position = self.all_rows[row_idx].position as usize;
            let q = &self.q[at..at + head_dim];
            *query = Some(Query { q, out, position, largest: f32::NEG_INFINITY, total: [0.0; LANES] });
        }
        let last = self.rows.clone().map(|row_idx| self.all_rows[row_idx].position as usize).max().unwrap_or(0);
        let mut tile = Tile { keys: [[0.0; TILE]; MAX_HEAD_DIM], values: [[[0.0; LANES]; MAX_HEAD_DIM / LANES]; TILE] };
        for first_position in (0..=last).step_by(TILE) {
            self.load_tile(simd, first_position, &mut tile);
            for queries in queries[..n_queries].chunks_mut(WIDTH) {
                match queries {
                    [Some(a)] => visit(simd, [a], &tile, first_position),
                    [Some(a), Some(b)] => visit(simd, [a, b], &tile, first_position),
                    [Some(a), Some(b), Some(c)] => visit(simd, [a, b, c], &tile, first_position),
                    [Some(a), Some(b), Some(c), Some(d)] => visit(simd, [a, b, c, d], &tile, first_position),
                    _ => unreachable!("the first queries are set"),
                }
            }
        }
        queries.into_iter().flatten().for_each(|query| query.finish(simd));
    }

    #[inline(always)]
    fn load_tile<S: Simd>(&self, simd: S, first_position: usize, tile: &mut Tile) {
        let block_size = self.cache.block_size();
        let block = self.table[first_position / block_size] as usize;
        let slot = block * block_size + first_position % block_size;
        let (keys, values) = self.cache.tile(self.layer, slot, self.kv_head);
        for (out, bits) in tile.keys.iter_mut().zip(keys.as_chunks::<LANES>().0) {
            simd.store(simd.load_f16(bits), out);
        }
        for (out, bits) in tile.values.iter_mut().zip(values.chunks_exact(self.cache.head_dim())) {
            for (out, bits) in out.iter_mut().zip(bits.as_chunks::<LANES>().0) {
                simd.store(simd.load_f16(bits), out);
            }
        }
    }
}

/// Takes some queries through a tile. Those whose position lies before it are left as they are.
#[inline(always)]
fn visit<S: Simd, const N: usize>(simd: S, queries: [&mut Query<'_>; N], tile: &Tile, first_position: usize) {
    let scores: [S::F32; N] = score(simd, std::array::from_fn(|i| queries[i].q), tile);
    let mut weights = [[0.0; TILE]; N];
    let mut decays = [1.0; N];
    let mut n_valid = [0; N];
    for i in 0..N {
        let query = &mut *queries[i];
        if query.position >= first_position {
            n_valid[i] = TILE.min(query.position - first_position + 1);
            (weights[i], decays[i]) = query.weigh(simd, scores[i], n_valid[i]);
        }
    }
    let n_common = n_valid.iter().copied().min().unwrap_or(0);
    for chunk_idx in 0..queries[0].q.len() / LANES {
        let mut sums: [S::F32; N] = std::array::from_fn(|i| {
            simd.mul(simd.load(&queries[i].out.as_chunks::<LANES>().0[chunk_idx]), simd.splat(decays[i]))
        });
        for position in 0..n_common {
            let value = simd.load(&tile.values[position][chunk_idx]);
            for i in 0..N {
                sums[i] = simd.fma(simd.splat(weights[i][position]), value, sums[i]);
            }
        }
        for i in 0..N {
            for position in n_common..n_valid[i] {
                let value = simd.load(&tile.values[position][chunk_idx]);
                sums[i] = simd.fma(simd.splat(weights[i][position]), value, sums[i]);
            }
            simd.store(sums[i], &mut queries[i].out.as_chunks_mut::<LANES>().0[chunk_idx]);
        }
    }
}

/// Dot products of `N` queries with the 16 keys of a tile.
#[inline(always)]
fn score<S: Simd, const N: usize>(simd: S, queries: [&[f32]; N], tile: &Tile) -> [S::F32; N] {
    let mut even = [simd.splat(0.0); N];
    let mut odd = [simd.splat(0.0); N];
    let pairs: [&[[f32; 2]]; N] = queries.map(|q| q.as_chunks::<2>().0);
    for (pair_idx, [even_key, odd_key]) in tile.keys.as_chunks::<2>().0.iter().enumerate().take(pairs[0].len()) {
        let (even_key, odd_key) = (simd.load(even_key), simd.load(odd_key));
        for i in 0..N {
            let [even_q, odd_q] = pairs[i][pair_idx];
            even[i] = simd.fma(simd.splat(even_q), even_key, even[i]);
            odd[i] = simd.fma(simd.splat(odd_q), odd_key, odd[i]);
        }
    }
    let scale = simd.splat(1.0 / (queries[0].len() as f32).sqrt());
    std::array::from_fn(|i| simd.mul(simd.add(even[i], odd[i]), scale))
}

// === impl Query ===

impl Query<'_> {
    /// Softmax weights of a tile's positions, of which the first `n_valid` count, and by what to decay what was summed.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, scores: S::F32, n_valid: usize) -> ([f32; TILE], f32) {
        let mut lanes = [0.0; TILE];
        simd.store(scores, &mut lanes);
        lanes[n_valid..].fill(f32::NEG_INFINITY);
        let largest = lanes.iter().fold(self.largest, |largest, score| if *score > largest { *score } else { largest });
        // The largest so far may be -inf only before the first tile, or if every score was: nothing to decay then.
        let decay_and_pad = exp_lanes(simd, simd.splat(self.largest - largest));
        let weights = exp_lanes(simd, simd.sub(simd.load(&lanes), simd.splat(largest)));
        simd.store(simd.fma(simd.load(&self.total), decay_and_pad, weights), &mut self.total);
        self.largest = largest;
        simd.store(weights, &mut lanes);
        let mut decay = [0.0; LANES];
        simd.store(decay_and_pad, &mut decay);
        (lanes, decay[0])
    }

    #[inline(always)]
    fn finish<S: Simd>(self, simd: S) {
        let total = simd.sum(simd.load(&self.total));
        self.out.iter_mut().for_each(|out| *out /= total);
    }
}

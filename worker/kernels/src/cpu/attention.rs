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
//!     m' = max(m, largest score);  decay = 1 if m' = m, else e^(m - m');  w[p] = e^(score[p] - m')
//!     total[p] = fma(total[p], decay, w[p])
//!     out[d] = out[d] * decay, then fma(w[p], v[p, d], out[d]) for p ascending up to the row's position
//! out[d] = out[d] / (the lanes of total, added as `sum_lanes` does)
//! ```
//!
//! Rows of one sequence and the query heads that share a KV head go through a tile together: a few of them read it in f16
//! as it lies in the cache, more of them share one conversion to f32.

use std::ops::Range;

use crate::cpu::elementwise::exp_lanes;
use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd, unrolled};
use crate::exp::exp;
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

/// Keys `[head_dim, 16]` and values `[16, head_dim]` of one KV head for 16 positions.
trait Tile {
    /// Dimension `dim` of all keys.
    fn keys<S: Simd>(&self, simd: S, dim: usize) -> S::F32;
    /// Dimensions `16 * chunk_idx ..` of one value.
    fn values<S: Simd>(&self, simd: S, position: usize, chunk_idx: usize) -> S::F32;
}

/// A tile as it lies in the cache: f16 bits.
#[derive(Clone, Copy)]
struct CachedTile<'a> {
    keys: &'a [[u16; LANES]],
    values: &'a [[u16; LANES]],
}

/// A tile converted to f32.
struct ConvertedTile {
    keys: [[f32; LANES]; MAX_HEAD_DIM],
    /// `[16, head_dim / 16]` vectors, without gaps.
    values: [[f32; LANES]; MAX_HEAD_DIM],
    chunks_per_value: usize,
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
        let queries = &mut queries[..n_queries];
        let last = queries.iter().flatten().map(|query| query.position).max().unwrap_or(0);
        let mut converted = (n_queries > WIDTH).then(|| ConvertedTile::new(head_dim));
        let mut next = self.tile(0);
        for first_position in (0..=last).step_by(TILE) {
            let tile = next;
            if first_position + TILE <= last {
                next = self.tile(first_position + TILE);
                tile_prefetch(simd, next);
            }
            match &mut converted {
                None => visit_some(simd, queries, &tile, first_position),
                Some(converted) => {
                    converted.convert(simd, tile);
                    for queries in queries.chunks_mut(WIDTH) {
                        visit_some(simd, queries, converted, first_position);
                    }
                }
            }
        }
        for query in queries.iter_mut().flatten() {
            query.finish(simd);
        }
    }

    /// The tile that begins at `first_position` of the sequence.
    #[inline(always)]
    fn tile(&self, first_position: usize) -> CachedTile<'_> {
        let block_size = self.cache.block_size();
        let block = self.table[first_position / block_size] as usize;
        let slot = block * block_size + first_position % block_size;
        let (keys, values) = self.cache.tile(self.layer, slot, self.kv_head);
        CachedTile { keys: keys.as_chunks().0, values: values.as_chunks().0 }
    }
}

// === impl Tile ===

impl Tile for CachedTile<'_> {
    #[inline(always)]
    fn keys<S: Simd>(&self, simd: S, dim: usize) -> S::F32 {
        simd.load_f16(&self.keys[dim])
    }
    #[inline(always)]
    fn values<S: Simd>(&self, simd: S, position: usize, chunk_idx: usize) -> S::F32 {
        simd.load_f16(&self.values[position * (self.values.len() / TILE) + chunk_idx])
    }
}

/// Begins to fetch a tile that comes next: it lies anywhere in memory, where no hardware would look for it.
#[inline(always)]
fn tile_prefetch<S: Simd>(simd: S, tile: CachedTile<'_>) {
    // Two vectors of f16 to a cache line.
    for vector in tile.keys.iter().step_by(2).chain(tile.values.iter().step_by(2)) {
        simd.prefetch(vector);
    }
}

// === impl ConvertedTile ===

impl ConvertedTile {
    fn new(head_dim: usize) -> Self {
        let zeros = [[0.0; LANES]; MAX_HEAD_DIM];
        Self { keys: zeros, values: zeros, chunks_per_value: head_dim / LANES }
    }

    #[inline(always)]
    fn convert<S: Simd>(&mut self, simd: S, tile: CachedTile<'_>) {
        for (out, bits) in self.keys.iter_mut().zip(tile.keys).chain(self.values.iter_mut().zip(tile.values)) {
            simd.store(simd.load_f16(bits), out);
        }
    }
}

impl Tile for ConvertedTile {
    #[inline(always)]
    fn keys<S: Simd>(&self, simd: S, dim: usize) -> S::F32 {
        simd.load(&self.keys[dim])
    }
    #[inline(always)]
    fn values<S: Simd>(&self, simd: S, position: usize, chunk_idx: usize) -> S::F32 {
        simd.load(&self.values[position * self.chunks_per_value + chunk_idx])
    }
}

/// Takes up to [`WIDTH`] queries, all of them set, through a tile.
#[inline(always)]
fn visit_some<S: Simd>(simd: S, queries: &mut [Option<Query<'_>>], tile: &impl Tile, first_position: usize) {
    match queries {
        [Some(a)] => visit(simd, [a], tile, first_position),
        [Some(a), Some(b)] => visit(simd, [a, b], tile, first_position),
        [Some(a), Some(b), Some(c)] => visit(simd, [a, b, c], tile, first_position),
        [Some(a), Some(b), Some(c), Some(d)] => visit(simd, [a, b, c, d], tile, first_position),
        _ => unreachable!("one to four queries"),
    }
}

/// Takes `N` queries through a tile. Those whose position lies before it are left as they are.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "the index runs along the second axis of several arrays")]
fn visit<S: Simd, const N: usize>(simd: S, queries: [&mut Query<'_>; N], tile: &impl Tile, first_position: usize) {
    let scores: [S::F32; N] = score(simd, queries.each_ref().map(|query| query.q), tile);
    let mut weights = [[0.0; TILE]; N];
    let mut decays = [1.0; N];
    let mut n_valid = [0; N];
    unrolled!(i in 0..N {
        if queries[i].position >= first_position {
            n_valid[i] = TILE.min(queries[i].position - first_position + 1);
            decays[i] = queries[i].weigh(simd, scores[i], n_valid[i], &mut weights[i]);
        }
    });
    let n_common = n_valid.iter().copied().min().unwrap_or(0);
    for chunk_idx in 0..queries[0].q.len() / LANES {
        let mut sums = [simd.splat(0.0); N];
        unrolled!(i in 0..N {
            sums[i] = simd.mul(simd.load(&queries[i].out.as_chunks::<LANES>().0[chunk_idx]), simd.splat(decays[i]));
        });
        for position in 0..n_common {
            let value = tile.values(simd, position, chunk_idx);
            unrolled!(i in 0..N { sums[i] = simd.fma(simd.splat(weights[i][position]), value, sums[i]) });
        }
        unrolled!(i in 0..N {
            for (position, weight) in weights[i].iter().enumerate().take(n_valid[i]).skip(n_common) {
                sums[i] = simd.fma(simd.splat(*weight), tile.values(simd, position, chunk_idx), sums[i]);
            }
            simd.store(sums[i], &mut queries[i].out.as_chunks_mut::<LANES>().0[chunk_idx]);
        });
    }
}

/// Dot products of `N` queries with the 16 keys of a tile.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "the index runs along the second axis of several arrays")]
fn score<S: Simd, const N: usize>(simd: S, queries: [&[f32]; N], tile: &impl Tile) -> [S::F32; N] {
    let mut even = [simd.splat(0.0); N];
    let mut odd = [simd.splat(0.0); N];
    let pairs = queries.map(|q| q.as_chunks::<2>().0);
    for pair_idx in 0..pairs[0].len() {
        let (even_keys, odd_keys) = (tile.keys(simd, 2 * pair_idx), tile.keys(simd, 2 * pair_idx + 1));
        unrolled!(i in 0..N {
            let [even_q, odd_q] = pairs[i][pair_idx];
            even[i] = simd.fma(simd.splat(even_q), even_keys, even[i]);
            odd[i] = simd.fma(simd.splat(odd_q), odd_keys, odd[i]);
        });
    }
    let scale = simd.splat(1.0 / (queries[0].len() as f32).sqrt());
    let mut scores = even;
    unrolled!(i in 0..N { scores[i] = simd.mul(simd.add(even[i], odd[i]), scale) });
    scores
}

// === impl Query ===

impl Query<'_> {
    /// Writes the softmax weights of a tile's positions, of which the first `n_valid` count. Returns by what to decay what
    /// was summed so far.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, scores: S::F32, n_valid: usize, weights: &mut [f32; TILE]) -> f32 {
        let mut scores = scores;
        if n_valid < TILE {
            simd.store(scores, weights);
            weights[n_valid..].fill(f32::NEG_INFINITY);
            scores = simd.load(weights);
        }
        let before = self.largest;
        let largest = simd.largest(scores);
        self.largest = if largest > before { largest } else { before };
        let decay = if self.largest == before { 1.0 } else { exp(before - self.largest) };
        let lanes = exp_lanes(simd, simd.sub(scores, simd.splat(self.largest)));
        simd.store(lanes, weights);
        simd.store(simd.fma(simd.load(&self.total), simd.splat(decay), lanes), &mut self.total);
        decay
    }

    #[inline(always)]
    fn finish<S: Simd>(&mut self, simd: S) {
        let total = simd.sum(simd.load(&self.total));
        self.out.iter_mut().for_each(|out| *out /= total);
    }
}

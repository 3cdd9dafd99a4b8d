//! Attention over the paged KV cache: softmax split by split, as FlashDecoding does it (Dao et al., 2023).
//!
//! The rule, for each row and query head. A split is 256 neighbouring positions that begin at a multiple of 256, so it
//! makes no difference how a prompt was cut into chunks:
//!
//! ```text
//! for each split, up to the row's own position:
//!     score[p] = (Σ q[d] * k[p, d]) * k_scale[p] / sqrt(head_dim)    one chain of fma, d ascending
//!     m        = largest score;  w[p] = e^(score[p] - m)
//!     total[l] = Σ w[p] for p = l modulo 16                          16 lanes, p ascending
//!     out[d]   = Σ (w[p] * v_scale[p]) * v[p, d]                     one chain of fma, p ascending
//! splits are merged in order, `~` being what was merged before:
//!     m' = max(~m, m);  a = 1 if m' = ~m, else e^(~m - m');  b = 1 if m' = m, else e^(m - m')
//!     ~total[l] = fma(~total[l], a, total[l] * b);  ~out[d] = fma(~out[d], a, out[d] * b);  ~m = m'
//! out[d] = ~out[d] / (the lanes of ~total, added as `sum_lanes` does)
//! ```
//!
//! `k` and `v` are what the cache stores, as floats; `k_scale` and `v_scale` are what their steps are worth, and not there
//! in f16. Queries are turned to their positions first.
//!
//! Rows of one sequence and the query heads that share a KV head go through a split together, up to eight queries at a
//! time: each key and value is loaded and converted once for all of them. Where few rows attend to long sequences, threads
//! take single splits instead, which are merged afterwards: the same sums in the same order.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use crate::RopeTable;
use crate::cpu::elementwise::exp_lanes;
use crate::cpu::shared_slice::SharedSlice;
use crate::cpu::simd::{Kernel, LANES, Simd, unrolled};
use crate::exp::exp;
use crate::kv_cache::{Code, KvCache, TILE, Tile};

/// Positions whose softmax has one largest score.
pub(crate) const SPLIT: usize = 256;

/// One row of queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionRow {
    /// The row's position: it attends to positions 0 up to and including this one.
    pub position: u32,
    /// Which of the block tables is its sequence's.
    pub table: usize,
}

/// Queries (rows times heads) of one task.
pub(crate) const MAX_QUERIES: usize = 32;

/// Queries that share a loaded key or value.
const WIDTH: usize = 8;

thread_local! {
    /// Scores of a split, then its softmax weights. A task writes them before it reads them; to clear them for each would
    /// take as long as a short sequence does.
    pub(crate) static SCORES: RefCell<Scores> = const { RefCell::new([[0.0; SPLIT]; WIDTH]) };
}

/// A split's scores of as many queries as go through it together.
pub(crate) type Scores = [[f32; SPLIT]; WIDTH];

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Tiles ahead of their use that values are fetched. Keys are fetched as many ahead as go abreast.
const PREFETCH_TILES: usize = 2;

/// One task: rows of one sequence, for one KV head and the query heads that share it.
pub(crate) struct HeadTimesRows<'a, C> {
    pub(crate) cache: &'a KvCache,
    /// What the cache's encoding stores.
    pub(crate) code: PhantomData<C>,
    pub(crate) layer: usize,
    pub(crate) kv_head: usize,
    pub(crate) n_heads: usize,
    pub(crate) rope: &'a RopeTable,
    /// `[n_rows, n_heads, head_dim]`.
    pub(crate) q: SharedSlice<'a, f32>,
    pub(crate) all_rows: &'a [AttentionRow],
    pub(crate) rows: Range<usize>,
    /// The sequence's blocks.
    pub(crate) table: &'a [u32],
    /// As `q`.
    pub(crate) out: SharedSlice<'a, f32>,
}

/// What single splits came to, not merged yet: where few rows attend to long sequences, threads share their splits.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// `[n_rows, n_heads, n_splits, 32 + head_dim]`: the largest score, 15 unused values, the 16 lanes of the total, and
    /// the output.
    values: SharedSlice<'a, f32>,
    n_splits: usize,
}

/// A query on its way through the splits, with what was merged so far; its output accumulates in place.
struct Query<'a> {
    q: &'a [f32],
    out: &'a mut [f32],
    position: usize,
    /// Nothing was merged yet; `out` may hold anything.
    is_fresh: bool,
    largest: f32,
    total: [f32; LANES],
}

/// The part of a sequence that a split covers: positions `first ..= last`.
#[derive(Clone, Copy)]
struct Split<'a, C> {
    task: &'a HeadTimesRows<'a, C>,
    first: usize,
    last: usize,
}

/// A split and the queries that go through it: a kernel of its own, so that what is largest here is compiled once for
/// tasks of all splits and of single ones.
struct VisitSplit<'a, 'b, 'q, C> {
    split: Split<'a, C>,
    queries: &'b mut [Option<Query<'q>>],
    weights: &'b mut Scores,
}

/// How a query's split joins what was merged before: factors of either.
#[derive(Clone, Copy)]
struct Merge {
    is_first: bool,
    before: f32,
    split: f32,
}

/// A task at work.
pub(crate) struct Attend<'a, 'b, C> {
    pub(crate) task: HeadTimesRows<'a, C>,
    /// Without it, all splits, merged. With it, this split of queries that were turned before, to be merged later.
    pub(crate) part: Option<(usize, Parts<'a>)>,
    pub(crate) scores: &'b mut Scores,
}

/// Merges the splits of one row's heads that share a KV head.
pub(crate) struct MergeParts<'a, C> {
    pub(crate) task: HeadTimesRows<'a, C>,
    pub(crate) parts: Parts<'a>,
}

impl<C: Code> Kernel for Attend<'_, '_, C> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, part, scores } = self;
        let group_len = task.n_heads / task.cache.n_kv_heads();
        let heads_at_once = group_len.min(MAX_QUERIES / task.rows.len());
        let first_head = task.kv_head * group_len;
        let mut start = 0;
        while start < group_len {
            let end = group_len.min(start + heads_at_once);
            let heads = first_head + start..first_head + end;
            match part {
                None => task.heads(simd, heads, scores),
                Some((split_idx, parts)) => task.part(simd, heads, scores, split_idx, parts),
            }
            start = end;
        }
    }
}

impl<C: Code> Kernel for VisitSplit<'_, '_, '_, C> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.split.visit_all(simd, self.queries, self.weights);
    }
}

impl<C: Code> Kernel for MergeParts<'_, C> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { task, parts } = self;
        let group_len = task.n_heads / task.cache.n_kv_heads();
        let heads = task.kv_head * group_len..(task.kv_head + 1) * group_len;
        for (row_idx, head) in task.rows.clone().flat_map(|row_idx| heads.clone().map(move |head| (row_idx, head))) {
            let mut query = task.query(row_idx, head);
            for split_idx in 0..=query.position / SPLIT {
                // SAFETY: this job only reads parts, each in one task, and the job that wrote them is over.
                let part = unsafe { parts.part(&task, row_idx, head, split_idx) };
                let (state, split) = part.split_at(STATE);
                let total = simd.load(&state.as_chunks::<LANES>().0[1]);
                let merge = query.merge(simd, state[0], total);
                let outs = query.out.as_chunks_mut::<LANES>().0;
                for (out, split) in outs.iter_mut().zip(split.as_chunks::<LANES>().0) {
                    simd.store(merge.add(simd, out, simd.load(split)), out);
                }
            }
            query.finish(simd);
        }
    }
}

// === impl Parts ===

/// Values of a part before its output.
const STATE: usize = 2 * LANES;

impl<'a> Parts<'a> {
    /// For rows whose longest has `n_splits` splits; `room` is what they lie in.
    pub(crate) fn new(n_queries: usize, head_dim: usize, n_splits: usize, room: &'a mut Vec<f32>) -> Self {
        room.resize(n_queries * n_splits * (STATE + head_dim), 0.0);
        Self { values: SharedSlice::new(room), n_splits }
    }

    /// One split of one query.
    ///
    /// # Safety
    /// As [`SharedSlice::part`].
    #[inline(always)]
    unsafe fn part<C>(
        &self,
        task: &HeadTimesRows<'_, C>,
        row_idx: usize,
        head: usize,
        split_idx: usize,
    ) -> &'a mut [f32] {
        let len = STATE + task.cache.head_dim();
        let at = ((row_idx * task.n_heads + head) * self.n_splits + split_idx) * len;
        // SAFETY: by the caller's promise.
        unsafe { self.values.part(at..at + len) }
    }
}

// === impl HeadTimesRows ===

impl<'a, C: Code> HeadTimesRows<'a, C> {
    /// A query that has seen nothing.
    #[inline(always)]
    fn query(&self, row_idx: usize, head: usize) -> Query<'a> {
        let head_dim = self.cache.head_dim();
        let at = (row_idx * self.n_heads + head) * head_dim;
        // SAFETY: the tasks of a job divide rows and heads among them (`Cpu::attention`), and within a task every pair of
        // row and head is one query, which was turned before.
        let (q, out) = unsafe { (self.q.shared_part(at..at + head_dim), self.out.part(at..at + head_dim)) };
        Query::new(q, out, self.all_rows[row_idx].position as usize)
    }

    /// Turns the queries of all rows and some of the heads to their positions.
    #[inline(always)]
    fn turn(&self, heads: Range<usize>) {
        let head_dim = self.cache.head_dim();
        for row_idx in self.rows.clone() {
            let first = row_idx * self.n_heads;
            // SAFETY: as in `query`; nobody else has a part of these queries.
            let q = unsafe { self.q.part((first + heads.start) * head_dim..(first + heads.end) * head_dim) };
            let position = self.all_rows[row_idx].position as usize;
            q.chunks_exact_mut(head_dim).for_each(|head| self.rope.turn(head, position));
        }
    }

    /// All rows for some of the query heads.
    #[inline(always)]
    fn heads<S: Simd>(&self, simd: S, heads: Range<usize>, scores: &mut Scores) {
        self.turn(heads.clone());
        let n_queries = self.rows.len() * heads.len();
        let mut queries: [Option<Query<'_>>; MAX_QUERIES] = [const { None }; MAX_QUERIES];
        let places = self.rows.clone().flat_map(|row_idx| heads.clone().map(move |head| (row_idx, head)));
        for (query, (row_idx, head)) in queries.iter_mut().zip(places) {
            *query = Some(self.query(row_idx, head));
        }
        let queries = &mut queries[..n_queries];
        let last = queries.iter().flatten().map(|query| query.position).max().unwrap_or(0);
        for first in (0..=last).step_by(SPLIT) {
            let split = Split { task: self, first, last: last.min(first + SPLIT - 1) };
            simd.vectorize(VisitSplit { split, queries: &mut *queries, weights: scores });
        }
        for query in queries.iter_mut().flatten() {
            query.finish(simd);
        }
    }

    /// One split for all rows and some of the query heads.
    #[inline(always)]
    fn part<S: Simd>(&self, simd: S, heads: Range<usize>, scores: &mut Scores, split_idx: usize, parts: Parts<'_>) {
        let first = split_idx * SPLIT;
        let mut queries: [Option<Query<'_>>; MAX_QUERIES] = [const { None }; MAX_QUERIES];
        let mut n_queries = 0;
        let mut last = 0;
        let mut states: [Option<&mut [f32]>; MAX_QUERIES] = [const { None }; MAX_QUERIES];
        for (row_idx, head) in self.rows.clone().flat_map(|row_idx| heads.clone().map(move |head| (row_idx, head))) {
            let position = self.all_rows[row_idx].position as usize;
            if position < first {
                continue;
            }
            let at = (row_idx * self.n_heads + head) * self.cache.head_dim();
            // SAFETY: the tasks of a job divide rows, KV heads and splits among them (`Cpu::attention_by_splits`), and
            // all of them only read queries.
            let (q, part) = unsafe {
                (self.q.shared_part(at..at + self.cache.head_dim()), parts.part(self, row_idx, head, split_idx))
            };
            let (state, out) = part.split_at_mut(STATE);
            states[n_queries] = Some(state);
            queries[n_queries] = Some(Query::new(q, out, position));
            (n_queries, last) = (n_queries + 1, last.max(position));
        }
        if n_queries > 0 {
            let split = Split { task: self, first, last: last.min(first + SPLIT - 1) };
            simd.vectorize(VisitSplit { split, queries: &mut queries[..n_queries], weights: scores });
        }
        for (query, state) in queries.into_iter().flatten().zip(states.into_iter().flatten()) {
            state[0] = query.largest;
            state[LANES..].copy_from_slice(&query.total);
        }
    }

    /// The tile that begins at `first_position` of the sequence.
    #[inline(always)]
    fn tile(&self, first_position: usize) -> Tile<'_, C> {
        let block_size = self.cache.block_size();
        let block = self.table[first_position / block_size] as usize;
        let slot = block * block_size + first_position % block_size;
        self.cache.tile(self.layer, slot, self.kv_head)
    }
}

// === impl Split ===

impl<C: Code> Split<'_, C> {
    /// Takes all queries through the split, as many at a time as there are.
    #[inline(always)]
    fn visit_all<S: Simd>(self, simd: S, queries: &mut [Option<Query<'_>>], weights: &mut Scores) {
        let mut rest = queries;
        while !rest.is_empty() {
            rest = match rest {
                [Some(a), Some(b), Some(c), Some(d), Some(e), Some(f), Some(g), Some(h), rest @ ..] => {
                    self.visit::<S, 8, 2>(simd, [a, b, c, d, e, f, g, h], weights);
                    rest
                }
                [Some(a), Some(b), Some(c), Some(d), rest @ ..] => {
                    self.visit::<S, 4, 4>(simd, [a, b, c, d], weights);
                    rest
                }
                [Some(a), Some(b), Some(c), rest @ ..] => {
                    self.visit::<S, 3, 4>(simd, [a, b, c], weights);
                    rest
                }
                [Some(a), Some(b), rest @ ..] => {
                    self.visit::<S, 2, 4>(simd, [a, b], weights);
                    rest
                }
                [Some(a), rest @ ..] => {
                    self.visit::<S, 1, 8>(simd, [a], weights);
                    rest
                }
                _ => unreachable!("every query is set"),
            };
        }
    }

    /// Takes `N` queries through the split, `TILES` tiles of keys at a time: as many as keep the multipliers busy and fit
    /// the registers. Queries whose position lies before the split are left as they are.
    #[inline(always)]
    fn visit<S: Simd, const N: usize, const TILES: usize>(
        self,
        simd: S,
        mut queries: [&mut Query<'_>; N],
        weights: &mut Scores,
    ) {
        let mut first = self.first;
        while first + TILES * TILE <= self.last + 1 {
            self.score::<S, N, TILES>(simd, queries.each_ref().map(|query| query.q), first, weights);
            first += TILES * TILE;
        }
        while first <= self.last {
            self.score::<S, N, 1>(simd, queries.each_ref().map(|query| query.q), first, weights);
            first += TILE;
        }
        let mut n_valid = [0; N];
        let mut merges = [Merge { is_first: false, before: 1.0, split: 0.0 }; N];
        unrolled!(i in 0..N {
            if queries[i].position >= self.first {
                n_valid[i] = SPLIT.min(queries[i].position - self.first + 1);
                merges[i] = queries[i].weigh(simd, &mut weights[i], n_valid[i]);
            }
        });
        if C::HAS_SCALES {
            self.scale_weights(simd, &mut weights[..N]);
        }
        let n_chunks = queries[0].q.len() / LANES;
        let mut chunk_idx = 0;
        if N < WIDTH {
            while chunk_idx + 4 <= n_chunks {
                self.mix::<S, N, 4>(simd, &mut queries, chunk_idx, &n_valid, &merges, weights);
                chunk_idx += 4;
            }
        }
        while chunk_idx + 2 <= n_chunks {
            self.mix::<S, N, 2>(simd, &mut queries, chunk_idx, &n_valid, &merges, weights);
            chunk_idx += 2;
        }
        if chunk_idx < n_chunks {
            self.mix::<S, N, 1>(simd, &mut queries, chunk_idx, &n_valid, &merges, weights);
        }
    }

    /// Writes the scores of `N` queries with the keys of `TILES` tiles from position `first` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "the index runs along the second axis of several arrays")]
    fn score<S: Simd, const N: usize, const TILES: usize>(
        self,
        simd: S,
        queries: [&[f32]; N],
        first: usize,
        scores: &mut Scores,
    ) {
        let head_dim = queries[0].len();
        let tiles: [Tile<'_, C>; TILES] = std::array::from_fn(|i| self.task.tile(first + i * TILE));
        let keys = tiles.map(|tile| &tile.keys[..head_dim]);
        let next: [&[[C; LANES]]; TILES] =
            std::array::from_fn(|i| &self.after(simd, first + i * TILE, TILES)[..head_dim]);
        let queries = queries.map(|query| &query[..head_dim]);
        let mut sums = [[simd.splat(0.0); N]; TILES];
        for dim in 0..head_dim {
            unrolled!(tile_idx in 0..TILES {
                if dim % (LINE_BYTES / size_of::<[C; LANES]>()) == 0 {
                    simd.prefetch(&next[tile_idx][dim]);
                }
                let key = C::load(simd, &keys[tile_idx][dim]);
                unrolled!(i in 0..N { sums[tile_idx][i] = simd.fma(simd.splat(queries[i][dim]), key, sums[tile_idx][i]) });
            });
        }
        let scale = simd.splat(1.0 / (head_dim as f32).sqrt());
        let first_tile = (first - self.first) / TILE;
        unrolled!(tile_idx in 0..TILES {
            unrolled!(i in 0..N {
                let mut sum = sums[tile_idx][i];
                if let Some([key_scales, _]) = tiles[tile_idx].scales() {
                    sum = simd.mul(sum, simd.load(key_scales));
                }
                let scores = &mut scores[i].as_chunks_mut::<LANES>().0[first_tile + tile_idx];
                simd.store(simd.mul(sum, scale), scores);
            });
        });
    }

    /// What is read `n_tiles` tiles after the keys of the one at `position`: keys, whose scales it begins to fetch, or after
    /// their last values.
    #[inline(always)]
    fn after<S: Simd>(&self, simd: S, position: usize, n_tiles: usize) -> &[[C; LANES]] {
        let position = position + n_tiles * TILE;
        if position <= self.last {
            let tile = self.task.tile(position);
            tile.scales().into_iter().flatten().for_each(|scales| simd.prefetch(scales));
            return tile.keys;
        }
        let n_keys = (self.last - self.first) / TILE + 1;
        self.task.tile(self.last.min(position - n_keys * TILE)).values
    }

    /// Multiplies weights with the scales of the split's values, so that codes need not be. What comes of lanes behind a
    /// query's own position is not looked at.
    #[inline(always)]
    fn scale_weights<S: Simd>(self, simd: S, weights: &mut [[f32; SPLIT]]) {
        for first in (self.first..=self.last).step_by(TILE) {
            if let Some([_, value_scales]) = self.task.tile(first).scales() {
                let scales = simd.load(value_scales);
                for weights in &mut *weights {
                    let weights = &mut weights.as_chunks_mut::<LANES>().0[(first - self.first) / TILE];
                    simd.store(simd.mul(simd.load(weights), scales), weights);
                }
            }
        }
    }

    /// Adds up `CHUNKS` vectors of every query's output and merges them.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "the index runs along the second axis of several arrays")]
    fn mix<S: Simd, const N: usize, const CHUNKS: usize>(
        self,
        simd: S,
        queries: &mut [&mut Query<'_>; N],
        chunk_idx: usize,
        n_valid: &[usize; N],
        merges: &[Merge; N],
        weights: &Scores,
    ) {
        let mut sums = [[simd.splat(0.0); CHUNKS]; N];
        let n_common = n_valid.iter().copied().min().unwrap_or(0);
        let n_most = n_valid.iter().copied().max().unwrap_or(0);
        let n_chunks = queries[0].q.len() / LANES;
        for first in (0..n_most).step_by(TILE) {
            let ahead = (first + PREFETCH_TILES * TILE).min(self.last - self.first);
            let [values, ahead] = [first, ahead].map(|position| {
                let values = self.task.tile(self.first + position).values;
                values.chunks_exact(n_chunks).map(|value| &value[chunk_idx..chunk_idx + CHUNKS])
            });
            let n_shared = n_common.saturating_sub(first).min(TILE);
            for (p, (value, ahead)) in values.zip(ahead).enumerate() {
                let per_line = LINE_BYTES / size_of::<[C; LANES]>();
                ahead.iter().step_by(per_line).for_each(|vector| simd.prefetch(vector));
                if p < n_shared {
                    unrolled!(c in 0..CHUNKS {
                        let value = C::load(simd, &value[c]);
                        unrolled!(i in 0..N {
                            sums[i][c] = simd.fma(simd.splat(weights[i][first + p]), value, sums[i][c]);
                        });
                    });
                } else {
                    // What lies behind a query's own position may be anything, and must not even be multiplied by 0.
                    unrolled!(i in 0..N {
                        if first + p < n_valid[i] {
                            unrolled!(c in 0..CHUNKS {
                                let weight = simd.splat(weights[i][first + p]);
                                sums[i][c] = simd.fma(weight, C::load(simd, &value[c]), sums[i][c]);
                            });
                        }
                    });
                }
            }
        }
        unrolled!(i in 0..N {
            if n_valid[i] > 0 {
                unrolled!(c in 0..CHUNKS {
                    let out = &mut queries[i].out.as_chunks_mut::<LANES>().0[chunk_idx + c];
                    simd.store(merges[i].add(simd, out, sums[i][c]), out);
                });
            }
        });
    }
}

// === impl Merge ===

impl Merge {
    #[inline(always)]
    fn add<S: Simd>(self, simd: S, before: &[f32; LANES], split: S::F32) -> S::F32 {
        if self.is_first {
            return split;
        }
        let split = simd.mul(split, simd.splat(self.split));
        simd.fma(simd.load(before), simd.splat(self.before), split)
    }
}

// === impl Query ===

impl<'a> Query<'a> {
    #[inline(always)]
    fn new(q: &'a [f32], out: &'a mut [f32], position: usize) -> Self {
        Self { q, out, position, is_fresh: true, largest: f32::NEG_INFINITY, total: [0.0; LANES] }
    }

    /// Turns the scores of a split, of which the first `n_valid` count, to softmax weights, and merges their total.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, scores: &mut [f32; SPLIT], n_valid: usize) -> Merge {
        let n_tiles = n_valid.div_ceil(TILE);
        scores[n_valid..n_tiles * TILE].fill(f32::NEG_INFINITY);
        let tiles = &mut scores.as_chunks_mut::<LANES>().0[..n_tiles];
        let mut largest = simd.splat(f32::NEG_INFINITY);
        for tile in tiles.iter() {
            largest = simd.max(simd.load(tile), largest);
        }
        let largest = simd.largest(largest);
        let mut total = simd.splat(0.0);
        for tile in tiles {
            let weights = exp_lanes(simd, simd.sub(simd.load(tile), simd.splat(largest)));
            simd.store(weights, tile);
            total = simd.add(total, weights);
        }
        self.merge(simd, largest, total)
    }

    /// Merges a split's largest score and total; its output is to follow.
    #[inline(always)]
    fn merge<S: Simd>(&mut self, simd: S, largest: f32, total: S::F32) -> Merge {
        let before = self.largest;
        self.largest = if largest > before { largest } else { before };
        let factor = |largest: f32| if self.largest == largest { 1.0 } else { exp(largest - self.largest) };
        let is_first = std::mem::replace(&mut self.is_fresh, false);
        let merge = Merge { is_first, before: factor(before), split: factor(largest) };
        let split = simd.mul(total, simd.splat(merge.split));
        simd.store(simd.fma(simd.load(&self.total), simd.splat(merge.before), split), &mut self.total);
        merge
    }

    #[inline(always)]
    fn finish<S: Simd>(&mut self, simd: S) {
        let total = simd.sum(simd.load(&self.total));
        self.out.iter_mut().for_each(|out| *out /= total);
    }
}

//! The shard plan: which ranges of every weight a rank holds, and in what order sums cross ranks.
//!
//! The lockstep rule wants the same bits at every world size. A column-parallel layer (q, k, v, gate, up, output) is
//! cut by output rows, so each sum over K stays on one rank. A row-parallel layer (o, down) is cut over K itself; its
//! K is therefore divided, whatever the world size, into the same *segments*, ranks own whole runs of segments, and
//! segment sums are added along one fixed binary tree ([`SumTree`]). With SmolLM2's three KV heads:
//!
//! ```text
//!   o      K = 576   segments  |  KV head 0  |  KV head 1  |  KV head 2  |     world 2: rank 0 owns 0..1, rank 1 owns 1..3
//!   down   K = 1536  segments  |  0   |  1   |  2   |  3   |  4   |  5   |     world 2: rank 0 owns 0..3, rank 1 owns 3..6
//! ```

use std::ops::Range;

use lockstep_kernels::{SumOrder, SumTree};

use super::{LoadError, config::ModelConfig};

/// Ends of K-segments fall on multiples of this many columns, because activations are quantized in blocks of it.
const ACTIVATION_BLOCK: usize = 32;

/// Output rows of the vocabulary are dealt out in multiples of this, the height of a packed panel.
const VOCAB_UNIT: usize = 16;

/// What one rank holds.
#[derive(Clone, Debug)]
pub struct ShardPlan {
    /// This rank.
    pub rank: usize,
    /// Ranks in the group.
    pub world_size: usize,
    /// Query heads of this rank.
    pub heads: Range<usize>,
    /// Key and value heads of this rank.
    pub kv_heads: Range<usize>,
    /// Columns of the MLP of this rank.
    pub ffn: Range<usize>,
    /// Rows of the output matrix, for each rank.
    pub vocab: Vec<Range<usize>>,
    /// How o's partial sums are made and added.
    pub attention_sum: Reduction,
    /// How down's partial sums are made and added.
    pub ffn_sum: Reduction,
}

/// How a row-parallel layer adds up.
#[derive(Clone, Debug)]
pub struct Reduction {
    /// This rank's columns.
    pub columns: Range<usize>,
    /// Ends of this rank's segments, relative to the start of `columns`.
    pub segment_ends: Vec<usize>,
    /// The largest whole subtrees of this rank, as ranges of its own segments.
    pub local_subtrees: Vec<Range<usize>>,
    /// The largest whole subtrees of each rank, as ranges of all segments, by rank.
    pub subtrees: Vec<Vec<Range<usize>>>,
    /// How the sums of all ranks' subtrees are added.
    pub order: SumOrder,
}

impl ShardPlan {
    /// Plans the shard of `rank`.
    ///
    /// `block_len`: values in a quantization block of o and of down (1 for float weights), within which K cannot be
    /// cut.
    ///
    /// # Errors
    /// [`LoadError::WorldSize`] if there are fewer KV heads, or fewer segments, than ranks.
    pub fn new(
        config: &ModelConfig,
        rank: usize,
        world_size: usize,
        block_len: RowParallelBlocks,
    ) -> Result<Self, LoadError> {
        let attention_ends = attention_segments(config, block_len.o);
        let n_attention = attention_ends.len();
        if world_size == 0 || rank >= world_size || world_size > n_attention {
            let why = format!(
                "its {} KV heads make {n_attention} segments that ranks can own, so 1 to {n_attention} ranks can share it",
                config.n_kv_heads
            );
            return Err(LoadError::WorldSize { world_size, why });
        }
        let ffn_ends = ffn_segments(config, n_attention, block_len.down);
        if ffn_ends.len() < world_size {
            let why = format!("its MLP of {} columns makes only {} segments", config.ffn_dim, ffn_ends.len());
            return Err(LoadError::WorldSize { world_size, why });
        }

        let attention_sum = Reduction::new(&attention_ends, rank, world_size);
        let ffn_sum = Reduction::new(&ffn_ends, rank, world_size);
        let group_dim = config.group_size() * config.head_dim;
        let kv_heads = attention_sum.columns.start / group_dim..attention_sum.columns.end / group_dim;
        Ok(Self {
            rank,
            world_size,
            heads: kv_heads.start * config.group_size()..kv_heads.end * config.group_size(),
            kv_heads,
            ffn: ffn_sum.columns.clone(),
            vocab: vocab_ranges(config.vocab_size, world_size),
            attention_sum,
            ffn_sum,
        })
    }
}

/// Values in a quantization block of the two row-parallel weights, the largest over all layers.
#[derive(Clone, Copy, Debug)]
pub struct RowParallelBlocks {
    /// Of the attention's output projection.
    pub o: usize,
    /// Of the MLP's down projection.
    pub down: usize,
}

// === impl Reduction ===

impl Reduction {
    fn new(ends: &[usize], rank: usize, world_size: usize) -> Self {
        let tree = SumTree::new(ends.len());
        let owned = |rank: usize| share(ends.len(), rank, world_size);
        let start = |segment: usize| if segment == 0 { 0 } else { ends[segment - 1] };
        let mine = owned(rank);
        let columns = start(mine.start)..start(mine.end);
        let subtrees: Vec<_> = (0..world_size).map(|rank| tree.subtrees(owned(rank))).collect();
        Self {
            segment_ends: mine.clone().map(|segment| ends[segment] - columns.start).collect(),
            local_subtrees: tree
                .subtrees(mine.clone())
                .into_iter()
                .map(|subtree| subtree.start - mine.start..subtree.end - mine.start)
                .collect(),
            order: tree.order(&subtrees.concat()),
            subtrees,
            columns,
        }
    }

    /// Partial sums that `rank` sends for each output value.
    pub fn n_partials(&self, rank: usize) -> usize {
        self.subtrees[rank].len()
    }

    /// Values of each rank's partial sums, of `plane` values each.
    pub fn lengths(&self, plane: usize) -> Vec<usize> {
        self.subtrees.iter().map(|subtrees| subtrees.len() * plane).collect()
    }

    /// Which of all ranks' partial sums are those of `rank`.
    pub fn partials(&self, rank: usize) -> Range<usize> {
        let start = (0..rank).map(|lower| self.n_partials(lower)).sum();
        start..start + self.n_partials(rank)
    }
}

/// The part of `n` things that `rank` owns: sizes differ by one at most, larger parts last.
fn share(n: usize, rank: usize, world_size: usize) -> Range<usize> {
    n * rank / world_size..n * (rank + 1) / world_size
}

/// o's segments: one for each KV head's group of query heads, or for runs of several where a quantization block
/// would be cut.
fn attention_segments(config: &ModelConfig, block_len: usize) -> Vec<usize> {
    let unit = block_len.max(ACTIVATION_BLOCK);
    let group_dim = config.group_size() * config.head_dim;
    let n_segments = (1..=config.n_kv_heads)
        .rev()
        .find(|n| config.n_kv_heads.is_multiple_of(*n) && (config.n_kv_heads / n * group_dim).is_multiple_of(unit))
        .unwrap_or(1);
    (1..=n_segments).map(|i| i * config.q_dim() / n_segments).collect()
}

/// down's segments: as many as o has, doubled if that is odd, so that two ranks share evenly; ends on whole blocks.
fn ffn_segments(config: &ModelConfig, n_attention: usize, block_len: usize) -> Vec<usize> {
    let unit = block_len.max(ACTIVATION_BLOCK);
    let n_units = config.ffn_dim.div_ceil(unit);
    let wanted = if n_attention.is_multiple_of(2) || n_attention == 1 { n_attention } else { 2 * n_attention };
    let n_segments = wanted.min(n_units);
    (1..=n_segments).map(|i| (n_units * i / n_segments * unit).min(config.ffn_dim)).collect()
}

fn vocab_ranges(vocab_size: usize, world_size: usize) -> Vec<Range<usize>> {
    let n_units = vocab_size.div_ceil(VOCAB_UNIT);
    let end = |i: usize| (n_units * i / world_size * VOCAB_UNIT).min(vocab_size);
    (0..world_size).map(|rank| end(rank)..end(rank + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(n_heads: usize, n_kv_heads: usize, head_dim: usize, ffn_dim: usize) -> ModelConfig {
        ModelConfig {
            n_layers: 1,
            hidden_dim: n_heads * head_dim,
            n_heads,
            n_kv_heads,
            head_dim,
            ffn_dim,
            vocab_size: 1000,
            context_length: 128,
            rms_eps: 1e-5,
            rope_base: 1e4,
            rope_dim: head_dim,
            rope_scale: 1.0,
            rope_style: lockstep_kernels::RopeStyle::Adjacent,
        }
    }

    fn smollm2() -> ModelConfig {
        config(9, 3, 64, 1536)
    }

    fn llama3_8b() -> ModelConfig {
        config(32, 8, 128, 14336)
    }

    fn check_covers(config: &ModelConfig, world_size: usize, block_len: usize) {
        let blocks = RowParallelBlocks { o: block_len, down: block_len };
        let plans: Vec<_> =
            (0..world_size).map(|rank| ShardPlan::new(config, rank, world_size, blocks).expect("a plan")).collect();
        let covers = |range: fn(&ShardPlan) -> Range<usize>, total: usize| {
            let mut at = 0;
            for plan in &plans {
                let range = range(plan);
                assert_eq!(range.start, at, "world size {world_size}");
                assert!(range.end > range.start, "rank {} of {world_size} has nothing", plan.rank);
                at = range.end;
            }
            assert_eq!(at, total);
        };
        covers(|plan| plan.heads.clone(), config.n_heads);
        covers(|plan| plan.kv_heads.clone(), config.n_kv_heads);
        covers(|plan| plan.ffn.clone(), config.ffn_dim);
        covers(|plan| plan.vocab[plan.rank].clone(), config.vocab_size);
        covers(|plan| plan.attention_sum.columns.clone(), config.q_dim());
    }

    #[test]
    fn ranks_cover_every_weight_exactly_once() {
        for world_size in 1..=3 {
            check_covers(&smollm2(), world_size, 32);
        }
        for world_size in 1..=8 {
            check_covers(&llama3_8b(), world_size, 32);
            check_covers(&llama3_8b(), world_size, 256);
        }
    }

    #[test]
    fn segments_do_not_depend_on_the_world_size() {
        let blocks = RowParallelBlocks { o: 32, down: 32 };
        let whole = ShardPlan::new(&smollm2(), 0, 1, blocks).expect("a plan");
        let mut ends = Vec::new();
        for rank in 0..3 {
            let plan = ShardPlan::new(&smollm2(), rank, 3, blocks).expect("a plan");
            ends.extend(plan.ffn_sum.segment_ends.iter().map(|end| end + plan.ffn_sum.columns.start));
        }
        assert_eq!(ends, whole.ffn_sum.segment_ends);
    }

    #[test]
    fn more_ranks_than_kv_heads_are_refused_by_name() {
        let blocks = RowParallelBlocks { o: 32, down: 32 };
        let error = ShardPlan::new(&smollm2(), 0, 4, blocks).expect_err("four ranks");
        assert_eq!(
            error.to_string(),
            "world size 4 is not possible for this model: its 3 KV heads make 3 segments that ranks can own, so 1 to 3 \
             ranks can share it"
        );
    }

    #[test]
    fn a_quantization_block_is_never_cut() {
        let blocks = RowParallelBlocks { o: 256, down: 256 };
        let plan = ShardPlan::new(&config(8, 8, 64, 1024), 0, 2, blocks).expect("a plan");
        assert_eq!(plan.attention_sum.segment_ends, [256], "four heads of 64 make one block");
    }
}

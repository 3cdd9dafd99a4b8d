//! The sum tree: the one order in which the sums of a layer's K-segments are added, on however many ranks.
//!
//! A layer whose input is split over ranks sums each of its fixed K-segments by itself; the segment sums are then added
//! as a binary tree that depends only on the number of segments: a node over `n > 1` segments adds the sum of its first
//! `ceil(n / 2)` segments to the sum of the others. A rank adds what it can (the largest subtrees whose segments it owns
//! whole), and whoever has all subtrees finishes the tree with the same additions in the same places. Since a node's
//! shape follows from its size alone, a rank can add up a subtree without knowing where in the tree it hangs.
//!
//! The halves make a rank of two own one subtree, a rank of four one, and a rank of three at most three up to 16
//! segments; a contiguous range never holds more than about twice the tree's depth.

use std::ops::Range;
use std::sync::Arc;

/// The most K-segments that a layer may have. World sizes are far below it.
pub const MAX_SEGMENTS: usize = 128;

/// Sums pending at once while a tree of [`MAX_SEGMENTS`] is added in segment order: its depth and one.
pub(crate) const MAX_PENDING: usize = 8;

/// The fixed binary tree over `n_segments` K-segments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumTree {
    n_segments: usize,
}

/// The order in which the sums of some subtrees, which together are the whole tree, are added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumOrder {
    /// For each subtree, how many pending sums are added to its sum, the latest first, before the next one's turn.
    merges: Arc<[u8]>,
}

/// The terms of a sum: planes of equal size, `[n_planes, ..]`, one for each subtree of `order`.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// All planes.
    pub planes: &'a [f32],
    /// How they are added.
    pub order: &'a SumOrder,
}

// === impl SumOrder ===

impl SumOrder {
    /// Planes that are added: one for each subtree.
    pub fn n_planes(&self) -> usize {
        self.merges.len()
    }

    /// Adds up `planes`, `[n_planes, out.len()]`.
    ///
    /// # Panics
    /// If `planes` has another size.
    pub fn add(&self, planes: &[f32], out: &mut [f32]) {
        assert_eq!(planes.len(), self.n_planes() * out.len(), "planes of {} subtrees", self.n_planes());
        let n = out.len();
        for (i, out) in out.iter_mut().enumerate() {
            let mut pending = [0.0; MAX_PENDING];
            let mut n_pending = 0;
            for (plane_idx, n_merges) in self.merges.iter().enumerate() {
                let mut sum = planes[plane_idx * n + i];
                for _ in 0..*n_merges {
                    n_pending -= 1;
                    sum += pending[n_pending];
                }
                pending[n_pending] = sum;
                n_pending += 1;
            }
            *out = pending[0];
        }
    }

    pub(crate) fn merges(&self) -> &[u8] {
        &self.merges
    }
}

// === impl SumTree ===

impl SumTree {
    /// The tree over `n_segments` segments.
    ///
    /// # Panics
    /// If there are none or more than [`MAX_SEGMENTS`].
    pub fn new(n_segments: usize) -> Self {
        assert!((1..=MAX_SEGMENTS).contains(&n_segments), "a sum tree of {n_segments} segments");
        Self { n_segments }
    }

    /// Number of segments.
    pub fn n_segments(&self) -> usize {
        self.n_segments
    }

    /// The largest whole subtrees inside the segments `owned`, in order. Together they cover `owned`.
    ///
    /// # Panics
    /// If `owned` is not within the tree.
    pub fn subtrees(&self, owned: Range<usize>) -> Vec<Range<usize>> {
        assert!(owned.start <= owned.end && owned.end <= self.n_segments, "segments {owned:?} of {}", self.n_segments);
        let mut found = Vec::new();
        collect_subtrees(0..self.n_segments, &owned, &mut found);
        found
    }

    /// How the sums of `subtrees`, in order, are added up to the tree's total. Any partition of the segments into subtrees
    /// of this tree gives the same bits.
    ///
    /// # Panics
    /// If `subtrees` is not such a partition.
    pub fn order(&self, subtrees: &[Range<usize>]) -> SumOrder {
        let mut merges = vec![0; subtrees.len()];
        let n_used = count_subtree_merges(0..self.n_segments, subtrees, &mut merges);
        assert_eq!(n_used, subtrees.len(), "{subtrees:?} reach past {} segments", self.n_segments);
        SumOrder { merges: merges.into() }
    }

    /// For each segment in order, how many pending sums are added to its sum before the next segment is begun: adding
    /// "the latest pending sum + this one" that often is the tree's order.
    pub(crate) fn merges(&self) -> Vec<u8> {
        let mut merges = vec![0; self.n_segments];
        count_merges(0..self.n_segments, &mut merges);
        merges
    }
}

/// Where the node over `segments` is halved.
fn middle(segments: &Range<usize>) -> usize {
    segments.start + segments.len().div_ceil(2)
}

fn collect_subtrees(node: Range<usize>, owned: &Range<usize>, found: &mut Vec<Range<usize>>) {
    if node.end <= owned.start || owned.end <= node.start {
        return;
    }
    if owned.start <= node.start && node.end <= owned.end {
        found.push(node);
        return;
    }
    let middle = middle(&node);
    collect_subtrees(node.start..middle, owned, found);
    collect_subtrees(middle..node.end, owned, found);
}

/// Notes at the last subtree of every node within `node` that its halves are then added. Returns how many subtrees
/// `node` consists of.
fn count_subtree_merges(node: Range<usize>, subtrees: &[Range<usize>], merges: &mut [u8]) -> usize {
    let first = subtrees.first().unwrap_or_else(|| panic!("no subtree covers segments {node:?}"));
    if *first == node {
        return 1;
    }
    assert!(first.start == node.start && node.len() > 1, "{first:?} is no subtree at {node:?}");
    let middle = middle(&node);
    let n_left = count_subtree_merges(node.start..middle, subtrees, merges);
    let n = n_left + count_subtree_merges(middle..node.end, &subtrees[n_left..], &mut merges[n_left..]);
    merges[n - 1] += 1;
    n
}

fn count_merges(node: Range<usize>, merges: &mut [u8]) {
    if node.len() > 1 {
        let middle = middle(&node);
        count_merges(node.start..middle, merges);
        count_merges(middle..node.end, merges);
        merges[node.end - 1] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(segments: &[f32], node: Range<usize>) -> f32 {
        match node.len() {
            1 => segments[node.start],
            n => {
                total(segments, node.start..node.start + n.div_ceil(2))
                    + total(segments, node.start + n.div_ceil(2)..node.end)
            }
        }
    }

    /// Sums whose rounding shows every change of order.
    fn segment_sums(n: usize) -> Vec<f32> {
        (0..n).map(|i| (1.0 + i as f32 * 0.37) * 10f32.powi((i as i32 * 5) % 7 - 3)).collect()
    }

    #[test]
    fn any_split_over_owners_gives_the_same_bits() {
        for n in 1..=33 {
            let tree = SumTree::new(n);
            let sums = segment_sums(n);
            let expected = total(&sums, 0..n);
            for first_cut in 0..=n {
                for second_cut in first_cut..=n {
                    let mut subtrees = tree.subtrees(0..first_cut);
                    subtrees.extend(tree.subtrees(first_cut..second_cut));
                    subtrees.extend(tree.subtrees(second_cut..n));
                    let planes: Vec<f32> = subtrees
                        .iter()
                        .map(|s| total(&sums, 0..s.len().max(1)).mul_add(0.0, total(&sums, s.clone())))
                        .collect();
                    let mut out = [0.0];
                    tree.order(&subtrees).add(&planes, &mut out);
                    assert_eq!(
                        out[0].to_bits(),
                        expected.to_bits(),
                        "{n} segments cut at {first_cut} and {second_cut}"
                    );
                }
            }
        }
    }

    #[test]
    fn merging_in_segment_order_is_the_tree() {
        for n in 1..=MAX_SEGMENTS {
            let sums = segment_sums(n);
            let mut pending: Vec<f32> = Vec::new();
            for (sum, n_merges) in sums.iter().zip(SumTree::new(n).merges()) {
                let mut sum = *sum;
                for _ in 0..n_merges {
                    sum += pending.pop().unwrap();
                }
                pending.push(sum);
                assert!(pending.len() <= MAX_PENDING);
            }
            assert_eq!(pending.len(), 1);
            assert_eq!(pending[0].to_bits(), total(&sums, 0..n).to_bits(), "{n} segments");
        }
    }

    #[test]
    fn balanced_owners_own_few_subtrees() {
        for n in 1..=MAX_SEGMENTS {
            for world_size in 1..=n.min(8) {
                let tree = SumTree::new(n);
                for rank in 0..world_size {
                    let owned = n * rank / world_size..n * (rank + 1) / world_size;
                    let n_subtrees = tree.subtrees(owned).len();
                    assert!(n_subtrees <= 2 * MAX_PENDING, "{n} segments on {world_size} ranks: {n_subtrees}");
                }
            }
        }
        assert_eq!(SumTree::new(8).subtrees(4..8), vec![4..8]);
        assert_eq!(SumTree::new(8).subtrees(0..3), vec![0..2, 2..3]);
    }

    #[test]
    #[should_panic(expected = "no subtree")]
    fn a_range_that_is_no_subtree_is_refused() {
        SumTree::new(4).order(&[0..1, 1..3, 3..4]);
    }
}

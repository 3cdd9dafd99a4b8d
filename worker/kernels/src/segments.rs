//! K-segments: the fixed runs of input columns whose products are summed by themselves, and which of those sums a
//! matrix adds up before it hands them on.

use std::ops::Range;

use crate::{KernelError, SumTree, sum_tree::MAX_PENDING, sum_tree::MAX_SEGMENTS};

/// One segment of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) cols: Range<usize>,
    /// Pending sums to add once this segment is summed ([`SumTree::merges`]).
    pub(crate) n_merges: u8,
}

/// The segments of one shard and the subtrees they are added up to: one partial plane each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SegmentPlan {
    segments: Vec<Segment>,
    subtrees: Vec<Range<usize>>,
}

// === impl SegmentPlan ===

impl SegmentPlan {
    /// Segments that end at the columns `ends`, summed by `subtrees`, ranges of segments that cover them in order.
    pub(crate) fn new(
        ends: &[usize],
        subtrees: &[Range<usize>],
        n_cols: usize,
        align: usize,
    ) -> Result<Self, KernelError> {
        let ascending = ends.is_sorted_by(|a, b| a < b) && ends.first().is_some_and(|end| *end > 0);
        let aligned = ends.iter().all(|end| end.is_multiple_of(align));
        if !ascending || !aligned || ends.last() != Some(&n_cols) || ends.len() > MAX_SEGMENTS {
            return Err(KernelError::Segments { ends: ends.to_vec(), n_cols, align, limit: MAX_SEGMENTS });
        }
        let mut next = 0;
        for subtree in subtrees {
            if subtree.start != next || subtree.end <= subtree.start {
                return Err(subtree_error(subtrees, ends.len()));
            }
            next = subtree.end;
        }
        if next != ends.len() {
            return Err(subtree_error(subtrees, ends.len()));
        }
        let starts = std::iter::once(&0).chain(ends);
        let merges = subtrees.iter().flat_map(|subtree| SumTree::new(subtree.len()).merges());
        let segments =
            starts.zip(ends).zip(merges).map(|((start, end), n_merges)| Segment { cols: *start..*end, n_merges });
        Ok(Self { segments: segments.collect(), subtrees: subtrees.to_vec() })
    }

    /// Partial planes of a product.
    pub(crate) fn n_partials(&self) -> usize {
        self.subtrees.len()
    }

    /// The segments of each subtree, in order.
    pub(crate) fn subtrees(&self) -> impl Iterator<Item = &[Segment]> {
        self.subtrees.iter().map(|subtree| &self.segments[subtree.clone()])
    }

    /// Sums every segment with `sum_segment` (given its columns), adds the sums as the tree says, and hands each
    /// subtree's sum to `store` with its plane.
    pub(crate) fn sum<T: Copy>(
        &self,
        zero: T,
        mut sum_segment: impl FnMut(Range<usize>) -> T,
        add: impl Fn(T, T) -> T,
        mut store: impl FnMut(usize, T),
    ) {
        for (plane_idx, segments) in self.subtrees().enumerate() {
            let mut pending = [zero; MAX_PENDING];
            let mut n_pending = 0;
            for segment in segments {
                let mut sum = sum_segment(segment.cols.clone());
                for _ in 0..segment.n_merges {
                    n_pending -= 1;
                    sum = add(pending[n_pending], sum);
                }
                pending[n_pending] = sum;
                n_pending += 1;
            }
            store(plane_idx, pending[0]);
        }
    }
}

fn subtree_error(subtrees: &[Range<usize>], n_segments: usize) -> KernelError {
    KernelError::Subtrees { subtrees: subtrees.iter().map(|s| (s.start, s.end)).collect(), n_segments }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "a subtree list of one")]
    fn plans_that_do_not_cover_the_columns_are_refused() {
        let check = |ends: &[usize], subtrees: &[Range<usize>], message: &str| {
            assert_eq!(SegmentPlan::new(ends, subtrees, 96, 32).unwrap_err().to_string(), message);
        };
        let not_covering = |ends: &str| {
            format!("K-segments ending at {ends} do not divide 96 columns on boundaries of 32, or are over 128")
        };
        check(&[], &[], &not_covering("[]"));
        check(&[64], &[0..1], &not_covering("[64]"));
        check(&[48, 96], &[0..2], &not_covering("[48, 96]"));
        check(&[64, 64, 96], &[0..3], &not_covering("[64, 64, 96]"));
        check(&[0, 96], &[0..2], &not_covering("[0, 96]"));
        check(&[64, 96], &[0..1], "subtrees [(0, 1)] do not cover 2 K-segments in order");
        check(&[64, 96], &[1..2, 0..1], "subtrees [(1, 2), (0, 1)] do not cover 2 K-segments in order");
        check(&[96], &[0..2], "subtrees [(0, 2)] do not cover 1 K-segments in order");
    }

    #[test]
    fn sums_follow_the_tree_of_each_subtree() {
        let plan = SegmentPlan::new(&[1, 3, 6, 10], &[0..3, 3..4], 10, 1).unwrap();
        let mut planes = Vec::new();
        let add = |a: i64, b: i64| a * 100 + b;
        plan.sum(0, |cols| cols.len() as i64, add, |plane_idx, sum| planes.push((plane_idx, sum)));
        // ((1 + 2) + 3), 4: "a * 100 + b" shows the order.
        assert_eq!(planes, [(0, 10203), (1, 4)]);
    }
}

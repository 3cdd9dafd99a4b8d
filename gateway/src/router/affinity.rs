//! Affinity: which group served a prompt's beginning before, and so may still hold its keys and values.
//!
//! A prompt's leading ids are cut into blocks; the n-th hash covers the first n blocks and the model's name. Each hash
//! points to the group that served it last, in a map of bounded size that forgets what was not used for longest. The
//! map is a guess, not a mirror of the groups' caches: a wrong guess costs one prefill, so nobody keeps it exact. A
//! group that formed anew holds nothing of what it held; entries of its earlier epochs no longer count.

use std::{
    hash::{BuildHasher, RandomState},
    num::NonZeroUsize,
};

use lru::LruCache;

use super::GroupId;

/// Ids in a block. Small enough that a short system prompt fills one, large enough that hashing stays a small part of
/// a request's cost.
pub const BLOCK_TOKENS: usize = 64;

/// Blocks of a prompt that are remembered: its first 4,096 ids tell conversations apart.
pub const MAX_BLOCKS: usize = 64;

/// Hashes over all groups: at most 65,536 entries of about 50 bytes.
const MAX_ENTRIES: NonZeroUsize = NonZeroUsize::new(65_536).expect("it is not zero");

/// The hashes of a prompt's beginnings, shortest first.
#[derive(Debug, Clone, Default)]
pub struct Prefix(Vec<u64>);

/// Hashes prompts. Keyed at random, so that nobody can choose prompts that collide.
#[derive(Debug, Clone, Default)]
pub struct PrefixHasher(RandomState);

/// What was served where.
#[derive(Debug)]
pub struct Affinity {
    served: LruCache<u64, Served>,
}

#[derive(Debug, Clone, Copy)]
struct Served {
    group: GroupId,
    epoch: u64,
}

// === impl PrefixHasher ===

impl PrefixHasher {
    /// Hashes the beginnings of `ids` for `model`.
    pub fn prefix(&self, model: &str, ids: &[u32]) -> Prefix {
        let mut hash = self.0.hash_one(model);
        let blocks = ids.chunks_exact(BLOCK_TOKENS).take(MAX_BLOCKS);
        Prefix(
            blocks
                .map(|block| {
                    hash = self.0.hash_one((hash, block));
                    hash
                })
                .collect(),
        )
    }
}

// === impl Affinity ===

impl Affinity {
    /// Remembers nothing yet.
    pub fn new() -> Self {
        Self { served: LruCache::new(MAX_ENTRIES) }
    }

    /// Notes that `group`, in its present `epoch`, serves this prompt.
    pub fn record(&mut self, prefix: &Prefix, group: GroupId, epoch: u64) {
        for &hash in &prefix.0 {
            self.served.put(hash, Served { group, epoch });
        }
    }

    /// The group that served the longest beginning of this prompt and has not formed anew since.
    pub fn find(&mut self, prefix: &Prefix, epoch_of: impl Fn(GroupId) -> u64) -> Option<GroupId> {
        let mut found = prefix.0.iter().rev().filter_map(|hash| self.served.get(hash).copied());
        found.find(|served| epoch_of(served.group) == served.epoch).map(|served| served.group)
    }
}

impl Default for Affinity {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(blocks: &[u32]) -> Vec<u32> {
        blocks.iter().flat_map(|&block| [block; BLOCK_TOKENS]).collect()
    }

    #[test]
    fn the_longest_shared_beginning_decides() {
        let (hasher, mut affinity) = (PrefixHasher::default(), Affinity::new());
        affinity.record(&hasher.prefix("m", &ids(&[1, 2, 3])), GroupId(0), 0);
        affinity.record(&hasher.prefix("m", &ids(&[1, 9])), GroupId(1), 0);
        let mut check = |blocks: &[u32], expected: Option<usize>| {
            let found = affinity.find(&hasher.prefix("m", &ids(blocks)), |_| 0);
            assert_eq!(found, expected.map(GroupId), "{blocks:?}");
        };
        check(&[1, 2, 3, 4], Some(0));
        check(&[1, 9, 3], Some(1));
        check(&[1, 5], Some(1));
        check(&[2], None);
        check(&[], None);
    }

    #[test]
    fn a_block_that_is_not_full_and_another_model_do_not_match() {
        let (hasher, mut affinity) = (PrefixHasher::default(), Affinity::new());
        affinity.record(&hasher.prefix("m", &ids(&[1])[..BLOCK_TOKENS - 1]), GroupId(0), 0);
        affinity.record(&hasher.prefix("other", &ids(&[1])), GroupId(0), 0);
        assert_eq!(affinity.find(&hasher.prefix("m", &ids(&[1])), |_| 0), None);
    }

    #[test]
    fn a_group_that_formed_anew_is_forgotten() {
        let (hasher, mut affinity) = (PrefixHasher::default(), Affinity::new());
        let prefix = hasher.prefix("m", &ids(&[1]));
        affinity.record(&prefix, GroupId(0), 7);
        assert_eq!(affinity.find(&prefix, |_| 8), None);
        assert_eq!(affinity.find(&prefix, |_| 7), Some(GroupId(0)));
    }

    #[test]
    fn memory_is_bounded_by_prompts_long_and_many() {
        let (hasher, mut affinity) = (PrefixHasher::default(), Affinity::new());
        let long = hasher.prefix("m", &vec![0; BLOCK_TOKENS * MAX_BLOCKS * 2]);
        assert_eq!(long.0.len(), MAX_BLOCKS);
        for prompt in 0..=MAX_ENTRIES.get() as u32 {
            affinity.record(&hasher.prefix("m", &ids(&[prompt])), GroupId(0), 0);
        }
        assert_eq!(affinity.served.len(), MAX_ENTRIES.get());
        assert_eq!(affinity.find(&hasher.prefix("m", &ids(&[0])), |_| 0), None, "the oldest went");
    }
}

//! The prefix cache: finds the blocks that already hold the beginning of a prompt.
//!
//! The content of a full block is named by a [`BlockKey`], which covers its tokens and all tokens before them. Blocks
//! are looked up from the first on, so a hit is always a prefix. Only blocks whose keys and values have been computed
//! are in the index, and an indexed block is never written again: sharing it needs no copy.
//!
//! A block that no sequence refers to stays indexed until its place is needed; the one unused for longest goes first. A
//! sequence gives its blocks back from the last to the first, so that the end of a prefix goes before its beginning.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

use super::block_pool::BlockPool;
use crate::scheduler::plan::BlockId;

/// Names the content of a full block: SHA-256 of the key before it and of its own tokens.
///
/// Prompts come from strangers, and a collision would show one of them the keys and values of another's text. A
/// cryptographic digest rules that out without comparing tokens.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockKey([u8; 32]);

impl BlockKey {
    /// The key of a block that holds `token_ids`, after the block `parent`, or at the beginning of a sequence.
    pub fn new(parent: Option<&Self>, token_ids: &[u32]) -> Self {
        let mut digest = Sha256::new();
        digest.update(parent.map_or([0; 32], |key| key.0));
        for token_id in token_ids {
            digest.update(token_id.to_le_bytes());
        }
        Self(digest.finalize().into())
    }
}

/// How many blocks are in which state.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct BlockCounts {
    /// Hold nothing that anybody may ask for.
    pub free: usize,
    /// In no block table, kept for later prompts.
    pub cached: usize,
    /// In at least one block table.
    pub referenced: usize,
    /// All of them: the sum of the others.
    pub total: usize,
}

/// All blocks, and what the full ones hold.
#[derive(Clone, Debug)]
pub struct PrefixCache {
    pool: BlockPool,
    /// The block that holds a content. Two blocks may hold the same one (two sequences computed it at the same time);
    /// the first is indexed.
    index: HashMap<BlockKey, BlockId>,
    /// The inverse of `index`, by block.
    contents: Vec<Option<BlockKey>>,
    /// Indexed blocks without a reference, by the time of their last use.
    idle: BTreeMap<u64, BlockId>,
    /// Where a block stands in `idle`, by block; meaningless while it is referenced.
    idle_since: Vec<u64>,
    /// Counts the times that a block fell idle.
    clock: u64,
}

impl PrefixCache {
    /// `n_blocks` free blocks.
    pub fn new(n_blocks: u32) -> Self {
        Self {
            pool: BlockPool::new(n_blocks),
            index: HashMap::new(),
            contents: vec![None; n_blocks as usize],
            idle: BTreeMap::new(),
            idle_since: vec![0; n_blocks as usize],
            clock: 0,
        }
    }

    /// How many blocks [`allocate`](Self::allocate) can hand out before it fails.
    pub fn n_available(&self) -> usize {
        self.pool.free_blocks().len() + self.idle.len()
    }

    /// A block for one sequence alone: a free one, else the idle one unused for longest, whose content is forgotten.
    pub fn allocate(&mut self) -> Option<BlockId> {
        if self.pool.free_blocks().is_empty() {
            let (_, block) = self.idle.pop_first()?;
            self.forget(block);
            self.pool.free(block);
        }
        self.pool.allocate()
    }

    /// How many of `keys`, from the first on, are indexed.
    pub fn n_cached(&self, keys: &[BlockKey]) -> usize {
        keys.iter().take_while(|key| self.index.contains_key(*key)).count()
    }

    /// The blocks that hold the longest indexed prefix of `keys`, with a reference to each.
    pub fn acquire(&mut self, keys: &[BlockKey]) -> Vec<BlockId> {
        let blocks: Vec<_> = keys.iter().map_while(|key| self.index.get(key).copied()).collect();
        for &block in &blocks {
            if self.pool.ref_count(block) == 0 {
                self.idle.remove(&self.idle_since[block.0 as usize]);
            }
            self.pool.add_reference(block);
        }
        blocks
    }

    /// Says that a referenced block is full, computed, and holds `key`. Does nothing if another block is known to.
    pub fn insert(&mut self, key: BlockKey, block: BlockId) {
        debug_assert!(self.pool.ref_count(block) > 0, "{block:?} belongs to nobody");
        if self.index.contains_key(&key) {
            return;
        }
        self.index.insert(key, block);
        self.contents[block.0 as usize] = Some(key);
    }

    /// Drops a sequence's reference to each block of its table: indexed ones fall idle, the others are free.
    pub fn release(&mut self, table: &[BlockId]) {
        for &block in table.iter().rev() {
            if !self.pool.drop_reference(block) {
                continue;
            }
            if self.contents[block.0 as usize].is_some() {
                self.clock += 1;
                self.idle_since[block.0 as usize] = self.clock;
                self.idle.insert(self.clock, block);
            } else {
                self.pool.free(block);
            }
        }
    }

    /// How many sequences refer to a block.
    pub fn ref_count(&self, block: BlockId) -> u32 {
        self.pool.ref_count(block)
    }

    /// Whether a block's content is indexed, so that others may come to share it.
    pub fn is_indexed(&self, block: BlockId) -> bool {
        self.contents[block.0 as usize].is_some()
    }

    /// The blocks by state.
    pub fn counts(&self) -> BlockCounts {
        BlockCounts {
            free: self.pool.free_blocks().len(),
            cached: self.idle.len(),
            referenced: self.pool.n_referenced(),
            total: self.pool.n_total(),
        }
    }

    /// Asserts that index, idle list and reference counts tell the same story.
    ///
    /// # Panics
    /// If they do not.
    pub fn check_integrity(&self) {
        let counts = self.counts();
        assert_eq!(counts.free + counts.cached + counts.referenced, counts.total, "{counts:?}");
        for &block in self.pool.free_blocks() {
            assert_eq!(self.pool.ref_count(block), 0, "{block:?} is free and referenced");
            assert!(!self.is_indexed(block), "{block:?} is free and indexed");
        }
        for (since, &block) in &self.idle {
            assert_eq!(self.pool.ref_count(block), 0, "{block:?} is idle and referenced");
            assert!(self.is_indexed(block), "{block:?} is idle and not indexed");
            assert_eq!(self.idle_since[block.0 as usize], *since, "{block:?}");
        }
        assert_eq!(self.index.len(), self.contents.iter().flatten().count());
        for (key, &block) in &self.index {
            assert_eq!(self.contents[block.0 as usize].as_ref(), Some(key), "{block:?}");
        }
    }

    fn forget(&mut self, block: BlockId) {
        if let Some(key) = self.contents[block.0 as usize].take() {
            self.index.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of blocks that hold one token each.
    fn keys(token_ids: &[u32]) -> Vec<BlockKey> {
        let mut keys: Vec<BlockKey> = Vec::new();
        for token_id in token_ids {
            keys.push(BlockKey::new(keys.last(), &[*token_id]));
        }
        keys
    }

    /// A sequence's table over blocks of one token each: what is cached is shared, the rest is computed.
    fn run(cache: &mut PrefixCache, token_ids: &[u32]) -> Vec<BlockId> {
        let keys = keys(token_ids);
        let mut table = cache.acquire(&keys);
        for key in &keys[table.len()..] {
            let block = cache.allocate().unwrap();
            cache.insert(*key, block);
            table.push(block);
        }
        cache.check_integrity();
        table
    }

    #[track_caller]
    fn check(cache: &PrefixCache, free: usize, cached: usize, referenced: usize) {
        cache.check_integrity();
        assert_eq!(cache.counts(), BlockCounts { free, cached, referenced, total: free + cached + referenced });
        assert_eq!(cache.n_available(), free + cached);
    }

    #[test]
    fn a_key_covers_the_tokens_before_it() {
        let (a, b) = (keys(&[1, 2]), keys(&[3, 2]));
        assert_ne!(a[1], b[1]);
        assert_eq!(a, keys(&[1, 2]));
        assert_ne!(BlockKey::new(None, &[1, 2]), BlockKey::new(None, &[2, 1]));
    }

    #[test]
    fn a_prefix_hit_shares_blocks_until_the_first_divergence() {
        let mut cache = PrefixCache::new(8);
        let first = run(&mut cache, &[1, 2, 3, 4]);
        let second = run(&mut cache, &[1, 2, 9, 4]);
        assert_eq!(first[..2], second[..2]);
        assert_ne!(first[2..], second[2..]);
        assert_eq!((cache.ref_count(first[0]), cache.ref_count(first[2])), (2, 1));
        check(&cache, 2, 0, 6);
        cache.release(&first);
        check(&cache, 2, 2, 4);
        cache.release(&second);
        check(&cache, 2, 6, 0);
    }

    #[test]
    fn the_end_of_the_prefix_unused_for_longest_goes_first() {
        let mut cache = PrefixCache::new(4);
        let old = run(&mut cache, &[1, 2]);
        let new = run(&mut cache, &[3, 4]);
        cache.release(&old);
        cache.release(&new);
        let taken = cache.allocate().unwrap();
        assert_eq!(taken, old[1]);
        assert_eq!((cache.n_cached(&keys(&[1, 2])), cache.n_cached(&keys(&[3, 4]))), (1, 2));
        check(&cache, 0, 3, 1);
    }

    #[test]
    fn use_protects_a_prefix_from_eviction() {
        let mut cache = PrefixCache::new(2);
        let old = run(&mut cache, &[1]);
        let new = run(&mut cache, &[2]);
        cache.release(&old);
        cache.release(&new);
        let again = cache.acquire(&keys(&[1]));
        cache.release(&again);
        assert_eq!(cache.allocate(), Some(new[0]));
    }

    #[test]
    fn a_block_that_never_was_full_is_free_at_once() {
        let mut cache = PrefixCache::new(1);
        let block = cache.allocate().unwrap();
        assert_eq!(cache.allocate(), None);
        cache.release(&[block]);
        check(&cache, 1, 0, 0);
    }

    #[test]
    fn of_two_blocks_with_one_content_the_first_is_found() {
        let mut cache = PrefixCache::new(2);
        let (a, b) = (cache.allocate().unwrap(), cache.allocate().unwrap());
        let key = keys(&[7])[0];
        cache.insert(key, a);
        cache.insert(key, b);
        cache.release(&[b]);
        check(&cache, 1, 0, 1);
        assert_eq!(cache.acquire(&[key]), [a]);
    }
}

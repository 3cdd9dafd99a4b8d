//! The prefix cache: finds the blocks that already hold the beginning of a prompt.
//!
//! The content of a full block is named by a [`BlockKey`], which covers its tokens and all tokens before them. Blocks
//! are looked up from the first on, so a hit is always a prefix. Only blocks whose keys and values have been computed
//! are in the index, and an indexed block is never written again: sharing it needs no copy.
//!
//! A block that no sequence refers to stays indexed until its place is needed; the one unused for longest goes first. A
//! sequence gives its blocks back from the last to the first, so that the end of a prefix goes before its beginning.
//!
//! While the index is *watched*, what changes in it is noted, for whoever keeps a copy of it elsewhere.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

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

    /// Its first bytes: enough to tell the blocks of one cache apart, and not enough to share one by.
    pub fn prefix(&self) -> [u8; 8] {
        let mut prefix = [0; 8];
        prefix.copy_from_slice(&self.0[..8]);
        prefix
    }
}

/// What a full block holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Content {
    /// Names it.
    pub key: BlockKey,
    /// Names what is in the block before it in a sequence; none for the first.
    pub parent: Option<BlockKey>,
    /// Blocks before it in a sequence.
    pub block_idx: usize,
    /// Its tokens.
    pub token_ids: Arc<[u32]>,
}

/// What has happened to the index.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// A block came.
    Stored(Content),
    /// A block went.
    Removed(BlockKey),
    /// All blocks went.
    Cleared,
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

// === impl BlockCounts ===

impl BlockCounts {
    /// The part of all blocks that sequences use. The others can be had at once.
    pub fn usage(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.referenced as f64 / self.total as f64 }
    }
}

/// All blocks, and what the full ones hold.
#[derive(Clone, Debug)]
pub struct PrefixCache {
    pool: BlockPool,
    /// The block that holds a content. Two blocks may hold the same one (two sequences computed it at the same time);
    /// the first is indexed.
    index: HashMap<BlockKey, BlockId>,
    /// The inverse of `index`, by block.
    contents: Vec<Option<Content>>,
    /// Indexed blocks without a reference, by the time of their last use.
    idle: BTreeMap<u64, BlockId>,
    /// Where a block stands in `idle`, by block; meaningless while it is referenced.
    idle_since: Vec<u64>,
    /// Counts the times that a block fell idle.
    clock: u64,
    /// What has changed since somebody asked; none while nobody watches.
    changes: Option<Vec<Change>>,
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
            changes: None,
        }
    }

    /// As many free blocks, watched if these are.
    #[must_use]
    pub fn cleared(&self) -> Self {
        let changes = self.changes.clone().map(|changes| [changes, vec![Change::Cleared]].concat());
        Self { changes, ..Self::new(self.contents.len() as u32) }
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

    /// Says that a referenced block is full, computed, and holds `content`. Does nothing if another block is known to.
    pub fn insert(&mut self, content: Content, block: BlockId) {
        debug_assert!(self.pool.ref_count(block) > 0, "{block:?} belongs to nobody");
        if self.index.contains_key(&content.key) {
            return;
        }
        if let Some(changes) = &mut self.changes {
            changes.push(Change::Stored(content.clone()));
        }
        self.index.insert(content.key, block);
        self.contents[block.0 as usize] = Some(content);
    }

    /// Notes changes from now on. Returns what is indexed, every block behind those before it.
    pub fn watch(&mut self) -> Vec<Content> {
        self.changes.get_or_insert_default();
        let mut contents: Vec<Content> = self.contents.iter().flatten().cloned().collect();
        contents.sort_by_key(|content| content.block_idx);
        contents
    }

    /// What has changed since this was asked last, in order. None if nobody watches.
    pub fn take_changes(&mut self) -> Vec<Change> {
        self.changes.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Notes no more changes.
    pub fn unwatch(&mut self) {
        self.changes = None;
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
            assert_eq!(self.contents[block.0 as usize].as_ref().map(|content| content.key), Some(*key), "{block:?}");
        }
    }

    fn forget(&mut self, block: BlockId) {
        if let Some(content) = self.contents[block.0 as usize].take() {
            self.index.remove(&content.key);
            if let Some(changes) = &mut self.changes {
                changes.push(Change::Removed(content.key));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks that hold one token each.
    fn contents(token_ids: &[u32]) -> Vec<Content> {
        let mut contents: Vec<Content> = Vec::new();
        for (block_idx, token_id) in token_ids.iter().enumerate() {
            let parent = contents.last().map(|content| content.key);
            let key = BlockKey::new(parent.as_ref(), &[*token_id]);
            contents.push(Content { key, parent, block_idx, token_ids: [*token_id].into() });
        }
        contents
    }

    fn keys(token_ids: &[u32]) -> Vec<BlockKey> {
        contents(token_ids).into_iter().map(|content| content.key).collect()
    }

    /// A sequence's table over blocks of one token each: what is cached is shared, the rest is computed.
    fn run(cache: &mut PrefixCache, token_ids: &[u32]) -> Vec<BlockId> {
        let keys = keys(token_ids);
        let mut table = cache.acquire(&keys);
        for content in contents(token_ids).split_off(table.len()) {
            let block = cache.allocate().unwrap();
            cache.insert(content, block);
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
        let content = contents(&[7]).remove(0);
        cache.insert(content.clone(), a);
        cache.insert(content.clone(), b);
        cache.release(&[b]);
        check(&cache, 1, 0, 1);
        assert_eq!(cache.acquire(&[content.key]), [a]);
    }

    #[test]
    fn whoever_watches_learns_what_is_there_and_what_changes() {
        let mut cache = PrefixCache::new(3);
        let first = run(&mut cache, &[1, 2]);
        cache.release(&first);
        assert_eq!(cache.take_changes(), [], "nobody watches");
        let [one, two] = contents(&[1, 2]).try_into().unwrap();
        assert_eq!(cache.watch(), [one, two.clone()]);
        assert_eq!(cache.take_changes(), []);

        let second = run(&mut cache, &[1, 3, 4]);
        let [_, three, four] = contents(&[1, 3, 4]).try_into().unwrap();
        let expected = [Change::Stored(three), Change::Removed(two.key), Change::Stored(four)];
        assert_eq!(cache.take_changes(), expected);
        cache.release(&second);

        let mut cleared = cache.cleared();
        check(&cleared, 3, 0, 0);
        assert_eq!(cleared.take_changes(), [Change::Cleared]);
        cleared.unwatch();
        run(&mut cleared, &[5]);
        assert_eq!(cleared.take_changes(), []);
        assert_eq!(cache.cleared().cleared().take_changes(), [Change::Cleared, Change::Cleared]);
    }
}

//! The block pool: how many sequences refer to each block, and which blocks are free.
//!
//! It knows nothing of contents. A block that nobody refers to any more is free only once its last user has said so
//! ([`BlockPool::free`]): the prefix cache keeps some of them.

use crate::scheduler::plan::BlockId;

/// Reference counts over a fixed number of blocks.
#[derive(Clone, Debug)]
pub struct BlockPool {
    /// By block.
    ref_counts: Vec<u32>,
    /// A stack; the first to be handed out of a new pool is block 0.
    free: Vec<BlockId>,
    n_referenced: usize,
}

impl BlockPool {
    /// A pool of `n_blocks` free blocks.
    pub fn new(n_blocks: u32) -> Self {
        Self {
            ref_counts: vec![0; n_blocks as usize],
            free: (0..n_blocks).rev().map(BlockId).collect(),
            n_referenced: 0,
        }
    }

    /// Takes a free block, with one reference to it.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.add_reference(block);
        Some(block)
    }

    /// Adds a reference to a block that is not free.
    pub fn add_reference(&mut self, block: BlockId) {
        let count = &mut self.ref_counts[block.0 as usize];
        self.n_referenced += usize::from(*count == 0);
        *count += 1;
    }

    /// Drops a reference. Returns whether it was the last one.
    ///
    /// # Panics
    /// If the block has no reference.
    pub fn drop_reference(&mut self, block: BlockId) -> bool {
        let count = &mut self.ref_counts[block.0 as usize];
        *count = count.checked_sub(1).expect("a reference is dropped once");
        self.n_referenced -= usize::from(*count == 0);
        *count == 0
    }

    /// Makes a block free that has no references left.
    ///
    /// # Panics
    /// If the block is referenced.
    pub fn free(&mut self, block: BlockId) {
        assert_eq!(self.ref_count(block), 0, "{block:?} is in use");
        self.free.push(block);
    }

    /// How many block tables hold the block.
    pub fn ref_count(&self, block: BlockId) -> u32 {
        self.ref_counts[block.0 as usize]
    }

    /// The free blocks.
    pub fn free_blocks(&self) -> &[BlockId] {
        &self.free
    }

    /// Number of blocks with at least one reference.
    pub fn n_referenced(&self) -> usize {
        self.n_referenced
    }

    /// Number of blocks in all.
    pub fn n_total(&self) -> usize {
        self.ref_counts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_handed_out_in_order_until_none_is_left() {
        let mut pool = BlockPool::new(2);
        assert_eq!(pool.allocate(), Some(BlockId(0)));
        assert_eq!(pool.allocate(), Some(BlockId(1)));
        assert_eq!(pool.allocate(), None);
        assert_eq!((pool.n_referenced(), pool.n_total()), (2, 2));
    }

    #[test]
    fn a_shared_block_is_unreferenced_after_its_last_user() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().unwrap();
        pool.add_reference(block);
        assert_eq!(pool.ref_count(block), 2);
        assert!(!pool.drop_reference(block));
        assert!(pool.drop_reference(block));
        assert_eq!((pool.n_referenced(), pool.free_blocks().len()), (0, 0), "free only when it is said");
        pool.free(block);
        assert_eq!(pool.free_blocks(), [block]);
    }

    #[test]
    #[should_panic(expected = "dropped once")]
    fn a_reference_cannot_be_dropped_twice() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().unwrap();
        pool.drop_reference(block);
        pool.drop_reference(block);
    }

    #[test]
    #[should_panic(expected = "in use")]
    fn a_block_in_use_cannot_be_freed() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().unwrap();
        pool.free(block);
    }
}

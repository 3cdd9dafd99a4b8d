//! The paged KV cache: keys and values of every position, in blocks that sequences own, share and leave behind.
//!
//! A block holds the keys and values of a fixed run of positions, in every layer. At any moment it is in one of three
//! states, and `free + cached + referenced == total` always holds:
//!
//! * *referenced*: in the block table of one sequence or more;
//! * *cached*: in no table, but kept because a later prompt may begin with its tokens;
//! * *free*: holds nothing that anybody may ask for.
//!
//! [`block_pool`] counts references, [`prefix_cache`] remembers contents. Both are pure: which block is whose is decided
//! on rank 0, without touching the storage.

pub mod block_pool;
pub mod prefix_cache;

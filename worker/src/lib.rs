//! A tensor-parallel shard of a model, advancing in lockstep with its group.

#![forbid(unsafe_code)]

pub mod group;
pub mod kv;
pub mod sampler;
pub mod scheduler;
#[cfg(test)]
mod test_seed;

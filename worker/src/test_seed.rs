//! The seed of a random test: a new one each run, printed, so that a failure can be run again.

use std::hash::{BuildHasher, RandomState};

/// From `LOCKSTEP_TEST_SEED` if that is set.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("LOCKSTEP_TEST_SEED") {
        Ok(seed) => seed.parse().expect("LOCKSTEP_TEST_SEED is a number"),
        Err(_) => RandomState::new().hash_one("seed"),
    };
    println!("run again with LOCKSTEP_TEST_SEED={seed}");
    seed
}

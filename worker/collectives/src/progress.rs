//! A progress: how many calls a rank has come to, for threads that are in none of them.
//!
//! A call counts when the rank comes to it, not when it is through: a rank that waits in a call has come to it, and the
//! one that it waits for has not. So whoever holds the others up is behind them. A call that is enqueued on a device counts
//! then: [`device`](crate::device) says why.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Counts the calls of one rank. Clones are the same count.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    // Nothing else is read by what it says, so no order with other memory is needed.
    calls: Arc<AtomicU64>,
}

// === impl Progress ===

impl Progress {
    /// A count that begins at 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls that the rank has come to.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub(crate) fn count_calls(&self, n_calls: u64) {
        self.calls.fetch_add(n_calls, Ordering::Relaxed);
    }
}

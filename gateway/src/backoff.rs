//! A backoff: how long to wait before a peer that failed is tried again.
//!
//! Each failure doubles the wait up to a limit; a success starts over. A wait is drawn from the upper half of its
//! length, so that many gateways that lost one peer do not come back to it in the same instant.

use std::time::Duration;

/// The first wait: a peer that was only restarted is usually back by then.
const FIRST: Duration = Duration::from_millis(100);

/// The longest wait: how late a peer that was away for long is noticed.
const LONGEST: Duration = Duration::from_secs(5);

/// The waits for one peer.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

// === impl Backoff ===

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    /// The wait after one more failure. `jitter` is uniform in [0, 1).
    pub(crate) fn wait(&mut self, jitter: f64) -> Duration {
        let length = self.next;
        self.next = (length * 2).min(LONGEST);
        length.mul_f64(0.5 + jitter / 2.0)
    }

    /// The peer answered.
    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_over() {
        let mut backoff = Backoff::new();
        let waits: Vec<u128> = (0..8).map(|_| backoff.wait(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        backoff.reset();
        assert_eq!(backoff.wait(0.0), FIRST / 2);
    }
}

//! A deadline: when a request must have had its last word.
//!
//! A stream that expires ends with what it has, so its end must be on the way before the client's own clock cuts the
//! call. The gateway keeps back a margin `m` of the time it was given: 2 % of it, at least 20 ms (a round trip to the
//! worker and one step of a small model), at most half.
//!
//! ```text
//! arrival ─────────────────────► T-m ───────────► T-m/2 ─────────► T
//!           the worker generates      its last ids come     Finish travels
//! ```

use std::time::{Duration, Instant};

const LEAST_MARGIN: Duration = Duration::from_millis(20);
const MARGIN_PARTS: u32 = 50;

/// The points in time by which each part of a request must be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    worker: Instant,
    tokens: Instant,
    client: Instant,
}

// === impl Deadline ===

impl Deadline {
    /// The deadline of a request that arrives `now` and has `timeout` to live.
    pub fn new(now: Instant, timeout: Duration) -> Self {
        let margin = (timeout / MARGIN_PARTS).max(LEAST_MARGIN).min(timeout / 2);
        let client = now + timeout;
        Self { worker: client - margin, tokens: client - margin / 2, client }
    }

    /// What is left for the worker, as it goes into its request. Unit: milliseconds. `None`: nothing is left.
    pub fn worker_budget_ms(&self, now: Instant) -> Option<u32> {
        let left = self.worker.saturating_duration_since(now).as_millis();
        u32::try_from(left).ok().filter(|&ms| ms > 0)
    }

    /// When the gateway stops waiting for tokens, and for anything that must come before them.
    pub fn tokens(&self) -> Instant {
        self.tokens
    }

    /// When the client stops waiting.
    pub fn client(&self) -> Instant {
        self.client
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_margin_is_a_fiftieth_at_least_20_ms_and_at_most_half() {
        let check = |timeout_ms: u64, budget_ms: Option<u32>| {
            let now = Instant::now();
            let deadline = Deadline::new(now, Duration::from_millis(timeout_ms));
            assert_eq!(deadline.worker_budget_ms(now), budget_ms, "{timeout_ms} ms");
            assert!(deadline.worker <= deadline.tokens() && deadline.tokens() <= deadline.client());
        };
        check(10_000, Some(9_800));
        check(500, Some(480));
        check(30, Some(15));
        check(1, None);
        check(0, None);
    }

    #[test]
    fn the_budget_shrinks_as_time_passes() {
        let now = Instant::now();
        let deadline = Deadline::new(now, Duration::from_millis(1_000));
        assert_eq!(deadline.worker_budget_ms(now + Duration::from_millis(900)), Some(80));
        assert_eq!(deadline.worker_budget_ms(now + Duration::from_millis(980)), None);
    }
}

//! A [`Backoff`] is how long to wait before a child that ended is started again.
//!
//! The first restart follows soon, as most crashes are single ones. Each further end within [`STABLE`] of its start
//! doubles the pause, up to [`LONGEST`], so that a child that cannot run costs next to nothing; one that ran for longer
//! starts over.

use std::time::Duration;

/// The first pause.
const SHORTEST: Duration = Duration::from_millis(200);

/// The longest pause.
const LONGEST: Duration = Duration::from_secs(10);

/// A child that ran for so long was well.
const STABLE: Duration = Duration::from_secs(30);

/// How long to wait before the next start.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

// === impl Backoff ===

impl Backoff {
    pub(super) fn new() -> Self {
        Self { next: SHORTEST }
    }

    /// The pause after a child that ran for so long.
    pub(super) fn after(&mut self, ran: Duration) -> Duration {
        if ran >= STABLE {
            self.next = SHORTEST;
        }
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_to_a_bound_and_start_over_after_a_stable_run() {
        let mut backoff = Backoff::new();
        let pauses: Vec<u64> = (0..8).map(|_| backoff.after(Duration::ZERO).as_millis() as u64).collect();
        assert_eq!(pauses, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(backoff.after(STABLE), SHORTEST);
    }
}

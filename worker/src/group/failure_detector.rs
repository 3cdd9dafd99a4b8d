//! A failure detector: who has been silent for so long that it counts as dead.
//!
//! Ranks say every so often that they live. One that has said nothing for [`FailureDetector::suspect_after`] is
//! suspected, once; what follows from that is for others to decide. It is pure: it is told the time.
//!
//! A detector that did not run itself cannot judge others. On a machine with more work than cores, or one that was
//! suspended, both the heartbeats and the detector stand still; so when its own turns come late, it counts the time in
//! between as nobody's silence.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Watches ranks.
#[derive(Clone, Debug)]
pub struct FailureDetector {
    suspect_after: Duration,
    /// The longest time between two turns that is no delay.
    turn: Duration,
    last_turn: Option<Instant>,
    /// When each watched rank was last heard of.
    heard: BTreeMap<usize, Instant>,
}

/// A rank that counts as dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// The rank.
    pub rank: usize,
    /// For how long it has been silent while the detector ran.
    pub silence: Duration,
}

// === impl FailureDetector ===

impl FailureDetector {
    /// A detector that watches nobody yet. `turn` is how often it will be asked.
    pub fn new(suspect_after: Duration, turn: Duration) -> Self {
        Self { suspect_after, turn, last_turn: None, heard: BTreeMap::new() }
    }

    /// After how long a silence a rank is suspected.
    pub fn suspect_after(&self) -> Duration {
        self.suspect_after
    }

    /// Begins to watch `rank`.
    pub fn watch(&mut self, rank: usize, now: Instant) {
        // A first turn that comes late must not count against the rank either.
        self.last_turn.get_or_insert(now);
        self.heard.insert(rank, now);
    }

    /// Notes that `rank` lives, if it is watched.
    pub fn heard(&mut self, rank: usize, now: Instant) {
        if let Some(heard) = self.heard.get_mut(&rank) {
            *heard = now.max(*heard);
        }
    }

    /// Watches nobody any more.
    pub fn clear(&mut self) {
        self.heard.clear();
    }

    /// One turn: returns the rank that has been silent for too long, if there is one, and watches it no more.
    pub fn tick(&mut self, now: Instant) -> Option<Suspicion> {
        let gap = self.last_turn.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last_turn = Some(now);
        let delay = gap.saturating_sub(self.turn);
        for heard in self.heard.values_mut() {
            *heard = (*heard + delay).min(now);
        }
        let silence = |heard: &Instant| now.saturating_duration_since(*heard);
        let (&rank, heard) = self.heard.iter().find(|(_, heard)| silence(heard) >= self.suspect_after)?;
        let suspicion = Suspicion { rank, silence: silence(heard) };
        self.heard.remove(&rank);
        Some(suspicion)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TURN: Duration = Duration::from_millis(200);

    fn detector() -> FailureDetector {
        FailureDetector::new(Duration::from_secs(1), TURN)
    }

    /// Asks after each of `turns`; ranks of `beating` are heard of before.
    fn run(detector: &mut FailureDetector, now: &mut Instant, turns: &[Duration], beating: &[usize]) -> Vec<Suspicion> {
        let mut suspicions = Vec::new();
        for turn in turns {
            *now += *turn;
            beating.iter().for_each(|&rank| detector.heard(rank, *now));
            suspicions.extend(detector.tick(*now));
        }
        suspicions
    }

    #[test]
    fn a_silent_rank_is_suspected_once_and_a_beating_one_never() {
        let (mut detector, mut now) = (detector(), Instant::now());
        detector.tick(now);
        detector.watch(1, now);
        detector.watch(2, now);
        let suspicions = run(&mut detector, &mut now, &[TURN; 50], &[1]);
        assert_eq!(suspicions, [Suspicion { rank: 2, silence: Duration::from_secs(1) }]);
    }

    #[test]
    fn nobody_is_suspected_of_the_time_in_which_the_detector_stood_still() {
        let (mut detector, mut now) = (detector(), Instant::now());
        detector.watch(1, now);
        // Each of these turns counts as one of 200 ms.
        let stalled = [Duration::from_secs(60), TURN, Duration::from_secs(5), TURN];
        assert_eq!(run(&mut detector, &mut now, &stalled, &[]), []);
        assert_eq!(run(&mut detector, &mut now, &[TURN], &[]).len(), 1, "its silence in between adds up");
    }

    #[test]
    fn who_is_not_watched_is_not_suspected() {
        let (mut detector, mut now) = (detector(), Instant::now());
        detector.watch(1, now);
        detector.clear();
        detector.heard(1, now);
        assert_eq!(run(&mut detector, &mut now, &[TURN; 20], &[]), []);
    }
}

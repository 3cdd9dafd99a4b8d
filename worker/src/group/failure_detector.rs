//! A failure detector: which rank counts as dead.
//!
//! Ranks say every so often that they live, and how far they are: their *progress*, the number of collectives that
//! they have come to. Two things make a rank suspected, once; what follows from that is for others to decide.
//!
//! * It is *silent*: it has said nothing for [`Limits::suspect_after`]. Its process or its host is gone.
//! * It *hangs*: it says that it lives, but for [`Limits::hung_after`] it has not moved, and another rank is ahead.
//!   Whoever is ahead waits for it, since no rank is through a collective before all have come to it. Steps may take
//!   as long as they need: ranks that are equally slow are equally far, so that what counts is only by how much one of
//!   them is slower than the fastest between two collectives, of which there are two a layer.
//!
//! It is pure: it is told the time.
//!
//! A detector that did not run itself cannot judge others. On a machine with more work than cores, or one that was
//! suspended, both the heartbeats and the detector stand still; so when its own turns come late, it counts the time in
//! between against nobody. Nor does a silence count as standing still: that a rank has not moved is known only up to
//! when it was last heard of.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

/// Watches ranks.
#[derive(Clone, Debug)]
pub struct FailureDetector {
    limits: Limits,
    last_turn: Option<Instant>,
    watched: BTreeMap<usize, Watched>,
}

/// When a rank is suspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Silence after which it counts as dead.
    pub suspect_after: Duration,
    /// Standstill, while others wait, after which it counts as hung.
    pub hung_after: Duration,
    /// How often the detector is asked: the longest time between two turns that is no delay.
    pub turn: Duration,
}

/// What is known of a rank.
#[derive(Clone, Copy, Debug)]
struct Watched {
    /// When it was last heard of.
    heard: Instant,
    /// The most that it said to have come to.
    progress: u64,
    /// Since when it has been where it is, and another one ahead.
    behind_since: Option<Instant>,
}

/// A rank that counts as dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// The rank.
    pub rank: usize,
    /// Why.
    pub symptom: Symptom,
    /// For how long, while the detector ran.
    pub lasted: Duration,
    /// Collectives that the rank had come to.
    pub progress: u64,
}

/// What makes a rank suspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Symptom {
    /// It says nothing.
    Silent,
    /// It does not move, and others wait for it.
    Hung,
}

// === impl FailureDetector ===

impl FailureDetector {
    /// A detector that watches nobody yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, last_turn: None, watched: BTreeMap::new() }
    }

    /// Begins to watch `rank`, which has come to no collective.
    pub fn watch(&mut self, rank: usize, now: Instant) {
        // A first turn that comes late must not count against the rank either.
        self.last_turn.get_or_insert(now);
        self.watched.insert(rank, Watched { heard: now, progress: 0, behind_since: None });
    }

    /// Notes that `rank` lives and has come to `progress` collectives, if it is watched.
    pub fn heard(&mut self, rank: usize, progress: u64, now: Instant) {
        let Some(watched) = self.watched.get_mut(&rank) else { return };
        watched.heard = now.max(watched.heard);
        if progress <= watched.progress {
            return;
        }
        watched.progress = progress;
        watched.behind_since = None;
        let front = self.watched.values().map(|watched| watched.progress).max().unwrap_or(0);
        for watched in self.watched.values_mut().filter(|watched| watched.progress < front) {
            watched.behind_since.get_or_insert(now);
        }
    }

    /// Watches nobody any more.
    pub fn clear(&mut self) {
        self.watched.clear();
    }

    /// One turn: returns a rank that has been silent for too long, or else one that hangs, and watches it no more.
    pub fn tick(&mut self, now: Instant) -> Option<Suspicion> {
        let gap = self.last_turn.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last_turn = Some(now);
        let delay = gap.saturating_sub(self.limits.turn);
        for watched in self.watched.values_mut() {
            watched.heard = (watched.heard + delay).min(now);
            watched.behind_since = watched.behind_since.map(|since| (since + delay).min(now));
        }
        let suspicion = self.silent(now).or_else(|| self.hung())?;
        self.watched.remove(&suspicion.rank);
        Some(suspicion)
    }

    fn silent(&self, now: Instant) -> Option<Suspicion> {
        self.watched.iter().find_map(|(&rank, &Watched { heard, progress, .. })| {
            let lasted = now.saturating_duration_since(heard);
            let symptom = Symptom::Silent;
            (lasted >= self.limits.suspect_after).then_some(Suspicion { rank, symptom, lasted, progress })
        })
    }

    /// The rank that is furthest behind among those that hang: others that stand still may wait for it.
    fn hung(&self) -> Option<Suspicion> {
        let hung = self.watched.iter().filter_map(|(&rank, &Watched { heard, progress, behind_since })| {
            let lasted = heard.saturating_duration_since(behind_since?);
            let symptom = Symptom::Hung;
            (lasted >= self.limits.hung_after).then_some(Suspicion { rank, symptom, lasted, progress })
        });
        hung.min_by_key(|suspicion| suspicion.progress)
    }
}

// === impl Suspicion ===

impl fmt::Display for Suspicion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, progress, .. } = self;
        let ms = self.lasted.as_millis();
        match self.symptom {
            Symptom::Silent => write!(f, "rank {rank} is silent for {ms} ms, after {progress} collectives"),
            Symptom::Hung => write!(f, "rank {rank} hangs: the others wait for {ms} ms, after {progress} collectives"),
        }
    }
}

#[cfg(test)]
mod tests;

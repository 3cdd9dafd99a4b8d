//! A breaker: whether a group that fails may be asked again.
//!
//! *Closed*: work goes through; each failure in a row is counted, any success sets the count to 0. At the threshold
//! the breaker *opens*: no work until a pause has passed. Then it is *half open*: exactly one request, the probe, goes
//! through. If the group serves it the breaker closes; if it fails the breaker opens again and the pause doubles, up
//! to its limit; if the client gives up before either is known, the next request is the probe.
//!
//! Only a group that breaks is a failure. One that refuses because it is full works as it should.

use std::time::{Duration, Instant};

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct BreakerSettings {
    /// Failures in a row that open it. Range: at least 1.
    pub failures: u32,
    /// The first pause.
    pub pause: Duration,
    /// The longest pause.
    pub max_pause: Duration,
}

/// The breaker of one group.
#[derive(Debug, Clone)]
pub struct Breaker {
    settings: BreakerSettings,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed { failures: u32 },
    Open { until: Instant, pause: Duration },
    HalfOpen { pause: Duration },
}

/// What the breaker lets a request be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// One of many.
    Normal,
    /// The one on which the breaker decides.
    Probe,
}

// === impl Breaker ===

impl Breaker {
    /// A closed breaker.
    pub fn new(settings: BreakerSettings) -> Self {
        Self { settings, state: State::Closed { failures: 0 } }
    }

    /// The state's name: `closed`, `open` or `half_open`.
    pub fn name(&self) -> &'static str {
        match self.state {
            State::Closed { .. } => "closed",
            State::Open { .. } => "open",
            State::HalfOpen { .. } => "half_open",
        }
    }

    /// What a request would be that came now; `None` if it may not pass.
    pub fn check(&self, now: Instant) -> Option<Pass> {
        match self.state {
            State::Closed { .. } => Some(Pass::Normal),
            State::Open { until, .. } if now >= until => Some(Pass::Probe),
            State::Open { .. } | State::HalfOpen { .. } => None,
        }
    }

    /// Lets a request through, as `check` said.
    pub fn enter(&mut self, now: Instant) -> Option<Pass> {
        let pass = self.check(now)?;
        if let (Pass::Probe, State::Open { pause, .. }) = (pass, self.state) {
            self.state = State::HalfOpen { pause };
        }
        Some(pass)
    }

    /// The group served a request.
    pub fn success(&mut self, pass: Pass) {
        // A stream that began before the breaker opened says nothing about the group now.
        if pass == Pass::Probe || matches!(self.state, State::Closed { .. }) {
            self.state = State::Closed { failures: 0 };
        }
    }

    /// The group broke a request.
    pub fn failure(&mut self, pass: Pass, now: Instant) {
        match (self.state, pass) {
            (State::HalfOpen { pause }, Pass::Probe) => {
                self.open(now, pause.saturating_mul(2).min(self.settings.max_pause));
            }
            (State::Closed { failures }, _) if failures.saturating_add(1) >= self.settings.failures => {
                self.open(now, self.settings.pause);
            }
            (State::Closed { failures }, _) => self.state = State::Closed { failures: failures.saturating_add(1) },
            // Those that were under way when it opened fail with it: they are one failure, not many.
            (State::Open { .. } | State::HalfOpen { .. }, _) => {}
        }
    }

    /// A request ended without saying anything about the group.
    pub fn unknown(&mut self, pass: Pass, now: Instant) {
        if let (State::HalfOpen { pause }, Pass::Probe) = (self.state, pass) {
            self.state = State::Open { until: now, pause };
        }
    }

    fn open(&mut self, now: Instant, pause: Duration) {
        self.state = State::Open { until: now + pause, pause };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(BreakerSettings { failures: 3, pause: SECOND, max_pause: SECOND * 3 });
        for _ in 0..3 {
            assert_eq!(breaker.enter(now), Some(Pass::Normal));
            breaker.failure(Pass::Normal, now);
        }
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_them_does_not() {
        let now = Instant::now();
        let mut breaker = Breaker::new(BreakerSettings { failures: 2, pause: SECOND, max_pause: SECOND });
        breaker.failure(Pass::Normal, now);
        breaker.success(Pass::Normal);
        breaker.failure(Pass::Normal, now);
        assert_eq!(breaker.check(now), Some(Pass::Normal));
        breaker.failure(Pass::Normal, now);
        assert_eq!(breaker.check(now), None);
    }

    #[test]
    fn one_probe_passes_after_the_pause_and_closes_it() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert_eq!(breaker.enter(now + SECOND / 2), None);
        assert_eq!(breaker.enter(now + SECOND), Some(Pass::Probe));
        assert_eq!(breaker.enter(now + SECOND), None, "a second probe");
        breaker.success(Pass::Probe);
        assert_eq!(breaker.enter(now + SECOND), Some(Pass::Normal));
    }

    #[test]
    fn a_failed_probe_doubles_the_pause_up_to_its_limit() {
        let mut now = Instant::now();
        let mut breaker = opened(now);
        for pause in [1, 2, 3, 3].map(|n| SECOND * n) {
            assert_eq!(breaker.check(now + pause - SECOND / 2), None);
            now += pause;
            assert_eq!(breaker.enter(now), Some(Pass::Probe));
            breaker.failure(Pass::Probe, now);
        }
    }

    #[test]
    fn a_probe_that_ends_unknown_makes_room_for_the_next() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert_eq!(breaker.enter(now + SECOND), Some(Pass::Probe));
        breaker.unknown(Pass::Probe, now + SECOND);
        assert_eq!(breaker.enter(now + SECOND), Some(Pass::Probe));
    }

    #[test]
    fn what_began_before_it_opened_neither_closes_nor_prolongs_it() {
        let now = Instant::now();
        let mut breaker = opened(now);
        breaker.success(Pass::Normal);
        breaker.failure(Pass::Normal, now + SECOND / 2);
        breaker.unknown(Pass::Normal, now);
        assert_eq!(breaker.check(now + SECOND / 2), None);
        assert_eq!(breaker.check(now + SECOND), Some(Pass::Probe));
    }
}

//! Membership: which ranks make up the group, and since when, as its leader sees it.
//!
//! ```text
//! Forming ──all ranks have joined──► Attaching ──all plan streams attached──► Running
//!    ▲                                   │                                      │
//!    └──the leader forms anew── Broken ◄─┴── a rank is lost, silent, restarted … ┘
//! ```
//!
//! An epoch is one unbroken life of the group, from the moment at which all ranks have joined. It never changes its
//! ranks: whatever happens to one of them ends the epoch for all, and the group forms again under the next number.
//! Numbers are never used twice. Ranks may ask to join at any time; those who come while an epoch lives wait for the
//! next one, and break the epoch, for they have evidently started anew. A rank whose [`Attestation`] differs from the
//! leader's is refused.
//!
//! A rank that shuts down says so and goes on: from then on the group is [draining](Membership::leaving), and the epoch
//! ends with [`BreakReason::Left`] once the leader says that [nothing runs](Membership::idle).
//!
//! It is pure: it is told what happens and when, and says what to do.

mod attestation;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

pub use self::attestation::{Attestation, Difference};
use super::failure_detector::{FailureDetector, Suspicion};

/// The leader's rank.
pub const LEADER: usize = 0;

/// Names one request to join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// A rank that asks to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// The rank.
    pub rank: usize,
    /// What it is.
    pub attestation: Attestation,
    /// How the others meet it.
    pub contact: Contact,
}

/// What a rank's collective transport needs to be met by the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contact {
    /// Where it listens; empty if that needs no address.
    pub address: String,
    /// Names the GPU that it could use NCCL with, the same for all processes; empty if there is none.
    pub device_id: String,
}

/// What a rank says of itself with each sign of life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beat {
    /// Collectives that its engine has come to in the epoch.
    pub progress: u64,
    /// It was told to shut down, and waits for the epoch's end.
    pub leaving: bool,
}

/// A rank of a new epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joiner {
    /// The request to answer.
    pub ticket: Ticket,
    /// How the others meet it.
    pub contact: Contact,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A new epoch begins: bring up its transport and answer those who joined.
    Start {
        /// Its number.
        epoch: u64,
        /// All ranks but the leader's.
        joiners: BTreeMap<usize, Joiner>,
    },
    /// Refuse a request to join.
    Refuse {
        /// The request.
        ticket: Ticket,
        /// Why.
        refusal: Refusal,
    },
    /// All plan streams of the epoch are attached: steps may begin.
    Run {
        /// The epoch.
        epoch: u64,
    },
    /// The epoch has ended: abort its collective and end its plan streams.
    Break {
        /// The epoch.
        epoch: u64,
        /// Why.
        reason: BreakReason,
    },
}

/// Why a request to join is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such follower.
    NoSuchRank {
        /// The rank.
        rank: usize,
        /// The number of ranks.
        world_size: usize,
    },
    /// The rank is not what the leader is.
    Differs {
        /// The rank.
        rank: usize,
        /// In what.
        difference: Difference,
    },
    /// The rank has asked again since.
    Superseded {
        /// The rank.
        rank: usize,
    },
}

/// Why an epoch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BreakReason {
    /// The rank's plan stream has ended: its process is gone, or it has left the epoch.
    Lost {
        /// The rank.
        rank: usize,
    },
    /// The rank has sent no heartbeat, or its engine stands still while the others wait for it.
    Suspected(Suspicion),
    /// The rank shuts down, and nothing ran any more.
    Left {
        /// The rank.
        rank: usize,
    },
    /// The rank asked to join although it was in the epoch.
    Restarted {
        /// The rank.
        rank: usize,
    },
    /// The rank joined but did not ask for the plans.
    NotAttached {
        /// The rank.
        rank: usize,
    },
    /// The rank does not take its plans.
    Behind {
        /// The rank.
        rank: usize,
    },
    /// The leader has given the epoch up.
    GivenUp {
        /// Why, in one line.
        cause: String,
    },
}

/// Where a rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankState {
    /// Gone, or not there yet.
    Missing,
    /// It waits for the others: the next epoch begins once all have come.
    Waiting,
    /// In the epoch that lives.
    Joined,
}

/// A rank, as the leader sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// The rank.
    pub rank: usize,
    /// Where it is.
    pub state: RankState,
    /// Since it was last heard of; none: it never was.
    pub silence: Option<Duration>,
}

/// The state of a group.
#[derive(Clone, Debug)]
pub struct Membership {
    world_size: usize,
    attestation: Attestation,
    attach_timeout: Duration,
    detector: FailureDetector,
    /// The newest epoch's number; 0 before the first.
    epoch: u64,
    /// Who waits for the next epoch.
    waiting: BTreeMap<usize, Joiner>,
    /// Ranks of this epoch that shut down.
    leaving: BTreeSet<usize>,
    /// When each rank but the leader's was last heard of, in whatever epoch.
    heard: BTreeMap<usize, Instant>,
    phase: Phase,
}

/// How far the group is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No epoch lives; the next begins once all ranks have come.
    Forming {
        /// Whether the leader itself has come.
        leader_ready: bool,
    },
    /// All have come, and now ask for the plans.
    Attaching {
        /// The ranks that have.
        attached: BTreeSet<usize>,
        /// By when all must have.
        deadline: Instant,
    },
    /// Steps may be made.
    Running,
    /// The epoch has ended and the leader has not taken note yet.
    Broken {
        /// Why.
        reason: BreakReason,
        /// When.
        since: Instant,
    },
}

// === impl Membership ===

impl Membership {
    /// A group of `world_size` ranks whose leader is what `attestation` says. An epoch is broken if not all ranks have
    /// asked for its plans `attach_timeout` after its start.
    pub fn new(
        world_size: usize,
        attestation: Attestation,
        detector: FailureDetector,
        attach_timeout: Duration,
    ) -> Self {
        Self {
            world_size,
            attestation,
            attach_timeout,
            detector,
            epoch: 0,
            waiting: BTreeMap::new(),
            leaving: BTreeSet::new(),
            heard: BTreeMap::new(),
            phase: Phase::Forming { leader_ready: false },
        }
    }

    /// The newest epoch's number; 0 before the first.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// How far the group is.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Ranks that the next epoch waits for, the leader not among them.
    pub fn missing(&self) -> Vec<usize> {
        self.followers().filter(|rank| !self.waiting.contains_key(rank)).collect()
    }

    /// Every rank, by number.
    pub fn ranks(&self, now: Instant) -> Vec<Presence> {
        let lives = self.is_alive(self.epoch);
        let presence = |rank| {
            // A rank whose call waits for an answer has no more to say.
            let is_here = rank == LEADER || self.waiting.contains_key(&rank);
            let state = match (lives, is_here) {
                (true, _) => RankState::Joined,
                (false, true) => RankState::Waiting,
                (false, false) => RankState::Missing,
            };
            let heard = if is_here { Some(&now) } else { self.heard.get(&rank) };
            Presence { rank, state, silence: heard.map(|&heard| now.saturating_duration_since(heard)) }
        };
        (0..self.world_size).map(presence).collect()
    }

    /// The first rank of the living epoch that shuts down: no new work is to begin, and [`idle`](Self::idle) is to be
    /// called when none is left.
    pub fn leaving(&self) -> Option<usize> {
        self.leaving.first().copied()
    }

    /// The leader is ready for a new epoch; the one that lives, if any, ends.
    pub fn form(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = self.end("the leader forms the group anew", now);
        self.phase = Phase::Forming { leader_ready: true };
        actions.extend(self.start_if_complete(now));
        actions
    }

    /// The leader is not ready any more, unless an epoch has begun.
    pub fn withdraw_leader(&mut self) {
        if let Phase::Forming { leader_ready } = &mut self.phase {
            *leader_ready = false;
        }
    }

    /// A rank asks to join.
    pub fn join(&mut self, ticket: Ticket, join: Join, now: Instant) -> Vec<Action> {
        let Join { rank, attestation, contact } = join;
        if !self.followers().contains(&rank) {
            let refusal = Refusal::NoSuchRank { rank, world_size: self.world_size };
            return vec![Action::Refuse { ticket, refusal }];
        }
        if let Some(difference) = self.attestation.difference(&attestation) {
            return vec![Action::Refuse { ticket, refusal: Refusal::Differs { rank, difference } }];
        }
        self.heard.insert(rank, now);
        let mut actions = Vec::new();
        if let Some(earlier) = self.waiting.insert(rank, Joiner { ticket, contact }) {
            actions.push(Action::Refuse { ticket: earlier.ticket, refusal: Refusal::Superseded { rank } });
        }
        if self.is_alive(self.epoch) {
            actions.push(self.end_epoch(BreakReason::Restarted { rank }, now));
        }
        actions.extend(self.start_if_complete(now));
        actions
    }

    /// A request to join was taken back: its rank has gone away.
    pub fn withdraw(&mut self, ticket: Ticket) {
        self.waiting.retain(|_rank, joiner| joiner.ticket != ticket);
    }

    /// A rank asks for the plans of `epoch`. `None`: it may not, since that epoch does not live or it has them already.
    pub fn attach(&mut self, rank: usize, epoch: u64) -> Option<Vec<Action>> {
        if epoch != self.epoch || !self.followers().contains(&rank) {
            return None;
        }
        let n_followers = self.followers().len();
        let Phase::Attaching { attached, .. } = &mut self.phase else { return None };
        if !attached.insert(rank) {
            return None;
        }
        if attached.len() < n_followers {
            return Some(Vec::new());
        }
        self.phase = Phase::Running;
        Some(vec![Action::Run { epoch }])
    }

    /// A rank says that it lives. Returns whether its epoch does.
    pub fn heartbeat(&mut self, rank: usize, epoch: u64, beat: Beat, now: Instant) -> bool {
        if !self.is_alive(epoch) || !self.followers().contains(&rank) {
            return false;
        }
        self.detector.heard(rank, beat.progress, now);
        self.heard.insert(rank, now);
        if beat.leaving {
            self.leaving.insert(rank);
        }
        true
    }

    /// A rank's plan stream of `epoch` has ended.
    pub fn lost(&mut self, rank: usize, epoch: u64, now: Instant) -> Option<Action> {
        self.is_alive(epoch).then(|| self.end_epoch(BreakReason::Lost { rank }, now))
    }

    /// A rank does not take the plans of `epoch` in time.
    pub fn behind(&mut self, rank: usize, epoch: u64, now: Instant) -> Option<Action> {
        self.is_alive(epoch).then(|| self.end_epoch(BreakReason::Behind { rank }, now))
    }

    /// Nothing runs: an epoch that a rank wants to leave ends.
    pub fn idle(&mut self, now: Instant) -> Option<Action> {
        let rank = self.leaving()?;
        Some(self.end_epoch(BreakReason::Left { rank }, now))
    }

    /// The leader gives up the epoch that lives, if one does.
    pub fn end(&mut self, cause: &str, now: Instant) -> Vec<Action> {
        let reason = BreakReason::GivenUp { cause: cause.to_owned() };
        let ended = self.is_alive(self.epoch).then(|| self.end_epoch(reason, now));
        ended.into_iter().collect()
    }

    /// Time has passed; to be called at every turn of the failure detector. `progress` is the leader's own: its engine
    /// may hang like any other.
    pub fn tick(&mut self, progress: u64, now: Instant) -> Option<Action> {
        self.detector.heard(LEADER, progress, now);
        let suspicion = self.detector.tick(now);
        if let Some(suspicion) = suspicion.filter(|_| self.is_alive(self.epoch)) {
            return Some(self.end_epoch(BreakReason::Suspected(suspicion), now));
        }
        let Phase::Attaching { attached, deadline } = &self.phase else { return None };
        if now < *deadline {
            return None;
        }
        let rank = self.followers().find(|rank| !attached.contains(rank))?;
        Some(self.end_epoch(BreakReason::NotAttached { rank }, now))
    }

    fn followers(&self) -> std::ops::Range<usize> {
        1..self.world_size
    }

    fn is_alive(&self, epoch: u64) -> bool {
        epoch == self.epoch && matches!(self.phase, Phase::Attaching { .. } | Phase::Running)
    }

    fn start_if_complete(&mut self, now: Instant) -> Vec<Action> {
        if self.phase != (Phase::Forming { leader_ready: true }) || !self.missing().is_empty() {
            return Vec::new();
        }
        self.epoch += 1;
        let epoch = self.epoch;
        (0..self.world_size).for_each(|rank| self.detector.watch(rank, now));
        let mut actions = vec![Action::Start { epoch, joiners: std::mem::take(&mut self.waiting) }];
        if self.followers().is_empty() {
            self.phase = Phase::Running;
            actions.push(Action::Run { epoch });
        } else {
            self.phase = Phase::Attaching { attached: BTreeSet::new(), deadline: now + self.attach_timeout };
        }
        actions
    }

    fn end_epoch(&mut self, reason: BreakReason, now: Instant) -> Action {
        self.detector.clear();
        self.leaving.clear();
        self.phase = Phase::Broken { reason: reason.clone(), since: now };
        Action::Break { epoch: self.epoch, reason }
    }
}

// === impl Refusal ===

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchRank { rank, world_size } => {
                write!(f, "rank {rank} is no follower in a group of {world_size} ranks")
            }
            Self::Differs { rank, difference: Difference { key, leader, other } } => {
                let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "has none".to_owned());
                write!(f, "rank {rank} differs in {key}: leader {}, rank {rank} {}", value(leader), value(other))
            }
            Self::Superseded { rank } => write!(f, "rank {rank} has asked to join again since"),
        }
    }
}

// === impl BreakReason ===

impl fmt::Display for BreakReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { rank } => write!(f, "rank {rank} is gone"),
            Self::Suspected(suspicion) => suspicion.fmt(f),
            Self::Left { rank } => write!(f, "rank {rank} shuts down"),
            Self::Restarted { rank } => write!(f, "rank {rank} has restarted"),
            Self::NotAttached { rank } => write!(f, "rank {rank} joined but did not ask for the plans"),
            Self::Behind { rank } => write!(f, "rank {rank} does not take its plans"),
            Self::GivenUp { cause } => f.write_str(cause),
        }
    }
}

#[cfg(test)]
mod tests;

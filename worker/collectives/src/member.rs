//! A member: what a rank knows of itself and its group before a transport connects it.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

use crate::{AbortHandle, Call, CollectiveError, Progress};

/// How long a call waits at most, unless a [`Member`] says otherwise. It is the last resort behind the peer's death
/// and the abort handle; the longest honest wait is a peer's prefill step, seconds on a slow machine.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Most ranks of a group: bounds what a segment or a mesh takes up. The lockstep rule supports as many ranks as a
/// model has KV-head groups, which is 8 for the models in sight.
pub const MAX_WORLD_SIZE: usize = 64;

/// One rank of a group.
#[derive(Clone, Debug)]
pub struct Member {
    /// The group's epoch: ranks of different epochs are never connected. Default: 0.
    pub epoch: u64,
    /// This rank, below the world size. Default: 0.
    pub rank: usize,
    /// The number of ranks, at most [`MAX_WORLD_SIZE`]. Default: 1.
    pub world_size: usize,
    /// Longest wait of a call. Default: [`DEFAULT_TIMEOUT`].
    pub timeout: Duration,
    /// Ends this rank's calls, and its set-up. Default: a new one.
    pub abort: AbortHandle,
    /// Counts this rank's calls. Default: a new one.
    pub progress: Progress,
}

/// How a wait may end without what was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interruption {
    Aborted,
    TimedOut,
    PeerGone,
}

/// How long a wait may last: until a point in time or an abort.
#[derive(Clone, Debug)]
pub(crate) struct Patience {
    pub(crate) abort: AbortHandle,
    pub(crate) deadline: Instant,
    pub(crate) timeout: Duration,
}

// === impl Member ===

impl Default for Member {
    fn default() -> Self {
        Self {
            epoch: 0,
            rank: 0,
            world_size: 1,
            timeout: DEFAULT_TIMEOUT,
            abort: AbortHandle::new(),
            progress: Progress::new(),
        }
    }
}

impl Member {
    /// Checks that the rank lies in the group and the group within [`MAX_WORLD_SIZE`].
    pub(crate) fn validate(&self, transport: &'static str) -> Result<(), CollectiveError> {
        let Self { rank, world_size, .. } = self;
        if *world_size == 0 || *world_size > MAX_WORLD_SIZE {
            let reason = format!("the world size is {world_size}, must be 1 to {MAX_WORLD_SIZE}");
            return Err(CollectiveError::Setup { transport, reason });
        }
        if rank >= world_size {
            let reason = format!("the rank is {rank}, must be below the world size {world_size}");
            return Err(CollectiveError::Setup { transport, reason });
        }
        Ok(())
    }

    /// All other ranks, in ascending order.
    pub(crate) fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.world_size).filter(move |&peer| peer != rank)
    }

    /// For one call that starts now.
    pub(crate) fn patience(&self) -> Patience {
        self.patience_until(Instant::now() + self.timeout)
    }

    /// For the group's set-up.
    pub(crate) fn patience_until(&self, deadline: Instant) -> Patience {
        Patience { abort: self.abort.clone(), deadline, timeout: self.timeout }
    }
}

// === impl Interruption ===

impl Interruption {
    /// The error of a call in which `rank` was waited for.
    pub(crate) fn during(self, call: Call, rank: usize, patience: &Patience) -> CollectiveError {
        match self {
            Self::Aborted => CollectiveError::Aborted,
            Self::TimedOut => CollectiveError::Timeout { rank, call, timeout_ms: patience.timeout.as_millis() },
            Self::PeerGone => CollectiveError::PeerGone { rank, call },
        }
    }
}

// === impl Patience ===

impl Patience {
    /// Time that is left, or why there is none.
    pub(crate) fn left(&self) -> Result<Duration, Interruption> {
        if self.abort.is_aborted() {
            return Err(Interruption::Aborted);
        }
        match self.deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(Interruption::TimedOut),
        }
    }
}

/// As the kernel takes it.
pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs().cast_signed(), tv_nsec: duration.subsec_nanos().into() }
}

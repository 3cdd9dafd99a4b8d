//! A group: the ranks that share one copy of a model, and how they find one another, attest and notice death.
//!
//! Rank 0 leads. The others ask it over gRPC to [join](LeaderGroup) an epoch; when all have come it tells them how to
//! meet in a collective transport, and streams them its step plans. Whatever happens to a rank ends the epoch on all of
//! them: every wait returns, within about a second at worst, and the ranks join the next one.
//!
//! The engine calls this module from a thread of its own, in which it blocks. Heartbeats and plans move on the async
//! runtime, so that a rank that computes, or waits in a collective, still says that it lives.
//!
//! # Layout
//!
//! * [`config`]: the settings.
//! * [`membership`] and [`failure_detector`]: what makes an epoch, and what ends it; both pure.
//! * [`wire`]: plans and requests to join as they travel, and the checks on them.
//! * `rendezvous`: brings up an epoch's collective transport.
//! * [`leader`] and [`follower`]: the two sides of an epoch.

pub mod config;
pub mod failure_detector;
pub mod follower;
pub mod leader;
pub mod membership;
mod rendezvous;
pub mod wire;

use std::{fmt, sync::Arc};

use lockstep_collectives::{Collective, CollectiveError};
use thiserror::Error;

pub use self::{
    config::{GroupConfig, Transport},
    follower::FollowerGroup,
    leader::{GroupRpc, LeaderGroup, Roster},
    membership::Attestation,
};

/// One unbroken life of the group, as one rank sees it.
pub struct Epoch {
    /// Counts the epochs of this leader from 1.
    pub number: u64,
    /// This rank's end of the collective. To be dropped once a call has failed.
    pub collective: Box<dyn Collective>,
}

/// Ends a rank's part in its group from any thread, at once or with the epoch, as whoever made it says: what waits
/// returns [`GroupError::Stopped`] then, and ever after.
#[derive(Clone)]
pub struct StopHandle(Arc<dyn Fn() + Send + Sync>);

/// Why a rank is not, or no longer, in an epoch.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GroupError {
    /// The leader will not have this rank as it is; to try again is pointless.
    #[error("refused by the leader: {reason}")]
    Refused {
        /// Why, naming both values of what differs.
        reason: String,
    },
    /// Not all ranks have come. The leader may try again.
    #[error("waited {waited_ms} ms for ranks {ranks:?}")]
    Missing {
        /// Those who have not.
        ranks: Vec<usize>,
        /// How long it has waited. Unit: milliseconds.
        waited_ms: u128,
    },
    /// The leader could not be joined. The follower may try again.
    #[error("cannot join the group of {leader}: {reason}")]
    NotJoined {
        /// The leader's address.
        leader: String,
        /// What the last attempt failed with.
        reason: String,
    },
    /// The epoch has ended. The rank may join the next one.
    #[error("epoch {epoch} has ended: {reason}")]
    Ended {
        /// The epoch.
        epoch: u64,
        /// Why.
        reason: String,
    },
    /// The rank's own side of the transport cannot be set up.
    #[error(transparent)]
    Transport(#[from] CollectiveError),
    /// This rank's own engine stands still. Nothing within the process can end that, so the process should end.
    #[error("the engine of rank {rank} hangs")]
    Hung {
        /// The rank.
        rank: usize,
    },
    /// [`StopHandle::stop`] was called.
    #[error("stopped")]
    Stopped,
}

/// Plans on their way to a rank. The engine makes the next one while the ranks carry out the one before; a rank that is
/// as many as this behind does not take part any more.
const PLAN_QUEUE: usize = 64;

// === impl Epoch ===

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Epoch").field("number", &self.number).finish_non_exhaustive()
    }
}

// === impl StopHandle ===

impl StopHandle {
    fn new(stop: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(stop))
    }

    /// Ends the rank's part, for good.
    pub fn stop(&self) {
        (self.0)();
    }
}

impl fmt::Debug for StopHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StopHandle").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

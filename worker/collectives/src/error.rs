//! Why a call of a collective, or its set-up, failed.

use thiserror::Error;

use crate::Call;

/// Why a call, or the set-up of a transport, failed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CollectiveError {
    /// This rank's [`AbortHandle`](crate::AbortHandle) was used.
    #[error("aborted")]
    Aborted,
    /// A peer lives but did not come.
    #[error("rank {rank} did not come to {call} within {timeout_ms} ms")]
    Timeout {
        /// The peer.
        rank: usize,
        /// What it did not come to, as this rank expects it of the peer.
        call: Call,
        /// How long this rank has waited. Unit: milliseconds.
        timeout_ms: u128,
    },
    /// A peer's process has ended, or its end of the group was dropped.
    #[error("rank {rank} is gone, before {call}")]
    PeerGone {
        /// The peer.
        rank: usize,
        /// What it did not come to, as this rank expects it of the peer.
        call: Call,
    },
    /// A peer makes another call.
    #[error("rank {rank} is out of step: expected {expected}; found {found}")]
    OutOfStep {
        /// The peer.
        rank: usize,
        /// What this rank expects of the peer.
        expected: Call,
        /// What the peer does.
        found: Call,
    },
    /// The ranks could not be brought together.
    #[error("cannot set up the {transport} transport: {reason}")]
    Setup {
        /// The transport.
        transport: &'static str,
        /// Why, in one line.
        reason: String,
    },
}

//! Why a call of a collective, or its set-up, failed.

use std::fmt;

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
    /// The device is not through its work. NCCL does not say for whom it waits; if it is for nobody, the device hangs.
    #[error("{awaited} did not end within {timeout_ms} ms: a rank did not come to it, or the device hangs")]
    NotDone {
        /// What has not ended.
        awaited: Awaited,
        /// How long this rank has waited. Unit: milliseconds.
        timeout_ms: u128,
    },
    /// NCCL or the device has failed, perhaps because a peer has.
    #[error("{awaited} failed: {reason}")]
    Failed {
        /// What has failed, at the latest.
        awaited: Awaited,
        /// What NCCL or the driver says, in one line.
        reason: String,
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

/// What a rank waited for when its device, or NCCL, failed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// That a call lies on the stream.
    Enqueued(Call),
    /// That the device is through what lies on the stream, at the latest up to this call.
    Device {
        /// The newest call; none if there was none.
        newest: Option<Call>,
    },
}

// === impl Awaited ===

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Enqueued(call) => write!(f, "enqueueing {call}"),
            Self::Device { newest: Some(call) } => write!(f, "the device's work up to {call}"),
            Self::Device { newest: None } => write!(f, "the device's work before the first call"),
        }
    }
}

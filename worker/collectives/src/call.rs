//! A call: one collective operation as one rank makes it, in the form in which its peers check it.

use std::fmt;

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// [`Collective::all_gather`](crate::Collective::all_gather).
    AllGather,
    /// [`Collective::gather`](crate::Collective::gather).
    Gather {
        /// The rank that takes the floats.
        root: usize,
    },
    /// [`Collective::barrier`](crate::Collective::barrier).
    Barrier,
    /// [`DeviceCollective::broadcast`](crate::DeviceCollective::broadcast).
    Broadcast {
        /// The rank that gives the values.
        root: usize,
    },
    /// [`DeviceCollective::all_reduce`](crate::DeviceCollective::all_reduce).
    AllReduce,
    /// What a peer sent is none of these.
    Unknown {
        /// What it sent.
        code: u64,
    },
}

/// A call as one rank makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Counts the calls of the epoch from 0.
    pub index: u64,
    /// What it does.
    pub op: Op,
    /// Bytes that all ranks give together.
    pub total_bytes: u64,
    /// Bytes that this rank gives.
    pub part_bytes: u64,
}

/// Words of a call's encoded form.
pub(crate) const CALL_WORDS: usize = 4;

// === impl Op ===

// The kind is in the low byte, the root above it.
const ALL_GATHER: u64 = 1;
const GATHER: u64 = 2;
const BARRIER: u64 = 3;
const BROADCAST: u64 = 4;
const ALL_REDUCE: u64 = 5;

impl Op {
    /// Whether `rank` takes what the others give.
    pub(crate) fn receives(self, rank: usize) -> bool {
        match self {
            Self::Gather { root } => rank == root,
            _ => true,
        }
    }

    fn code(self) -> u64 {
        match self {
            Self::AllGather => ALL_GATHER,
            Self::Gather { root } => GATHER | (root as u64) << 8,
            Self::Barrier => BARRIER,
            Self::Broadcast { root } => BROADCAST | (root as u64) << 8,
            Self::AllReduce => ALL_REDUCE,
            Self::Unknown { code } => code,
        }
    }

    fn from_code(code: u64) -> Self {
        match (code & 0xff, code >> 8) {
            (ALL_GATHER, 0) => Self::AllGather,
            (GATHER, root) => Self::Gather { root: root as usize },
            (BARRIER, 0) => Self::Barrier,
            (BROADCAST, root) => Self::Broadcast { root: root as usize },
            (ALL_REDUCE, 0) => Self::AllReduce,
            _ => Self::Unknown { code },
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllGather => write!(f, "all_gather"),
            Self::Gather { root } => write!(f, "gather to rank {root}"),
            Self::Barrier => write!(f, "barrier"),
            Self::Broadcast { root } => write!(f, "broadcast of rank {root}"),
            Self::AllReduce => write!(f, "all_reduce"),
            Self::Unknown { code } => write!(f, "unknown operation {code:#x}"),
        }
    }
}

// === impl Call ===

impl Call {
    /// A call as `rank` makes it, in which rank `r` gives `lengths[r]` floats, or other values of their size.
    pub(crate) fn of_floats(index: u64, op: Op, lengths: &[usize], rank: usize) -> Self {
        let bytes = |n_floats: usize| size_of::<f32>() as u64 * n_floats as u64;
        let part = lengths.get(rank).copied().unwrap_or(0);
        Self { index, op, total_bytes: bytes(lengths.iter().sum()), part_bytes: bytes(part) }
    }

    pub(crate) fn encode(&self) -> [u64; CALL_WORDS] {
        [self.index, self.op.code(), self.total_bytes, self.part_bytes]
    }

    pub(crate) fn decode([index, code, total_bytes, part_bytes]: [u64; CALL_WORDS]) -> Self {
        Self { index, op: Op::from_code(code), total_bytes, part_bytes }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "call {}, {} with {} of {} bytes", self.index, self.op, self.part_bytes, self.total_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_survives_encoding_and_no_two_operations_share_a_code() {
        let ops = [
            Op::AllGather,
            Op::Gather { root: 0 },
            Op::Gather { root: 7 },
            Op::Barrier,
            Op::Broadcast { root: 0 },
            Op::Broadcast { root: 7 },
            Op::AllReduce,
            Op::Unknown { code: 0x103 },
        ];
        for (position, op) in ops.into_iter().enumerate() {
            let call = Call { index: u64::MAX, op, total_bytes: 12, part_bytes: 4 };
            assert_eq!(Call::decode(call.encode()), call);
            assert!(ops[..position].iter().all(|other| other.code() != op.code()));
        }
    }
}

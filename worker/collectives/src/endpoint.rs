//! An endpoint: one rank's end of a group over any transport.
//!
//! It does what all transports need alike: numbers the calls, checks their arguments, gives each its deadline, and
//! remembers the first error, after which the ranks' calls no longer match and nothing may be sent any more.

use std::fmt;

use crate::{AbortHandle, Call, Collective, CollectiveError, Member, Op, member::Patience};

/// One rank's end of a group, over whichever transport connected it.
pub struct Endpoint {
    member: Member,
    next_index: u64,
    failed: Option<CollectiveError>,
    link: Box<dyn Link>,
}

/// What a transport does: moves the floats of one call.
pub(crate) trait Link: Send {
    /// Makes one call: gives, and takes if the operation says so.
    fn exchange(&mut self, exchange: Exchange<'_>, patience: &Patience) -> Result<(), CollectiveError>;
}

/// The floats of one call.
pub(crate) struct Exchange<'a> {
    pub(crate) index: u64,
    pub(crate) op: Op,
    pub(crate) mine: &'a [f32],
    /// Floats of each rank; none for a barrier.
    pub(crate) lengths: &'a [usize],
    /// Where the floats of all ranks go; empty on a rank that takes none.
    pub(crate) out: &'a mut [f32],
}

// === impl Exchange ===

impl Exchange<'_> {
    /// The call as `rank` makes it.
    pub(crate) fn call(&self, rank: usize) -> Call {
        let total: usize = self.lengths.iter().sum();
        Call {
            index: self.index,
            op: self.op,
            total_bytes: size_of::<f32>() as u64 * total as u64,
            part_bytes: size_of::<f32>() as u64 * self.length(rank) as u64,
        }
    }

    /// Floats of `rank`.
    pub(crate) fn length(&self, rank: usize) -> usize {
        self.lengths.get(rank).copied().unwrap_or(0)
    }

    /// Compares what `rank` does with what it should do.
    pub(crate) fn check(&self, rank: usize, found: Call) -> Result<(), CollectiveError> {
        let expected = self.call(rank);
        if found == expected { Ok(()) } else { Err(CollectiveError::OutOfStep { rank, expected, found }) }
    }
}

// === impl Endpoint ===

impl Endpoint {
    pub(crate) fn new(member: Member, link: impl Link + 'static) -> Self {
        Self { member, next_index: 0, failed: None, link: Box::new(link) }
    }

    fn call(&mut self, op: Op, mine: &[f32], lengths: &[usize], out: &mut [f32]) -> Result<(), CollectiveError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.member.progress.count_call();
        let patience = self.member.patience();
        let exchange = Exchange { index: self.next_index, op, mine, lengths, out };
        let result = if patience.abort.is_aborted() {
            Err(CollectiveError::Aborted)
        } else {
            self.link.exchange(exchange, &patience)
        };
        self.next_index += 1;
        self.failed = result.as_ref().err().cloned();
        result
    }

    /// Panics unless the arguments fit one another.
    fn check_arguments(&self, mine: &[f32], lengths: &[usize]) {
        assert_eq!(lengths.len(), self.member.world_size, "one length for each rank");
        assert_eq!(mine.len(), lengths[self.member.rank], "this rank's floats are as many as its length says");
    }
}

/// Where `rank`'s floats lie in the floats of all ranks.
fn part(rank: usize, lengths: &[usize]) -> std::ops::Range<usize> {
    let start = lengths[..rank].iter().sum();
    start..start + lengths[rank]
}

impl Collective for Endpoint {
    fn rank(&self) -> usize {
        self.member.rank
    }

    fn world_size(&self) -> usize {
        self.member.world_size
    }

    fn all_gather(&mut self, mine: &[f32], lengths: &[usize], out: &mut [f32]) -> Result<(), CollectiveError> {
        self.check_arguments(mine, lengths);
        assert_eq!(out.len(), lengths.iter().sum::<usize>(), "out holds the floats of all ranks");
        out[part(self.member.rank, lengths)].copy_from_slice(mine);
        self.call(Op::AllGather, mine, lengths, out)
    }

    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        lengths: &[usize],
        out: Option<&mut [f32]>,
    ) -> Result<(), CollectiveError> {
        self.check_arguments(mine, lengths);
        assert!(root < self.member.world_size, "root {root} is outside the group");
        assert_eq!(out.is_some(), root == self.member.rank, "the root alone passes out");
        let Some(out) = out else {
            return self.call(Op::Gather { root }, mine, lengths, &mut []);
        };
        assert_eq!(out.len(), lengths.iter().sum::<usize>(), "out holds the floats of all ranks");
        out[part(root, lengths)].copy_from_slice(mine);
        self.call(Op::Gather { root }, mine, lengths, out)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.call(Op::Barrier, &[], &[], &mut [])
    }

    fn abort_handle(&self) -> AbortHandle {
        self.member.abort.clone()
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("member", &self.member)
            .field("next_index", &self.next_index)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

//! An endpoint: one rank's end of a group over any transport.
//!
//! It does what all transports need alike: numbers the calls, checks their arguments, gives each its deadline, and
//! remembers the first error, after which the ranks' calls no longer match and nothing may be sent any more.

use std::{fmt, ops::Range};

use crate::{
    AbortHandle, Call, Collective, CollectiveError, DeviceCollective, Member, Op, member::Patience,
    nccl::communicator::Communicator,
};

/// One rank's end of a group, over whichever transport connected it.
pub struct Endpoint {
    calls: Calls,
    link: Box<dyn Link>,
}

/// The calls of one rank, and the first error of one.
#[derive(Debug)]
pub(crate) struct Calls {
    pub(crate) member: Member,
    next_index: u64,
    failed: Option<CollectiveError>,
}

/// What a transport does: moves the floats of one call.
pub(crate) trait Link: Send {
    /// Makes one call: gives, and takes if the operation says so.
    fn exchange(&mut self, exchange: Exchange<'_>, patience: &Patience) -> Result<(), CollectiveError>;

    /// What moves them between devices, if it does.
    fn communicator(&mut self) -> Option<&mut Communicator> {
        None
    }
}

/// The floats of one call.
pub(crate) struct Exchange<'a> {
    pub(crate) index: u64,
    pub(crate) op: Op,
    pub(crate) mine: &'a [f32],
    /// Floats of each rank; none for a barrier.
    pub(crate) lengths: &'a [usize],
    /// Where the peers' floats go; nowhere on a rank that takes none.
    pub(crate) theirs: Theirs<'a>,
}

/// Where the floats of a rank's peers go.
#[derive(Default)]
pub(crate) struct Theirs<'a> {
    /// Those of all lower ranks, in rank order.
    pub(crate) lower: &'a mut [f32],
    /// Those of all higher ranks.
    pub(crate) higher: &'a mut [f32],
}

// === impl Theirs ===

impl<'a> Theirs<'a> {
    /// What is around this rank's part of `all`, and that part.
    fn around(all: &'a mut [f32], part: Range<usize>) -> (&'a mut [f32], Self) {
        let (rest, higher) = all.split_at_mut(part.end);
        let (lower, mine) = rest.split_at_mut(part.start);
        (mine, Self { lower, higher })
    }
}

// === impl Exchange ===

impl Exchange<'_> {
    /// The call as `rank` makes it.
    pub(crate) fn call(&self, rank: usize) -> Call {
        Call::of_floats(self.index, self.op, self.lengths, rank)
    }

    /// Floats of `rank`.
    pub(crate) fn length(&self, rank: usize) -> usize {
        self.lengths.get(rank).copied().unwrap_or(0)
    }

    /// Where the floats of `peer`, another rank than `me`, go: a part of `theirs`.
    pub(crate) fn part(&mut self, me: usize, peer: usize) -> &mut [f32] {
        let length = |rank: usize| self.lengths.get(rank).copied().unwrap_or(0);
        let (among, first) = if peer < me { (&mut *self.theirs.lower, 0) } else { (&mut *self.theirs.higher, me + 1) };
        let start = (first..peer).map(length).sum::<usize>();
        &mut among[start..start + length(peer)]
    }

    /// Compares what `rank` does with what it should do.
    pub(crate) fn check(&self, rank: usize, found: Call) -> Result<(), CollectiveError> {
        let expected = self.call(rank);
        if found == expected { Ok(()) } else { Err(CollectiveError::OutOfStep { rank, expected, found }) }
    }
}

// === impl Calls ===

impl Calls {
    /// Makes the next `n_calls` as one, unless one has failed. `call` is told the number of the first.
    pub(crate) fn make(
        &mut self,
        n_calls: u64,
        call: impl FnOnce(&Member, u64, &Patience) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.member.progress.count_calls(n_calls);
        let patience = self.member.patience();
        let result = if patience.abort.is_aborted() {
            Err(CollectiveError::Aborted)
        } else {
            call(&self.member, self.next_index, &patience)
        };
        self.next_index += n_calls;
        self.failed = result.as_ref().err().cloned();
        result
    }

    /// Waits for what earlier calls have begun, unless one has failed. It is no call.
    pub(crate) fn wait(
        &mut self,
        wait: impl FnOnce(&Patience) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = wait(&self.member.patience());
        self.failed = result.as_ref().err().cloned();
        result
    }
}

// === impl Endpoint ===

impl Endpoint {
    pub(crate) fn new(member: Member, link: impl Link + 'static) -> Self {
        Self { calls: Calls { member, next_index: 0, failed: None }, link: Box::new(link) }
    }

    fn call(&mut self, op: Op, mine: &[f32], lengths: &[usize], theirs: Theirs<'_>) -> Result<(), CollectiveError> {
        let link = &mut *self.link;
        let exchange =
            |_: &_, index, patience: &_| link.exchange(Exchange { index, op, mine, lengths, theirs }, patience);
        let result = self.calls.make(1, exchange);
        match self.link.communicator() {
            Some(communicator) => communicator.settle(result),
            None => result,
        }
    }

    /// This rank's part of the floats of all ranks, `all`, and the others'.
    ///
    /// # Panics
    ///
    /// Unless there is a length for each rank and `all` is as long as they say.
    fn split<'a>(&self, lengths: &[usize], all: &'a mut [f32]) -> (&'a mut [f32], Theirs<'a>) {
        assert_eq!(lengths.len(), self.calls.member.world_size, "one length for each rank");
        assert_eq!(all.len(), lengths.iter().sum::<usize>(), "the floats of all ranks");
        Theirs::around(all, part(self.calls.member.rank, lengths))
    }
}

/// Where `rank`'s floats lie in the floats of all ranks.
fn part(rank: usize, lengths: &[usize]) -> Range<usize> {
    let start = lengths[..rank].iter().sum();
    start..start + lengths[rank]
}

impl Collective for Endpoint {
    fn rank(&self) -> usize {
        self.calls.member.rank
    }

    fn world_size(&self) -> usize {
        self.calls.member.world_size
    }

    fn all_gather(&mut self, lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError> {
        let (mine, theirs) = self.split(lengths, all);
        self.call(Op::AllGather, mine, lengths, theirs)
    }

    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        lengths: &[usize],
        out: Option<&mut [f32]>,
    ) -> Result<(), CollectiveError> {
        assert_eq!(lengths.len(), self.calls.member.world_size, "one length for each rank");
        assert_eq!(mine.len(), lengths[self.calls.member.rank], "this rank's floats are as many as its length says");
        assert!(root < self.calls.member.world_size, "root {root} is outside the group");
        assert_eq!(out.is_some(), root == self.calls.member.rank, "the root alone passes out");
        let Some(out) = out else {
            return self.call(Op::Gather { root }, mine, lengths, Theirs::default());
        };
        let (own, theirs) = self.split(lengths, out);
        own.copy_from_slice(mine);
        self.call(Op::Gather { root }, mine, lengths, theirs)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.call(Op::Barrier, &[], &[], Theirs::default())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.calls.member.abort.clone()
    }

    fn device(&mut self) -> Option<DeviceCollective<'_>> {
        let communicator = self.link.communicator()?;
        Some(DeviceCollective::new(&mut self.calls, communicator))
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("calls", &self.calls).finish_non_exhaustive()
    }
}

//! The NCCL transport: ranks compute on GPUs, whose memories NCCL connects by whatever there is, NVLink to sockets.
//!
//! Rank 0 makes a [`UniqueId`] for each epoch and tells it to the others; all [connect](connect) with it. A communicator
//! is never mended: after an error, a peer's death or an abort it is aborted on every rank, and the next epoch has one of
//! its own, on the same stream and over the same weights.
//!
//! What a rank's device has goes from device to device: [`Collective::device`](crate::Collective::device). The methods
//! that take host memory are for the little that is said besides, and go through a small staging buffer of the device,
//! rather than over a second transport beside this one, which would have to be brought up, watched and aborted as well.
//! They compare calls before they move anything, as every transport does; device calls don't, for that would double them.
//!
//! NCCL sees a peer's death only where its own sockets connect the two. On one host, kernels of the others spin for ever:
//! it takes the failure detector and [`AbortHandle`](crate::AbortHandle) to end that, which NCCL does for the kernels.

pub(crate) mod communicator;
mod driver;
mod library;
pub(crate) mod transfer;

use std::{fmt, time::Instant};

pub use self::library::Version;
use self::{
    communicator::Communicator,
    driver::Staging,
    library::{ID_BYTES, Library, RawId},
    transfer::Transfer,
};
use crate::{
    Awaited, Call, CollectiveError, DeviceStream, Endpoint, Member, Op,
    call::CALL_WORDS,
    endpoint::{Exchange, Link},
    member::Patience,
};

/// By what the ranks of an epoch find one another.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; ID_BYTES]);

/// A communicator, and the way from host memory to it.
struct Staged {
    communicator: Communicator,
    staging: Staging,
}

const TRANSPORT: &str = "nccl";

/// Floats in whose place a call travels.
const CALL_FLOATS: usize = CALL_WORDS * size_of::<u64>() / size_of::<f32>();

/// From this version on several ranks may share a GPU if [`shared_gpu_environment`] says so.
const SHARES_GPUS_SINCE: Version = Version { major: 2, minor: 30, patch: 0 };

/// The version of the NCCL on this machine.
///
/// # Errors
///
/// [`CollectiveError::Setup`] saying what was tried to open it.
pub fn version() -> Result<Version, CollectiveError> {
    Ok(Library::get().map_err(setup)?.version())
}

/// What must be in the environment of the process of `rank` before it starts, so that ranks may share a GPU: for tests on
/// a machine with fewer GPUs than ranks. Until 2.29 NCCL refuses that, unless it takes the ranks to be on several hosts,
/// and then connects them by sockets.
pub fn shared_gpu_environment(version: Version, rank: usize) -> (&'static str, String) {
    if version >= SHARES_GPUS_SINCE {
        ("NCCL_MULTI_RANK_GPU_ENABLE", "1".to_owned())
    } else {
        ("NCCL_HOSTID", format!("lockstep-rank-{rank}"))
    }
}

/// Connects `member`, which computes on `stream`, to all others that have `id`.
///
/// # Errors
///
/// [`CollectiveError::Setup`] if NCCL is missing or fails, or not all ranks have come by `deadline`;
/// [`CollectiveError::Aborted`].
pub fn connect(
    id: &UniqueId,
    stream: DeviceStream,
    member: Member,
    deadline: Instant,
) -> Result<Endpoint, CollectiveError> {
    member.validate(TRANSPORT)?;
    let library = Library::get().map_err(setup)?;
    let patience = member.patience_until(deadline);
    let communicator = Communicator::connect(library, RawId(id.0), stream, member.clone(), &patience)?;
    Ok(Endpoint::new(member, Staged { communicator, staging: Staging::default() }))
}

fn setup(reason: String) -> CollectiveError {
    CollectiveError::Setup { transport: TRANSPORT, reason }
}

// === impl UniqueId ===

impl UniqueId {
    /// A new one. The ranks meet in the process that made it.
    ///
    /// # Errors
    ///
    /// [`CollectiveError::Setup`] if NCCL is missing, or finds no network interface to listen at.
    pub fn new() -> Result<Self, CollectiveError> {
        let RawId(bytes) = Library::get().and_then(Library::unique_id).map_err(setup)?;
        Ok(Self(bytes))
    }

    /// One that has travelled.
    ///
    /// # Errors
    ///
    /// [`CollectiveError::Setup`] if it is not as long as one.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CollectiveError> {
        let sized = bytes.try_into();
        sized.map(Self).map_err(|_| setup(format!("a unique id of {} bytes, expected {ID_BYTES}", bytes.len())))
    }

    /// As it travels.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever knows the rest could join.
        f.debug_struct("UniqueId").finish_non_exhaustive()
    }
}

// === impl Staged ===

impl Staged {
    /// Puts `values` into the staging memory, `offset` floats from its start, makes `transfer`, and waits for it.
    fn transfer(
        &mut self,
        call: Call,
        (offset, values): (usize, &[f32]),
        transfer: &Transfer<'_>,
        patience: &Patience,
    ) -> Result<(), CollectiveError> {
        let written = self.staging.write(self.communicator.stream(), offset, values);
        written.map_err(failed(call))?;
        self.communicator.enqueue(call, transfer, patience)?;
        self.communicator.wait(patience)
    }

    fn read(&self, call: Call, offset: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.staging.read(self.communicator.stream(), offset, values).map_err(failed(call))
    }

    /// Compares what all ranks do, before any takes what another gives.
    fn compare_calls(&mut self, exchange: &Exchange<'_>, patience: &Patience) -> Result<(), CollectiveError> {
        let &Member { rank, world_size, .. } = self.communicator.member();
        let lengths = vec![CALL_FLOATS; world_size];
        let call = exchange.call(rank);
        let all = self.staging.reserve(world_size * CALL_FLOATS * size_of::<f32>()).map_err(failed(call))?;
        let words = call.encode();
        let transfer = Transfer::AllGather { lengths: &lengths, all };
        self.transfer(call, (rank * CALL_FLOATS, bytemuck::cast_slice(&words)), &transfer, patience)?;
        for peer in self.communicator.member().peers() {
            let mut words = [0_u64; CALL_WORDS];
            self.read(call, peer * CALL_FLOATS, bytemuck::cast_slice_mut(&mut words))?;
            exchange.check(peer, Call::decode(words))?;
        }
        Ok(())
    }

    /// Moves the floats of all ranks, `total` of them, laid out in the staging memory in rank order. A rank that gives
    /// to another's gather has no more than its own there.
    fn move_floats(
        &mut self,
        exchange: &mut Exchange<'_>,
        total: usize,
        patience: &Patience,
    ) -> Result<(), CollectiveError> {
        let rank = self.communicator.member().rank;
        let call = exchange.call(rank);
        // The root of a gather gives from behind the place where all come together.
        let floats = total + exchange.mine.len();
        let all = self.staging.reserve(floats * size_of::<f32>()).map_err(failed(call))?;
        let (offset, transfer) = match exchange.op {
            Op::Gather { root } => {
                let mine = all + (total * size_of::<f32>()) as u64;
                let out = (root == rank).then_some(all);
                (total, Transfer::Gather { root, mine, lengths: exchange.lengths, out })
            }
            _ => (exchange.lengths[..rank].iter().sum(), Transfer::AllGather { lengths: exchange.lengths, all }),
        };
        self.transfer(call, (offset, exchange.mine), &transfer, patience)?;
        if exchange.op.receives(rank) {
            let lower = exchange.theirs.lower.len();
            self.read(call, 0, exchange.theirs.lower)?;
            self.read(call, lower + exchange.mine.len(), exchange.theirs.higher)?;
        }
        Ok(())
    }
}

impl Link for Staged {
    fn exchange(&mut self, mut exchange: Exchange<'_>, patience: &Patience) -> Result<(), CollectiveError> {
        // What device calls have left on the stream: a copy would wait for it without an end.
        self.communicator.wait(patience)?;
        self.compare_calls(&exchange, patience)?;
        match exchange.lengths.iter().sum() {
            0 => Ok(()),
            total => self.move_floats(&mut exchange, total, patience),
        }
    }

    fn communicator(&mut self) -> Option<&mut Communicator> {
        Some(&mut self.communicator)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // A stream that is stuck keeps the memory: to free it would wait for the stream.
        if self.communicator.leave() {
            self.staging.free();
        }
    }
}

fn failed(call: Call) -> impl Fn(String) -> CollectiveError {
    move |reason| CollectiveError::Failed { awaited: Awaited::Enqueued(call), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_a_gpu_by_what_their_nccl_understands() {
        let version = |minor, patch| Version { major: 2, minor, patch };
        assert_eq!(shared_gpu_environment(version(29, 7), 1), ("NCCL_HOSTID", "lockstep-rank-1".to_owned()));
        assert_ne!(shared_gpu_environment(version(29, 7), 0), shared_gpu_environment(version(29, 7), 1));
        assert_eq!(shared_gpu_environment(version(30, 0), 1), ("NCCL_MULTI_RANK_GPU_ENABLE", "1".to_owned()));
    }

    #[test]
    fn an_id_of_another_length_is_refused() {
        let error = UniqueId::from_bytes(&[1; 127]).unwrap_err().to_string();
        assert_eq!(error, "cannot set up the nccl transport: a unique id of 127 bytes, expected 128");
        assert_eq!(UniqueId::from_bytes(&[1; 128]).unwrap().as_bytes(), [1; 128]);
    }
}

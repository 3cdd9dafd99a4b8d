//! A collective: what a rank can do together with all other ranks of its group.

use std::fmt;

use crate::{AbortHandle, CollectiveError, DeviceCollective};

/// One rank's end of a group. All ranks make the same calls in the same order; none of them may be skipped.
///
/// `lengths[r]` is the number of floats that rank `r` gives, equal on every rank; `all` and `out` hold those of all in rank
/// order, `[lengths[0] + lengths[1] + …]`. Floats travel bit for bit.
///
/// # Panics
///
/// Every method panics on arguments that contradict one another (`mine.len() != lengths[rank]`, an `out` of the wrong
/// size, a `root` outside the group): that is a mistake in the caller, on every rank alike.
///
/// # Errors
///
/// Every method fails with a [`CollectiveError`]; after the first one, all later calls fail with the same error.
pub trait Collective: fmt::Debug + Send {
    /// This rank, below [`world_size`](Self::world_size).
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn world_size(&self) -> usize;

    /// Gives this rank's part of `all` to all ranks and takes theirs into the other parts. Returns when the floats of all
    /// ranks have come.
    fn all_gather(&mut self, lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError>;

    /// Gives `mine` to `root`, which alone passes `out`. Other ranks may return before `root` has taken their floats.
    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        lengths: &[usize],
        out: Option<&mut [f32]>,
    ) -> Result<(), CollectiveError>;

    /// Returns when all ranks have called it.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Ends this rank's calls from any other thread.
    fn abort_handle(&self) -> AbortHandle;

    /// The same group between the ranks' devices; `None` if its transport moves floats through host memory, as all but
    /// NCCL do. Then a device's floats must be staged there.
    fn device(&mut self) -> Option<DeviceCollective<'_>> {
        None
    }
}

//! How long a rank waits for the others.

use std::time::{Duration, Instant};

use crate::{AbortHandle, Collective, CollectiveError, DeviceCollective};

/// A collective that adds up the time spent in it. Calls of a [device](Collective::device) return before the floats have
/// moved, so they are not timed.
#[derive(Debug)]
pub struct Timed<'a> {
    inner: &'a mut dyn Collective,
    spent: Duration,
}

impl<'a> Timed<'a> {
    /// Passes all calls on to `inner`.
    pub fn new(inner: &'a mut dyn Collective) -> Self {
        Self { inner, spent: Duration::ZERO }
    }

    /// The time that calls have taken so far.
    pub fn spent(&self) -> Duration {
        self.spent
    }

    fn timed<T>(&mut self, call: impl FnOnce(&mut dyn Collective) -> T) -> T {
        let start = Instant::now();
        let result = call(self.inner);
        self.spent += start.elapsed();
        result
    }
}

impl Collective for Timed<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_gather(&mut self, lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError> {
        self.timed(|inner| inner.all_gather(lengths, all))
    }

    fn gather(
        &mut self,
        root: usize,
        mine: &[f32],
        lengths: &[usize],
        out: Option<&mut [f32]>,
    ) -> Result<(), CollectiveError> {
        self.timed(|inner| inner.gather(root, mine, lengths, out))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.timed(|inner| inner.barrier())
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }

    fn device(&mut self) -> Option<DeviceCollective<'_>> {
        self.inner.device()
    }
}

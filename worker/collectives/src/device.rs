//! A device collective: what a rank's device can do together with all others, without a way through host memory.
//!
//! [`Collective::device`](crate::Collective::device) gives it where the transport has it (NCCL). Its calls are calls of
//! the group like those of [`Collective`](crate::Collective): all ranks make the same ones, of both kinds, in the same
//! order. But they are *enqueued*: each returns once the device's stream holds it, at which time the floats have not
//! moved yet. What is enqueued on the stream later sees them moved. Nothing tells a rank that its peers make another
//! call; it then waits for its [`timeout`](crate::Member::timeout), or gets garbage.
//!
//! So that an abort, a peer's death and the deadline can end every wait, a rank must never wait for its device by other
//! means than [`wait`](DeviceCollective::wait) and [`wait_until`](DeviceCollective::wait_until): with a peer gone, the
//! kernels of a collective spin until they are aborted, and a `cuStreamSynchronize` or a blocking copy never returns.
//!
//! # Progress
//!
//! A call counts in [`Progress`](crate::Progress) when it is enqueued, not when the device comes to it. Then whoever
//! holds the others up is still the one that is behind, as long as what hangs is a host: the others have enqueued what
//! it has not. Counted when finished, the rank that hangs and those that wait for it would stand at the same number.
//! The price: a rank whose *device* hangs is not told from its peers, and ends by the timeout of all of them. And a
//! rank must not enqueue further ahead of the others than a step or so, which is much less than the time after which a
//! rank counts as hung.
//!
//! # Graphs
//!
//! Calls may be captured in a CUDA graph, between [`begin_capture`](DeviceCollective::begin_capture) and
//! [`end_capture`](DeviceCollective::end_capture), which gives the [`Captured`] that
//! [`launch`](DeviceCollective::launch) asks for. They are numbered and count when they are captured and again at each
//! launch, on every rank alike: all capture the same calls at the same place among the others, and launch the graph of
//! that capture together, as NCCL asks. Launches and calls outside of graphs may follow one another without a wait, since
//! communicators are made for that (NCCL's `graphUsageMode` 2, its default). Three more things NCCL wants:
//!
//! - The same calls were made once outside of a graph before, for it connects to peers at first use.
//! - A process has one GPU. With several, a launch may block until the other's is made.
//! - An epoch ends in this order:
//!   1. The communicator is aborted, at the first error on this rank. Then kernels that wait for a peer end, those of a
//!      graph that is on the stream as well, and the call that fails returns when the stream is idle.
//!   2. All graphs of the epoch are dropped, each with its [`Captured`]. Until then NCCL keeps the communicator's memory.
//!   3. The group's end is dropped, which waits for the rest if no graph is left.
//!
//!   To change 2 and 3 is no error, but the memory of the old communicator then stays beside that of the next epoch's. A
//!   graph is never launched on another epoch's group: it holds the addresses of a communicator that is gone.

use std::{any::Any, ffi::c_void, fmt, marker::PhantomData, sync::Arc};

use crate::{
    Call, CollectiveError, Op,
    endpoint::Calls,
    nccl::{communicator::Communicator, transfer::Transfer},
};

pub use crate::nccl::communicator::Captured;

/// The stream on which a rank's device computes, in the device's primary context. Clones are the same stream.
#[derive(Clone)]
pub struct DeviceStream {
    context: *mut c_void,
    stream: *mut c_void,
    id: Arc<str>,
    _owner: Arc<dyn Any + Send + Sync>,
}

/// `T`s in device memory that a collective reads.
#[derive(Clone, Copy)]
pub struct DeviceSlice<'a, T> {
    address: u64,
    len: usize,
    _borrow: PhantomData<&'a [T]>,
}

/// `T`s in device memory that a collective writes.
pub struct DeviceSliceMut<'a, T> {
    address: u64,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

/// One rank's end of a group, as its device sees it. See the module for what every call keeps to.
///
/// # Panics
///
/// As [`Collective`](crate::Collective): on arguments that contradict one another.
///
/// # Errors
///
/// As [`Collective`](crate::Collective): after the first [`CollectiveError`], all later calls fail with the same one. The
/// first one aborts what is still on the stream, so that other waits for the stream end, too.
pub struct DeviceCollective<'a> {
    calls: &'a mut Calls,
    communicator: &'a mut Communicator,
}

// === impl DeviceStream ===

// SAFETY: a context and a stream are handles that every thread of the process may use, which `new` asks for.
unsafe impl Send for DeviceStream {}
// SAFETY: as above; the driver's functions on them are thread-safe.
unsafe impl Sync for DeviceStream {}

impl DeviceStream {
    /// `stream` (a `CUstream`) of `context` (a `CUcontext`). `id` names the device itself, not this process' number for
    /// it: the same on every process that uses it, another on every other device, e.g. its UUID.
    ///
    /// # Safety
    ///
    /// `context` is the primary context of its device, `stream` is one of its streams, and both live until `owner` is
    /// dropped. The CUDA driver is loaded.
    pub unsafe fn new(
        context: *mut c_void,
        stream: *mut c_void,
        id: impl Into<Arc<str>>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { context, stream, id: id.into(), _owner: owner }
    }

    /// Names the device.
    pub fn device_id(&self) -> &str {
        &self.id
    }

    pub(crate) fn context(&self) -> *mut c_void {
        self.context
    }

    pub(crate) fn stream(&self) -> *mut c_void {
        self.stream
    }
}

impl fmt::Debug for DeviceStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceStream").field("id", &self.id).finish_non_exhaustive()
    }
}

// === impl DeviceSlice ===

impl<T> DeviceSlice<'_, T> {
    /// `len` values from `address` (a `CUdeviceptr`).
    ///
    /// # Safety
    ///
    /// The memory is the device's whose [`DeviceStream`] the group has, holds `len` values of `T`, and stays allocated
    /// until the stream has passed whatever is enqueued during the borrow. Whoever else reads or writes it does so in the
    /// order of that stream.
    pub unsafe fn new(address: u64, len: usize) -> Self {
        Self { address, len, _borrow: PhantomData }
    }
}

impl<T> DeviceSliceMut<'_, T> {
    /// `len` values from `address` (a `CUdeviceptr`).
    ///
    /// # Safety
    ///
    /// As [`DeviceSlice::new`].
    pub unsafe fn new(address: u64, len: usize) -> Self {
        Self { address, len, _borrow: PhantomData }
    }
}

impl<T> fmt::Debug for DeviceSlice<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceSlice({:#x}, {})", self.address, self.len)
    }
}

impl<T> fmt::Debug for DeviceSliceMut<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceSliceMut({:#x}, {})", self.address, self.len)
    }
}

// === impl DeviceCollective ===

impl<'a> DeviceCollective<'a> {
    pub(crate) fn new(calls: &'a mut Calls, communicator: &'a mut Communicator) -> Self {
        Self { calls, communicator }
    }

    /// Enqueues [`Collective::all_gather`](crate::Collective::all_gather): this rank's part of `all` goes to all ranks,
    /// theirs come into the other parts.
    pub fn all_gather(&mut self, lengths: &[usize], all: DeviceSliceMut<'_, f32>) -> Result<(), CollectiveError> {
        self.check_lengths(lengths);
        assert_eq!(all.len, lengths.iter().sum::<usize>(), "the floats of all ranks");
        self.enqueue(Op::AllGather, lengths, &Transfer::AllGather { lengths, all: all.address })
    }

    /// Enqueues [`Collective::gather`](crate::Collective::gather): `mine` goes to `root`, which alone passes `out`, and
    /// passes a `mine` outside of it.
    pub fn gather(
        &mut self,
        root: usize,
        mine: DeviceSlice<'_, f32>,
        lengths: &[usize],
        out: Option<DeviceSliceMut<'_, f32>>,
    ) -> Result<(), CollectiveError> {
        self.check_lengths(lengths);
        let rank = self.calls.member.rank;
        assert_eq!(mine.len, lengths[rank], "this rank's floats are as many as its length says");
        assert!(root < lengths.len(), "root {root} is outside the group");
        assert_eq!(out.is_some(), root == rank, "the root alone passes out");
        if let Some(out) = &out {
            assert_eq!(out.len, lengths.iter().sum::<usize>(), "the floats of all ranks");
        }
        let out = out.map(|out| out.address);
        self.enqueue(Op::Gather { root }, lengths, &Transfer::Gather { root, mine: mine.address, lengths, out })
    }

    /// Enqueues a broadcast: the values of rank `root` (sampled token ids, say) become those of all ranks, which pass
    /// equally many.
    pub fn broadcast(&mut self, root: usize, values: DeviceSliceMut<'_, u32>) -> Result<(), CollectiveError> {
        let world_size = self.calls.member.world_size;
        assert!(root < world_size, "root {root} is outside the group");
        let lengths: Vec<usize> = (0..world_size).map(|rank| if rank == root { values.len } else { 0 }).collect();
        let transfer = Transfer::Broadcast { root, values: values.address, len: values.len };
        self.enqueue(Op::Broadcast { root }, &lengths, &transfer)
    }

    /// Enqueues a sum: `values` become, element by element, the sums of those of all ranks, which pass equally many.
    ///
    /// The order of a sum is NCCL's: it changes with the number of ranks, of elements, and NCCL's version. So this
    /// breaks the lockstep rule, and is for those who give it up for speed.
    pub fn all_reduce(&mut self, values: DeviceSliceMut<'_, f32>) -> Result<(), CollectiveError> {
        let lengths = vec![values.len; self.calls.member.world_size];
        self.enqueue(Op::AllReduce, &lengths, &Transfer::AllReduce { values: values.address, len: values.len })
    }

    /// Waits until the device is through all that is on the stream.
    pub fn wait(&mut self) -> Result<(), CollectiveError> {
        let result = self.calls.wait(|patience| self.communicator.wait(patience));
        self.communicator.settle(result)
    }

    /// Waits until `done` says so, e.g. of an event that lies before the stream's end. `done` is asked again and again,
    /// and must not block; if it fails, so does the group.
    pub fn wait_until(&mut self, done: impl FnMut() -> Result<bool, String>) -> Result<(), CollectiveError> {
        let result = self.calls.wait(|patience| self.communicator.wait_until(done, patience));
        self.communicator.settle(result)
    }

    /// From now on calls go into the graph that the device's stream captures, until [`end_capture`](Self::end_capture).
    /// Meanwhile nothing may be waited for.
    pub fn begin_capture(&mut self) {
        self.communicator.begin_capture();
    }

    /// The calls that were captured.
    ///
    /// # Panics
    ///
    /// If no capture has begun.
    pub fn end_capture(&mut self) -> Captured {
        self.communicator.end_capture()
    }

    /// Makes the calls that a graph has captured, by `launch`, which puts the graph on the device's stream.
    ///
    /// # Panics
    ///
    /// If they were captured in another epoch.
    pub fn launch(
        &mut self,
        captured: &Captured,
        launch: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), CollectiveError> {
        let make = |_: &_, first_index, _: &_| self.communicator.launch(captured, first_index, launch);
        let result = self.calls.make(captured.n_calls(), make);
        self.communicator.settle(result)
    }

    fn check_lengths(&self, lengths: &[usize]) {
        assert_eq!(lengths.len(), self.calls.member.world_size, "one length for each rank");
    }

    fn enqueue(&mut self, op: Op, lengths: &[usize], transfer: &Transfer<'_>) -> Result<(), CollectiveError> {
        let result = self.calls.make(1, |member, index, patience| {
            let call = Call::of_floats(index, op, lengths, member.rank);
            self.communicator.enqueue(call, transfer, patience)
        });
        self.communicator.settle(result)
    }
}

impl fmt::Debug for DeviceCollective<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceCollective").field("calls", &self.calls).finish_non_exhaustive()
    }
}

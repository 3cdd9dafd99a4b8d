//! A communicator: NCCL's end of a group, on one device's stream.
//!
//! It is *non-blocking*: NCCL brings the ranks together, and puts a call's kernels on the stream, in a thread of its own.
//! Until that is done, which it says when asked, the communicator may not be used, and the stream not be added to. So
//! every call here asks until then. That takes tens of microseconds, but longer where NCCL first has to connect to a
//! peer, and for ever if that does not come; a *blocking* communicator would then neither see an abort nor a deadline.
//!
//! The thread that has the communicator makes all calls. Only its end is left to another one (see [`Communicator::end`]).
//!
//! Calls may be captured in graphs. What NCCL keeps for those it frees when the graphs are destroyed, for which a
//! communicator waits before it comes to its end, an aborted one, too (`commDestroySync` of `src/init.cc`, 2.30).

use std::{
    ffi::c_int,
    fmt,
    sync::{
        Arc,
        mpsc::{self, Receiver, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    driver,
    library::{IN_PROGRESS, Library, RawComm, RawId, ResultCode, SUCCESS},
    transfer::{Place, Transfer},
};
use crate::{
    Awaited, Call, CollectiveError, DeviceStream, Member,
    member::{Interruption, Patience},
};

/// One rank's end.
pub(crate) struct Communicator {
    library: &'static Library,
    stream: DeviceStream,
    member: Member,
    /// The newest call on the stream.
    newest: Option<Call>,
    /// What a graph is capturing.
    capture: Option<Captured>,
    /// Shared with all that graphs have captured.
    identity: Arc<()>,
    life: Life,
}

/// The calls that a graph has captured. It is kept beside the graph and dropped with it, whereby the group knows how long
/// NCCL must keep what the graph uses.
#[derive(Debug)]
pub struct Captured {
    n_calls: u64,
    newest: Option<Call>,
    communicator: Arc<()>,
}

/// Whether there is a communicator.
enum Life {
    Alive(RawComm),
    /// A thread has it destroyed or aborted, and says when NCCL has come back from that.
    Ending {
        has_ended: Receiver<()>,
        deadline: Instant,
    },
    Ended,
}

/// How a communicator ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// What is on the stream is done first.
    Finalize,
    /// What is on the stream is given up.
    Abort,
}

/// Why a wait ended early.
enum Trouble {
    Interrupted(Interruption),
    Failed(String),
}

/// How long the core is offered to others between two looks, before the thread sleeps: longer than a step that somebody
/// waits for token by token.
const YIELD_FOR: Duration = Duration::from_millis(20);

/// Sleep between two looks afterwards.
const SLEEP: Duration = Duration::from_micros(100);

/// How long a rank that leaves waits for what it has put on the stream.
const FINALIZE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long it waits for its end, which normally takes milliseconds.
const END_TIMEOUT: Duration = Duration::from_secs(5);

// === impl Communicator ===

// SAFETY: NCCL asks that one thread at a time uses a communicator, not that it is always the same.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Brings `member` together with all others who have `id`.
    pub(super) fn connect(
        library: &'static Library,
        id: RawId,
        stream: DeviceStream,
        member: Member,
        patience: &Patience,
    ) -> Result<Self, CollectiveError> {
        driver::enter(&stream).map_err(super::setup)?;
        // SAFETY: the context is current.
        let (comm, code) = unsafe { library.init(id, member.rank as c_int, member.world_size as c_int) };
        let life = if comm.is_null() { Life::Ended } else { Life::Alive(comm) };
        let (capture, identity) = (None, Arc::new(()));
        let mut communicator = Self { library, stream, member, newest: None, capture, identity, life };
        let state = library.check(code).map_err(Trouble::Failed).and_then(|()| communicator.until_ready(patience));
        state.map_err(|trouble| {
            communicator.end(Ending::Abort);
            match trouble {
                Trouble::Interrupted(Interruption::Aborted) => CollectiveError::Aborted,
                Trouble::Interrupted(_) => super::setup("not all ranks have come in time".to_owned()),
                Trouble::Failed(reason) => super::setup(reason),
            }
        })?;
        Ok(communicator)
    }

    pub(super) fn stream(&self) -> &DeviceStream {
        &self.stream
    }

    pub(super) fn member(&self) -> &Member {
        &self.member
    }

    /// Puts a transfer on the stream. Memory that it names must be the device's, and stay until the stream has passed it.
    pub(crate) fn enqueue(
        &mut self,
        call: Call,
        transfer: &Transfer<'_>,
        patience: &Patience,
    ) -> Result<(), CollectiveError> {
        let awaited = Awaited::Enqueued(call);
        let result = self.start(transfer).map_err(Trouble::Failed).and_then(|()| self.until_ready(patience));
        result.map_err(|trouble| trouble.during(awaited, patience))?;
        match &mut self.capture {
            None => self.newest = Some(call),
            Some(capture) => {
                capture.n_calls += 1;
                capture.newest = Some(call);
            }
        }
        Ok(())
    }

    /// From now on, calls go into a graph.
    pub(crate) fn begin_capture(&mut self) {
        self.capture = Some(Captured { n_calls: 0, newest: None, communicator: Arc::clone(&self.identity) });
    }

    /// The calls since then.
    pub(crate) fn end_capture(&mut self) -> Captured {
        self.capture.take().expect("a capture has begun")
    }

    /// Launches a graph, whose calls are numbered from `first_index` on.
    pub(crate) fn launch(
        &mut self,
        captured: &Captured,
        first_index: u64,
        launch: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), CollectiveError> {
        assert!(Arc::ptr_eq(&captured.communicator, &self.identity), "a graph of this epoch");
        let index = first_index + captured.n_calls.saturating_sub(1);
        let newest = captured.newest.map(|call| Call { index, ..call });
        let awaited = newest.map_or(Awaited::Device { newest: self.newest }, Awaited::Enqueued);
        let launched = driver::enter(&self.stream).and_then(|()| launch());
        launched.map_err(|reason| CollectiveError::Failed { awaited, reason })?;
        self.newest = newest.or(self.newest);
        Ok(())
    }

    /// Waits until the device is through all that is on the stream.
    pub(crate) fn wait(&self, patience: &Patience) -> Result<(), CollectiveError> {
        // What is on the stream now: this thread, the only one that adds to it, is here.
        self.wait_until(|| driver::is_idle(&self.stream), patience)
    }

    /// Waits until `done` says so.
    pub(crate) fn wait_until(
        &self,
        mut done: impl FnMut() -> Result<bool, String>,
        patience: &Patience,
    ) -> Result<(), CollectiveError> {
        let entered = driver::enter(&self.stream).map_err(Trouble::Failed);
        let waited = entered.and_then(|()| self.poll(|_| done(), patience));
        waited.map_err(|trouble| trouble.during(Awaited::Device { newest: self.newest }, patience))
    }

    /// Aborts the communicator if a call has failed: peers are not in step any more, and what is left on the stream might
    /// wait for them without an end.
    pub(crate) fn settle(&mut self, result: Result<(), CollectiveError>) -> Result<(), CollectiveError> {
        if result.is_err() {
            self.end(Ending::Abort);
        }
        result
    }

    /// Leaves the group. Returns whether the stream can become idle.
    pub(super) fn leave(&mut self) -> bool {
        self.end(if self.member.abort.is_aborted() { Ending::Abort } else { Ending::Finalize });
        matches!(self.life, Life::Ended) || self.is_idle() == Ok(true)
    }

    /// Ends the communicator, if that has not happened. NCCL does that in the calling thread, and may wait there for
    /// ever: for a graph that is not dropped, for a device that hangs. So the thread is one that can be left alone.
    fn end(&mut self, ending: Ending) {
        if let Life::Alive(comm) = self.life {
            let (library, stream, comm) = (self.library, self.stream.clone(), Handed(comm));
            let (ended, has_ended) = mpsc::sync_channel(1);
            let thread = thread::Builder::new().name("nccl-end".into()).spawn(move || {
                let Handed(comm) = { comm };
                // Without a context NCCL finds the device by itself.
                let _entered = driver::enter(&stream);
                end(library, comm, ending);
                let _too_late = ended.send(());
            });
            let ending = Life::Ending { has_ended, deadline: Instant::now() + END_TIMEOUT };
            self.life = if thread.is_ok() { ending } else { Life::Ended };
        }
        self.await_end();
    }

    /// Waits until the communicator is at its end, or all that can be waited for is: while there are graphs it is not, but
    /// the stream becomes idle.
    fn await_end(&mut self) {
        while let Life::Ending { has_ended, deadline } = &self.life {
            if has_ended.try_recv() != Err(TryRecvError::Empty) {
                self.life = Life::Ended;
            } else if Instant::now() >= *deadline || (self.has_graphs() && self.is_idle() != Ok(false)) {
                return;
            } else {
                thread::sleep(SLEEP);
            }
        }
    }

    fn is_idle(&self) -> Result<bool, String> {
        driver::enter(&self.stream).and_then(|()| driver::is_idle(&self.stream))
    }

    /// Whether there are graphs that have captured calls.
    fn has_graphs(&self) -> bool {
        Arc::strong_count(&self.identity) > 1
    }

    /// Waits until NCCL has carried out the last call, so that the stream holds it.
    fn until_ready(&self, patience: &Patience) -> Result<(), Trouble> {
        self.poll(|state| Ok(state == SUCCESS), patience)
    }

    /// Looks at NCCL's state again and again until `done`, which is told that state, says so.
    fn poll(
        &self,
        mut done: impl FnMut(ResultCode) -> Result<bool, String>,
        patience: &Patience,
    ) -> Result<(), Trouble> {
        let start = Instant::now();
        loop {
            let state = self.state();
            self.library.check(state).map_err(Trouble::Failed)?;
            if done(state).map_err(Trouble::Failed)? {
                return Ok(());
            }
            patience.left().map_err(Trouble::Interrupted)?;
            if start.elapsed() < YIELD_FOR { thread::yield_now() } else { thread::sleep(SLEEP) }
        }
    }

    fn state(&self) -> ResultCode {
        match self.life {
            // SAFETY: it is alive.
            Life::Alive(comm) => unsafe { self.library.state(comm) },
            // No call comes here after the first error.
            Life::Ending { .. } | Life::Ended => SUCCESS,
        }
    }

    /// Makes NCCL's calls for `transfer`.
    fn start(&self, transfer: &Transfer<'_>) -> Result<(), String> {
        let Life::Alive(comm) = self.life else { return Err("the communicator has ended".to_owned()) };
        driver::enter(&self.stream)?;
        let place = Place { library: self.library, comm, stream: self.stream.stream(), rank: self.member.rank };
        // SAFETY: the communicator is alive and ready, for every call waits until it is, or fails for good. The memory is
        // what the makers of `DeviceSlice`s have promised, and `DeviceCollective` has checked the lengths.
        let code = unsafe { place.start(transfer) };
        self.library.check(code)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator").field("member", &self.member).finish_non_exhaustive()
    }
}

// === impl Captured ===

impl Captured {
    /// How many they are.
    pub fn n_calls(&self) -> u64 {
        self.n_calls
    }
}

/// A communicator on its way to the thread that ends it.
struct Handed(RawComm);

// SAFETY: the thread that had it uses it no more.
unsafe impl Send for Handed {}

/// Ends `comm`, which nobody else uses.
fn end(library: &'static Library, comm: RawComm, ending: Ending) {
    let functions = library.functions();
    if ending == Ending::Finalize && finalize(library, comm) {
        // SAFETY: it is finalized, and used no more.
        unsafe { (functions.comm_destroy)(comm) };
        return;
    }
    // SAFETY: it has not been destroyed, and is used no more.
    unsafe { (functions.comm_abort)(comm) };
}

/// Waits for what `comm` has on the stream. Returns whether that is done.
fn finalize(library: &'static Library, comm: RawComm) -> bool {
    let deadline = Instant::now() + FINALIZE_TIMEOUT;
    // SAFETY: it is alive.
    if !matches!(unsafe { (library.functions().comm_finalize)(comm) }, SUCCESS | IN_PROGRESS) {
        return false;
    }
    loop {
        // SAFETY: as above.
        match unsafe { library.state(comm) } {
            SUCCESS => return true,
            IN_PROGRESS if Instant::now() < deadline => thread::sleep(SLEEP),
            _ => return false,
        }
    }
}

// === impl Trouble ===

impl Trouble {
    fn during(self, awaited: Awaited, patience: &Patience) -> CollectiveError {
        match self {
            Self::Failed(reason) => CollectiveError::Failed { awaited, reason },
            Self::Interrupted(Interruption::Aborted) => CollectiveError::Aborted,
            Self::Interrupted(Interruption::TimedOut | Interruption::PeerGone) => {
                CollectiveError::NotDone { awaited, timeout_ms: patience.timeout.as_millis() }
            }
        }
    }
}

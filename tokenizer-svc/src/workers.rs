//! Workers: a bounded number of threads for work that takes long, off the async runtime. What takes less time than to wake
//! one of them is done where it is asked for ([`Workers::run_here`]), as many at a time as the runtime has threads.
//!
//! A request first takes a place in the waiting room, or is refused at once; then it waits for a thread. Both are
//! given back when the work has really ended, also if the caller has long gone, so the bounds hold whatever callers do.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::error::{Error, Reason};
use prometheus_client::metrics::gauge::Gauge;
use tokio::{sync::Semaphore, task, time};

use crate::{config::WorkLimits, metrics::Present};

/// When to come back if the waiting room is full: about as long as a full one takes to empty.
const RETRY_AFTER: Duration = Duration::from_millis(250);

/// The threads and the waiting room. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Workers {
    threads: Arc<Semaphore>,
    places: Arc<Semaphore>,
    jobs: Gauge,
}

// === impl Workers ===

impl Workers {
    /// `jobs` shows how many calls run or wait.
    pub(crate) fn new(limits: WorkLimits, jobs: Gauge) -> Self {
        let places = (limits.threads as usize).saturating_add(limits.max_waiting as usize).min(Semaphore::MAX_PERMITS);
        let threads = (limits.threads as usize).min(Semaphore::MAX_PERMITS);
        Self { threads: Arc::new(Semaphore::new(threads)), places: Arc::new(Semaphore::new(places)), jobs }
    }

    /// Runs `work` on a thread, unless `deadline` passes before one is free.
    ///
    /// # Errors
    /// `OVERLOADED` if the waiting room is full, `DEADLINE_EXCEEDED` if the deadline passed, `INTERNAL` if the work
    /// panicked, and what the work returns.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        deadline: Option<Instant>,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            Error::new(Reason::Overloaded, "every thread is busy and the waiting room is full").retry_after(RETRY_AFTER)
        })?;
        let present = Present::new(&self.jobs);
        let thread = Arc::clone(&self.threads).acquire_owned();
        let thread = match deadline {
            Some(deadline) => time::timeout_at(deadline.into(), thread).await,
            None => Ok(thread.await),
        };
        let thread =
            thread.map_err(|_| Error::new(Reason::Deadline, "the deadline passed before a thread was free"))?;
        let running = task::spawn_blocking(move || {
            let _held_until_done = (place, present, thread);
            work()
        });
        running.await.unwrap_or_else(|e| {
            tracing::error!(error = %e, "the tokenizer panicked");
            Err(broken())
        })
    }

    /// Runs `work` at once, where the caller is: waking a thread takes longer than short work.
    ///
    /// # Errors
    /// `DEADLINE_EXCEEDED` if the deadline has passed, `INTERNAL` if the work panicked, and what the work returns.
    pub(crate) fn run_here<T>(deadline: Option<Instant>, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Error::new(Reason::Deadline, "the deadline passed before the work began"));
        }
        panic::catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            tracing::error!("the tokenizer panicked");
            Err(broken())
        })
    }
}

fn broken() -> Error {
    Error::new(Reason::Internal, "the tokenizer failed on this request")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn workers() -> Workers {
        Workers::new(WorkLimits { threads: 1, max_waiting: 1 }, Gauge::default())
    }

    #[tokio::test]
    async fn a_full_waiting_room_refuses_at_once_and_empties_again() {
        let workers = workers();
        let (release, held) = mpsc::channel::<()>();
        let busy = workers.run(None, move || Ok(held.recv().is_err()));
        let waiting = workers.run(None, || Ok(true));
        tokio::pin!(busy, waiting);
        assert!(futures_pending(&mut busy).await && futures_pending(&mut waiting).await);
        let refusal = workers.run(None, || Ok(())).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::Overloaded);
        assert!(refusal.retry_delay().is_some());
        drop(release);
        assert!(busy.await.unwrap() && waiting.await.unwrap());
        assert_eq!(workers.run(None, || Ok(7)).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn expired_work_never_starts() {
        let workers = workers();
        let (release, held) = mpsc::channel::<()>();
        let busy = workers.run(None, move || Ok(held.recv().is_err()));
        tokio::pin!(busy);
        assert!(futures_pending(&mut busy).await);
        let soon = Instant::now() + Duration::from_millis(1);
        let refusal = workers.run(Some(soon), || -> Result<(), Error> { panic!("it started") }).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::Deadline);
        let refusal = Workers::run_here(Some(soon), || -> Result<(), Error> { panic!("it started") }).unwrap_err();
        assert_eq!(refusal.reason(), Reason::Deadline);
        drop(release);
        busy.await.unwrap();
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_frees_the_thread() {
        let workers = workers();
        let refusal = workers.run(None, || -> Result<(), Error> { panic!("on purpose") }).await.unwrap_err();
        assert_eq!(refusal.reason(), Reason::Internal);
        assert!(workers.run(None, || Ok(true)).await.unwrap());
        let refusal = Workers::run_here(None, || -> Result<(), Error> { panic!("on purpose") }).unwrap_err();
        assert_eq!(refusal.reason(), Reason::Internal);
    }

    /// Polls a future once; whether it has not ended.
    async fn futures_pending<F: Future + Unpin>(future: &mut F) -> bool {
        std::future::poll_fn(|cx| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(cx).is_pending())).await
    }
}

//! The pool: OS threads that take the numbered tasks of one job after another.
//!
//! Each thread has a share of neighbouring tasks, so that it reads memory in one stream; one that is done with its own
//! share goes on with what is left of the others'. A thread that the system does not schedule, or whose core somebody
//! else uses, thus makes the job slower but does not hold it up.
//!
//! A job is open from [`Pool::run`] until its tasks have all been claimed; then it is closed, and `run` returns when no
//! worker is inside any more. A worker that wakes too late finds the job closed and goes back to sleep, so a thread that
//! the system does not schedule costs its share of the work, but nobody waits for it to start. Between jobs workers spin
//! briefly, then park.
//!
//! Which thread runs which task, and when, is left open; tasks must not depend on each other.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

/// Turns of the spin loop before a thread parks. Between the ops of one step there are microseconds; this many turns
/// take some tens of them, so that a decode loop never pays for a wake-up and an idle worker soon costs nothing.
const SPIN_TURNS: usize = if cfg!(miri) { 2 } else { 2_000 };

/// Bytes between the counters of two shares: processors fetch cache lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Share {
    /// The next task of the share to claim.
    next_task: AtomicUsize,
}

/// In [`Shared::state`]: the job is open to workers. The bits below count the workers inside; those above count jobs.
const OPEN: usize = 1 << 16;
/// In [`Shared::state`]: one job further.
const NEXT_JOB: usize = OPEN << 1;
/// In [`Shared::state`]: the workers inside.
const INSIDE: usize = OPEN - 1;
/// In [`Shared::state`]: all ones when the pool is being dropped. No job count gets there.
const SHUT_DOWN: usize = usize::MAX;

/// The most threads a pool may have, the caller included.
pub(crate) const MAX_THREADS: usize = 1_024;

/// Threads that run jobs for whoever owns the pool.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    state: AtomicUsize,
    /// The job. Written by the owner while `state` is closed with nobody inside; read by threads that are inside.
    job: UnsafeCell<Job>,
    /// One for each thread, the owner's first.
    shares: Box<[Share]>,
    /// What a task panicked with, for the owner to go on with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A job with its lifetime erased.
#[derive(Clone, Copy)]
struct Job {
    run_task: *const (dyn Fn(usize) + Sync),
    n_tasks: usize,
    owner: *const Thread,
}

// SAFETY: `job` is the only part that is not `Sync` by itself. `Pool::run` writes it only while the state is closed and
// counts nobody inside, and workers read it only between entering and leaving, which the state's atomic updates order.
unsafe impl Sync for Shared {}
// SAFETY: the pointers in `job` are followed only inside an open job, whose closure is `Sync` and outlives it.
unsafe impl Send for Shared {}

// === impl Pool ===

impl Pool {
    /// A pool of `n_threads`, the caller being one of them.
    ///
    /// # Panics
    /// If `n_threads` is 0 or over [`MAX_THREADS`], or the system refuses a thread.
    pub(crate) fn new(n_threads: usize) -> Self {
        assert!((1..=MAX_THREADS).contains(&n_threads), "a pool of {n_threads} threads");
        let shared = Arc::new(Shared {
            state: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { run_task: &|_| (), n_tasks: 0, owner: std::ptr::null() }),
            shares: (0..n_threads).map(|_| Share::default()).collect(),
            panic: Mutex::new(None),
        });
        let spawn = |thread_idx: usize| {
            let shared = Arc::clone(&shared);
            let named = thread::Builder::new().name(format!("kernels-{thread_idx}"));
            named.spawn(move || shared.work(thread_idx)).expect("the system grants a thread")
        };
        let workers = (1..n_threads).map(spawn).collect();
        Self { shared, workers }
    }

    /// Threads, the caller included.
    pub(crate) fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `run_task` once for each of `0..n_tasks`, on any thread in any order, and returns when all are done.
    ///
    /// # Panics
    /// If a task does; the first payload is passed on, and tasks not yet claimed are not run.
    pub(crate) fn run(&mut self, n_tasks: usize, run_task: &(dyn Fn(usize) + Sync)) {
        if n_tasks <= 1 || self.workers.is_empty() {
            (0..n_tasks).for_each(run_task);
            return;
        }
        let owner = thread::current();
        // SAFETY: only the lifetime changes. `Opened::drop` below waits, on every way out of this function, until no
        // worker is inside the job, and workers use the pointer only while inside.
        let run_task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(run_task) };
        let opened = Opened::new(&self.shared, Job { run_task, n_tasks, owner: &owner }, &self.workers);
        self.shared.run_tasks(run_task, n_tasks, 0);
        drop(opened);
        let panic = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.store(SHUT_DOWN, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its tasks, so there is nothing to learn from how it ended.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("n_threads", &self.n_threads()).finish_non_exhaustive()
    }
}

/// A job that workers may enter; dropping it closes the job and waits for them.
struct Opened<'a> {
    shared: &'a Shared,
}

// === impl Opened ===

impl<'a> Opened<'a> {
    fn new(shared: &'a Shared, job: Job, workers: &[JoinHandle<()>]) -> Self {
        for (thread_idx, share) in shared.shares.iter().enumerate() {
            share.next_task.store(shared.start_of_share(thread_idx, job.n_tasks), Ordering::Relaxed);
        }
        // SAFETY: the state is closed and counts nobody inside: it starts so, `Opened::drop` left it so, and only the
        // owner's exclusive borrow of the pool opens it. So no thread reads the job now.
        unsafe { *shared.job.get() = job };
        let state = shared.state.load(Ordering::Relaxed);
        let next = state.wrapping_add(NEXT_JOB | OPEN);
        // `SHUT_DOWN` is skipped; it is 2^47 jobs away.
        shared.state.store(next, Ordering::Release);
        workers.iter().for_each(|worker| worker.thread().unpark());
        Self { shared }
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        // Also after a panic of the owner's own task: nobody shall begin another one.
        self.shared.close_shares();
        let mut state = self.shared.state.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut n_turns = 0;
        while state & INSIDE != 0 {
            if n_turns < SPIN_TURNS {
                n_turns += 1;
                std::hint::spin_loop();
            } else {
                thread::park();
            }
            state = self.shared.state.load(Ordering::Acquire);
        }
    }
}

// === impl Shared ===

impl Shared {
    /// Where the share of a thread begins, and that of the one before ends.
    fn start_of_share(&self, thread_idx: usize, n_tasks: usize) -> usize {
        n_tasks * thread_idx / self.shares.len()
    }

    /// Claims and runs tasks until there are none, those of the thread's own share first. A panic is kept for the owner
    /// and ends the claiming everywhere.
    fn run_tasks(&self, run_task: &(dyn Fn(usize) + Sync), n_tasks: usize, thread_idx: usize) {
        let claim_all = || {
            let n_shares = self.shares.len();
            for share_idx in (thread_idx..n_shares).chain(0..thread_idx) {
                let end = self.start_of_share(share_idx + 1, n_tasks);
                loop {
                    let task_idx = self.shares[share_idx].next_task.fetch_add(1, Ordering::Relaxed);
                    if task_idx >= end {
                        break;
                    }
                    run_task(task_idx);
                }
            }
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(claim_all)) {
            self.close_shares();
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }

    /// Leaves nothing to claim.
    fn close_shares(&self) {
        self.shares.iter().for_each(|share| share.next_task.store(usize::MAX / 2, Ordering::Relaxed));
    }

    /// A worker's life.
    fn work(&self, thread_idx: usize) {
        let mut last_job = 0;
        let mut n_turns = 0;
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state == SHUT_DOWN {
                return;
            }
            if state & OPEN != 0 && state & !INSIDE != last_job {
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    last_job = state & !INSIDE;
                    n_turns = 0;
                    self.run_job(thread_idx);
                }
            } else if n_turns < SPIN_TURNS {
                n_turns += 1;
                std::hint::spin_loop();
            } else {
                thread::park();
            }
        }
    }

    /// A worker's part in the job that it has just entered; leaves it.
    fn run_job(&self, thread_idx: usize) {
        // SAFETY: this thread is inside, so the owner does not write the job until it has left.
        let job = unsafe { *self.job.get() };
        // SAFETY: the owner keeps the closure alive until everybody has left.
        self.run_tasks(unsafe { &*job.run_task }, job.n_tasks, thread_idx);
        // SAFETY: the owner's handle, too, is alive until everybody has left.
        let owner = unsafe { (*job.owner).clone() };
        let state = self.state.fetch_sub(1, Ordering::AcqRel);
        if state & OPEN == 0 && state & INSIDE == 1 {
            owner.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_task_runs_once_in_every_job() {
        for n_threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(n_threads);
            for n_tasks in [0, 1, 2, 7, 100].into_iter().cycle().take(if cfg!(miri) { 10 } else { 5_000 }) {
                let counts: Vec<AtomicU64> = (0..n_tasks).map(|_| AtomicU64::new(0)).collect();
                pool.run(n_tasks, &|task_idx| {
                    counts[task_idx].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(3);
        for bad_task in 0..8 {
            let run =
                AssertUnwindSafe(|| pool.run(8, &|task_idx| assert!(task_idx != bad_task, "task {task_idx} failed")));
            let payload = catch_unwind(run).unwrap_err();
            assert_eq!(payload.downcast_ref::<String>().unwrap(), &format!("task {bad_task} failed"));
        }
        let sum = AtomicU64::new(0);
        pool.run(10, &|task_idx| {
            sum.fetch_add(task_idx as u64, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn parked_workers_wake_for_the_next_job() {
        let mut pool = Pool::new(2);
        let main = thread::current().id();
        // With the caller's task waiting for it, the other task must be run by the worker, asleep or not.
        for _ in 0..20 {
            let barrier = std::sync::Barrier::new(2);
            let n_elsewhere = AtomicU64::new(0);
            pool.run(2, &|_| {
                barrier.wait();
                n_elsewhere.fetch_add(u64::from(thread::current().id() != main), Ordering::Relaxed);
            });
            assert_eq!(n_elsewhere.into_inner(), 1);
            for _ in 0..50 {
                thread::yield_now();
            }
        }
    }
}

//! A desk: the words by which one rank tells the others how far it is, and at which it sleeps.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use rustix::{
    io::Errno,
    thread::futex::{self, Flags},
};

use crate::member::timespec;

/// One rank's words. All zero: nobody has sat down yet.
///
/// The first cache line is written once a round and looked at by all peers; the second is written only around sleeps.
/// Lines are counted as 128 bytes, since processors fetch them in pairs.
#[repr(C, align(128))]
pub(crate) struct Desk {
    published: Line<AtomicU32>,
    state: AtomicU32,
    pid: AtomicU32,
    pid_namespace: AtomicU64,
    /// 0: for nobody, otherwise a rank + 1.
    waits_for: AtomicU32,
    doorbell: AtomicU32,
}

#[repr(C, align(128))]
struct Line<T>(T);

/// The process that a rank runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tenant {
    pub(crate) pid: u32,
    /// Identifies the namespace in which `pid` counts; 0 where it cannot be known.
    pub(crate) pid_namespace: u64,
}

// States of a desk, in the order in which they are passed.
const FREE: u32 = 0;
const SITTING_DOWN: u32 = 1;
const TAKEN: u32 = 2;
const LEFT: u32 = 3;

// === impl Tenant ===

impl Tenant {
    pub(crate) fn this_process() -> Self {
        let pid_namespace = rustix::fs::stat("/proc/self/ns/pid").map_or(0, |stat| stat.st_ino);
        Self { pid: std::process::id(), pid_namespace }
    }
}

// === impl Desk ===

// A rank writes `published` and then reads peers' `waits_for`; a peer writes `waits_for` and then reads `published`.
// One of the two must see the other's write, or the peer would sleep on: hence the sequential consistency.
impl Desk {
    /// Sits down, unless somebody has already.
    pub(crate) fn take(&self, tenant: &Tenant) -> bool {
        if self.state.compare_exchange(FREE, SITTING_DOWN, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return false;
        }
        self.pid.store(tenant.pid, Ordering::Relaxed);
        self.pid_namespace.store(tenant.pid_namespace, Ordering::Relaxed);
        self.state.store(TAKEN, Ordering::SeqCst);
        true
    }

    /// Who sits here, or sat here at the end.
    pub(crate) fn tenant(&self) -> Option<Tenant> {
        let seated = matches!(self.state.load(Ordering::SeqCst), TAKEN | LEFT);
        seated.then(|| Tenant {
            pid: self.pid.load(Ordering::Relaxed),
            pid_namespace: self.pid_namespace.load(Ordering::Relaxed),
        })
    }

    pub(crate) fn leave(&self) {
        self.state.store(LEFT, Ordering::SeqCst);
    }

    pub(crate) fn is_left(&self) -> bool {
        self.state.load(Ordering::SeqCst) == LEFT
    }

    /// Makes known what the slot of `round` holds.
    pub(crate) fn publish(&self, round: u32) {
        self.published.0.store(round, Ordering::SeqCst);
    }

    /// Whether the rank has published `round`. Rounds wrap, and ranks are at most one apart.
    pub(crate) fn has_published(&self, round: u32) -> bool {
        self.published.0.load(Ordering::SeqCst).wrapping_sub(round).cast_signed() >= 0
    }

    /// Says for whom the rank at this desk waits.
    pub(crate) fn wait_for(&self, peer: Option<usize>) {
        self.waits_for.store(peer.map_or(0, |peer| peer as u32 + 1), Ordering::SeqCst);
    }

    pub(crate) fn waits_for(&self, rank: usize) -> bool {
        self.waits_for.load(Ordering::SeqCst) == rank as u32 + 1
    }

    /// Changes with every ring.
    pub(crate) fn doorbell(&self) -> u32 {
        self.doorbell.load(Ordering::SeqCst)
    }

    /// Wakes the rank that sleeps here.
    pub(crate) fn ring(&self) {
        self.doorbell.fetch_add(1, Ordering::SeqCst);
        // Can fail only for an address that is not mapped.
        let _woken = futex::wake(&self.doorbell, Flags::empty(), 1);
    }

    /// Sleeps until a ring that came after `doorbell` was read, at most `limit`. Returns whether it may have rung.
    pub(crate) fn sleep(&self, doorbell: u32, limit: Duration) -> bool {
        futex::wait(&self.doorbell, Flags::empty(), doorbell, Some(&timespec(limit))) != Err(Errno::TIMEDOUT)
    }
}

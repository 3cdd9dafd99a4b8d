//! An abort: the end of one rank's calls, declared by a thread that is not in one.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// Ends the calls of one rank: the one that waits now and all later ones fail with
/// [`CollectiveError::Aborted`](crate::CollectiveError::Aborted). Clones are the same handle.
#[derive(Clone, Default)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    aborted: AtomicBool,
    // Held only to add a waker or to call them; a transport adds one when it is set up.
    wakers: Mutex<Vec<Waker>>,
}

type Waker = Box<dyn Fn() + Send + Sync>;

// === impl AbortHandle ===

impl AbortHandle {
    /// A handle that nobody has used.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the rank's calls, now and for good.
    pub fn abort(&self) {
        self.shared.aborted.store(true, Ordering::SeqCst);
        for wake in self.shared.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            wake();
        }
    }

    /// Whether [`abort`](Self::abort) was called.
    pub fn is_aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::SeqCst)
    }

    /// Has `wake` called at every abort, from the aborting thread; at once if the abort has come already.
    pub(crate) fn on_abort(&self, wake: impl Fn() + Send + Sync + 'static) {
        let mut wakers = self.shared.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_aborted() {
            wake();
        }
        wakers.push(Box::new(wake));
    }
}

impl fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AbortHandle").field("aborted", &self.is_aborted()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn a_waker_that_comes_after_the_abort_is_called_too() {
        let handle = AbortHandle::new();
        let calls = Arc::new(AtomicUsize::new(0));
        let add = |calls: &Arc<AtomicUsize>| {
            let calls = Arc::clone(calls);
            move || {
                calls.fetch_add(1, Ordering::SeqCst);
            }
        };
        handle.on_abort(add(&calls));
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        handle.clone().abort();
        assert!(handle.is_aborted());
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        handle.on_abort(add(&calls));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }
}

//! Aborts: which requests run, by the names that their callers gave them, so that others can end them.
//!
//! There is one entry for each call that runs, which the server bounds. Names may repeat; an abort ends all that have it.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// See the module's documentation. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Aborts {
    /// Locked for a look-up at a time, never over an await.
    entries: Arc<Mutex<Entries>>,
}

#[derive(Debug, Default)]
struct Entries {
    /// By name, and by a number that no two have.
    by_name: BTreeMap<(String, u64), CancellationToken>,
    next: u64,
}

/// A request that runs, until this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    aborts: Aborts,
    key: (String, u64),
    aborted: CancellationToken,
}

// === impl Aborts ===

impl Aborts {
    pub(super) fn enter(&self, request_id: &str) -> Running {
        let aborted = CancellationToken::new();
        let key = self.with(|entries| {
            let key = (request_id.to_owned(), entries.next);
            entries.next += 1;
            entries.by_name.insert(key.clone(), aborted.clone());
            key
        });
        Running { aborts: self.clone(), key, aborted }
    }

    /// Ends every request of this name.
    pub(super) fn abort(&self, request_id: &str) {
        let all = (request_id.to_owned(), 0)..=(request_id.to_owned(), u64::MAX);
        self.with(|entries| entries.by_name.range(all).for_each(|(_, aborted)| aborted.cancel()));
    }

    fn with<T>(&self, change: impl FnOnce(&mut Entries) -> T) -> T {
        // Nothing under the lock panics half-way.
        change(&mut self.entries.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

// === impl Running ===

impl Running {
    /// What comes of `future`; none if the request is aborted first.
    pub(super) async fn unless_aborted<T>(&self, future: impl Future<Output = T>) -> Option<T> {
        self.aborted.run_until_cancelled(future).await
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.aborts.with(|entries| entries.by_name.remove(&self.key));
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn an_abort_ends_all_that_have_the_name_and_nobody_else() {
        let aborts = Aborts::default();
        let (first, second, other) = (aborts.enter("a"), aborts.enter("a"), aborts.enter("ab"));
        aborts.abort("a");
        for aborted in [&first, &second] {
            assert_eq!(aborted.unless_aborted(pending::<()>()).await, None);
        }
        assert_eq!(other.unless_aborted(ready(1)).await, Some(1));
        let later = aborts.enter("a");
        assert_eq!(later.unless_aborted(ready(2)).await, Some(2));
    }

    #[test]
    fn a_request_that_has_ended_leaves_nothing_behind() {
        let aborts = Aborts::default();
        drop((aborts.enter("a"), aborts.enter("a")));
        assert!(aborts.with(|entries| entries.by_name.is_empty()));
    }
}

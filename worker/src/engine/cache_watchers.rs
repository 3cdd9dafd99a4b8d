//! Cache watchers: who keeps a copy of what the prefix cache holds. They get all of it at first, and then every change,
//! step by step.
//!
//! The step loop never waits for them: one that falls behind is cut off, and may watch anew. While nobody watches, no
//! change is noted.

use std::sync::{Arc, OnceLock};

use tokio::sync::mpsc;

use super::{EVENT_QUEUE, EngineError, handle};
use crate::{
    kv::prefix_cache::{Change, Content},
    scheduler::Scheduler,
};

/// Watchers at a time. Each takes a little of the step loop's time, and routers are few.
const MAX_WATCHERS: usize = 16;

/// What changed in one step, in order.
type Changes = Arc<[Change]>;

/// A watcher's end.
#[derive(Debug)]
pub struct CacheWatch {
    /// What the cache held at first, every block behind those before it.
    pub held: Vec<Content>,
    changes: mpsc::Receiver<Changes>,
    failure: Arc<OnceLock<EngineError>>,
}

/// The engine's end.
#[derive(Debug)]
struct Watcher {
    changes: mpsc::Sender<Changes>,
    failure: Arc<OnceLock<EngineError>>,
}

/// All watchers.
#[derive(Debug, Default)]
pub(super) struct CacheWatchers(Vec<Watcher>);

// === impl CacheWatch ===

impl CacheWatch {
    /// What changes next, in order.
    ///
    /// # Errors
    /// Why there is nothing more to learn.
    pub async fn changes(&mut self) -> Result<Changes, EngineError> {
        let failure = || self.failure.get().cloned().unwrap_or_else(handle::stopped);
        self.changes.recv().await.ok_or_else(failure)
    }
}

// === impl CacheWatchers ===

impl CacheWatchers {
    pub(super) fn add(&mut self, scheduler: &mut Scheduler) -> Result<CacheWatch, EngineError> {
        // What has changed by now is in what the cache holds now.
        self.tell(scheduler);
        if self.0.len() >= MAX_WATCHERS {
            return Err(EngineError::TooManyWatchers { limit: MAX_WATCHERS });
        }
        let (sender, changes) = mpsc::channel(EVENT_QUEUE);
        let failure = Arc::default();
        self.0.push(Watcher { changes: sender, failure: Arc::clone(&failure) });
        Ok(CacheWatch { held: scheduler.watch_cache(), changes, failure })
    }

    /// Passes on what has changed.
    pub(super) fn tell(&mut self, scheduler: &mut Scheduler) {
        if self.0.is_empty() {
            return;
        }
        let changes: Changes = scheduler.cache_changes().into();
        self.0.retain(|watcher| match changes.is_empty() {
            true => !watcher.changes.is_closed(),
            false => watcher.send(&changes),
        });
        if self.0.is_empty() {
            scheduler.unwatch_cache();
        }
    }
}

impl Watcher {
    /// Whether it goes on watching.
    fn send(&self, changes: &Changes) -> bool {
        let sent = self.changes.try_send(Arc::clone(changes));
        if let Err(mpsc::error::TrySendError::Full(_)) = &sent {
            let _ = self.failure.set(EngineError::SlowReader);
        }
        sent.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::scheduler::{NewSequence, Sampled, SchedulerConfig, speculation::Speculation};

    fn scheduler() -> Scheduler {
        let config = SchedulerConfig {
            max_step_tokens: 16,
            max_prefill_chunk: 16,
            max_prompt_logits_rows: 2,
            max_running: 8,
            max_waiting: 8,
            n_blocks: 64,
            block_size: 1,
            context_length: 64,
            speculation: Speculation::Off,
        };
        Scheduler::new(config).expect("it makes sense")
    }

    /// Computes a prompt whose blocks all change something.
    fn run(scheduler: &mut Scheduler, prompt: Vec<u32>) {
        let sequence = NewSequence { prompt, max_new_tokens: 1, ..NewSequence::default() };
        let id = scheduler.add(sequence, Instant::now()).expect("it is taken");
        scheduler.schedule(Instant::now());
        scheduler.commit(&[Sampled { id, tokens: vec![0], stop: true }]);
    }

    fn tokens(contents: impl IntoIterator<Item = Content>) -> Vec<u32> {
        contents.into_iter().flat_map(|content| content.token_ids.to_vec()).collect()
    }

    fn stored(changes: &[Change]) -> Vec<u32> {
        let contents = changes.iter().map(|change| match change {
            Change::Stored(content) => content.clone(),
            other => panic!("{other:?}"),
        });
        tokens(contents)
    }

    #[tokio::test]
    async fn a_watcher_gets_what_is_held_and_then_what_changes_once() {
        let (mut scheduler, mut watchers) = (scheduler(), CacheWatchers::default());
        run(&mut scheduler, vec![1, 2]);
        let mut first = watchers.add(&mut scheduler).expect("there is room");
        assert_eq!(tokens(first.held.clone()), [1, 2]);
        run(&mut scheduler, vec![3]);
        let second = watchers.add(&mut scheduler).expect("there is room");
        assert_eq!(tokens(second.held.clone()).len(), 3);
        assert_eq!(stored(&first.changes().await.expect("it watches")), [3]);
        run(&mut scheduler, vec![4]);
        watchers.tell(&mut scheduler);
        assert_eq!(stored(&first.changes().await.expect("it watches")), [4]);

        drop((first, second));
        watchers.tell(&mut scheduler);
        run(&mut scheduler, vec![5]);
        assert_eq!(scheduler.cache_changes(), [], "nobody watches");
    }

    #[tokio::test]
    async fn a_watcher_that_falls_behind_is_cut_off() {
        let (mut scheduler, mut watchers) = (scheduler(), CacheWatchers::default());
        let mut slow = watchers.add(&mut scheduler).expect("there is room");
        for token in 0..=EVENT_QUEUE {
            run(&mut scheduler, vec![token as u32]);
            watchers.tell(&mut scheduler);
        }
        for _ in 0..EVENT_QUEUE {
            slow.changes().await.expect("it has not lost these");
        }
        assert!(matches!(slow.changes().await, Err(EngineError::SlowReader)));
        run(&mut scheduler, vec![u32::MAX]);
        assert_eq!(scheduler.cache_changes(), [], "nobody watches");
    }

    #[test]
    fn watchers_are_bounded() {
        let (mut scheduler, mut watchers) = (scheduler(), CacheWatchers::default());
        let mut watches: Vec<_> = (0..MAX_WATCHERS).map(|_| watchers.add(&mut scheduler).expect("room")).collect();
        assert!(matches!(watchers.add(&mut scheduler), Err(EngineError::TooManyWatchers { .. })));
        watches.pop();
        assert!(watchers.add(&mut scheduler).is_ok());
    }
}

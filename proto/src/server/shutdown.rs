//! A [`Shutdown`] is the one switch that ends a service: it moves from running to draining to forced, never back.
//!
//! SIGTERM and SIGINT turn it one step each, so that a second Ctrl-C cuts a drain short. With `exit_with_parent` the
//! end of standard input starts it too: a supervisor that holds the other end of that pipe takes its children along
//! even when it is killed outright, without a signal handler or `unsafe` code on either side.

use std::{
    io::{self, Read as _},
    sync::Arc,
    thread,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::AbortHandle,
};
use tokio_stream::wrappers::WatchStream;

/// How far a shutdown has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not at all.
    Running,
    /// No new work; what runs may end.
    Draining,
    /// What runs is cut off.
    Forced,
}

/// The switch. Clones share it.
#[derive(Debug, Clone)]
pub struct Shutdown {
    phase: watch::Sender<Phase>,
    _signals: Option<Arc<SignalTask>>,
}

/// Ends with the last clone of the switch.
#[derive(Debug)]
struct SignalTask(AbortHandle);

// === impl Shutdown ===

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// A switch that only [`Shutdown::start`] turns.
    #[must_use]
    pub fn new() -> Self {
        Self { phase: watch::Sender::new(Phase::Running), _signals: None }
    }

    /// A switch that SIGTERM and SIGINT turn as well, and the end of standard input if `exit_with_parent`. Must be
    /// called within a tokio runtime.
    ///
    /// # Errors
    /// If the process can have no signal handlers or no further thread.
    pub fn on_signals(exit_with_parent: bool) -> io::Result<Self> {
        let phase = watch::Sender::new(Phase::Running);
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let turned = phase.clone();
        let task = tokio::spawn(async move {
            loop {
                let signal = tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                };
                tracing::info!(signal, "shutting down");
                turned.send_modify(|phase| {
                    *phase = if *phase == Phase::Running { Phase::Draining } else { Phase::Forced }
                });
            }
        });
        let shutdown = Self { phase, _signals: Some(Arc::new(SignalTask(task.abort_handle()))) };
        if exit_with_parent {
            shutdown.watch_stdin()?;
        }
        Ok(shutdown)
    }

    /// Begins the shutdown; the first call counts.
    pub fn start(&self) {
        self.advance(Phase::Draining);
    }

    /// Cuts off what still runs.
    pub fn force(&self) {
        self.advance(Phase::Forced);
    }

    /// Whether the shutdown has begun.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.phase() >= Phase::Draining
    }

    /// How far it has come.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits until the shutdown has begun.
    pub async fn started(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Waits until what runs must be cut off.
    pub async fn forced(&self) {
        self.reached(Phase::Forced).await;
    }

    /// The phase now, and each one that follows.
    pub(super) fn phases(&self) -> WatchStream<Phase> {
        WatchStream::new(self.phase.subscribe())
    }

    async fn reached(&self, wanted: Phase) {
        let mut phases = self.phase.subscribe();
        // The sender is `self`, so the channel cannot close while this waits.
        let _ = phases.wait_for(|phase| *phase >= wanted).await;
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let forward = to > *phase;
            *phase = to.max(*phase);
            forward
        });
    }

    /// Reads standard input to its end on a thread of its own: a runtime could not stop a task that blocks there. The
    /// thread is never joined, it ends with the process.
    fn watch_stdin(&self) -> io::Result<()> {
        let shutdown = Self { phase: self.phase.clone(), _signals: None };
        thread::Builder::new().name("parent-watch".into()).spawn(move || {
            let mut ignored = [0; 64];
            let mut stdin = io::stdin().lock();
            loop {
                match stdin.read(&mut ignored) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            tracing::info!("standard input ended, shutting down");
            shutdown.start();
        })?;
        Ok(())
    }
}

// === impl SignalTask ===

impl Drop for SignalTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_only_advance() {
        let shutdown = Shutdown::new();
        assert!(!shutdown.is_started());
        shutdown.clone().force();
        shutdown.start();
        assert_eq!(shutdown.phase(), Phase::Forced);
    }

    #[tokio::test]
    async fn waiting_ends_for_those_who_came_before_and_after() {
        let shutdown = Shutdown::new();
        let before = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.started().await }
        });
        shutdown.start();
        before.await.unwrap();
        shutdown.started().await;
    }
}

//! An outbox: the way of a request's events to its client, of bounded length.
//!
//! The generation runs in a task of its own, so that it notices a client that does not read: when the outbox has been
//! full for longer than the patience, the request is cut, and the worker is let go. Dropping
//! [`Events`], as tonic does when the client goes away, ends the task and with it everything downstream.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt as _};
use lockstep_proto::v1;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use crate::status::Failure;

/// Events that wait for the client, beside what HTTP/2 buffers: enough to ride out a scheduling hiccup.
const CAPACITY: usize = 32;

/// One event of an answer: one `Start`, then `Chunk`s, then one `Finish`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The beginning.
    Start(v1::Start),
    /// A piece of a choice.
    Chunk(v1::Chunk),
    /// The end.
    Finish(v1::Finish),
}

/// The sending end.
#[derive(Debug)]
pub struct Outbox {
    events: mpsc::Sender<Box<Event>>,
    patience: Duration,
    until: Instant,
}

/// The receiving end: events, and a failure if the answer was cut.
#[derive(Debug)]
pub struct Events {
    /// An event that was waited for and is still to be given.
    first: Option<Event>,
    /// In boxes: the channel sets room for 32 of them aside, for as long as an answer takes.
    events: mpsc::Receiver<Box<Event>>,
    /// `None` once its outcome was given.
    task: Option<AbortOnDropHandle<Result<(), Failure>>>,
}

/// How long a client may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// With one event.
    pub event: Duration,
    /// With all of them.
    pub until: Instant,
}

/// Runs a generation that fills an outbox.
pub fn run<Run>(patience: Patience, generation: impl FnOnce(Outbox) -> Run) -> Events
where
    Run: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let (sender, events) = mpsc::channel(CAPACITY);
    let outbox = Outbox { events: sender, patience: patience.event, until: patience.until };
    let task = tokio::spawn(generation(outbox).in_current_span());
    Events { first: None, events, task: Some(AbortOnDropHandle::new(task)) }
}

// === impl Outbox ===

impl Outbox {
    /// Puts one event in, waiting for room.
    ///
    /// # Errors
    /// When the client is gone, reads too slowly, or has no time left.
    pub async fn send(&self, event: Event) -> Result<(), Failure> {
        let limit = self.patience.min(self.until.saturating_duration_since(Instant::now()));
        match tokio::time::timeout(limit, self.events.send(Box::new(event))).await {
            Ok(sent) => sent.map_err(|_| Failure::ClientGone),
            Err(_) if limit < self.patience => Err(Failure::Deadline),
            Err(_) => Err(Failure::SlowReader(self.patience)),
        }
    }
}

// === impl Events ===

impl Events {
    /// Waits for the first event, which stays in the stream.
    ///
    /// # Errors
    /// When there is none.
    pub async fn begun(mut self) -> Result<Self, Failure> {
        let first = self.next().await.ok_or_else(|| Failure::Bug("an answer without events".to_owned()))??;
        self.first = Some(first);
        Ok(self)
    }
}

impl Stream for Events {
    type Item = Result<Event, Failure>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        if let Some(event) = ready!(self.events.poll_recv(context)) {
            return Poll::Ready(Some(Ok(*event)));
        }
        let Some(task) = &mut self.task else { return Poll::Ready(None) };
        let outcome = ready!(Pin::new(task).poll(context));
        self.task = None;
        Poll::Ready(match outcome {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(Err(failure)),
            Err(panic) => Some(Err(Failure::Bug(format!("the request's task broke: {panic}")))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(seq: u64) -> Event {
        Event::Chunk(v1::Chunk { seq, ..v1::Chunk::default() })
    }

    fn patience() -> Patience {
        Patience { event: Duration::from_secs(5), until: Instant::now() + Duration::from_secs(60) }
    }

    #[tokio::test]
    async fn events_arrive_in_order_and_the_failure_comes_last() {
        let mut events = run(patience(), |outbox| async move {
            outbox.send(chunk(0)).await?;
            outbox.send(chunk(1)).await?;
            Err(Failure::Deadline)
        });
        assert_eq!(events.next().await.unwrap().unwrap(), chunk(0));
        assert_eq!(events.next().await.unwrap().unwrap(), chunk(1));
        assert!(matches!(events.next().await, Some(Err(Failure::Deadline))));
        assert!(events.next().await.is_none());
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_cut_and_the_buffer_stays_bounded() {
        let (sent, mut progress) = tokio::sync::watch::channel(0);
        let short = Patience { event: Duration::from_millis(5), ..patience() };
        let mut events = run(short, |outbox| async move {
            for seq in 0.. {
                outbox.send(chunk(seq)).await?;
                sent.send_replace(seq + 1);
            }
            Ok(())
        });
        while progress.changed().await.is_ok() {}
        assert_eq!(*progress.borrow(), CAPACITY as u64);
        for _ in 0..CAPACITY {
            assert!(events.next().await.unwrap().is_ok());
        }
        assert!(matches!(events.next().await, Some(Err(Failure::SlowReader(_)))));
    }

    #[tokio::test]
    async fn dropping_the_events_drops_what_the_task_holds() {
        let (held, released) = tokio::sync::oneshot::channel::<()>();
        let events = run(patience(), |_outbox| async move {
            let _held = held;
            std::future::pending().await
        });
        drop(events);
        assert!(released.await.is_err());
    }

    #[tokio::test]
    async fn a_panic_is_a_bug_and_not_an_end() {
        let mut events = run(patience(), |_outbox| async { panic!("on purpose") });
        assert!(matches!(events.next().await, Some(Err(Failure::Bug(_)))));
    }
}

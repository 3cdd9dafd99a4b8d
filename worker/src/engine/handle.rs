//! The handle: how async code gives jobs to the engine and reads what becomes of them.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::Stream;

use super::{
    COMMAND_QUEUE, EVENT_QUEUE, EmbeddingJob, EngineError, Event, EventSender, GenerationId, Job,
    cache_watchers::CacheWatch, embeddings::Answer,
};
use crate::scheduler::Stats;

/// What the engine is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Run a job.
    Submit(Submission),
    /// Embed a prompt.
    Embed(EmbeddingJob, Answer),
    /// End one choice of a job, if it is there.
    EndChoice { generation: GenerationId, choice: u32 },
    /// Say what the prefix cache holds, and what changes in it.
    WatchCache(oneshot::Sender<Result<CacheWatch, EngineError>>),
    /// Take no further jobs, and answer when none is left.
    Drain(oneshot::Sender<()>),
    /// End the step loop; what runs is lost.
    Stop,
}

/// A job with the ends of its channels.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) job: Job,
    pub(super) accepted: oneshot::Sender<Result<(), EngineError>>,
    pub(super) outlet: Outlet,
}

/// The engine's end of a job.
#[derive(Clone, Debug)]
pub(super) struct Outlet {
    pub(super) events: EventSender,
    pub(super) failure: Arc<OnceLock<EngineError>>,
}

/// The engine's state, as of its last turn.
#[derive(Clone, Debug)]
pub struct EngineStatus {
    /// The group is together and warmed up.
    pub ready: bool,
    /// Nothing more is taken.
    pub draining: bool,
    /// How often the group has formed.
    pub epoch: u64,
    /// Queue lengths and block counts.
    pub stats: Stats,
    /// How long a step that only decodes takes lately; none: there was none yet.
    pub decode_step: Option<Duration>,
    /// Tokens generated since the start.
    pub generated_tokens: u64,
    /// When the step loop last went round.
    pub last_turn: Instant,
}

/// Gives jobs to the engine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    status: watch::Receiver<EngineStatus>,
}

/// The engine's ends of the handle's channels.
#[derive(Debug)]
pub struct EnginePort {
    pub(super) commands: Receiver<Command>,
    pub(super) status: watch::Sender<EngineStatus>,
}

/// A handle, and the port to build the engine with.
pub fn channel(now: Instant) -> (EngineHandle, EnginePort) {
    let (command_sender, commands) = sync_channel(COMMAND_QUEUE);
    let initial = EngineStatus {
        ready: false,
        draining: false,
        epoch: 0,
        stats: Stats::default(),
        decode_step: None,
        generated_tokens: 0,
        last_turn: now,
    };
    let (status_sender, status) = watch::channel(initial);
    (EngineHandle { commands: command_sender, status }, EnginePort { commands, status: status_sender })
}

impl EngineHandle {
    /// Runs a job. Dropping the stream ends it within one step.
    ///
    /// # Errors
    /// Why the engine did not take it.
    pub async fn submit(&self, job: Job) -> Result<EventStream, EngineError> {
        let (accepted, answer) = oneshot::channel();
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        let failure = Arc::new(OnceLock::new());
        let choices_left = job.n;
        let outlet = Outlet { events, failure: Arc::clone(&failure) };
        self.send(Command::Submit(Submission { job, accepted, outlet }))?;
        answer.await.unwrap_or_else(|_| Err(stopped()))?;
        Ok(EventStream { events: receiver, failure, choices_left })
    }

    /// Embeds a prompt: its hidden states, pooled, `[hidden_dim]`. Dropping the future ends it within one step.
    ///
    /// # Errors
    /// Why there is no embedding.
    pub async fn embed(&self, job: EmbeddingJob) -> Result<Vec<f32>, EngineError> {
        let (answer, embedding) = oneshot::channel();
        self.send(Command::Embed(job, answer))?;
        embedding.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Ends one choice of a job before the next step. One that is not there (it may just have ended) is no error.
    ///
    /// # Errors
    /// Why the engine did not hear of it.
    pub fn end_choice(&self, generation: GenerationId, choice: u32) -> Result<(), EngineError> {
        self.send(Command::EndChoice { generation, choice })
    }

    /// What the prefix cache holds, and what changes in it. Dropping the result ends it.
    ///
    /// # Errors
    /// Why the engine does not say.
    pub async fn watch_cache(&self) -> Result<CacheWatch, EngineError> {
        let (answer, watch) = oneshot::channel();
        self.send(Command::WatchCache(answer))?;
        watch.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// The engine's state, and its changes.
    pub fn status(&self) -> watch::Receiver<EngineStatus> {
        self.status.clone()
    }

    /// Ends admission; returns when what runs has ended.
    pub async fn drain(&self) {
        let (sender, done) = oneshot::channel();
        if self.send(Command::Drain(sender)).is_ok() {
            // An engine that is gone has nothing left to drain.
            let _ = done.await;
        }
    }

    /// Ends the step loop.
    pub fn stop(&self) {
        // A full queue is emptied at the engine's next turn; an engine that is gone is what was asked for.
        let _ = self.commands.send(Command::Stop);
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => EngineError::QueueFull,
            TrySendError::Disconnected(_) => stopped(),
        })
    }
}

pub(super) fn stopped() -> EngineError {
    EngineError::NotReady("the engine has stopped".into())
}

/// A job's events. Ends after one [`Event::Finish`] for each choice, or with an error.
#[derive(Debug)]
pub struct EventStream {
    events: mpsc::Receiver<Event>,
    failure: Arc<OnceLock<EngineError>>,
    choices_left: u32,
}

impl Stream for EventStream {
    type Item = Result<Event, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.choices_left == 0 {
            return Poll::Ready(None);
        }
        match std::task::ready!(self.events.poll_recv(context)) {
            Some(event) => {
                if matches!(event, Event::Finish { .. }) {
                    self.choices_left -= 1;
                }
                Poll::Ready(Some(Ok(event)))
            }
            None => {
                self.choices_left = 0;
                let error = self.failure.get().cloned().unwrap_or_else(stopped);
                Poll::Ready(Some(Err(error)))
            }
        }
    }
}

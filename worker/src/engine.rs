//! The engine: the step loop, on an OS thread of its own. Async code talks to it through [`handle`] alone.
//!
//! Rank 0 runs [`leader`]: it admits jobs, asks the scheduler for the next plan, sends the plan to the other ranks,
//! runs it, samples, and hands tokens out. The other ranks run [`follower`]: they receive plans and run them. Both go
//! round for each *epoch*, the time for which a group holds together; every epoch begins with an empty cache.
//!
//! ```text
//!   service ──Job──► handle ──bounded queue──► leader loop ──StepPlan──► followers' loops
//!      ▲                                          │   └──── run ────► model_runner ◄── run ────┘
//!      └────────Event, one bounded queue a job────┘
//! ```

mod average;
pub mod cache_watchers;
pub mod draft_model;
mod embeddings;
pub mod follower;
pub mod handle;
pub mod leader;
mod live;
pub mod metrics;

use std::time::Instant;

use tokio::sync::mpsc;

use crate::{
    constraint::{ConstraintError, guide::Compiled},
    group::GroupError,
    model::StepError,
    sampler::{SamplingParams, TokenLogprobs},
    scheduler::{Pooling, Refusal},
};

/// Jobs that may wait between the service and the engine; it takes all of them in at every turn.
const COMMAND_QUEUE: usize = 256;

/// Events that a job's reader may be behind. A reader that is further behind is cut off: the step loop never waits.
/// Gateways read as fast as tokens come, so this is some seconds of output.
const EVENT_QUEUE: usize = 2048;

/// One client's request, ready to run.
#[derive(Clone, Debug)]
pub struct Job {
    /// Names it in logs.
    pub request_id: String,
    /// The prompt; never empty, every id below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// How tokens are chosen, for every choice.
    pub params: SamplingParams,
    /// Most tokens for each choice.
    pub max_new_tokens: u32,
    /// Choices, at least 1.
    pub n: u32,
    /// Alternatives with each token's log-probability, if wanted.
    pub logprobs: Option<u32>,
    /// The same for the prompt.
    pub prompt_logprobs: Option<u32>,
    /// After this it never starts, and ends if it runs.
    pub deadline: Option<Instant>,
    /// What the text of every choice must be, if it must be something.
    pub constraint: Option<Box<Compiled>>,
}

/// A prompt to be embedded.
#[derive(Clone, Debug)]
pub struct EmbeddingJob {
    /// Names it in logs.
    pub request_id: String,
    /// The prompt; never empty, every id below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// How its hidden states become one.
    pub pooling: Pooling,
    /// After this it never starts, and fails if it runs.
    pub deadline: Option<Instant>,
}

/// Names a job: 128 random bits, so that nobody ends another's choices by accident. (Request ids come from clients and
/// may repeat.)
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GenerationId(pub [u8; 16]);

/// What happens to a job.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt is computed, and the first tokens follow. Comes first.
    Started {
        /// Names the job from now on.
        generation: GenerationId,
        /// Prompt tokens that the prefix cache held.
        cached_tokens: u32,
    },
    /// Log-probabilities of the prompt's tokens but the first. Comes before any token.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// One token of a choice.
    Token {
        /// The choice.
        choice: u32,
        /// Tokens of the choice before this one.
        position: u32,
        /// The token.
        token_id: u32,
        /// If wanted.
        logprobs: Option<TokenLogprobs>,
    },
    /// A choice has ended.
    Finish {
        /// The choice.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// This stop token was sampled.
    StopToken(u32),
    /// `max_new_tokens` or the end of the context.
    Length,
    /// The job's deadline.
    Deadline,
    /// Its reader wanted no more of it.
    Ended,
    /// Its constraint allows nothing more.
    Complete,
}

// === impl GenerationId ===

impl GenerationId {
    /// A new name.
    fn random() -> Self {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the system has a source of random numbers");
        Self(bytes)
    }
}

/// Why a job did not start or did not end well.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// The scheduler cannot take it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The engine takes nothing more.
    #[error("this group is draining")]
    Draining,
    /// Too many jobs at once.
    #[error("the engine's queue of {COMMAND_QUEUE} commands is full")]
    QueueFull,
    /// The group is not together.
    #[error("the group is not ready: {0}")]
    NotReady(String),
    /// The group fell apart while the job ran.
    #[error("the group was lost: {0}")]
    GroupLost(String),
    /// The reader did not read.
    #[error("the reader fell {EVENT_QUEUE} events behind and was cut off")]
    SlowReader,
    /// The constraint could not be held to the end.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// Too many watch the prefix cache.
    #[error("{limit} watch the prefix cache already, which is the limit")]
    TooManyWatchers {
        /// How many may.
        limit: usize,
    },
    /// The deadline passed before the job started, or before all of an embedding was computed.
    #[error("the deadline passed before there was anything to answer")]
    Expired,
}

/// Why an engine cannot go on in this process. Whoever supervises the process starts it anew.
#[derive(Debug, thiserror::Error)]
pub enum EngineFailure {
    /// The leader refuses this rank for good.
    #[error(transparent)]
    Refused(#[from] GroupError),
    /// See [`StepError::is_of_device`].
    #[error("the GPU has failed and can be used by a new process only: {0}")]
    Device(StepError),
}

/// How a job reaches its reader.
type EventSender = mpsc::Sender<Event>;

//! A status is how a failure crosses the wire. This is the only place in the gateway that makes one: each [`Failure`]
//! becomes a reason of the table in [`lockstep_proto::error`], which decides the gRPC code and the details.

use std::time::Duration;

use lockstep_proto::error::{Error, FieldViolation, Reason};
use tonic::Status;

use crate::{
    admission::Refused,
    generation::Breach,
    request::{FactsError, RequestError, ViolationKind},
    router::NoGroup,
    sampling::ResolveError,
    template::TemplateError,
    tokenizer::{NoTemplate, TokenizerError, UnknownToken},
};

/// When to come back after a refusal by a peer that did not say: groups report, and so free up, about once a second.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Why a request was not answered.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// It was not let in.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It breaks the contract or the policy.
    #[error("{0}")]
    Request(#[from] RequestError),
    /// Its prompt leaves no room, or more is asked for than it leaves.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// One of several prompts is too long to be embedded.
    #[error("the prompt has {n_tokens} tokens; the context of {limit} takes no more")]
    InputTooLong {
        /// Which of the inputs.
        index: usize,
        /// Its length. Unit: tokens.
        n_tokens: u32,
        /// The context's length. Unit: tokens.
        limit: u32,
    },
    /// The groups began to serve another model while they embedded.
    #[error("the model was replaced while the inputs were embedded")]
    ModelChanged,
    /// The model cannot chat.
    #[error("model `{model}`: {why}")]
    NoTemplate {
        /// The model.
        model: String,
        /// Why.
        why: NoTemplate,
    },
    /// The chat template does not render the conversation.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// No model has this name.
    #[error("no model `{0}` is served")]
    UnknownModel(String),
    /// The request names no model, and there are several.
    #[error("name a model: {0} are served")]
    AmbiguousModel(String),
    /// The model's own files contradict themselves.
    #[error("model `{model}`: {error}")]
    Facts {
        /// The model.
        model: String,
        /// How.
        error: FactsError,
    },
    /// No group can take it.
    #[error("{0}")]
    NoGroup(#[from] NoGroup),
    /// The group that had it failed or refused it.
    #[error("group {address}: {error}")]
    Group {
        /// The group's leader.
        address: String,
        /// What it said.
        error: Box<Error>,
    },
    /// The tokenizer service failed or refused it.
    #[error("{0}")]
    Tokenizer(#[from] TokenizerError),
    /// An id that its tokenizer does not have.
    #[error("the tokenizer does not know all tokens: {0}")]
    UnknownToken(#[from] UnknownToken),
    /// A peer broke its contract.
    #[error("{peer} broke its contract: {breach}")]
    Breach {
        /// The peer's address.
        peer: String,
        /// How.
        breach: Breach,
    },
    /// Its deadline passed before there was anything to answer.
    #[error("the deadline passed before there was anything to answer")]
    Deadline,
    /// Its client does not read.
    #[error("the client took no event for {0:?}")]
    SlowReader(Duration),
    /// Its client is gone.
    #[error("the client went away")]
    ClientGone,
    /// The body of its HTTP request is over the limit. Unit: bytes.
    #[error("the body is over {0} bytes")]
    BodyTooLarge(usize),
    /// No such thing is served by HTTP.
    #[error("there is no {0} here")]
    NoSuchPath(String),
    /// The gateway is shutting down.
    #[error("the gateway is shutting down")]
    Draining,
    /// A bug of ours.
    #[error("{0}")]
    Bug(String),
}

// === impl Failure ===

impl Failure {
    /// The failure as a row of the table, with its details.
    pub fn to_error(&self) -> Error {
        let message = self.to_string();
        match self {
            Self::Request(error) | Self::Resolve(ResolveError::Request(error)) => request_error(error, message),
            Self::Group { error, .. } => group_error(error, message),
            Self::Tokenizer(TokenizerError::Refused { error, .. }) => tokenizer_error(error, message),
            Self::Refused(Refused::Requests(_) | Refused::PromptBytes { .. }) => {
                Error::new(Reason::Overloaded, message).retry_after(RETRY_AFTER)
            }
            Self::NoGroup(NoGroup::NoneReady) | Self::ModelChanged => {
                Error::new(Reason::GroupUnavailable, message).retry_after(RETRY_AFTER)
            }
            Self::Draining => Error::new(Reason::Draining, message).retry_after(RETRY_AFTER),
            _ => match self.field() {
                Some(path) => Error::new(self.plain_reason(), message.clone()).violation(path, message),
                None => Error::new(self.plain_reason(), message),
            },
        }
    }

    /// What a group says of the constraint, under the name of the request's own field: a group has other kinds of them.
    pub(crate) fn of_constraint(self, path: Option<&str>) -> Self {
        match (&self, path) {
            (Self::Group { error, .. }, Some(path)) if error.reason() == Reason::InvalidArgument => {
                let about_it = |found: &&FieldViolation| found.path.starts_with("sampling.constraint");
                match error.field_violations().iter().find(about_it) {
                    Some(found) => RequestError::invalid(path, &found.message).into(),
                    None => self,
                }
            }
            _ => self,
        }
    }

    /// The field that is at fault, where only later work than the request's check could find it.
    fn field(&self) -> Option<String> {
        match self {
            Self::Resolve(ResolveError::PromptTooLong { .. }) => Some("prompt".to_owned()),
            Self::InputTooLong { index, .. } => Some(format!("inputs[{index}]")),
            Self::Template(TemplateError::Entropy(_)) => None,
            Self::Template(_) => Some("conversation".to_owned()),
            _ => None,
        }
    }

    /// The stable name of its reason, for metrics.
    pub fn reason(&self) -> Reason {
        self.to_error().reason()
    }

    /// The reason of a failure that has no details of its own.
    fn plain_reason(&self) -> Reason {
        match self {
            Self::Refused(Refused::NoKey | Refused::UnknownKey) => Reason::Unauthenticated,
            Self::Resolve(ResolveError::PromptTooLong { .. }) | Self::InputTooLong { .. } => Reason::PromptTooLong,
            Self::NoTemplate { .. } => Reason::NoChatTemplate,
            Self::Template(TemplateError::Entropy(_)) => Reason::Internal,
            Self::Template(_) => Reason::TemplateFailed,
            Self::UnknownModel(_) | Self::NoGroup(NoGroup::UnknownModel) => Reason::ModelNotFound,
            Self::AmbiguousModel(_) => Reason::InvalidArgument,
            Self::Tokenizer(TokenizerError::Unreachable(_)) => Reason::TokenizerUnavailable,
            Self::Deadline | Self::Tokenizer(TokenizerError::Deadline) => Reason::Deadline,
            Self::SlowReader(_) => Reason::SlowReader,
            Self::ClientGone => Reason::Cancelled,
            Self::BodyTooLarge(_) => Reason::MessageTooLarge,
            Self::NoSuchPath(_) => Reason::NotFound,
            _ => Reason::Internal,
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        failure.to_error().into()
    }
}

fn request_error(error: &RequestError, message: String) -> Error {
    let reason = match error.kind() {
        ViolationKind::Invalid => Reason::InvalidArgument,
        ViolationKind::OverPolicy => Reason::OverPolicy,
        ViolationKind::Unimplemented => Reason::Unimplemented,
    };
    let violations = error.violations().iter();
    let fields = violations.map(|found| FieldViolation { path: found.path.clone(), message: found.message.clone() });
    Error::new(reason, message).violations(fields)
}

/// What a group says of load, limits and time, or that it does not do, is passed on; that it cannot be reached or has
/// formed anew are the same thing to a client; anything else is a bug on our side of the wire.
fn group_error(error: &Error, message: String) -> Error {
    match error.reason() {
        Reason::Overloaded => {
            Error::new(Reason::Overloaded, message).retry_after(error.retry_delay().unwrap_or(RETRY_AFTER))
        }
        reason @ (Reason::PromptTooLong | Reason::Deadline | Reason::Unimplemented) => Error::new(reason, message),
        reason if reason_of_absence(reason) => Error::new(Reason::GroupUnavailable, message).retry_after(RETRY_AFTER),
        _ => Error::new(Reason::Internal, message),
    }
}

/// A group's stream that ended before it said anything: like a group that is gone.
pub(crate) fn ended_unasked() -> Status {
    Error::new(Reason::GroupUnavailable, "it ended the stream unasked").into()
}

/// A tokenizer whose vocabulary cannot be had or used: like one that is away, so that another is asked.
pub(crate) fn no_vocabulary(cause: &str) -> Status {
    Error::new(Reason::Unavailable, cause).into()
}

/// A tokenizer that did not answer in time.
pub(crate) fn too_late() -> Status {
    Error::new(Reason::Deadline, "it did not answer in time").into()
}

/// Whether a group that answers so is away rather than wrong.
pub(crate) fn reason_of_absence(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Unavailable | Reason::GroupUnavailable | Reason::Draining | Reason::EpochEnded | Reason::Cancelled
    )
}

/// A text that the tokenizer refuses, or that becomes a message over a limit, is the client's; that it is full or
/// stopping is a matter of time.
fn tokenizer_error(error: &Error, message: String) -> Error {
    match error.reason() {
        Reason::Overloaded => {
            Error::new(Reason::Overloaded, message).retry_after(error.retry_delay().unwrap_or(RETRY_AFTER))
        }
        reason @ (Reason::PromptTooLong | Reason::InvalidArgument | Reason::MessageTooLarge) => {
            Error::new(reason, message)
        }
        _ => Error::new(Reason::Internal, message),
    }
}

//! Status: the only place of the worker that makes a [`tonic::Status`].

use std::time::Duration;

use lockstep_proto::{
    error::{Error, FieldViolation, Reason},
    fields,
};
use tonic::Status;

use crate::{constraint::ConstraintError, engine::EngineError, scheduler::Refusal};

/// When to come back to a group that is full. A guess: decodes of a full batch end about so often.
const RETRY_WHEN_FULL: Duration = Duration::from_millis(250);

/// When to come back to a group that is being formed: a rank that died is found out, and rejoins, in about so long.
const RETRY_WHEN_LOST: Duration = Duration::from_secs(2);

/// The status of a request that breaks the contract.
pub fn invalid(violations: Vec<FieldViolation>) -> Status {
    Error::new(Reason::InvalidArgument, "the request is not valid").violations(violations).into()
}

/// The status of a request whose constraint is not held.
pub fn constraint(error: &ConstraintError) -> Status {
    let message = error.to_string();
    let error = match error {
        ConstraintError::Refused { field, reason } => {
            Error::new(Reason::InvalidArgument, message).violation(*field, reason)
        }
        ConstraintError::NoVocabulary(_) => Error::new(Reason::Unimplemented, message),
        ConstraintError::Busy => Error::new(Reason::Overloaded, message).retry_after(RETRY_WHEN_FULL),
        ConstraintError::System(_) => Error::new(Reason::Internal, message),
    };
    error.into()
}

/// The same status to a client of another protocol, which has names of its own for the fields.
pub fn renamed(status: &Status, name: impl Fn(&str) -> String) -> Status {
    fields::rename(&Error::from_status(status), name).into()
}

/// The status of a stream that cannot go on where another one ended.
pub fn no_history(message: &str) -> Status {
    Error::new(Reason::NoHistory, message).into()
}

/// The status of a bug of ours.
pub fn internal(message: &str) -> Status {
    Error::new(Reason::Internal, message).into()
}

/// The status of a request for what this worker does not do.
pub fn unimplemented(message: &str) -> Status {
    Error::new(Reason::Unimplemented, message).into()
}

/// The status of a job that did not start or did not end well.
pub fn engine(error: &EngineError) -> Status {
    let message = error.to_string();
    let error = match error {
        EngineError::Refused(refusal) => return refused(refusal, message),
        EngineError::Constraint(error) => return constraint(error),
        EngineError::QueueFull | EngineError::TooManyWatchers { .. } => {
            Error::new(Reason::Overloaded, message).retry_after(RETRY_WHEN_FULL)
        }
        EngineError::SlowReader => Error::new(Reason::SlowReader, message),
        EngineError::Draining => Error::new(Reason::Draining, message),
        EngineError::NotReady(_) | EngineError::GroupLost(_) => {
            Error::new(Reason::GroupUnavailable, message).retry_after(RETRY_WHEN_LOST)
        }
        EngineError::Expired => Error::new(Reason::Deadline, message),
    };
    error.into()
}

fn refused(refusal: &Refusal, message: String) -> Status {
    let error = match refusal {
        Refusal::QueueFull { .. } => Error::new(Reason::Overloaded, message).retry_after(RETRY_WHEN_FULL),
        Refusal::PromptTooLong { .. } | Refusal::NeverFits { .. } => {
            Error::new(Reason::PromptTooLong, message.clone()).violation("prompt_token_ids", message)
        }
        Refusal::EmptyPrompt => {
            Error::new(Reason::InvalidArgument, message.clone()).violation("prompt_token_ids", message)
        }
        Refusal::NothingToGenerate => {
            Error::new(Reason::InvalidArgument, message.clone()).violation("sampling.max_new_tokens", message)
        }
        Refusal::DeadlinePassed => Error::new(Reason::Deadline, message),
    };
    error.into()
}

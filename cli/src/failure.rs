//! A [`Failure`] is why a command could not be done: one line for people, and an exit status for scripts.

use std::{fmt::Write as _, io, process::ExitCode};

use lockstep_proto::error::{Error, Reason};
use thiserror::Error;
use tonic::Code;

/// Exit status for a wrong command line or setting (BSD's `sysexits.h`).
pub(crate) const EX_USAGE: u8 = 64;

/// Exit status for a cluster that does not answer or takes no work.
pub(crate) const EX_UNAVAILABLE: u8 = 69;

/// What a command comes to.
pub(crate) type Done = Result<ExitCode, Failure>;

/// Why a command could not be done.
#[derive(Debug, Error)]
pub(crate) enum Failure {
    /// The command line or a setting is wrong.
    #[error("{0}")]
    Usage(String),
    /// The cluster does not answer or takes no work.
    #[error("{0}")]
    Unavailable(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

// === impl Failure ===

impl Failure {
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) => ExitCode::from(EX_USAGE),
            Self::Unavailable(_) => ExitCode::from(EX_UNAVAILABLE),
            Self::Failed(_) => ExitCode::FAILURE,
        }
    }

    /// What a server at `address` answered.
    pub(crate) fn from_answer(error: &Error, address: &str) -> Self {
        match (error.reason(), error.code()) {
            // The server names a reason of its own; this one stands for "no answer at all".
            (Reason::Unavailable, _) => Self::Unavailable(format!("{address} does not answer: {}", error.message())),
            (_, Code::Unavailable) => Self::Unavailable(line(error)),
            _ => Self::Failed(line(error)),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// An error of the cluster in one line: reason, message, each wrong field, and when to try again.
pub(crate) fn line(error: &Error) -> String {
    let mut line = format!("{}: {}", error.reason(), error.message());
    for field in error.field_violations() {
        let separator = if field.path.is_empty() { "" } else { ": " };
        // The gateway's messages say what is wrong with which field already; other servers' need not.
        if !error.message().contains(&field.message) {
            let _ = write!(line, "; {}{separator}{}", field.path, field.message);
        }
    }
    if let Some(delay) = error.retry_delay() {
        let _ = write!(line, "; try again in {:.1} s", delay.as_secs_f64());
    }
    line.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn line_names_reason_fields_and_delay() {
        let error = Error::new(Reason::OverPolicy, "over the\npolicy")
            .violation("sampling.n", "9 is over 4")
            .violation("", "and 3 more violations")
            .retry_after(Duration::from_millis(1500));
        assert_eq!(
            line(&error),
            "OVER_POLICY: over the policy; sampling.n: 9 is over 4; and 3 more violations; try again in 1.5 s"
        );
    }

    #[test]
    fn field_that_the_message_names_is_not_named_again() {
        let error = Error::new(Reason::InvalidArgument, "sampling.n: 0 is too low; sampling.top_p: 2 is too high")
            .violation("sampling.n", "0 is too low")
            .violation("sampling.top_p", "2 is too high");
        assert_eq!(line(&error), "INVALID_ARGUMENT: sampling.n: 0 is too low; sampling.top_p: 2 is too high");
    }

    #[test]
    fn unreachable_and_draining_clusters_are_unavailable() {
        for reason in [Reason::Unavailable, Reason::Draining, Reason::GroupUnavailable] {
            let failure = Failure::from_answer(&Error::new(reason, "x"), "here:1");
            assert!(matches!(failure, Failure::Unavailable(_)), "{reason}");
        }
        let failure = Failure::from_answer(&Error::new(Reason::InvalidArgument, "x"), "here:1");
        assert!(matches!(failure, Failure::Failed(_)));
    }
}

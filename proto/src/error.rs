//! An [`Error`] is a refusal or a failure as it crosses the wire: one [`Reason`], one line of text, and the details that
//! let a program act on it.
//!
//! This file holds the only table from reasons to gRPC codes and HTTP statuses. On the wire an error is a
//! `tonic::Status` whose details follow `google.rpc` (`error_details.proto`): always an `ErrorInfo` with the reason's name
//! and the domain [`DOMAIN`], a `BadRequest` with one entry for each wrong field, and a `RetryInfo` where trying again makes sense.
//! [`Error::from_status`] reads all of it back, so that a gateway can pass on what a worker said.

use std::{collections::BTreeMap, fmt, time::Duration};

use http::StatusCode;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// The `domain` of every `ErrorInfo` that a Lockstep service sends.
pub const DOMAIN: &str = "lockstep";

/// Most field violations that travel with one error. The details are an HTTP/2 trailer, and common clients take no
/// more than 8 KiB of those; what is left out is counted in the last entry.
pub const MAX_VIOLATIONS: usize = 16;

/// Longest text of a message or a violation on the wire, for the same reason. Unit: bytes. A longer one is cut at a
/// character and ends in an ellipsis.
pub const MAX_TEXT_BYTES: usize = 1024;

/// Declares [`Reason`] from the table below: one row says what it means, what it is called, which code it has, and which
/// status in HTTP.
macro_rules! reasons {
    ($(#[doc = $meaning:literal] $variant:ident, $name:literal, $code:ident, $http:ident;)+) => {
        /// Why a call failed. The name is stable: programs compare it, and metrics are labelled with it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $(#[doc = $meaning] $variant,)+
        }

        impl Reason {
            /// Every reason, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name that `ErrorInfo.reason` carries.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => $meaning.trim_ascii(),)+ }
            }

            /// The gRPC status code.
            #[must_use]
            pub const fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code,)+ }
            }

            /// The status of a front for HTTP.
            #[must_use]
            pub const fn http_status(self) -> StatusCode {
                match self { $(Self::$variant => StatusCode::$http,)+ }
            }
        }
    };
}

reasons! {
    /// The request breaks the contract; violations name the fields.
    InvalidArgument, "INVALID_ARGUMENT", InvalidArgument, BAD_REQUEST;
    /// The prompt leaves no room in the model's context, or passes a limit on its length.
    PromptTooLong, "PROMPT_TOO_LONG", InvalidArgument, BAD_REQUEST;
    /// A value is legal but over a cap of the operator's policy; violations name the fields.
    OverPolicy, "OVER_POLICY", InvalidArgument, BAD_REQUEST;
    /// The chat template refused the conversation, or did not end.
    TemplateFailed, "TEMPLATE_FAILED", InvalidArgument, BAD_REQUEST;
    /// The model has no chat template, so it cannot chat; raw prompts work.
    NoChatTemplate, "NO_CHAT_TEMPLATE", FailedPrecondition, BAD_REQUEST;
    /// A rank differs from its group; metadata names what differs.
    AttestationMismatch, "ATTESTATION_MISMATCH", FailedPrecondition, BAD_REQUEST;
    /// A message is larger than `limits.max_message_bytes`.
    MessageTooLarge, "MESSAGE_TOO_LARGE", OutOfRange, PAYLOAD_TOO_LARGE;
    /// A stream cannot go on where an earlier one ended: what was sent is not kept. Begin anew.
    NoHistory, "NO_HISTORY", OutOfRange, BAD_REQUEST;
    /// No model of that name is served.
    ModelNotFound, "MODEL_NOT_FOUND", NotFound, NOT_FOUND;
    /// Something else that the request names does not exist.
    NotFound, "NOT_FOUND", NotFound, NOT_FOUND;
    /// The contract has it, this server does not do it yet.
    Unimplemented, "UNIMPLEMENTED", Unimplemented, BAD_REQUEST;
    /// No API key, or none that is known.
    Unauthenticated, "UNAUTHENTICATED", Unauthenticated, UNAUTHORIZED;
    /// The key is known and may not do this.
    PermissionDenied, "PERMISSION_DENIED", PermissionDenied, FORBIDDEN;
    /// Every queue that could take the request is full; the error says when to come back.
    Overloaded, "OVERLOADED", ResourceExhausted, TOO_MANY_REQUESTS;
    /// The client read its stream too slowly, and the buffer for it is full.
    SlowReader, "SLOW_READER", ResourceExhausted, TOO_MANY_REQUESTS;
    /// The server is shutting down and takes no new work; another one will.
    Draining, "DRAINING", Unavailable, SERVICE_UNAVAILABLE;
    /// No group of workers can take the request, or the one that had it is gone.
    GroupUnavailable, "GROUP_UNAVAILABLE", Unavailable, SERVICE_UNAVAILABLE;
    /// No tokenizer service answers.
    TokenizerUnavailable, "TOKENIZER_UNAVAILABLE", Unavailable, SERVICE_UNAVAILABLE;
    /// The peer cannot be reached.
    Unavailable, "UNAVAILABLE", Unavailable, SERVICE_UNAVAILABLE;
    /// The group has formed anew since the caller joined it; join again.
    EpochEnded, "EPOCH_ENDED", Aborted, CONFLICT;
    /// The deadline passed before there was anything to answer.
    Deadline, "DEADLINE_EXCEEDED", DeadlineExceeded, GATEWAY_TIMEOUT;
    /// The client went away.
    Cancelled, "CANCELLED", Cancelled, REQUEST_TIMEOUT;
    /// A bug of ours; the server's log has more under the request id.
    Internal, "INTERNAL", Internal, INTERNAL_SERVER_ERROR;
}

/// What is wrong with one field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field as a path from the request's root, in the names of the `.proto` file: `sampling.stop[2]`.
    pub path: String,
    /// What is wrong with it, with the value and the rule.
    pub message: String,
}

/// A refusal or a failure as it crosses the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    reason: Reason,
    message: String,
    violations: Vec<FieldViolation>,
    retry_after: Option<Duration>,
    metadata: BTreeMap<String, String>,
}

// === impl Reason ===

impl Reason {
    /// The reason that has this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.name() == name)
    }

    /// The reason nearest to a code that came without one, from a proxy or from tonic itself.
    #[must_use]
    pub const fn nearest(code: Code) -> Self {
        match code {
            Code::InvalidArgument | Code::AlreadyExists | Code::FailedPrecondition => Self::InvalidArgument,
            Code::NotFound => Self::NotFound,
            Code::OutOfRange => Self::MessageTooLarge,
            Code::PermissionDenied => Self::PermissionDenied,
            Code::Unauthenticated => Self::Unauthenticated,
            Code::ResourceExhausted => Self::Overloaded,
            Code::Unimplemented => Self::Unimplemented,
            Code::Unavailable => Self::Unavailable,
            Code::Aborted => Self::EpochEnded,
            Code::DeadlineExceeded => Self::Deadline,
            Code::Cancelled => Self::Cancelled,
            Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => Self::Internal,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

// === impl Error ===

impl Error {
    /// An error without further details.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), violations: Vec::new(), retry_after: None, metadata: BTreeMap::new() }
    }

    /// Adds one field that is wrong.
    #[must_use]
    pub fn violation(mut self, path: impl Into<String>, message: impl Into<String>) -> Self {
        self.violations.push(FieldViolation { path: path.into(), message: message.into() });
        self
    }

    /// Adds fields that are wrong.
    #[must_use]
    pub fn violations(mut self, violations: impl IntoIterator<Item = FieldViolation>) -> Self {
        self.violations.extend(violations);
        self
    }

    /// Says how long the client should wait before it tries again.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Adds a fact for programs to `ErrorInfo.metadata`.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Reads back what [`From<Error> for Status`](Status) wrote. A status of another origin keeps its message and
    /// takes the [nearest](Reason::nearest) reason.
    #[must_use]
    pub fn from_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN);
        let reason = info.and_then(|info| Reason::from_name(&info.reason));
        let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
        Self {
            reason: reason.unwrap_or_else(|| Reason::nearest(status.code())),
            message: status.message().to_owned(),
            violations: violations
                .iter()
                .map(|field| FieldViolation { path: field.field.clone(), message: field.description.clone() })
                .collect(),
            retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
            metadata: info.map(|info| info.metadata.clone().into_iter().collect()).unwrap_or_default(),
        }
    }

    /// Why the call failed.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The gRPC code, which follows from the reason.
    #[must_use]
    pub fn code(&self) -> Code {
        self.reason.code()
    }

    /// The line for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The fields that are wrong, in the order in which they were added.
    #[must_use]
    pub fn field_violations(&self) -> &[FieldViolation] {
        &self.violations
    }

    /// How long to wait before another try, where one makes sense.
    #[must_use]
    pub fn retry_delay(&self) -> Option<Duration> {
        self.retry_after
    }

    /// A fact for programs.
    #[must_use]
    pub fn get_metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    fn details(&self) -> ErrorDetails {
        let mut details = ErrorDetails::new();
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.clone(), shorten(value))).collect();
        details.set_error_info(
            self.reason.name(),
            DOMAIN,
            metadata.into_iter().collect::<std::collections::HashMap<_, _>>(),
        );
        for field in self.violations.iter().take(MAX_VIOLATIONS) {
            details.add_bad_request_violation(shorten(&field.path), shorten(&field.message));
        }
        if let Some(left_out) = self.violations.len().checked_sub(MAX_VIOLATIONS).filter(|n| *n > 0) {
            details.add_bad_request_violation("", format!("and {left_out} more violations"));
        }
        if self.retry_after.is_some() {
            details.set_retry_info(self.retry_after);
        }
        details
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let details = error.details();
        Self::with_error_details(error.code(), shorten(&error.message), details)
    }
}

/// The text, cut to [`MAX_TEXT_BYTES`] visibly.
fn shorten(text: &str) -> String {
    if text.len() <= MAX_TEXT_BYTES {
        return text.to_owned();
    }
    let ends = (0..=MAX_TEXT_BYTES - '…'.len_utf8()).rev();
    let cut = ends.filter_map(|end| text.get(..end)).next().unwrap_or_default();
    format!("{cut}…")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_read_back() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(Reason::from_name(reason.name()), Some(*reason), "row {i}");
        }
    }

    #[test]
    fn nearest_reason_of_a_code_has_that_code_or_says_why_not() {
        for value in 1..=16 {
            let code = Code::from_i32(value);
            let nearest = Reason::nearest(code).code();
            let expected = match code {
                Code::AlreadyExists | Code::FailedPrecondition => Code::InvalidArgument,
                Code::Unknown | Code::DataLoss => Code::Internal,
                same => same,
            };
            assert_eq!(nearest, expected, "{code:?}");
        }
    }

    #[test]
    fn every_detail_survives_the_wire() {
        let sent = Error::new(Reason::OverPolicy, "sampling is over the policy")
            .violation("sampling.n", "9 is over the cap of 4")
            .violations([FieldViolation { path: "sampling.stop[2]".into(), message: "empty".into() }])
            .retry_after(Duration::from_millis(1500))
            .metadata("policy", "default");
        let status = Status::from(sent.clone());
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(Error::from_status(&status), sent);
    }

    #[test]
    fn foreign_status_keeps_its_message_and_takes_the_nearest_reason() {
        let error = Error::from_status(&Status::resource_exhausted("slow down"));
        assert_eq!((error.reason(), error.message()), (Reason::Overloaded, "slow down"));
        assert_eq!(error.field_violations(), []);
    }

    #[test]
    fn reason_of_another_domain_is_not_ours() {
        let details = ErrorDetails::with_error_info("DRAINING", "example.com", [("k".to_owned(), "v".to_owned())]);
        let error = Error::from_status(&Status::with_error_details(Code::Internal, "theirs", details));
        assert_eq!(error.reason(), Reason::Internal);
        assert_eq!(error.get_metadata("k"), None);
    }

    #[test]
    fn details_stay_small_and_say_what_they_left_out() {
        let mut error = Error::new(Reason::InvalidArgument, "é".repeat(4096));
        for i in 0..MAX_VIOLATIONS + 3 {
            error = error.violation(format!("f[{i}]"), "bad");
        }
        let read = Error::from_status(&Status::from(error));
        assert!(read.message().len() <= MAX_TEXT_BYTES && read.message().ends_with('…'));
        assert_eq!(read.field_violations().len(), MAX_VIOLATIONS + 1);
        assert_eq!(read.field_violations().last().unwrap().message, "and 3 more violations");
    }
}

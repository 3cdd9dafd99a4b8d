//! Errors in the API's shape: `{"error", "error_type"}`, under its statuses.

use axum::response::Response;
use http::StatusCode;
use lockstep_proto::{
    error::{Error, Reason},
    fields::{self, Names},
};
use schemars::JsonSchema;
use serde::Serialize;

use crate::http::{failure_response, json_response};

/// An error as clients read it.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "TextGenerationError")]
pub(super) struct ErrorBody {
    /// What is wrong, and where.
    error: String,
    /// The kind of fault, by which programs may tell errors apart.
    error_type: &'static str,
}

/// What the API calls the fields of `lockstep.v1`.
const NAMES: &Names = &[
    ("sampling.constraint", "parameters.grammar"),
    ("sampling.", "parameters."),
    ("output.logprobs", "parameters.top_n_tokens"),
    ("output.prompt_logprobs", "parameters.decoder_input_details"),
    ("output.", "parameters."),
    ("prompt.text", "inputs"),
    ("prompt", "inputs"),
    ("body", ""),
];

/// The whole response.
pub fn response(error: &Error) -> Response {
    failure_response(status(error.reason()), error, &ErrorBody::from(error))
}

/// What `/health` says when no work can be taken.
pub(super) fn unhealthy() -> Response {
    let body = ErrorBody { error: "unhealthy".to_owned(), error_type: "healthcheck" };
    json_response(StatusCode::SERVICE_UNAVAILABLE, &body)
}

impl From<&Error> for ErrorBody {
    fn from(error: &Error) -> Self {
        let (_, error_type) = kind(error.reason());
        let named = fields::rename(error, |path| fields::name(NAMES, path));
        Self { error: named.message().to_owned(), error_type }
    }
}

/// The status of a reason.
pub(super) fn status(reason: Reason) -> StatusCode {
    kind(reason).0
}

/// The status and the type that the API's clients know; where it has none, the table's status.
fn kind(reason: Reason) -> (StatusCode, &'static str) {
    match reason {
        Reason::InvalidArgument
        | Reason::PromptTooLong
        | Reason::OverPolicy
        | Reason::TemplateFailed
        | Reason::NoChatTemplate
        | Reason::Unimplemented => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
        Reason::MessageTooLarge => (reason.http_status(), "validation"),
        Reason::Overloaded | Reason::SlowReader => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
        // Those that generate are not there, or failed.
        Reason::GroupUnavailable | Reason::TokenizerUnavailable | Reason::Unavailable | Reason::EpochEnded => {
            (StatusCode::FAILED_DEPENDENCY, "generation")
        }
        Reason::Deadline | Reason::Cancelled | Reason::Internal => {
            (StatusCode::INTERNAL_SERVER_ERROR, "incomplete_generation")
        }
        Reason::Draining => (reason.http_status(), "overloaded"),
        Reason::ModelNotFound
        | Reason::NotFound
        | Reason::NoHistory
        | Reason::Unauthenticated
        | Reason::PermissionDenied
        | Reason::AttestationMismatch => (reason.http_status(), "request"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_names_types_and_statuses_of_the_api() {
        let invalid = Error::new(Reason::InvalidArgument, "sampling.top_p: 2 is not in (0, 1]");
        for (error, status, body) in [
            (
                invalid.violation("sampling.top_p", "2 is not in (0, 1]"),
                422,
                r#"{"error":"parameters.top_p: 2 is not in (0, 1]","error_type":"validation"}"#,
            ),
            (
                Error::new(Reason::PromptTooLong, "too long").violation("prompt", "too long"),
                422,
                r#"{"error":"inputs: too long","error_type":"validation"}"#,
            ),
            (Error::new(Reason::Overloaded, "full"), 429, r#"{"error":"full","error_type":"overloaded"}"#),
            (Error::new(Reason::GroupUnavailable, "gone"), 424, r#"{"error":"gone","error_type":"generation"}"#),
            (Error::new(Reason::Internal, "bug"), 500, r#"{"error":"bug","error_type":"incomplete_generation"}"#),
            (Error::new(Reason::Unauthenticated, "no key"), 401, r#"{"error":"no key","error_type":"request"}"#),
        ] {
            assert_eq!(response(&error).status().as_u16(), status);
            assert_eq!(serde_json::to_string(&ErrorBody::from(&error)).unwrap(), body);
        }
    }
}

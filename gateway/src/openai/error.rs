//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::response::Response;
use lockstep_proto::{
    error::{Error, Reason},
    fields::{self, Names},
};
use schemars::JsonSchema;
use serde::Serialize;

use crate::http::failure_response;

/// An error as clients read it.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "OpenAiError")]
pub(crate) struct ErrorBody {
    error: ErrorObject,
}

/// What went wrong.
#[derive(Debug, Serialize, JsonSchema)]
struct ErrorObject {
    message: String,
    /// Whose fault it is, by the status.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field at fault, if it is one.
    param: Option<String>,
    /// The reason, by which programs may tell errors apart.
    code: &'static str,
}

/// The whole response.
pub fn response(error: &Error) -> Response {
    response_of(CHATS, error)
}

/// The whole response of an endpoint that has names of its own.
pub(super) fn response_of(names: &Names, error: &Error) -> Response {
    failure_response(error.reason().http_status(), error, &ErrorBody::new(names, error))
}

// === impl ErrorBody ===

impl ErrorBody {
    /// An error in the names of an endpoint.
    pub(super) fn new(names: &Names, error: &Error) -> Self {
        let error = fields::rename(error, |path| param_name(names, path));
        let (kind, code) = (kind(error.reason()), code(error.reason()));
        let param = error.field_violations().first().map(|violation| violation.path.clone());
        Self { error: ErrorObject { message: error.message().to_owned(), kind, param, code } }
    }
}

fn kind(reason: Reason) -> &'static str {
    match reason.http_status().as_u16() {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    }
}

/// The codes that clients of OpenAI know; for others the reason's own name.
fn code(reason: Reason) -> &'static str {
    match reason {
        Reason::PromptTooLong => "context_length_exceeded",
        Reason::ModelNotFound => "model_not_found",
        Reason::Unauthenticated => "invalid_api_key",
        Reason::Overloaded => "rate_limit_exceeded",
        other => other.name(),
    }
}

/// Names of `lockstep.v1`, by their beginnings, and what they are in completions.
pub(super) const COMPLETIONS: &Names = &[
    ("sampling.max_new_tokens", "max_tokens"),
    ("output.logprobs", "logprobs"),
    ("output.prompt_logprobs", "logprobs"),
];

/// The same of responses.
pub(super) const RESPONSES: &Names = &[
    ("sampling.max_new_tokens", "max_output_tokens"),
    ("sampling.constraint", "text.format"),
    ("conversation.messages", "input"),
];

/// The same of tokens whose text is asked for.
pub(super) const TOKENS: &Names = &[("prompt.token_ids.ids", "tokens"), ("prompt.token_ids", "tokens")];

/// The same of chats, and of whatever has no name of its own.
pub(super) const CHATS: &Names = &[
    ("sampling.max_new_tokens", "max_completion_tokens"),
    ("sampling.min_new_tokens", "min_tokens"),
    ("sampling.constraint", "response_format"),
    ("sampling.", ""),
    ("output.logprobs", "top_logprobs"),
    ("output.", ""),
    ("conversation.template_variables_json", "chat_template_kwargs"),
    ("conversation.", ""),
    ("prompt.text", "prompt"),
    ("prompt.token_ids.ids", "prompt"),
    ("prompt.token_ids", "prompt"),
    ("inputs", "input"),
    ("conversation", "messages"),
    ("body", ""),
];

/// A field's name, with what follows it, as OpenAI's clients wrote it.
fn param_name(names: &Names, path: &str) -> String {
    let name = fields::name(names, path);
    let name = if name == path { fields::name(CHATS, path) } else { name };
    name.replace(".arguments_json", ".function.arguments").replace(".parameters_json", ".function.parameters")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_the_names_of_the_protocol() {
        for (ours, theirs) in [
            ("sampling.top_p", "top_p"),
            ("sampling.max_new_tokens", "max_completion_tokens"),
            ("sampling.stop[2]", "stop[2]"),
            ("conversation.messages[3].role", "messages[3].role"),
            ("conversation.messages[3].tool_calls[0].arguments_json", "messages[3].tool_calls[0].function.arguments"),
            ("conversation.tools[0].parameters_json", "tools[0].function.parameters"),
            ("conversation", "messages"),
            ("output.logprobs", "top_logprobs"),
            ("prompt.token_ids.ids[7]", "prompt[7]"),
            ("model", "model"),
        ] {
            assert_eq!(param_name(CHATS, ours), theirs);
        }
        assert_eq!(param_name(COMPLETIONS, "sampling.max_new_tokens"), "max_tokens");
        assert_eq!(param_name(COMPLETIONS, "sampling.top_p"), "top_p");
        assert_eq!(param_name(TOKENS, "prompt.token_ids.ids[7]"), "tokens[7]");
        assert_eq!(param_name(RESPONSES, "conversation.messages[1].role"), "input[1].role");
    }

    #[test]
    fn an_error_names_what_is_wrong() {
        let error = Error::new(Reason::InvalidArgument, "sampling.top_p: 2 is not in (0, 1]")
            .violation("sampling.top_p", "2 is not in (0, 1]");
        let body = serde_json::to_string(&ErrorBody::new(CHATS, &error)).unwrap();
        let expected = r#"{"error":{"message":"top_p: 2 is not in (0, 1]","type":"invalid_request_error","param":"top_p","code":"INVALID_ARGUMENT"}}"#;
        assert_eq!(body, expected);
        let error = Error::new(Reason::GroupUnavailable, "no group is ready");
        let body = serde_json::to_string(&ErrorBody::new(CHATS, &error)).unwrap();
        let expected = r#"{"error":{"message":"no group is ready","type":"server_error","param":null,"code":"GROUP_UNAVAILABLE"}}"#;
        assert_eq!(body, expected);
    }
}

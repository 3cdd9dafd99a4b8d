//! A response as clients get it: whole, or as far as it has come.

use lockstep_proto::v1;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{TextFormat, ToolChoice};
use crate::{
    generation::collect::AnswerChoice,
    openai::usage::{fingerprint, now},
};

/// A response, as far as it has come.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(super) struct Response {
    pub(super) id: String,
    object: &'static str,
    created_at: i64,
    pub(super) status: Status,
    error: Option<()>,
    incomplete_details: Option<Incomplete>,
    model: String,
    pub(super) output: Vec<Item>,
    usage: Option<Usage>,
    system_fingerprint: Option<String>,
    #[serde(flatten)]
    echo: Echo,
}

/// How far a response or an item has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "ResponseStatus")]
pub(super) enum Status {
    InProgress,
    Completed,
    Incomplete,
}

/// Why a response is not complete.
#[derive(Debug, Clone, Serialize, JsonSchema)]
struct Incomplete {
    reason: &'static str,
}

/// What a response consists of: a message, and calls of tools.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseItem")]
pub(super) enum Item {
    Message { id: String, status: Status, role: &'static str, content: Vec<Content> },
    FunctionCall { id: String, call_id: String, name: String, arguments: String, status: Status },
}

/// A part of a message.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseContent")]
pub(super) enum Content {
    OutputText { text: String, annotations: [(); 0], logprobs: [(); 0] },
}

/// Tokens of a request.
#[derive(Debug, Clone, Serialize, JsonSchema)]
#[schemars(rename = "ResponseUsage")]
struct Usage {
    input_tokens: u32,
    input_tokens_details: InputDetails,
    output_tokens: u32,
    output_tokens_details: OutputDetails,
    total_tokens: u32,
}

/// Tokens of the input that had been computed before.
#[derive(Debug, Clone, Serialize, JsonSchema)]
struct InputDetails {
    cached_tokens: u32,
}

/// Tokens of the output that are not shown: none.
#[derive(Debug, Clone, Serialize, JsonSchema)]
struct OutputDetails {
    reasoning_tokens: u32,
}

/// What a response says about its own request.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(super) struct Echo {
    pub(super) instructions: Option<String>,
    pub(super) max_output_tokens: Option<u32>,
    pub(super) metadata: Map<String, Value>,
    pub(super) parallel_tool_calls: bool,
    pub(super) previous_response_id: Option<()>,
    pub(super) store: bool,
    pub(super) temperature: Option<f32>,
    pub(super) text: EchoedText,
    pub(super) tool_choice: ToolChoice,
    pub(super) tools: Vec<EchoedTool>,
    pub(super) top_p: Option<f32>,
    pub(super) truncation: &'static str,
}

/// What the text must be.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(super) struct EchoedText {
    pub(super) format: TextFormat,
}

/// A function that the model may call.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(super) struct EchoedTool {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) name: String,
    pub(super) description: Option<String>,
    pub(super) parameters: Option<Map<String, Value>>,
    pub(super) strict: bool,
}

// === impl Response ===

impl Response {
    pub(super) fn begun(start: &v1::Start, echo: Echo) -> Self {
        Self {
            id: format!("resp_{}", start.request_id),
            object: "response",
            created_at: now(),
            status: Status::InProgress,
            error: None,
            incomplete_details: None,
            model: start.model.clone(),
            output: Vec::new(),
            usage: None,
            system_fingerprint: None,
            echo,
        }
    }

    pub(super) fn end(&mut self, finish: &v1::Finish, reason: v1::FinishReason) {
        let whole = matches!(reason, v1::FinishReason::Stop | v1::FinishReason::ToolCalls);
        self.status = if whole { Status::Completed } else { Status::Incomplete };
        self.incomplete_details = (!whole).then_some(Incomplete { reason: "max_output_tokens" });
        let v1::Usage { prompt_tokens, cached_tokens, completion_tokens } = finish.usage.unwrap_or_default();
        self.usage = Some(Usage {
            input_tokens: prompt_tokens,
            input_tokens_details: InputDetails { cached_tokens },
            output_tokens: completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: 0 },
            total_tokens: prompt_tokens.saturating_add(completion_tokens),
        });
        self.system_fingerprint = fingerprint(finish.repro.as_ref());
    }

    /// Takes in a whole answer: its text, then its calls.
    pub(super) fn fill(&mut self, choice: &AnswerChoice) {
        if !choice.text.is_empty() || choice.tool_calls.is_empty() {
            self.output.push(Item::message(&self.id, Status::Completed, vec![Content::text(&choice.text)]));
        }
        self.output.extend(choice.tool_calls.iter().map(|call| Item::call(call, Status::Completed)));
    }
}

// === impl Item ===

impl Item {
    /// The message of a response, which has one.
    pub(super) fn message(response_id: &str, status: Status, content: Vec<Content>) -> Self {
        Self::Message { id: message_id(response_id), status, role: "assistant", content }
    }

    /// A call of a tool.
    pub(super) fn call(call: &v1::ToolCall, status: Status) -> Self {
        let v1::ToolCall { id, name, arguments_json } = call.clone();
        Self::FunctionCall { id: call_id(&id), call_id: id, name, arguments: arguments_json, status }
    }
}

/// The id of the item that is a response's message.
pub(super) fn message_id(response_id: &str) -> String {
    response_id.replacen("resp_", "msg_", 1)
}

/// The id of the item that is a call.
pub(super) fn call_id(id: &str) -> String {
    format!("fc_{id}")
}

// === impl Content ===

impl Content {
    pub(super) fn text(text: &str) -> Self {
        Self::OutputText { text: text.to_owned(), annotations: [], logprobs: [] }
    }
}

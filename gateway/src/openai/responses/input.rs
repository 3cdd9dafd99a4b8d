//! The items of `input`, and the conversation that they are.

use lockstep_proto::v1::{self, content_part::Part};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    json::{Object, OneOrMany},
    openai::messages::text_of_object,
    request::MAX_TOOL_NAME_BYTES,
};

/// One item. Clients send an answer's items back as they got them.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a message, a function_call or a function_call_output")]
#[schemars(rename = "ResponseInputItem")]
pub(super) enum Item {
    Call(Object<Call>),
    Output(Object<Output>),
    Message(Object<Message>),
}

/// What somebody says.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ResponseInputMessage")]
pub(super) struct Message {
    /// May be left out.
    #[serde(rename = "type")]
    _kind: Option<MessageKind>,
    /// Whose turn it is.
    role: Role,
    /// A text, or texts that are joined.
    content: OneOrMany<Object<Content>>,
    /// As it came with an answer.
    #[serde(rename = "id")]
    _id: Option<String>,
    /// As it came with an answer.
    #[serde(rename = "status")]
    _status: Option<String>,
    /// As it came with an answer.
    #[serde(rename = "phase")]
    _phase: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
enum MessageKind {
    Message,
}

/// Whose turn it is. Developers speak as the system.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "ResponseRole")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
}

/// A part of a message.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ResponseInputContent")]
struct Content {
    /// Whether a user or the model said it.
    #[serde(rename = "type")]
    _kind: ContentKind,
    /// The text.
    text: String,
    /// As it came with an answer.
    #[serde(rename = "annotations")]
    _annotations: Option<Vec<Value>>,
    /// As it came with an answer.
    #[serde(rename = "logprobs")]
    _logprobs: Option<Vec<Value>>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
enum ContentKind {
    InputText,
    OutputText,
}

/// A call of a tool that the model made.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ResponseInputCall")]
pub(super) struct Call {
    /// Says that it is a call.
    #[serde(rename = "type")]
    _kind: CallKind,
    /// Names the call.
    call_id: String,
    /// The name of the tool.
    #[schemars(length(min = 1, max = MAX_TOOL_NAME_BYTES))]
    name: String,
    /// The text of a JSON object with its arguments.
    #[schemars(transform = text_of_object)]
    arguments: String,
    /// As it came with an answer.
    #[serde(rename = "id")]
    _id: Option<String>,
    /// As it came with an answer.
    #[serde(rename = "status")]
    _status: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
enum CallKind {
    FunctionCall,
}

/// What a tool answers.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ResponseInputOutput")]
pub(super) struct Output {
    /// Says that it is an answer.
    #[serde(rename = "type")]
    _kind: OutputKind,
    /// The call that is answered.
    call_id: String,
    /// A text, or texts that are joined.
    output: OneOrMany<Object<Content>>,
    /// As it came with an answer.
    #[serde(rename = "id")]
    _id: Option<String>,
    /// As it came with an answer.
    #[serde(rename = "status")]
    _status: Option<String>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
enum OutputKind {
    FunctionCallOutput,
}

/// The turns of a conversation. Calls belong to the assistant's turn before them.
pub(super) fn messages(instructions: Option<String>, input: OneOrMany<Item>) -> Vec<v1::Message> {
    let mut messages: Vec<v1::Message> = Vec::new();
    messages.extend(instructions.map(|text| message(v1::Role::System, vec![text])));
    let items = match input {
        OneOrMany::One(text) => {
            messages.push(message(v1::Role::User, vec![text]));
            return messages;
        }
        OneOrMany::Many(items) => items,
    };
    for item in items {
        match item {
            Item::Message(Object(Message { role, content, .. })) => messages.push(message(role.into(), texts(content))),
            Item::Call(Object(Call { call_id, name, arguments, .. })) => {
                if messages.last().is_none_or(|last| last.role() != v1::Role::Assistant) {
                    messages.push(message(v1::Role::Assistant, Vec::new()));
                }
                let call = v1::ToolCall { id: call_id, name, arguments_json: arguments };
                if let Some(last) = messages.last_mut() {
                    last.tool_calls.push(call);
                }
            }
            Item::Output(Object(Output { call_id, output, .. })) => {
                let tool_call_id = call_id;
                messages.push(v1::Message { tool_call_id, ..message(v1::Role::Tool, texts(output)) });
            }
        }
    }
    messages
}

fn texts(content: OneOrMany<Object<Content>>) -> Vec<String> {
    match content {
        OneOrMany::One(text) => vec![text],
        OneOrMany::Many(parts) => parts.into_iter().map(|Object(part)| part.text).collect(),
    }
}

fn message(role: v1::Role, texts: Vec<String>) -> v1::Message {
    let content = texts.into_iter().map(|text| v1::ContentPart { part: Some(Part::Text(text)) }).collect();
    v1::Message { role: role.into(), content, ..v1::Message::default() }
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::System | Role::Developer => Self::System,
            Role::User => Self::User,
            Role::Assistant => Self::Assistant,
        }
    }
}

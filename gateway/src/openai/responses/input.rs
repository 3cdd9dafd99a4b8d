//! The items of `input`, and the conversation that they are.

use lockstep_proto::v1::{self, content_part::Part};
use serde::Deserialize;
use serde_json::Value;

use crate::json::OneOrMany;

/// One item. Clients send an answer's items back as they got them.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a message, a function_call or a function_call_output")]
pub(super) enum Item {
    Call(Call),
    Output(Output),
    Message(Message),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Message {
    #[serde(rename = "type")]
    _kind: Option<MessageKind>,
    role: Role,
    content: OneOrMany<Content>,
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "status")]
    _status: Option<String>,
    #[serde(rename = "phase")]
    _phase: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum MessageKind {
    Message,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    #[serde(alias = "developer")]
    System,
    User,
    Assistant,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    #[serde(rename = "type")]
    _kind: ContentKind,
    text: String,
    #[serde(rename = "annotations")]
    _annotations: Option<Vec<Value>>,
    #[serde(rename = "logprobs")]
    _logprobs: Option<Vec<Value>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ContentKind {
    InputText,
    OutputText,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Call {
    #[serde(rename = "type")]
    _kind: CallKind,
    call_id: String,
    name: String,
    arguments: String,
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "status")]
    _status: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CallKind {
    FunctionCall,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Output {
    #[serde(rename = "type")]
    _kind: OutputKind,
    call_id: String,
    output: OneOrMany<Content>,
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "status")]
    _status: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
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
            Item::Message(Message { role, content, .. }) => messages.push(message(role.into(), texts(content))),
            Item::Call(Call { call_id, name, arguments, .. }) => {
                if messages.last().is_none_or(|last| last.role() != v1::Role::Assistant) {
                    messages.push(message(v1::Role::Assistant, Vec::new()));
                }
                let call = v1::ToolCall { id: call_id, name, arguments_json: arguments };
                if let Some(last) = messages.last_mut() {
                    last.tool_calls.push(call);
                }
            }
            Item::Output(Output { call_id, output, .. }) => {
                let tool_call_id = call_id;
                messages.push(v1::Message { tool_call_id, ..message(v1::Role::Tool, texts(output)) });
            }
        }
    }
    messages
}

fn texts(content: OneOrMany<Content>) -> Vec<String> {
    match content {
        OneOrMany::One(text) => vec![text],
        OneOrMany::Many(parts) => parts.into_iter().map(|part| part.text).collect(),
    }
}

fn message(role: v1::Role, texts: Vec<String>) -> v1::Message {
    let content = texts.into_iter().map(|text| v1::ContentPart { part: Some(Part::Text(text)) }).collect();
    v1::Message { role: role.into(), content, ..v1::Message::default() }
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::System => Self::System,
            Role::User => Self::User,
            Role::Assistant => Self::Assistant,
        }
    }
}

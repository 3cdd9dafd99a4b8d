//! The messages and tools of a chat, as OpenAI's clients write them, and how they become a conversation.

use lockstep_proto::v1;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    json::{OneOrMany, Unsupported},
    request::RequestError,
};

/// One turn. Clients send answers back as they got them, so that what an answer may have is taken here.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Message {
    role: Role,
    content: Option<OneOrMany<Part>>,
    name: Option<String>,
    tool_calls: Option<Vec<ToolCall>>,
    tool_call_id: Option<String>,
    #[serde(rename = "refusal")]
    _refusal: Option<Unsupported>,
    #[serde(rename = "audio")]
    _audio: Option<Unsupported>,
    #[serde(rename = "function_call")]
    _function_call: Option<Unsupported>,
    /// Citations of an earlier answer, which no template shows.
    #[serde(rename = "annotations")]
    _annotations: Option<Vec<Value>>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Role {
    #[serde(alias = "developer")]
    System,
    User,
    Assistant,
    Tool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    #[serde(rename = "type")]
    _kind: PartKind,
    text: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PartKind {
    Text,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ToolCall {
    #[serde(default)]
    id: String,
    #[serde(rename = "type")]
    _kind: Option<FunctionKind>,
    /// Where a client has kept the pieces of a stream.
    #[serde(rename = "index")]
    _index: Option<u32>,
    function: CalledFunction,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FunctionKind {
    Function,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CalledFunction {
    name: String,
    #[serde(default)]
    arguments: String,
}

/// A function that the model may call.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tool {
    #[serde(rename = "type")]
    _kind: FunctionKind,
    function: Function,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    name: String,
    description: Option<String>,
    parameters: Option<Map<String, Value>>,
    /// Calls that are constrained follow their schema anyway.
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

/// Whether the model may, must or must not call a tool.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "`none`, `auto`, `required`, or a function by name")]
pub(super) enum ToolChoice {
    Mode(ToolMode),
    Named(NamedTool),
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ToolMode {
    None,
    Auto,
    Required,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NamedTool {
    #[serde(rename = "type")]
    _kind: FunctionKind,
    function: FunctionName,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionName {
    name: String,
}

// === impl Message ===

impl From<Message> for v1::Message {
    fn from(message: Message) -> Self {
        let role = match message.role {
            Role::System => v1::Role::System,
            Role::User => v1::Role::User,
            Role::Assistant => v1::Role::Assistant,
            Role::Tool => v1::Role::Tool,
        };
        let texts = match message.content {
            None => Vec::new(),
            Some(OneOrMany::One(text)) => vec![text],
            Some(OneOrMany::Many(parts)) => parts.into_iter().map(|part| part.text).collect(),
        };
        let part = |text| v1::ContentPart { part: Some(v1::content_part::Part::Text(text)) };
        let call = |call: ToolCall| v1::ToolCall {
            id: call.id,
            name: call.function.name,
            arguments_json: call.function.arguments,
        };
        Self {
            role: role.into(),
            content: texts.into_iter().map(part).collect(),
            tool_calls: message.tool_calls.unwrap_or_default().into_iter().map(call).collect(),
            tool_call_id: message.tool_call_id.unwrap_or_default(),
            name: message.name.unwrap_or_default(),
        }
    }
}

// === impl Tool ===

impl From<Tool> for v1::Tool {
    fn from(tool: Tool) -> Self {
        let Function { name, description, parameters, .. } = tool.function;
        let parameters_json = parameters.map(|parameters| Value::Object(parameters).to_string()).unwrap_or_default();
        Self { name, description: description.unwrap_or_default(), parameters_json }
    }
}

// === impl ToolChoice ===

impl ToolChoice {
    fn into_wire(self, parallel: Option<bool>) -> v1::ToolChoice {
        let (mode, name) = match self {
            ToolChoice::Mode(ToolMode::None) => (v1::ToolChoiceMode::None, String::new()),
            ToolChoice::Mode(ToolMode::Auto) => (v1::ToolChoiceMode::Auto, String::new()),
            ToolChoice::Mode(ToolMode::Required) => (v1::ToolChoiceMode::Required, String::new()),
            ToolChoice::Named(named) => (v1::ToolChoiceMode::Named, named.function.name),
        };
        v1::ToolChoice { mode: mode.into(), name, parallel }
    }
}

/// What the template sees besides messages and tools.
#[derive(Debug, Default)]
pub(super) struct Template {
    pub(super) add_generation_prompt: Option<bool>,
    pub(super) continue_final_message: Option<bool>,
    pub(super) variables: Option<Map<String, Value>>,
}

/// Tools, and how they may be called.
#[derive(Debug, Default)]
pub(super) struct Tools {
    pub(super) tools: Option<Vec<Tool>>,
    pub(super) choice: Option<ToolChoice>,
    pub(super) parallel: Option<bool>,
}

/// A conversation of all that a request says about it.
pub(super) fn conversation(
    messages: Vec<Message>,
    tools: Tools,
    template: Template,
) -> Result<v1::Conversation, RequestError> {
    let Tools { tools, choice, parallel } = tools;
    if matches!(choice, Some(ToolChoice::Mode(ToolMode::Required) | ToolChoice::Named(_))) && tools.is_none() {
        return Err(RequestError::invalid("tool_choice", "there are no tools to choose from"));
    }
    let choice = choice.unwrap_or(ToolChoice::Mode(ToolMode::Auto));
    Ok(v1::Conversation {
        tools: tools.unwrap_or_default().into_iter().map(v1::Tool::from).collect(),
        tool_choice: Some(choice.into_wire(parallel)),
        ..template.conversation(messages.into_iter().map(v1::Message::from).collect())
    })
}

// === impl Template ===

impl Template {
    /// A conversation without tools.
    pub(super) fn conversation(self, messages: Vec<v1::Message>) -> v1::Conversation {
        let variables = self.variables.map(|variables| Value::Object(variables).to_string());
        v1::Conversation {
            messages,
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            template_variables_json: variables.unwrap_or_default(),
            ..v1::Conversation::default()
        }
    }
}

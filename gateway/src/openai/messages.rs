//! The messages and tools of a chat, as OpenAI's clients write them, and how they become a conversation.

use lockstep_proto::v1;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    json::{Object, OneOrMany, Unsupported},
    openapi::rules::{either, off, set, where_set},
    request::{MAX_LISTED, MAX_TOOL_NAME_BYTES, RequestError},
};

/// One turn. Clients send answers back as they got them, so that what an answer may have is taken here.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ChatMessage", transform = fit_role)]
pub(super) struct Message {
    /// Whose turn it is.
    role: Role,
    /// What is said: a text, or texts that are joined.
    content: Option<OneOrMany<Object<Part>>>,
    /// The speaker's name, for templates that show it.
    name: Option<String>,
    /// Tools that the assistant calls.
    #[schemars(length(max = MAX_LISTED))]
    tool_calls: Option<Vec<Object<ToolCall>>>,
    /// The call that a tool answers.
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

/// Whose turn it is. Developers speak as the system.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "ChatRole")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
    Tool,
}

/// A part of a message.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ChatPart")]
pub(super) struct Part {
    /// Texts are the only parts there are.
    #[serde(rename = "type")]
    _kind: PartKind,
    /// The text.
    text: String,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
enum PartKind {
    Text,
}

/// A call of a tool.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ChatToolCall")]
struct ToolCall {
    /// Names the call.
    #[serde(default)]
    id: String,
    /// Functions are the only tools there are.
    #[serde(rename = "type")]
    _kind: Option<FunctionKind>,
    /// Where a client has kept the pieces of a stream.
    #[serde(rename = "index")]
    _index: Option<u32>,
    /// What is called.
    function: Object<CalledFunction>,
}

#[derive(Debug, Clone, Copy, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum FunctionKind {
    Function,
}

/// The function that is called.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ChatCalledFunction")]
struct CalledFunction {
    /// Its name.
    #[schemars(length(min = 1, max = MAX_TOOL_NAME_BYTES))]
    name: String,
    /// The text of a JSON object with its arguments.
    #[serde(default)]
    #[schemars(transform = text_of_object)]
    arguments: String,
}

/// A function that the model may call.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ChatTool")]
pub(super) struct Tool {
    /// Functions are the only tools there are.
    #[serde(rename = "type")]
    _kind: FunctionKind,
    /// The function.
    function: Object<Function>,
}

/// What the model is told of a function.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ChatFunction")]
struct Function {
    /// Its name, which no other has.
    #[schemars(length(min = 1, max = MAX_TOOL_NAME_BYTES))]
    name: String,
    /// What it does.
    description: Option<String>,
    /// The JSON Schema of its arguments. Default: it has none.
    parameters: Option<Map<String, Value>>,
    /// Whether calls follow the schemas of all functions even if the model need not call any. Default: false.
    strict: Option<bool>,
}

/// Whether the model may, must or must not call a tool.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "`none`, `auto`, `required`, or a function by name")]
#[schemars(rename = "ChatToolChoice")]
pub(super) enum ToolChoice {
    Mode(ToolMode),
    Named(Object<NamedTool>),
}

#[derive(Debug, Clone, Copy, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(inline)]
pub(super) enum ToolMode {
    None,
    Auto,
    Required,
}

/// The tool that must be called.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ChatNamedTool")]
pub(super) struct NamedTool {
    /// Functions are the only tools there are.
    #[serde(rename = "type")]
    _kind: FunctionKind,
    /// The function.
    function: Object<FunctionName>,
}

/// A function by its name.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FunctionName {
    /// The name of one of `tools`.
    name: String,
}

/// The schema of a text that is a JSON object, or empty.
pub(super) fn text_of_object(text: &mut Schema) {
    text.insert("contentMediaType".into(), "application/json".into());
    text.insert("contentSchema".into(), json!({ "type": "object" }));
}

/// The rule that assistants alone call tools, and tools alone answer calls.
fn fit_role(message: &mut Schema) {
    let no_calls = || ("tool_calls", json!({ "type": ["array", "null"], "maxItems": 0 }));
    let no_id = || ("tool_call_id", json!({ "enum": ["", null] }));
    let role = |roles: Value| ("role", json!({ "enum": roles }));
    let forms = [
        where_set([role(json!(["system", "developer", "user"])), no_calls(), no_id()]),
        where_set([role(json!(["assistant"])), no_id()]),
        where_set([role(json!(["tool"])), no_calls()]),
    ];
    either(message, forms);
}

/// The rule that a conversation does not begin an answer where its last message is left open.
pub(super) fn one_ending(request: &mut Schema) {
    either(request, [where_set([("continue_final_message", off())]), where_set([("add_generation_prompt", off())])]);
}

/// The rule that tools that must be called are there.
pub(super) fn something_to_call(request: &mut Schema) {
    let optional = where_set([("tool_choice", json!({ "enum": ["none", "auto", null] }))]);
    either(request, [optional, set("tools", json!({ "type": "array", "minItems": 1 }))]);
}

/// The rule that there are no tools to call where the text is constrained, unless it is as this schema says.
pub(super) fn tools_or_constraint(request: &mut Schema, unconstrained: Value) {
    let no_tools = where_set([("tools", json!({ "type": ["array", "null"], "maxItems": 0 }))]);
    either(request, [unconstrained, no_tools, set("tool_choice", json!({ "const": "none" }))]);
}

// === impl Message ===

impl From<Message> for v1::Message {
    fn from(message: Message) -> Self {
        let role = match message.role {
            Role::System | Role::Developer => v1::Role::System,
            Role::User => v1::Role::User,
            Role::Assistant => v1::Role::Assistant,
            Role::Tool => v1::Role::Tool,
        };
        let texts = match message.content {
            None => Vec::new(),
            Some(OneOrMany::One(text)) => vec![text],
            Some(OneOrMany::Many(parts)) => parts.into_iter().map(|Object(part)| part.text).collect(),
        };
        let part = |text| v1::ContentPart { part: Some(v1::content_part::Part::Text(text)) };
        let call = |Object(call): Object<ToolCall>| {
            let Object(CalledFunction { name, arguments }) = call.function;
            v1::ToolCall { id: call.id, name, arguments_json: arguments }
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
        let Object(Function { name, description, parameters, strict }) = tool.function;
        let parameters_json = parameters.map(|parameters| Value::Object(parameters).to_string()).unwrap_or_default();
        let (description, strict) = (description.unwrap_or_default(), strict.unwrap_or(false));
        Self { name, description, parameters_json, strict }
    }
}

// === impl ToolChoice ===

impl ToolChoice {
    fn into_wire(self, parallel: Option<bool>) -> v1::ToolChoice {
        let (mode, name) = match self {
            ToolChoice::Mode(ToolMode::None) => (v1::ToolChoiceMode::None, String::new()),
            ToolChoice::Mode(ToolMode::Auto) => (v1::ToolChoiceMode::Auto, String::new()),
            ToolChoice::Mode(ToolMode::Required) => (v1::ToolChoiceMode::Required, String::new()),
            ToolChoice::Named(Object(named)) => (v1::ToolChoiceMode::Named, named.function.0.name),
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
    pub(super) tools: Option<Vec<Object<Tool>>>,
    pub(super) choice: Option<ToolChoice>,
    pub(super) parallel: Option<bool>,
}

/// A conversation of all that a request says about it.
pub(super) fn conversation(
    messages: Vec<Object<Message>>,
    tools: Tools,
    template: Template,
) -> Result<v1::Conversation, RequestError> {
    let Tools { tools, choice, parallel } = tools;
    if matches!(choice, Some(ToolChoice::Mode(ToolMode::Required) | ToolChoice::Named(_))) && tools.is_none() {
        return Err(RequestError::invalid("tool_choice", "there are no tools to choose from"));
    }
    let choice = choice.unwrap_or(ToolChoice::Mode(ToolMode::Auto));
    Ok(v1::Conversation {
        tools: tools.unwrap_or_default().into_iter().map(|Object(tool)| tool.into()).collect(),
        tool_choice: Some(choice.into_wire(parallel)),
        ..template.conversation(messages.into_iter().map(|Object(message)| message.into()).collect())
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

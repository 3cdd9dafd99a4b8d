//! A conversation is all that a chat template sees: turns, tools, documents and further variables.

use std::{collections::BTreeSet, fmt};

use lockstep_proto::v1::{Conversation, Document, Message, Role, Tool, ToolCall, ToolChoice, ToolChoiceMode};
use serde_json::{Map, Value};

use super::{ModelFacts, Violations, prompt::MAX_TEXT_BYTES};
use crate::{template::is_reserved_name, tools};

/// Most turns, as the contract states it.
pub(crate) const MAX_MESSAGES: usize = 4_096;
/// Most tools, documents, and tool calls of one turn, as the contract states it.
pub(crate) const MAX_LISTED: usize = 128;
/// Longest name of a tool. Unit: bytes.
pub(crate) const MAX_TOOL_NAME_BYTES: usize = 256;
/// Largest JSON object of template variables. Unit: bytes.
const MAX_VARIABLES_BYTES: usize = 64 * 1024;

/// Turns, tools, documents and variables that a template can render without further checks.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidConversation {
    n_bytes: usize,
    pub(crate) messages: Vec<ValidMessage>,
    pub(crate) tools: Vec<ValidTool>,
    documents: Vec<ValidDocument>,
    tool_choice: ValidToolChoice,
    ending: Ending,
    variables: Map<String, Value>,
}

/// Whether the model may or must call tools.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValidToolChoice {
    /// Tools that may be called.
    pub(crate) tools: Vec<ValidTool>,
    /// Whether one of them must be.
    pub(crate) required: bool,
    /// Whether one answer may call several; `None`: as the model does by itself.
    pub(crate) parallel: Option<bool>,
}

/// How the rendered text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// After the last turn.
    LastTurn,
    /// With the header of the assistant's next turn.
    GenerationPrompt,
    /// Within the last turn, which stays open.
    OpenFinalMessage,
}

/// One turn.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidMessage {
    /// Who speaks, as templates name it.
    pub(crate) role: &'static str,
    /// The parts' texts, joined.
    pub(crate) content: String,
    /// Calls that the turn makes.
    pub(crate) tool_calls: Vec<ValidToolCall>,
    /// The call that the turn answers; may be empty.
    pub(crate) tool_call_id: String,
    /// The speaker's or tool's name; may be empty.
    pub(crate) name: String,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidToolCall {
    /// Names the call; may be empty.
    pub(crate) id: String,
    /// The tool's name.
    pub(crate) name: String,
    /// Its arguments.
    pub(crate) arguments: Map<String, Value>,
}

/// A tool that the template shows.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidTool {
    /// Its name.
    pub(crate) name: String,
    /// What it does; may be empty.
    pub(crate) description: String,
    /// JSON schema of its arguments.
    pub(crate) parameters: Map<String, Value>,
    /// Whether calls are held to the schemas where none must be made.
    pub(crate) strict: bool,
}

/// A document that the template shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidDocument {
    /// Its title; may be empty.
    pub(crate) title: String,
    /// Its text; may be empty.
    pub(crate) text: String,
}

// === impl ValidConversation ===

impl ValidConversation {
    /// Reads a conversation, noting what is wrong with it under `conversation`.
    pub(super) fn read(wire: Option<Conversation>, facts: &ModelFacts, violations: &mut Violations) -> Self {
        if !facts.has_chat_template() {
            violations.invalid("model", "the model has no chat template; send it a raw prompt");
        }
        let wire = wire.unwrap_or_default();
        let n_bytes = text_bytes(&wire);
        if n_bytes > MAX_TEXT_BYTES {
            violations.invalid("conversation", format!("{n_bytes} bytes of text are over {MAX_TEXT_BYTES}"));
        }
        match wire.messages.len() {
            0 => violations.invalid("conversation.messages", "there is no message"),
            n if n > MAX_MESSAGES => {
                violations.invalid("conversation.messages", format!("{n} messages are over {MAX_MESSAGES}"));
            }
            _ => {}
        }
        check_count("conversation.tools", wire.tools.len(), violations);
        check_count("conversation.documents", wire.documents.len(), violations);
        let ending = ending(&wire, violations);
        let (tools, tool_choice) = read_tools(wire.tools, wire.tool_choice, violations);
        let mut conversation = Self {
            n_bytes,
            messages: wire.messages.into_iter().enumerate().map(|at| read_message(at, violations)).collect(),
            tools,
            tool_choice,
            documents: wire.documents.into_iter().map(ValidDocument::from).collect(),
            ending,
            variables: read_variables(&wire.template_variables_json, violations),
        };
        if !facts.convention().shown_by_template {
            tools::prompt::spell_out(&mut conversation);
        }
        conversation
    }

    /// All text in it as it came, that of tools and documents included. Unit: bytes.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// The turns, oldest first; at least one.
    pub fn messages(&self) -> &[ValidMessage] {
        &self.messages
    }

    /// The tools that the template is shown.
    pub fn tools(&self) -> &[ValidTool] {
        &self.tools
    }

    /// Which tools may or must be called.
    pub fn tool_choice(&self) -> &ValidToolChoice {
        &self.tool_choice
    }

    /// The documents that the template is shown.
    pub fn documents(&self) -> &[ValidDocument] {
        &self.documents
    }

    /// How the rendered text ends.
    pub fn ending(&self) -> Ending {
        self.ending
    }

    /// Further template variables, none of them under a reserved name.
    pub fn variables(&self) -> &Map<String, Value> {
        &self.variables
    }
}

// === impl ValidMessage ===

impl ValidMessage {
    /// A turn of nothing but text.
    pub(crate) fn plain(role: &'static str, content: String) -> Self {
        Self { role, content, tool_calls: Vec::new(), tool_call_id: String::new(), name: String::new() }
    }
}

impl From<Document> for ValidDocument {
    fn from(wire: Document) -> Self {
        Self { title: wire.title, text: wire.text }
    }
}

/// Bytes of every string of a conversation, so that the sum bounds what rendering has to carry.
fn text_bytes(wire: &Conversation) -> usize {
    let parts = |message: &Message| message.content.iter().filter_map(|part| part.part.as_ref()).map(text_of).sum();
    let calls = |call: &ToolCall| call.id.len() + call.name.len() + call.arguments_json.len();
    let message = |message: &Message| -> usize {
        let parts: usize = parts(message);
        parts + message.tool_calls.iter().map(calls).sum::<usize>() + message.tool_call_id.len() + message.name.len()
    };
    let tool = |tool: &Tool| tool.name.len() + tool.description.len() + tool.parameters_json.len();
    wire.messages.iter().map(message).sum::<usize>()
        + wire.tools.iter().map(tool).sum::<usize>()
        + wire.documents.iter().map(|document| document.title.len() + document.text.len()).sum::<usize>()
        + wire.template_variables_json.len()
}

fn text_of(part: &lockstep_proto::v1::content_part::Part) -> usize {
    let lockstep_proto::v1::content_part::Part::Text(text) = part;
    text.len()
}

fn ending(wire: &Conversation, violations: &mut Violations) -> Ending {
    match (wire.add_generation_prompt, wire.continue_final_message.unwrap_or(false)) {
        (Some(true), true) => {
            let message = "cannot be true together with add_generation_prompt";
            violations.invalid("conversation.continue_final_message", message);
            Ending::OpenFinalMessage
        }
        (_, true) => Ending::OpenFinalMessage,
        (Some(false), false) => Ending::LastTurn,
        (_, false) => Ending::GenerationPrompt,
    }
}

fn read_message((index, wire): (usize, Message), violations: &mut Violations) -> ValidMessage {
    let path = format!("conversation.messages[{index}]");
    let role = match wire.role() {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
        Role::Tool => "tool",
        Role::Unspecified => {
            violations.invalid(format_args!("{path}.role"), format!("{} is no role", wire.role));
            ""
        }
    };
    if role != "assistant" && !wire.tool_calls.is_empty() {
        violations.invalid(format_args!("{path}.tool_calls"), "only a ROLE_ASSISTANT message calls tools");
    }
    if role != "tool" && !wire.tool_call_id.is_empty() {
        violations.invalid(format_args!("{path}.tool_call_id"), "only a ROLE_TOOL message answers a call");
    }
    check_count(format_args!("{path}.tool_calls"), wire.tool_calls.len(), violations);
    let mut content = String::new();
    for (part_index, part) in wire.content.into_iter().enumerate() {
        match part.part {
            Some(lockstep_proto::v1::content_part::Part::Text(text)) => content.push_str(&text),
            None => violations.invalid(format_args!("{path}.content[{part_index}]"), "the part is not set"),
        }
    }
    let tool_calls = wire.tool_calls.into_iter().enumerate();
    let tool_calls = tool_calls.map(|at| read_tool_call(&path, at, violations)).collect();
    ValidMessage { role, content, tool_calls, tool_call_id: wire.tool_call_id, name: wire.name }
}

fn read_tool_call(message: &str, (index, wire): (usize, ToolCall), violations: &mut Violations) -> ValidToolCall {
    let path = format!("{message}.tool_calls[{index}]");
    check_tool_name(format_args!("{path}.name"), &wire.name, violations);
    let arguments = read_object(format_args!("{path}.arguments_json"), &wire.arguments_json, violations);
    ValidToolCall { id: wire.id, name: wire.name, arguments: arguments.unwrap_or_default() }
}

fn read_tools(
    wire: Vec<Tool>,
    choice: Option<ToolChoice>,
    violations: &mut Violations,
) -> (Vec<ValidTool>, ValidToolChoice) {
    let choice = choice.unwrap_or_default();
    let path = "conversation.tool_choice";
    let tools: Vec<_> = wire.into_iter().enumerate().map(|at| read_tool(at, violations)).collect();
    let mut names = BTreeSet::new();
    for (index, tool) in tools.iter().enumerate() {
        if !names.insert(tool.name.clone()) {
            violations.invalid(format_args!("conversation.tools[{index}].name"), "another tool has this name");
        }
    }
    let Ok(mode) = ToolChoiceMode::try_from(choice.mode) else {
        violations.invalid(format_args!("{path}.mode"), format!("{} is no mode", choice.mode));
        return Default::default();
    };
    if mode != ToolChoiceMode::Named && !choice.name.is_empty() {
        violations.invalid(format_args!("{path}.name"), "a name goes with TOOL_CHOICE_MODE_NAMED alone");
    }
    let mut callable = tools.clone();
    let required = match mode {
        ToolChoiceMode::None => return Default::default(),
        ToolChoiceMode::Auto | ToolChoiceMode::Unspecified => false,
        ToolChoiceMode::Required => {
            if names.is_empty() {
                violations.invalid(format_args!("{path}.mode"), "there are no tools to call");
            }
            true
        }
        ToolChoiceMode::Named => {
            if !names.contains(&choice.name) {
                violations.invalid(format_args!("{path}.name"), "no tool has this name");
            }
            callable.retain(|tool| tool.name == choice.name);
            true
        }
    };
    (tools, ValidToolChoice { tools: callable, required, parallel: choice.parallel })
}

fn read_tool((index, wire): (usize, Tool), violations: &mut Violations) -> ValidTool {
    let path = format!("conversation.tools[{index}]");
    check_tool_name(format_args!("{path}.name"), &wire.name, violations);
    let parameters = read_object(format_args!("{path}.parameters_json"), &wire.parameters_json, violations);
    ValidTool {
        name: wire.name,
        description: wire.description,
        parameters: parameters.unwrap_or_else(no_parameters),
        strict: wire.strict,
    }
}

/// The schema of a tool without arguments, as Hugging Face's `get_json_schema` writes it.
fn no_parameters() -> Map<String, Value> {
    Map::from_iter([("type".into(), "object".into()), ("properties".into(), Map::new().into())])
}

fn read_variables(json: &str, violations: &mut Violations) -> Map<String, Value> {
    let path = "conversation.template_variables_json";
    if json.len() > MAX_VARIABLES_BYTES {
        violations.invalid(path, format!("{} bytes are over {MAX_VARIABLES_BYTES}", json.len()));
        return Map::new();
    }
    let variables = read_object(path, json, violations).unwrap_or_default();
    for name in variables.keys().filter(|name| is_reserved_name(name)) {
        violations.invalid(path, format!("the template variable `{name}` cannot be replaced"));
    }
    variables
}

/// Reads a JSON object; none if the text is empty or no object. serde_json bounds the nesting at 128.
fn read_object(path: impl fmt::Display, json: &str, violations: &mut Violations) -> Option<Map<String, Value>> {
    if json.is_empty() {
        return None;
    }
    serde_json::from_str(json).map_err(|error| violations.invalid(path, format!("not a JSON object: {error}"))).ok()
}

fn check_tool_name(path: impl fmt::Display, name: &str, violations: &mut Violations) {
    if name.is_empty() {
        violations.invalid(path, "the name is empty");
    } else if name.len() > MAX_TOOL_NAME_BYTES {
        violations.invalid(path, format!("{} bytes are over {MAX_TOOL_NAME_BYTES}", name.len()));
    }
}

fn check_count(path: impl fmt::Display, count: usize, violations: &mut Violations) {
    if count > MAX_LISTED {
        violations.invalid(path, format!("{count} entries are over {MAX_LISTED}"));
    }
}

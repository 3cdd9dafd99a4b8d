//! `/v1/responses`: the same conversations under other names. Nothing is stored, so that a request has all of its own.

mod input;
mod pieces;

use axum::extract::Request;
use http::StatusCode;
use lockstep_proto::v1;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Answer, Front,
    constraint::{NamedSchema, ResponseFormat, read},
    error,
    messages::{FunctionKind, Template, ToolMode},
    parameters::Sampling,
    stream,
    usage::{fingerprint, now},
};
use crate::{
    generation::collect::AnswerChoice,
    http::json_response,
    json::{OneOrMany, Unsupported},
    request::RequestError,
};
use input::Item;
use pieces::Pieces;

/// What a client sends.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResponseRequest {
    input: OneOrMany<Item>,
    model: Option<String>,
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    stream: Option<bool>,
    tools: Option<Vec<Tool>>,
    tool_choice: Option<ToolChoice>,
    parallel_tool_calls: Option<bool>,
    text: Option<Text>,
    store: Option<bool>,
    #[serde(rename = "truncation")]
    _truncation: Option<Truncation>,
    metadata: Option<Map<String, Value>>,
    #[serde(rename = "user")]
    _user: Option<String>,
    #[serde(rename = "safety_identifier")]
    _safety_identifier: Option<String>,
    #[serde(rename = "prompt_cache_key")]
    _prompt_cache_key: Option<String>,
    #[serde(rename = "background")]
    _background: Option<Unsupported>,
    #[serde(rename = "conversation")]
    _conversation: Option<Unsupported>,
    #[serde(rename = "include")]
    _include: Option<Unsupported>,
    #[serde(rename = "max_tool_calls")]
    _max_tool_calls: Option<Unsupported>,
    #[serde(rename = "previous_response_id")]
    _previous_response_id: Option<Unsupported>,
    #[serde(rename = "prompt")]
    _prompt: Option<Unsupported>,
    #[serde(rename = "reasoning")]
    _reasoning: Option<Unsupported>,
    #[serde(rename = "service_tier")]
    _service_tier: Option<Unsupported>,
    #[serde(rename = "stream_options")]
    _stream_options: Option<Unsupported>,
    #[serde(rename = "top_logprobs")]
    _top_logprobs: Option<Unsupported>,
}

/// A prompt that is too long is refused, and never cut.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Truncation {
    Disabled,
}

/// What the text must be.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    format: Option<TextFormat>,
    #[serde(rename = "verbosity")]
    _verbosity: Option<Unsupported>,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum TextFormat {
    Text {},
    JsonObject {},
    JsonSchema { name: Option<String>, description: Option<String>, schema: Option<Value>, strict: Option<bool> },
}

/// A function that the model may call.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tool {
    #[serde(rename = "type")]
    _kind: FunctionKind,
    name: String,
    description: Option<String>,
    parameters: Option<Map<String, Value>>,
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "`none`, `auto`, `required`, or a function by name")]
enum ToolChoice {
    Mode(ToolMode),
    Named(NamedTool),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NamedTool {
    #[serde(rename = "type")]
    _kind: FunctionKind,
    name: String,
}

/// A response, as far as it has come.
#[derive(Debug, Clone, Serialize)]
struct Response {
    id: String,
    object: &'static str,
    created_at: i64,
    status: &'static str,
    error: Option<Value>,
    incomplete_details: Option<Value>,
    model: String,
    output: Vec<Value>,
    usage: Option<Value>,
    system_fingerprint: Option<String>,
    #[serde(flatten)]
    echo: Echo,
}

/// What a response says about its own request.
#[derive(Debug, Clone, Serialize)]
struct Echo {
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    metadata: Map<String, Value>,
    parallel_tool_calls: bool,
    previous_response_id: Option<()>,
    store: bool,
    temperature: Option<f32>,
    text: Value,
    tool_choice: Value,
    tools: Vec<Value>,
    top_p: Option<f32>,
    truncation: &'static str,
}

pub(super) async fn answer(front: &Front, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let (mut call, request) = front.enter::<ResponseRequest>(&inbound, "responses")?;
    let streamed = request.stream.unwrap_or(false);
    let echo = request.echo();
    let request = call.note(request.into_wire())?;
    let answering = front.pipeline.chat(call, request).await?;
    if streamed {
        let mut pieces = Pieces::new(echo);
        return Ok(stream::response(error::RESPONSES, answering.events().await?, move |event| pieces.of(event)));
    }
    let answer = answering.collect().await?;
    let mut response = Response::begun(&answer.start, echo);
    let choice = answer.choices.into_iter().next().unwrap_or_default();
    response.output = output(&response.id, &choice);
    response.end(&answer.finish, choice.finish.map(|finish| finish.reason()).unwrap_or_default());
    Ok(json_response(StatusCode::OK, &response))
}

/// The items of a whole answer: its text, then its calls.
fn output(id: &str, choice: &AnswerChoice) -> Vec<Value> {
    let mut items = Vec::new();
    if !choice.text.is_empty() || choice.tool_calls.is_empty() {
        items.push(message_item(id, "completed", vec![text_part(&choice.text)]));
    }
    items.extend(choice.tool_calls.iter().map(|call| call_item(call, "completed")));
    items
}

fn message_item(response_id: &str, status: &str, content: Vec<Value>) -> Value {
    let id = response_id.replacen("resp_", "msg_", 1);
    json!({ "type": "message", "id": id, "status": status, "role": "assistant", "content": content })
}

fn text_part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

fn call_item(call: &v1::ToolCall, status: &str) -> Value {
    let v1::ToolCall { id, name, arguments_json } = call;
    json!({
        "type": "function_call", "id": format!("fc_{id}"), "call_id": id, "name": name,
        "arguments": arguments_json, "status": status,
    })
}

// === impl ResponseRequest ===

impl ResponseRequest {
    fn echo(&self) -> Echo {
        let choice = match &self.tool_choice {
            None | Some(ToolChoice::Mode(ToolMode::Auto)) => json!("auto"),
            Some(ToolChoice::Mode(ToolMode::None)) => json!("none"),
            Some(ToolChoice::Mode(ToolMode::Required)) => json!("required"),
            Some(ToolChoice::Named(named)) => json!({ "type": "function", "name": named.name }),
        };
        let tool = |tool: &Tool| {
            json!({
                "type": "function", "name": tool.name, "description": tool.description,
                "parameters": tool.parameters, "strict": true,
            })
        };
        let format = self.text.as_ref().and_then(|text| text.format.as_ref()).map(TextFormat::echo);
        Echo {
            instructions: self.instructions.clone(),
            max_output_tokens: self.max_output_tokens,
            metadata: self.metadata.clone().unwrap_or_default(),
            parallel_tool_calls: self.parallel_tool_calls.unwrap_or(true),
            previous_response_id: None,
            store: false,
            temperature: self.temperature,
            text: json!({ "format": format.unwrap_or_else(|| json!({ "type": "text" })) }),
            tool_choice: choice,
            tools: self.tools.iter().flatten().map(tool).collect(),
            top_p: self.top_p,
            truncation: "disabled",
        }
    }

    fn into_wire(self) -> Result<v1::ChatRequest, RequestError> {
        if self.store == Some(true) {
            return Err(RequestError::invalid("store", "nothing is stored here"));
        }
        let format = self.text.and_then(|text| text.format).map(ResponseFormat::from);
        let sampling = Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            constraint: read(format, None)?,
            ..Sampling::default()
        };
        let tools: Vec<v1::Tool> = self.tools.unwrap_or_default().into_iter().map(v1::Tool::from).collect();
        let mut conversation = Template::default().conversation(input::messages(self.instructions, self.input));
        conversation.tool_choice = tool_choice(self.tool_choice, self.parallel_tool_calls, tools.is_empty())?;
        conversation.tools = tools;
        Ok(v1::ChatRequest {
            model: super::model_name(self.model),
            conversation: Some(conversation),
            sampling: Some(sampling.params(self.max_output_tokens)?),
            output: None,
        })
    }
}

fn tool_choice(
    choice: Option<ToolChoice>,
    parallel: Option<bool>,
    no_tools: bool,
) -> Result<Option<v1::ToolChoice>, RequestError> {
    let (mode, name) = match choice {
        None | Some(ToolChoice::Mode(ToolMode::Auto)) => (v1::ToolChoiceMode::Auto, String::new()),
        Some(ToolChoice::Mode(ToolMode::None)) => (v1::ToolChoiceMode::None, String::new()),
        Some(_) if no_tools => {
            return Err(RequestError::invalid("tool_choice", "there are no tools to choose from"));
        }
        Some(ToolChoice::Mode(ToolMode::Required)) => (v1::ToolChoiceMode::Required, String::new()),
        Some(ToolChoice::Named(named)) => (v1::ToolChoiceMode::Named, named.name),
    };
    Ok(Some(v1::ToolChoice { mode: mode.into(), name, parallel }))
}

impl From<Tool> for v1::Tool {
    fn from(tool: Tool) -> Self {
        let parameters_json = tool.parameters.map(|parameters| Value::Object(parameters).to_string());
        Self {
            name: tool.name,
            description: tool.description.unwrap_or_default(),
            parameters_json: parameters_json.unwrap_or_default(),
        }
    }
}

// === impl TextFormat ===

impl TextFormat {
    fn echo(&self) -> Value {
        match self {
            Self::Text {} => json!({ "type": "text" }),
            Self::JsonObject {} => json!({ "type": "json_object" }),
            Self::JsonSchema { name, description, schema, strict } => json!({
                "type": "json_schema", "name": name, "description": description, "schema": schema, "strict": strict,
            }),
        }
    }
}

impl From<TextFormat> for ResponseFormat {
    fn from(format: TextFormat) -> Self {
        match format {
            TextFormat::Text {} => Self::Text {},
            TextFormat::JsonObject {} => Self::JsonObject {},
            TextFormat::JsonSchema { schema, .. } => Self::JsonSchema { json_schema: NamedSchema::of(schema) },
        }
    }
}

// === impl Response ===

impl Response {
    fn begun(start: &v1::Start, echo: Echo) -> Self {
        Self {
            id: format!("resp_{}", start.request_id),
            object: "response",
            created_at: now(),
            status: "in_progress",
            error: None,
            incomplete_details: None,
            model: start.model.clone(),
            output: Vec::new(),
            usage: None,
            system_fingerprint: None,
            echo,
        }
    }

    fn end(&mut self, finish: &v1::Finish, reason: v1::FinishReason) {
        let whole = matches!(reason, v1::FinishReason::Stop | v1::FinishReason::ToolCalls);
        self.status = if whole { "completed" } else { "incomplete" };
        self.incomplete_details = (!whole).then(|| json!({ "reason": "max_output_tokens" }));
        let v1::Usage { prompt_tokens, cached_tokens, completion_tokens } = finish.usage.unwrap_or_default();
        self.usage = Some(json!({
            "input_tokens": prompt_tokens,
            "input_tokens_details": { "cached_tokens": cached_tokens },
            "output_tokens": completion_tokens,
            "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": prompt_tokens.saturating_add(completion_tokens),
        }));
        self.system_fingerprint = fingerprint(finish.repro.as_ref());
    }
}

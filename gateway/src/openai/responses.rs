//! `/v1/responses`: the same conversations under other names. Nothing is stored, so that a request has all of its own.

mod input;
mod output;
mod pieces;

use axum::extract::Request;
use http::StatusCode;
use lockstep_proto::v1;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Answer, Front,
    constraint::{NamedSchema, ResponseFormat, any_text, json_schema_or_null, read},
    error,
    messages::{FunctionKind, Template, ToolMode, something_to_call, tools_or_constraint},
    parameters::Sampling,
    stream,
};
use crate::{
    http::json_response,
    json::{Object, OneOrMany, Unsupported},
    openapi::{
        OF_CHATS, OF_MODELS, OF_PROMPTS, Operation,
        rules::{either, never, set, where_set},
    },
    request::{MAX_LISTED, MAX_TOOL_NAME_BYTES, RequestError},
    sampling::range::{TEMPERATURE, TOP_P},
};
use input::Item;
use output::{Echo, EchoedText, EchoedTool, Response};
use pieces::{Piece, Pieces};

/// What a client sends.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = rules)]
struct ResponseRequest {
    /// What the user says, or a conversation, oldest item first.
    input: OneOrMany<Item>,
    /// The model. Default: the only one that is served.
    model: Option<String>,
    /// What the system says first.
    instructions: Option<String>,
    /// Most tokens of the answer, no more than the context has room for. Default: what the operator or the model says.
    #[schemars(range(min = 1))]
    max_output_tokens: Option<u32>,
    /// Flattens the distribution that tokens are drawn from; 0 always takes the most probable one. Default: 1.
    #[schemars(transform = TEMPERATURE.in_schema())]
    temperature: Option<f32>,
    /// Tokens are drawn from the most probable ones that together have this much probability.
    #[schemars(transform = TOP_P.in_schema())]
    top_p: Option<f32>,
    /// Whether the answer comes as it is made.
    stream: Option<bool>,
    /// Functions that the model may call.
    #[schemars(length(max = MAX_LISTED))]
    tools: Option<Vec<Object<Tool>>>,
    /// Whether it may, must or must not call them. Default: it may.
    tool_choice: Option<ToolChoice>,
    /// Whether one answer may call several. Default: as the model does by itself.
    parallel_tool_calls: Option<bool>,
    /// What the text must be.
    text: Option<Object<Text>>,
    /// Nothing is stored.
    #[schemars(transform = never)]
    store: Option<bool>,
    /// What happens to a prompt that is too long: it is refused, and never cut.
    #[serde(rename = "truncation")]
    _truncation: Option<Truncation>,
    /// Comes back with the response.
    metadata: Option<Map<String, Value>>,
    /// Whose request it is: for the client's own records.
    #[serde(rename = "user")]
    _user: Option<String>,
    /// The same.
    #[serde(rename = "safety_identifier")]
    _safety_identifier: Option<String>,
    /// Taken, and changes nothing: every prefix is cached.
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
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Truncation {
    Disabled,
}

/// What the text must be.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ResponseText")]
struct Text {
    /// Any text, a JSON object, or JSON that a schema accepts.
    format: Option<Object<TextFormat>>,
    #[serde(rename = "verbosity")]
    _verbosity: Option<Unsupported>,
}

#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[schemars(inline)]
enum TextFormat {
    Text {},
    JsonObject {},
    JsonSchema {
        /// For the client's own use.
        name: Option<String>,
        /// For the client's own use.
        description: Option<String>,
        /// The JSON Schema. Default: one that accepts everything.
        #[schemars(transform = json_schema_or_null)]
        schema: Option<Value>,
        /// Taken, and changes nothing: a schema is always held to.
        strict: Option<bool>,
    },
}

/// A function that the model may call.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ResponseTool")]
struct Tool {
    /// Functions are the only tools there are.
    #[serde(rename = "type")]
    _kind: FunctionKind,
    /// Its name, which no other has.
    #[schemars(length(min = 1, max = MAX_TOOL_NAME_BYTES))]
    name: String,
    /// What it does.
    description: Option<String>,
    /// The JSON Schema of its arguments. Default: it has none.
    parameters: Option<Map<String, Value>>,
    /// Whether calls follow the schemas of all functions even if the model need not call any. Default: true.
    strict: Option<bool>,
}

#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(untagged, expecting = "`none`, `auto`, `required`, or a function by name")]
#[schemars(inline)]
enum ToolChoice {
    Mode(ToolMode),
    Named(Object<NamedTool>),
}

#[derive(Debug, Clone, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
struct NamedTool {
    /// Functions are the only tools there are.
    #[serde(rename = "type")]
    kind: FunctionKind,
    /// The name of one of `tools`.
    name: String,
}

pub(super) fn operation() -> Operation {
    Operation::call("Answers a conversation whose state the client keeps.")
        .takes::<ResponseRequest>()
        .answers::<Response>()
        .streams::<Piece<'_>>(None)
        .fails(OF_MODELS)
        .fails(OF_PROMPTS)
        .fails(OF_CHATS)
}

/// What goes with what in a request.
fn rules(request: &mut Schema) {
    let has_items = where_set([("input", json!({ "minItems": 1 }))]);
    either(request, [set("instructions", json!({ "type": "string" })), has_items]);
    something_to_call(request);
    tools_or_constraint(request, where_set([("text", where_set([("format", any_text())]))]));
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
    response.fill(&choice);
    response.end(&answer.finish, choice.finish.map(|finish| finish.reason()).unwrap_or_default());
    Ok(json_response(StatusCode::OK, &response))
}

// === impl ResponseRequest ===

impl ResponseRequest {
    fn echo(&self) -> Echo {
        let tool = |Object(tool): &Object<Tool>| EchoedTool {
            kind: "function",
            name: tool.name.clone(),
            description: tool.description.clone(),
            parameters: tool.parameters.clone(),
            strict: tool.is_strict(),
        };
        let format = self.text.as_ref().and_then(|Object(text)| text.format.clone());
        Echo {
            instructions: self.instructions.clone(),
            max_output_tokens: self.max_output_tokens,
            metadata: self.metadata.clone().unwrap_or_default(),
            parallel_tool_calls: self.parallel_tool_calls.unwrap_or(true),
            previous_response_id: None,
            store: false,
            temperature: self.temperature,
            text: EchoedText { format: format.map_or(TextFormat::Text {}, |Object(format)| format) },
            tool_choice: self.tool_choice.clone().unwrap_or(ToolChoice::Mode(ToolMode::Auto)),
            tools: self.tools.iter().flatten().map(tool).collect(),
            top_p: self.top_p,
            truncation: "disabled",
        }
    }

    fn into_wire(self) -> Result<v1::ChatRequest, RequestError> {
        if self.store == Some(true) {
            return Err(RequestError::invalid("store", "nothing is stored here"));
        }
        let format = self.text.and_then(|Object(text)| text.format).map(|Object(format)| format.into());
        let sampling = Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            constraint: read(format, None)?,
            ..Sampling::default()
        };
        let tools: Vec<v1::Tool> = self.tools.unwrap_or_default().into_iter().map(|Object(tool)| tool.into()).collect();
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
        Some(ToolChoice::Named(Object(named))) => (v1::ToolChoiceMode::Named, named.name),
    };
    Ok(Some(v1::ToolChoice { mode: mode.into(), name, parallel }))
}

impl Tool {
    /// Here a function is strict unless it says otherwise, in the API of chats the other way round.
    fn is_strict(&self) -> bool {
        self.strict.unwrap_or(true)
    }
}

impl From<Tool> for v1::Tool {
    fn from(tool: Tool) -> Self {
        let strict = tool.is_strict();
        let parameters_json = tool.parameters.map(|parameters| Value::Object(parameters).to_string());
        Self {
            name: tool.name,
            description: tool.description.unwrap_or_default(),
            parameters_json: parameters_json.unwrap_or_default(),
            strict,
        }
    }
}

// === impl TextFormat ===

impl From<TextFormat> for ResponseFormat {
    fn from(format: TextFormat) -> Self {
        match format {
            TextFormat::Text {} => Self::Text {},
            TextFormat::JsonObject {} => Self::JsonObject {},
            TextFormat::JsonSchema { schema, .. } => Self::JsonSchema { json_schema: Object(NamedSchema::of(schema)) },
        }
    }
}

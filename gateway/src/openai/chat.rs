//! `/v1/chat/completions`.

use axum::{extract::Request, response::Response};
use http::StatusCode;
use lockstep_proto::v1;
use schemars::{JsonSchema, Schema};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    Answer, Front,
    constraint::{any_text, no_outputs, one_constraint},
    error,
    logprobs::ChatLogprobs,
    messages::{
        Message, Template, Tool, ToolChoice, Tools, conversation, one_ending, something_to_call, tools_or_constraint,
    },
    model_name,
    parameters::{StreamOptions, include_usage, options_of_streams, request},
    stream,
    usage::{FinishReason, Usage, fingerprint, now},
};
use crate::{
    generation::{Event, collect},
    http::json_response,
    json::{Object, Unsupported},
    openapi::{
        OF_CHATS, OF_MODELS, OF_PROMPTS, Operation,
        rules::{either, never, set, unset, where_set},
    },
    request::{MAX_LISTED, MAX_LOGPROBS, MAX_MESSAGES, RequestError},
};

request! {
    /// What a client sends.
    #[schemars(transform = rules)]
    struct ChatRequest {
        /// The conversation, oldest message first.
        #[schemars(length(min = 1, max = MAX_MESSAGES))]
        messages: Vec<Object<Message>>,
        /// The model. Default: the only one that is served.
        model: Option<String>,
        /// Whether the answer comes as it is made.
        stream: Option<bool>,
        /// What comes at the end of a stream.
        stream_options: Option<Object<StreamOptions>>,
        /// The older name of `max_completion_tokens`, with which it must agree.
        #[schemars(range(min = 1))]
        max_tokens: Option<u32>,
        /// Most tokens of the answer, no more than the context has room for. Default: what the operator or the model says.
        #[schemars(range(min = 1))]
        max_completion_tokens: Option<u32>,
        /// Whether each token comes with its log-probability.
        logprobs: Option<bool>,
        /// How many of the most probable tokens come with each.
        #[schemars(range(max = MAX_LOGPROBS))]
        top_logprobs: Option<u32>,
        /// Functions that the model may call.
        #[schemars(length(max = MAX_LISTED))]
        tools: Option<Vec<Object<Tool>>>,
        /// Whether it may, must or must not call them. Default: it may.
        tool_choice: Option<ToolChoice>,
        /// Whether one answer may call several. Default: as the model does by itself.
        parallel_tool_calls: Option<bool>,
        /// Whether control tokens are left out of the text. Default: true.
        skip_special_tokens: Option<bool>,
        /// Whether the prompt ends with the beginning of an answer. Default: true.
        add_generation_prompt: Option<bool>,
        /// Whether the answer goes on with the last message.
        continue_final_message: Option<bool>,
        /// What the chat template sees besides.
        chat_template_kwargs: Option<Map<String, Value>>,
        /// Whose request it is: for the client's own records.
        #[serde(rename = "user")]
        _user: Option<String>,
        /// The same.
        #[serde(rename = "safety_identifier")]
        _safety_identifier: Option<String>,
        /// Taken, and changes nothing: every prefix is cached.
        #[serde(rename = "prompt_cache_key")]
        _prompt_cache_key: Option<String>,
        /// Taken, and changes nothing.
        #[serde(rename = "service_tier")]
        _service_tier: Option<ServiceTier>,
        /// Nothing is stored.
        #[schemars(transform = never)]
        store: Option<bool>,
        #[serde(rename = "metadata")]
        _metadata: Option<Unsupported>,
        #[serde(rename = "audio")]
        _audio: Option<Unsupported>,
        /// Text is all there is.
        #[serde(rename = "modalities")]
        _modalities: Option<Vec<Modality>>,
        #[serde(rename = "prediction")]
        _prediction: Option<Unsupported>,
        #[serde(rename = "reasoning_effort")]
        _reasoning_effort: Option<Unsupported>,
        #[serde(rename = "verbosity")]
        _verbosity: Option<Unsupported>,
        #[serde(rename = "web_search_options")]
        _web_search_options: Option<Unsupported>,
        #[serde(rename = "functions")]
        _functions: Option<Unsupported>,
        #[serde(rename = "function_call")]
        _function_call: Option<Unsupported>,
    }
}

/// There is one tier.
#[derive(Debug, Clone, Copy, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum ServiceTier {
    Auto,
    Default,
}

/// A form of answers.
#[derive(Debug, Clone, Copy, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Modality {
    Text,
}

/// An answer, or a piece of one.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "{T}Completion")]
struct Completion<'a, T> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: Vec<T>,
    /// Missing in the pieces of a stream that does not count; null in those before the last of one that does.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    system_fingerprint: Option<String>,
}

/// One of the answers.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ChatChoice")]
struct Choice {
    index: u32,
    message: AssistantMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: FinishReason,
}

/// What the model says.
#[derive(Debug, Serialize, JsonSchema)]
struct AssistantMessage {
    role: &'static str,
    content: Option<String>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CalledTool>,
}

/// A call of a tool that the model makes.
#[derive(Debug, Serialize, JsonSchema)]
struct CalledTool {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: CalledFunction,
}

/// The function that is called.
#[derive(Debug, Serialize, JsonSchema)]
struct CalledFunction {
    name: String,
    /// The text of a JSON object, unless the answer was cut.
    arguments: String,
}

/// What is new of one of the answers.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ChatPiece")]
struct Piece {
    index: u32,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<FinishReason>,
}

/// What is new of a message.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[schemars(rename = "ChatDelta")]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolDelta>,
}

/// What is new of a call.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ChatToolDelta")]
struct ToolDelta {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta,
}

/// What is new of the function that is called.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ChatFunctionDelta")]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

/// What makes the pieces of a stream.
struct Pieces {
    id: String,
    created: i64,
    model: String,
    n: u32,
    logprobs: bool,
    include_usage: bool,
}

pub(super) fn operation() -> Operation {
    Operation::call("Answers a conversation.")
        .takes::<ChatRequest>()
        .answers::<Completion<'_, Choice>>()
        .streams::<Completion<'_, Piece>>(Some(stream::DONE))
        .fails(OF_MODELS)
        .fails(OF_PROMPTS)
        .fails(OF_CHATS)
}

/// What goes with what in a request.
fn rules(request: &mut Schema) {
    either(request, [where_set([("top_logprobs", unset())]), set("logprobs", json!({ "const": true }))]);
    options_of_streams(request);
    one_constraint(request);
    something_to_call(request);
    tools_or_constraint(
        request,
        where_set([("response_format", any_text()), ("structured_outputs", where_set(no_outputs()))]),
    );
    one_ending(request);
}

pub(super) async fn answer(front: &Front, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let (mut call, request) = front.enter::<ChatRequest>(&inbound, "chat/completions")?;
    let streamed = request.stream.unwrap_or(false);
    let include_usage = call.note(include_usage(streamed, request.stream_options))?;
    let logprobs = call.note(request.top_alternatives())?.is_some();
    let n = request.n.unwrap_or(1);
    let request = call.note(request.into_wire())?;
    let answering = front.pipeline.chat(call, request).await?;
    if !streamed {
        return Ok(whole(answering.collect().await?, logprobs));
    }
    let mut pieces = Pieces { id: String::new(), created: now(), model: String::new(), n, logprobs, include_usage };
    Ok(stream::response(error::CHATS, answering.events().await?, move |event| pieces.of(event)))
}

// === impl ChatRequest ===

impl ChatRequest {
    /// How many alternatives come with each token; none: no log-probabilities.
    fn top_alternatives(&self) -> Result<Option<u32>, RequestError> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (false, Some(_)) => Err(RequestError::invalid("top_logprobs", "it needs `logprobs`: set it to true")),
            (false, None) => Ok(None),
            (true, top) => Ok(Some(top.unwrap_or(0))),
        }
    }

    fn into_wire(mut self) -> Result<v1::ChatRequest, RequestError> {
        if self.store == Some(true) {
            return Err(RequestError::invalid("store", "nothing is stored here"));
        }
        let max_new_tokens = match (self.max_completion_tokens, self.max_tokens) {
            (Some(new), Some(old)) if new != old => {
                let message = format!("{old} contradicts max_completion_tokens of {new}");
                return Err(RequestError::invalid("max_tokens", message));
            }
            (new, old) => new.or(old),
        };
        let output = v1::OutputOptions {
            logprobs: self.top_alternatives()?,
            skip_special_tokens: self.skip_special_tokens,
            ..v1::OutputOptions::default()
        };
        let sampling = self.sampling(max_new_tokens)?;
        let template = Template {
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            variables: self.chat_template_kwargs,
        };
        let tools = Tools { tools: self.tools, choice: self.tool_choice, parallel: self.parallel_tool_calls };
        Ok(v1::ChatRequest {
            model: model_name(self.model),
            conversation: Some(conversation(self.messages, tools, template)?),
            sampling: Some(sampling),
            output: Some(output),
        })
    }
}

fn whole(answer: collect::Answer, logprobs: bool) -> Response {
    let choice = |(index, choice): (u32, collect::AnswerChoice)| {
        let tool_calls: Vec<_> = choice.tool_calls.into_iter().map(CalledTool::from).collect();
        let content = Some(choice.text).filter(|text| !text.is_empty() || tool_calls.is_empty());
        Choice {
            index,
            message: AssistantMessage { role: "assistant", content, refusal: None, tool_calls },
            logprobs: logprobs.then(|| ChatLogprobs::new(choice.logprobs)),
            finish_reason: choice.finish.map(|finish| finish.reason()).unwrap_or_default().into(),
        }
    };
    let body = Completion {
        id: &format!("chatcmpl-{}", answer.start.request_id),
        object: "chat.completion",
        created: now(),
        model: &answer.start.model,
        choices: (0..).zip(answer.choices).map(choice).collect(),
        usage: Some(Some(answer.finish.usage.unwrap_or_default().into())),
        system_fingerprint: fingerprint(answer.finish.repro.as_ref()),
    };
    json_response(StatusCode::OK, &body)
}

impl From<v1::ToolCall> for CalledTool {
    fn from(call: v1::ToolCall) -> Self {
        let function = CalledFunction { name: call.name, arguments: call.arguments_json };
        Self { id: call.id, kind: "function", function }
    }
}

// === impl Pieces ===

impl Pieces {
    fn of(&mut self, event: Event) -> Vec<axum::response::sse::Event> {
        match event {
            Event::Start(start) => {
                (self.id, self.model) = (format!("chatcmpl-{}", start.request_id), start.model);
                let first = |index| {
                    let delta = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
                    self.piece(Piece { index, delta, logprobs: None, finish_reason: None })
                };
                (0..self.n).map(first).collect()
            }
            Event::Chunk(chunk) => self.chunk(chunk).into_iter().collect(),
            Event::Finish(finish) => self.finish(finish),
        }
    }

    /// Tokens whose text is still to come make no piece of their own, unless their log-probabilities do.
    fn chunk(&self, chunk: v1::Chunk) -> Option<axum::response::sse::Event> {
        let logprobs = (self.logprobs && !chunk.logprobs.is_empty()).then(|| ChatLogprobs::new(chunk.logprobs));
        if chunk.text.is_empty() && chunk.tool_calls.is_empty() && logprobs.is_none() {
            return None;
        }
        let content = Some(chunk.text).filter(|text| !text.is_empty() || chunk.tool_calls.is_empty());
        let tool_calls = chunk.tool_calls.into_iter().map(ToolDelta::from).collect();
        let delta = Delta { role: None, content, tool_calls };
        Some(self.piece(Piece { index: chunk.choice, delta, logprobs, finish_reason: None }))
    }

    fn finish(&self, finish: v1::Finish) -> Vec<axum::response::sse::Event> {
        let last = |choice: &v1::ChoiceFinish| {
            let finish_reason = Some(choice.reason().into());
            self.piece(Piece { index: choice.choice, delta: Delta::default(), logprobs: None, finish_reason })
        };
        let mut events: Vec<_> = finish.choices.iter().map(last).collect();
        if self.include_usage {
            let usage = finish.usage.unwrap_or_default().into();
            let repro = finish.repro.as_ref();
            events.push(stream::data(&self.completion::<Piece>(Vec::new(), Some(Some(usage)), fingerprint(repro))));
        }
        events.push(stream::done());
        events
    }

    fn piece(&self, piece: Piece) -> axum::response::sse::Event {
        stream::data(&self.completion(vec![piece], self.include_usage.then_some(None), None))
    }

    fn completion<T>(
        &self,
        choices: Vec<T>,
        usage: Option<Option<Usage>>,
        system_fingerprint: Option<String>,
    ) -> Completion<'_, T> {
        let (id, model) = (self.id.as_str(), self.model.as_str());
        let object = "chat.completion.chunk";
        Completion { id, object, created: self.created, model, choices, usage, system_fingerprint }
    }
}

impl From<v1::ToolCallDelta> for ToolDelta {
    fn from(delta: v1::ToolCallDelta) -> Self {
        let first = !delta.id.is_empty() || !delta.name.is_empty();
        Self {
            index: delta.index,
            id: first.then_some(delta.id),
            kind: first.then_some("function"),
            function: FunctionDelta { name: first.then_some(delta.name), arguments: delta.arguments_json },
        }
    }
}

//! `/v1/chat/completions`.

use axum::{extract::Request, response::Response};
use http::StatusCode;
use lockstep_proto::v1;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Answer, Front, error,
    logprobs::ChatLogprobs,
    messages::{Message, Template, Tool, ToolChoice, Tools, conversation},
    model_name,
    parameters::{StreamOptions, include_usage, request},
    stream,
    usage::{Usage, fingerprint, finish_reason, now},
};
use crate::{
    generation::{Event, collect},
    http::json_response,
    json::Unsupported,
    request::RequestError,
};

request! {
    /// What a client sends.
    struct ChatRequest {
        messages: Vec<Message>,
        model: Option<String>,
        stream: Option<bool>,
        stream_options: Option<StreamOptions>,
        max_tokens: Option<u32>,
        max_completion_tokens: Option<u32>,
        logprobs: Option<bool>,
        top_logprobs: Option<u32>,
        tools: Option<Vec<Tool>>,
        tool_choice: Option<ToolChoice>,
        parallel_tool_calls: Option<bool>,
        skip_special_tokens: Option<bool>,
        add_generation_prompt: Option<bool>,
        continue_final_message: Option<bool>,
        chat_template_kwargs: Option<Map<String, Value>>,
        #[serde(rename = "user")]
        /// Whose request it is: for the client's own records.
        _user: Option<String>,
        #[serde(rename = "safety_identifier")]
        _safety_identifier: Option<String>,
        #[serde(rename = "prompt_cache_key")]
        /// Every prefix is cached.
        _prompt_cache_key: Option<String>,
        #[serde(rename = "service_tier")]
        _service_tier: Option<ServiceTier>,
        store: Option<bool>,
        #[serde(rename = "metadata")]
        _metadata: Option<Unsupported>,
        #[serde(rename = "audio")]
        _audio: Option<Unsupported>,
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
#[derive(Debug, Clone, Copy, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum ServiceTier {
    Auto,
    Default,
}

#[derive(Debug, Clone, Copy, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Modality {
    Text,
}

/// An answer, or a piece of one.
#[derive(Debug, Serialize)]
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

#[derive(Debug, Serialize)]
struct Choice {
    index: u32,
    message: AssistantMessage,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
}

#[derive(Debug, Serialize)]
struct AssistantMessage {
    role: &'static str,
    content: Option<String>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CalledTool>,
}

#[derive(Debug, Serialize)]
struct CalledTool {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: CalledFunction,
}

#[derive(Debug, Serialize)]
struct CalledFunction {
    name: String,
    arguments: String,
}

#[derive(Debug, Serialize)]
struct Piece {
    index: u32,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolDelta>,
}

#[derive(Debug, Serialize)]
struct ToolDelta {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta,
}

#[derive(Debug, Serialize)]
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
            finish_reason: finish_reason(choice.finish.map(|finish| finish.reason()).unwrap_or_default()),
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
            let finish_reason = Some(finish_reason(choice.reason()));
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

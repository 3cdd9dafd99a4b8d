//! `/v1/completions`: raw prompts, one or several, of text or of token ids.

use axum::{
    extract::Request,
    response::{Response, sse},
};
use futures_util::{
    Stream, StreamExt as _,
    future::{ready, try_join_all},
    stream::select_all,
};
use http::StatusCode;
use lockstep_proto::v1;
use schemars::{JsonSchema, Schema};
use serde::Serialize;
use serde_json::json;

use super::{
    Answer, Front,
    constraint::one_constraint,
    error,
    logprobs::CompletionLogprobs,
    model_name,
    parameters::{StreamOptions, include_usage, options_of_streams, request},
    prompts::{PromptItem, bound_prompts, prompts},
    stream,
    usage::{FinishReason, Usage, fingerprint, now},
};
use crate::{
    generation::{Event, collect},
    http::json_response,
    json::{Object, OneOrMany, Unsupported},
    openapi::{
        OF_MODELS, OF_PROMPTS, Operation,
        rules::{either, off, set, unset, where_set},
    },
    pipeline::Answering,
    request::{MAX_LOGPROBS, RequestError},
    status::Failure,
};

/// Most prompts of one request. Each is a request of its own to all that follows.
const MAX_PROMPTS: usize = 128;

/// What the protocol generates where nobody says how much.
const DEFAULT_MAX_TOKENS: u32 = 16;

request! {
    /// What a client sends.
    #[schemars(transform = rules)]
    struct CompletionRequest {
        /// Raw prompts: a text, several, the token ids of one, or lists of token ids.
        #[schemars(transform = bound)]
        prompt: OneOrMany<PromptItem>,
        /// The model. Default: the only one that is served.
        model: Option<String>,
        /// Whether the answer comes as it is made.
        stream: Option<bool>,
        /// What comes at the end of a stream.
        stream_options: Option<Object<StreamOptions>>,
        /// Most tokens of each answer, no more than the context has room for. 0: with `echo`, the prompt is the
        /// answer; it must leave room for one token all the same. Default: 16.
        max_tokens: Option<u32>,
        /// Each token comes with its log-probability, and with those of so many of the most probable ones.
        #[schemars(range(max = MAX_LOGPROBS))]
        logprobs: Option<u32>,
        /// Whether the prompt comes before the answer.
        echo: Option<bool>,
        /// Answers that the best are chosen from: as many as `n`, since nothing is chosen here.
        #[schemars(range(min = 1, max = crate::sampling::read::MAX_N))]
        best_of: Option<u32>,
        /// Whether control tokens are left out of the text. Default: true.
        skip_special_tokens: Option<bool>,
        /// Whose request it is: for the client's own records.
        #[serde(rename = "user")]
        _user: Option<String>,
        #[serde(rename = "suffix")]
        _suffix: Option<Unsupported>,
    }
}

/// An answer, or a piece of one.
#[derive(Debug, Serialize, JsonSchema)]
struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: Vec<Choice>,
    /// Missing in the pieces of a stream that does not count; null in those before the last of one that does.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    system_fingerprint: Option<String>,
}

/// One of the answers, or what is new of it.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "CompletionChoice")]
struct Choice {
    index: u32,
    text: String,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<FinishReason>,
}

/// What of an answer a client wants to see.
#[derive(Debug, Clone, Copy)]
struct View {
    n: u32,
    logprobs: bool,
    echo: bool,
    /// Whether it is the prompt alone.
    only_prompt: bool,
}

/// What makes the pieces of a stream.
struct Pieces {
    id: String,
    created: i64,
    model: String,
    view: View,
    include_usage: bool,
    usage: Usage,
    /// Prompts that have not ended.
    open: usize,
    /// By choice over all prompts, the log-probabilities of the prompt that are still to be shown, and how much text
    /// came before. Unit: characters.
    choices: Vec<(Option<CompletionLogprobs>, usize)>,
}

pub(super) fn operation() -> Operation {
    Operation::call("Continues raw prompts.")
        .takes::<CompletionRequest>()
        .answers::<Completion<'_>>()
        .streams::<Completion<'_>>(Some(stream::DONE))
        .fails(OF_MODELS)
        .fails(OF_PROMPTS)
}

/// What goes with what in a request.
fn rules(request: &mut Schema) {
    options_of_streams(request);
    one_constraint(request);
    let generates = where_set([("max_tokens", json!({ "not": { "const": 0 } }))]);
    either(request, [generates, set("echo", json!({ "const": true }))]);
    let one_choice = where_set([("n", json!({ "enum": [1, null] }))]);
    either(request, [where_set([("echo", off())]), where_set([("logprobs", unset())]), one_choice]);
}

fn bound(prompts: &mut Schema) {
    bound_prompts(prompts, MAX_PROMPTS);
}

pub(super) async fn answer(front: &Front, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let (mut call, mut request) = front.enter::<CompletionRequest>(&inbound, "completions")?;
    let streamed = request.stream.unwrap_or(false);
    let include_usage = call.note(include_usage(streamed, request.stream_options))?;
    let view = request.view();
    let requests = call.note(request.take_requests(view))?;
    let n_prompts = requests.len();
    // Each prompt is a request of its own to all that follows; the first has the place of the whole.
    let mut calls = vec![call];
    for _ in 1..n_prompts {
        calls.push(front.enter_part(&inbound, "completions")?);
    }
    let begun = calls.into_iter().zip(requests).map(|(call, request)| front.pipeline.generate(call, request));
    let answering = try_join_all(begun).await?;
    let events = answering.into_iter().map(|answering| view.events(answering));
    if !streamed {
        let answers = try_join_all(events.map(|events| collect::collect(events, view.n))).await?;
        return Ok(whole(answers, view));
    }
    let mut events = select_all((0..).zip(events).map(numbered));
    // What fails before anything was said is a plain error.
    let first = events.next().await.ok_or_else(|| Failure::Bug("an answer without events".to_owned()))??;
    let events = futures_util::stream::once(async { Ok(first) }).chain(events);
    let mut pieces = Pieces::new(n_prompts, view, include_usage);
    Ok(stream::response(error::COMPLETIONS, events, move |(prompt, event)| pieces.of(prompt, event)))
}

/// The events of one of several prompts.
fn numbered<Events>((prompt, events): (u32, Events)) -> impl Stream<Item = Result<(u32, Event), Failure>>
where
    Events: Stream<Item = Result<Event, Failure>>,
{
    events.map(move |event| event.map(|event| (prompt, event)))
}

// === impl CompletionRequest ===

impl CompletionRequest {
    fn view(&self) -> View {
        View {
            n: self.n.unwrap_or(1),
            logprobs: self.logprobs.is_some(),
            echo: self.echo.unwrap_or(false),
            only_prompt: self.max_tokens == Some(0),
        }
    }

    /// One request for each prompt.
    fn take_requests(&mut self, view: View) -> Result<Vec<v1::GenerateRequest>, RequestError> {
        let View { n, echo, only_prompt, .. } = view;
        if let Some(best_of) = self.best_of.filter(|&best_of| best_of != n) {
            let message = format!("{best_of} is not `n` ({n}): the best of more choices are not chosen here");
            return Err(RequestError::invalid("best_of", message));
        }
        if only_prompt && !echo {
            let message = "0 is not at least 1: without `echo` there would be no answer";
            return Err(RequestError::invalid("max_tokens", message));
        }
        if echo && self.logprobs.is_some() && n > 1 {
            let message = format!("{n} is not 1: with `echo` and `logprobs` each choice has those of the whole prompt");
            return Err(RequestError::invalid("n", message));
        }
        let output = v1::OutputOptions {
            return_full_text: Some(echo),
            logprobs: self.logprobs.filter(|_| !only_prompt),
            prompt_logprobs: self.logprobs.filter(|_| echo),
            skip_special_tokens: self.skip_special_tokens,
        };
        // Where the prompt is all, one token is generated and not shown: workers know no request for none.
        let max_tokens = self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS).max(1);
        let sampling = self.sampling(Some(max_tokens))?;
        let model = model_name(self.model.take());
        let prompts = prompts("prompt", &self.prompt, MAX_PROMPTS)?;
        let request = |prompt| v1::GenerateRequest {
            model: model.clone(),
            prompt: Some(v1::RawPrompt { prompt: Some(prompt) }),
            sampling: Some(sampling.clone()),
            output: Some(output),
        };
        Ok(prompts.into_iter().map(request).collect())
    }
}

// === impl View ===

impl View {
    /// The events of an answer that the client sees.
    fn events(self, answering: Answering) -> impl Stream<Item = Result<Event, Failure>> + Unpin {
        answering.into_events().filter_map(move |event| ready(event.map(|event| self.of(event)).transpose()))
    }

    fn of(self, event: Event) -> Option<Event> {
        match event {
            // The prompt's text is the first chunk of each choice.
            Event::Chunk(chunk) if self.only_prompt && chunk.seq >= self.n.into() => None,
            Event::Finish(mut finish) if self.only_prompt => {
                let stopped = |choice: &&mut v1::ChoiceFinish| choice.reason() == v1::FinishReason::Stop;
                let stopped = finish.choices.iter_mut().filter(stopped);
                stopped.for_each(|choice| choice.set_reason(v1::FinishReason::Length));
                finish.usage = finish.usage.map(|usage| v1::Usage { completion_tokens: 0, ..usage });
                Some(Event::Finish(finish))
            }
            event => Some(event),
        }
    }
}

fn whole(answers: Vec<collect::Answer>, view: View) -> Response {
    let mut usage = Usage::default();
    let mut choices = Vec::new();
    let (id, model, system_fingerprint) = match answers.first() {
        Some(first) => {
            (completion_id(&first.start), first.start.model.clone(), fingerprint(first.finish.repro.as_ref()))
        }
        None => Default::default(),
    };
    for (prompt, answer) in (0..).zip(answers) {
        usage.add(answer.finish.usage.unwrap_or_default());
        let prompt_logprobs = prompt_logprobs(answer.start.prompt_logprobs, view);
        for (index, choice) in (0..).zip(answer.choices) {
            let logprobs = view.logprobs.then(|| {
                let mut lists = prompt_logprobs.clone().unwrap_or_default();
                lists.extend(CompletionLogprobs::new(choice.logprobs, lists.text_len()));
                lists
            });
            choices.push(Choice {
                index: prompt * view.n + index,
                text: choice.text,
                logprobs,
                finish_reason: choice.finish.map(|finish| finish.reason().into()),
            });
        }
    }
    let (id, model) = (id.as_str(), model.as_str());
    let (object, created, usage) = ("text_completion", now(), Some(Some(usage)));
    json_response(StatusCode::OK, &Completion { id, object, created, model, choices, usage, system_fingerprint })
}

fn completion_id(start: &v1::Start) -> String {
    format!("cmpl-{}", start.request_id)
}

fn prompt_logprobs(logprobs: Vec<v1::TokenLogprob>, view: View) -> Option<CompletionLogprobs> {
    (view.echo && view.logprobs).then(|| CompletionLogprobs::of_prompt(logprobs))
}

// === impl Pieces ===

impl Pieces {
    fn new(n_prompts: usize, view: View, include_usage: bool) -> Self {
        let n = usize::try_from(view.n).unwrap_or(usize::MAX);
        Self {
            id: String::new(),
            created: now(),
            model: String::new(),
            view,
            include_usage,
            usage: Usage::default(),
            open: n_prompts,
            choices: vec![(None, 0); n_prompts.saturating_mul(n)],
        }
    }

    fn of(&mut self, prompt: u32, event: Event) -> Vec<sse::Event> {
        match event {
            Event::Start(start) => {
                if self.id.is_empty() {
                    (self.id, self.model) = (completion_id(&start), start.model);
                }
                let logprobs = prompt_logprobs(start.prompt_logprobs, self.view);
                for index in 0..self.view.n {
                    if let Some(choice) = self.choice(prompt, index) {
                        choice.0 = logprobs.clone();
                    }
                }
                Vec::new()
            }
            Event::Chunk(chunk) => self.chunk(prompt, chunk).into_iter().collect(),
            Event::Finish(finish) => self.finish(prompt, &finish),
        }
    }

    fn choice(&mut self, prompt: u32, index: u32) -> Option<&mut (Option<CompletionLogprobs>, usize)> {
        self.choices.get_mut(usize::try_from(prompt.saturating_mul(self.view.n).saturating_add(index)).ok()?)
    }

    /// Tokens whose text is still to come make no piece of their own, unless their log-probabilities do.
    fn chunk(&mut self, prompt: u32, chunk: v1::Chunk) -> Option<sse::Event> {
        let (prompt_logprobs, offset) = self.choice(prompt, chunk.choice)?;
        let mut lists = prompt_logprobs.take();
        if let Some(lists) = &lists {
            *offset = lists.text_len();
        }
        if !chunk.logprobs.is_empty() {
            let next = CompletionLogprobs::new(chunk.logprobs, *offset);
            *offset += next.text_len();
            lists.get_or_insert_default().extend(next);
        }
        if chunk.text.is_empty() && lists.is_none() {
            return None;
        }
        let index = prompt * self.view.n + chunk.choice;
        Some(self.piece(vec![Choice { index, text: chunk.text, logprobs: lists, finish_reason: None }]))
    }

    fn finish(&mut self, prompt: u32, finish: &v1::Finish) -> Vec<sse::Event> {
        self.usage.add(finish.usage.unwrap_or_default());
        self.open = self.open.saturating_sub(1);
        let last = |choice: &v1::ChoiceFinish| {
            let (index, finish_reason) = (prompt * self.view.n + choice.choice, Some(choice.reason().into()));
            self.piece(vec![Choice { index, text: String::new(), logprobs: None, finish_reason }])
        };
        let mut events: Vec<_> = finish.choices.iter().map(last).collect();
        if self.open == 0 {
            if self.include_usage {
                let repro = finish.repro.as_ref();
                events.push(self.completion(Vec::new(), Some(Some(self.usage)), fingerprint(repro)));
            }
            events.push(stream::done());
        }
        events
    }

    fn piece(&self, choices: Vec<Choice>) -> sse::Event {
        self.completion(choices, self.include_usage.then_some(None), None)
    }

    fn completion(
        &self,
        choices: Vec<Choice>,
        usage: Option<Option<Usage>>,
        system_fingerprint: Option<String>,
    ) -> sse::Event {
        let (id, model) = (self.id.as_str(), self.model.as_str());
        let object = "text_completion";
        stream::data(&Completion { id, object, created: self.created, model, choices, usage, system_fingerprint })
    }
}

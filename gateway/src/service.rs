//! `InferenceService`: the gate, the checks and the wire's forms around a [`generation`](crate::generation).

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt as _, stream};
use lockstep_proto::{
    client::deadline_of,
    trace::Trace,
    v1::{self, inference_service_server::InferenceService},
};
use prost::Message;
use tonic::{Request, Response, Status};

use crate::{
    admission::{Admission, Permit},
    backends::Backends,
    generation::{
        self, Deadline, Event, Events, Job, Prompt, Source,
        collect::{Answer, AnswerChoice, collect},
    },
    metrics::{Meter, Metrics},
    models::Models,
    request::{ModelFacts, Rules, ValidChat, ValidConversation, ValidCount, ValidGenerate, ValidOutput},
    sampling::{Policy, ValidSampling},
    status::Failure,
    tokenizer::{Caller, Facts, NoTemplate},
};

/// `InferenceService`.
#[derive(Debug)]
pub struct InferenceServer {
    /// Who gets in.
    pub admission: Arc<Admission>,
    /// What is served.
    pub models: Arc<Models>,
    /// Who does the work.
    pub backends: Arc<Backends>,
    /// What the operator allows.
    pub policy: Policy,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Longest life of a request.
    pub max_duration: Duration,
}

/// A call that was let in.
struct Call {
    trace: Trace,
    deadline: Deadline,
    meter: Meter,
    permit: Permit,
}

/// What a call is checked against.
struct Model {
    facts: Arc<Facts>,
    rules: ModelFacts,
}

/// A valid request.
struct Work {
    facts: Arc<Facts>,
    source: Source,
    sampling: ValidSampling,
    output: ValidOutput,
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

// === impl InferenceServer ===

impl InferenceServer {
    /// Lets a call in, with the time that its client gives it.
    fn enter<T: Message>(&self, method: &'static str, request: Request<T>) -> Result<(Call, T), Failure> {
        let arrived = Instant::now();
        let mut meter = self.metrics.meter(method, arrived);
        let admitted = self
            .admission
            .authenticate(request.metadata())
            .and_then(|()| self.admission.admit(request.get_ref().encoded_len()));
        let permit = meter.note(admitted.map_err(Failure::from))?;
        let given = deadline_of(&request).map(|deadline| deadline.saturating_duration_since(arrived));
        let timeout = given.map_or(self.max_duration, |given| given.min(self.max_duration));
        let call = Call { trace: Trace::of(&request), deadline: Deadline::new(arrived, timeout), meter, permit };
        Ok((call, request.into_inner()))
    }

    /// What is known of the model that a request names.
    async fn model(&self, name: &str, call: &Call) -> Result<Model, Failure> {
        let (name, served) = self.models.resolve(name)?;
        let facts = self.backends.tokenizers.facts(&name, call.caller()).await?;
        let rules = ModelFacts::new(facts.description(), served.context_length)
            .map_err(|error| Failure::Facts { model: name, error })?;
        Ok(Model { facts, rules })
    }

    async fn check_chat(&self, request: v1::ChatRequest, call: &Call) -> Result<Work, Failure> {
        let model = self.model(&request.model, call).await?;
        model.can_chat()?;
        let valid = ValidChat::new(request, self.rules(&model))?;
        Ok(Work {
            source: Source::Conversation(valid.conversation().clone()),
            sampling: valid.sampling().clone(),
            output: valid.output().clone(),
            facts: model.facts,
        })
    }

    async fn check_generate(&self, request: v1::GenerateRequest, call: &Call) -> Result<Work, Failure> {
        let model = self.model(&request.model, call).await?;
        let valid = ValidGenerate::new(request, self.rules(&model))?;
        Ok(Work {
            source: Source::Raw(valid.prompt().clone()),
            sampling: valid.sampling().clone(),
            output: valid.output().clone(),
            facts: model.facts,
        })
    }

    fn rules<'a>(&'a self, model: &'a Model) -> Rules<'a> {
        Rules { facts: &model.rules, policy: self.policy.for_model(model.facts.model()) }
    }

    fn begin(&self, call: Call, work: Work) -> Events {
        let Call { trace, deadline, meter, permit } = call;
        let Work { facts, source, sampling, output } = work;
        let job = Job { trace, deadline, meter, permit, facts, source, sampling, output };
        generation::start(Arc::clone(&self.backends), job)
    }

    async fn count(&self, request: v1::CountTokensRequest, call: &Call) -> Result<v1::CountTokensResponse, Failure> {
        let model = self.model(&request.model, call).await?;
        if let Some(v1::count_tokens_request::Input::Conversation(_)) = &request.input {
            model.can_chat()?;
        }
        let source = match ValidCount::new(request, &model.rules)? {
            ValidCount::Conversation(conversation) => Source::Conversation(conversation),
            ValidCount::Prompt(prompt) => Source::Raw(prompt),
        };
        let prompt = source.prompt(&self.backends.tokenizers, &model.facts, call.caller()).await?;
        Ok(v1::CountTokensResponse { token_count: prompt.n_tokens() })
    }

    async fn render(&self, request: v1::RenderChatRequest, call: &Call) -> Result<v1::RenderChatResponse, Failure> {
        let model = self.model(&request.model, call).await?;
        model.can_chat()?;
        let source = Source::Conversation(ValidConversation::new(request, &model.rules)?);
        let Prompt { ids, text } = source.prompt(&self.backends.tokenizers, &model.facts, call.caller()).await?;
        Ok(v1::RenderChatResponse { prompt: text.unwrap_or_default(), token_ids: ids })
    }
}

#[tonic::async_trait]
impl InferenceService for InferenceServer {
    async fn chat(&self, request: Request<v1::ChatRequest>) -> Result<Response<v1::ChatResponse>, Status> {
        let (mut call, request) = self.enter("Chat", request)?;
        let checked = self.check_chat(request, &call).await;
        let work = call.meter.note(checked)?;
        let n = work.sampling.n();
        Ok(Response::new(chat_response(collect(self.begin(call, work), n).await?)))
    }

    type StreamChatStream = EventStream<v1::StreamChatResponse>;

    async fn stream_chat(
        &self,
        request: Request<v1::StreamChatRequest>,
    ) -> Result<Response<Self::StreamChatStream>, Status> {
        let (mut call, request) = self.enter("StreamChat", request)?;
        let v1::StreamChatRequest { model, conversation, sampling, output } = request;
        let checked = self.check_chat(v1::ChatRequest { model, conversation, sampling, output }, &call).await;
        let work = call.meter.note(checked)?;
        Ok(Response::new(event_stream(self.begin(call, work), stream_chat_response).await?))
    }

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<v1::GenerateResponse>, Status> {
        let (mut call, request) = self.enter("Generate", request)?;
        let checked = self.check_generate(request, &call).await;
        let work = call.meter.note(checked)?;
        let n = work.sampling.n();
        Ok(Response::new(generate_response(collect(self.begin(call, work), n).await?)))
    }

    type StreamGenerateStream = EventStream<v1::StreamGenerateResponse>;

    async fn stream_generate(
        &self,
        request: Request<v1::StreamGenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let (mut call, request) = self.enter("StreamGenerate", request)?;
        let v1::StreamGenerateRequest { model, prompt, sampling, output } = request;
        let checked = self.check_generate(v1::GenerateRequest { model, prompt, sampling, output }, &call).await;
        let work = call.meter.note(checked)?;
        Ok(Response::new(event_stream(self.begin(call, work), stream_generate_response).await?))
    }

    async fn count_tokens(
        &self,
        request: Request<v1::CountTokensRequest>,
    ) -> Result<Response<v1::CountTokensResponse>, Status> {
        let (mut call, request) = self.enter("CountTokens", request)?;
        let counted = self.count(request, &call).await;
        Ok(Response::new(call.meter.settle(counted)?))
    }

    async fn render_chat(
        &self,
        request: Request<v1::RenderChatRequest>,
    ) -> Result<Response<v1::RenderChatResponse>, Status> {
        let (mut call, request) = self.enter("RenderChat", request)?;
        let rendered = self.render(request, &call).await;
        Ok(Response::new(call.meter.settle(rendered)?))
    }
}

// === impl Call ===

impl Call {
    fn caller(&self) -> Caller<'_> {
        Caller { trace: &self.trace, until: self.deadline.tokens() }
    }
}

// === impl Model ===

impl Model {
    fn can_chat(&self) -> Result<(), Failure> {
        let no_template =
            |why: &NoTemplate| Failure::NoTemplate { model: self.facts.model().to_owned(), why: why.clone() };
        self.facts.template().map(|_| ()).map_err(no_template)
    }
}

/// The stream of a call, once its first event is there: a request that fails before is a plain error.
async fn event_stream<T: Send + 'static>(mut events: Events, wire: fn(Event) -> T) -> Result<EventStream<T>, Failure> {
    let first = events.next().await.ok_or_else(|| Failure::Bug("an answer without events".to_owned()))??;
    let events = stream::once(async { Ok(first) }).chain(events);
    Ok(Box::pin(events.map(move |event| event.map(wire).map_err(Status::from))))
}

fn stream_chat_response(event: Event) -> v1::StreamChatResponse {
    use v1::stream_chat_response::Event as Wire;
    let event = match event {
        Event::Start(start) => Wire::Start(start),
        Event::Chunk(chunk) => Wire::Chunk(chunk),
        Event::Finish(finish) => Wire::Finish(finish),
    };
    v1::StreamChatResponse { event: Some(event) }
}

fn stream_generate_response(event: Event) -> v1::StreamGenerateResponse {
    use v1::stream_generate_response::Event as Wire;
    let event = match event {
        Event::Start(start) => Wire::Start(start),
        Event::Chunk(chunk) => Wire::Chunk(chunk),
        Event::Finish(finish) => Wire::Finish(finish),
    };
    v1::StreamGenerateResponse { event: Some(event) }
}

fn chat_response(answer: Answer) -> v1::ChatResponse {
    let choice = |choice: AnswerChoice| {
        let part = v1::content_part::Part::Text(choice.text);
        let message = v1::Message {
            role: v1::Role::Assistant.into(),
            content: vec![v1::ContentPart { part: Some(part) }],
            ..v1::Message::default()
        };
        let AnswerChoice { finish, token_ids, logprobs, .. } = choice;
        v1::ChatChoice { message: Some(message), finish, token_ids, logprobs }
    };
    let v1::Finish { usage, timings, repro, .. } = answer.finish;
    let choices = answer.choices.into_iter().map(choice).collect();
    v1::ChatResponse { start: Some(answer.start), choices, usage, timings, repro }
}

fn generate_response(answer: Answer) -> v1::GenerateResponse {
    let choice =
        |AnswerChoice { text, token_ids, logprobs, finish }| v1::GenerateChoice { text, finish, token_ids, logprobs };
    let v1::Finish { usage, timings, repro, .. } = answer.finish;
    let choices = answer.choices.into_iter().map(choice).collect();
    v1::GenerateResponse { start: Some(answer.start), choices, usage, timings, repro }
}

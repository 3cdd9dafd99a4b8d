//! The services of `lockstep.v1`: the front for gRPC, over the [`pipeline`](crate::pipeline).

use std::{pin::Pin, sync::Arc, time::Instant};

use futures_util::{Stream, StreamExt as _};
use lockstep_proto::{
    client::deadline_of,
    trace::Trace,
    v1::{self, inference_service_server::InferenceService, model_service_server::ModelService},
};
use prost::Message;
use tonic::{Request, Response, Status};

use crate::{
    generation::{
        Event, Events,
        collect::{Answer, AnswerChoice},
    },
    pipeline::{Arrival, Call, Pipeline},
    status::Failure,
};

/// `InferenceService` and `ModelService`. Clones share the pipeline.
#[derive(Debug, Clone)]
pub struct Services {
    pipeline: Arc<Pipeline>,
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

// === impl Services ===

impl Services {
    /// The services over this pipeline.
    pub fn new(pipeline: Arc<Pipeline>) -> Self {
        Self { pipeline }
    }

    /// Lets a call in, with the time that its client gives it.
    fn enter<T: Message>(&self, method: &'static str, request: Request<T>) -> Result<(Call, T), Failure> {
        let timeout = deadline_of(&request).map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let call = self.pipeline.enter(Arrival {
            method,
            trace: Trace::of(&request),
            headers: request.metadata().as_ref(),
            n_bytes: request.get_ref().encoded_len(),
            timeout,
        })?;
        Ok((call, request.into_inner()))
    }
}

#[tonic::async_trait]
impl InferenceService for Services {
    async fn chat(&self, request: Request<v1::ChatRequest>) -> Result<Response<v1::ChatResponse>, Status> {
        let (call, request) = self.enter("Chat", request)?;
        let answer = self.pipeline.chat(call, request).await?.collect().await?;
        Ok(Response::new(chat_response(answer)))
    }

    type StreamChatStream = EventStream<v1::StreamChatResponse>;

    async fn stream_chat(
        &self,
        request: Request<v1::StreamChatRequest>,
    ) -> Result<Response<Self::StreamChatStream>, Status> {
        let (call, request) = self.enter("StreamChat", request)?;
        let v1::StreamChatRequest { model, conversation, sampling, output } = request;
        let request = v1::ChatRequest { model, conversation, sampling, output };
        let events = self.pipeline.chat(call, request).await?.events().await?;
        Ok(Response::new(event_stream(events, stream_chat_response)))
    }

    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Result<Response<v1::GenerateResponse>, Status> {
        let (call, request) = self.enter("Generate", request)?;
        let answer = self.pipeline.generate(call, request).await?.collect().await?;
        Ok(Response::new(generate_response(answer)))
    }

    type StreamGenerateStream = EventStream<v1::StreamGenerateResponse>;

    async fn stream_generate(
        &self,
        request: Request<v1::StreamGenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let (call, request) = self.enter("StreamGenerate", request)?;
        let v1::StreamGenerateRequest { model, prompt, sampling, output } = request;
        let request = v1::GenerateRequest { model, prompt, sampling, output };
        let events = self.pipeline.generate(call, request).await?.events().await?;
        Ok(Response::new(event_stream(events, stream_generate_response)))
    }

    async fn embed(&self, request: Request<v1::EmbedRequest>) -> Result<Response<v1::EmbedResponse>, Status> {
        let (call, request) = self.enter("Embed", request)?;
        Ok(Response::new(self.pipeline.embed(call, request).await?))
    }

    async fn count_tokens(
        &self,
        request: Request<v1::CountTokensRequest>,
    ) -> Result<Response<v1::CountTokensResponse>, Status> {
        let (call, request) = self.enter("CountTokens", request)?;
        Ok(Response::new(self.pipeline.count(call, request).await?))
    }

    async fn render_chat(
        &self,
        request: Request<v1::RenderChatRequest>,
    ) -> Result<Response<v1::RenderChatResponse>, Status> {
        let (call, request) = self.enter("RenderChat", request)?;
        Ok(Response::new(self.pipeline.render(call, request).await?))
    }
}

#[tonic::async_trait]
impl ModelService for Services {
    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let models = self.pipeline.list_models(request.metadata().as_ref(), &Trace::of(&request)).await?;
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn get_model(&self, request: Request<v1::GetModelRequest>) -> Result<Response<v1::GetModelResponse>, Status> {
        let (headers, trace) = (request.metadata().as_ref(), Trace::of(&request));
        let model = self.pipeline.model(&request.get_ref().name, headers, &trace).await?;
        Ok(Response::new(v1::GetModelResponse { model: Some(model) }))
    }
}

fn event_stream<T: Send + 'static>(events: Events, wire: fn(Event) -> T) -> EventStream<T> {
    Box::pin(events.map(move |event| event.map(wire).map_err(Status::from)))
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
            tool_calls: choice.tool_calls,
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
    let choice = |AnswerChoice { text, token_ids, logprobs, finish, .. }| v1::GenerateChoice {
        text,
        finish,
        token_ids,
        logprobs,
    };
    let v1::Finish { usage, timings, repro, .. } = answer.finish;
    let choices = answer.choices.into_iter().map(choice).collect();
    v1::GenerateResponse { start: Some(answer.start), choices, usage, timings, repro }
}

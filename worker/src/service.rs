//! The service: `WorkerService`, which the gateway calls on rank 0.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use lockstep_proto::worker::v1::{
    ChoiceFinish, DrainRequest, DrainResponse, EmbedRequest, EmbedResponse, EndChoiceRequest, EndChoiceResponse,
    FinishReason as WireReason, GenerateRequest, GenerateResponse, GetStatusRequest, GetStatusResponse, Logprob,
    PromptLogprobs, RankState as WireRankState, RankStatus, Started, Status as WireStatus,
    TokenLogprobs as WireLogprobs, Tokens, WatchStatusRequest, WatchStatusResponse, generate_response,
    worker_service_server::WorkerService,
};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::{
    constraint::compiler::Compiler,
    engine::{
        Event, FinishReason,
        handle::{self, EngineHandle, EngineStatus},
    },
    group::{
        Roster,
        membership::{Presence, RankState},
    },
    request::{self, Limits},
    sampler::TokenLogprobs,
    status,
};

/// A changed status is sent at most so often: gateways need no finer picture, and a step may take less than this.
const STATUS_INTERVAL_MIN: Duration = Duration::from_millis(50);
/// An unchanged status is repeated after this, as a sign of life.
const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// What a worker says about itself that does not change.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The model's name.
    pub model: String,
    /// SHA-256 of the model's weights and settings, in hexadecimal.
    pub model_digest: String,
    /// Ranks of the group.
    pub world_size: u32,
    /// Positions in a block.
    pub block_size: u32,
    /// Values of an embedding.
    pub embedding_size: u32,
    /// What every rank computes on.
    pub device: String,
    /// What requests are checked against.
    pub limits: Limits,
}

/// The gRPC service over an engine.
#[derive(Debug)]
pub struct Service {
    engine: EngineHandle,
    compiler: Compiler,
    identity: Identity,
    roster: Roster,
}

impl Service {
    /// A service for one engine and its group, and what compiles constraints for it.
    pub fn new(engine: EngineHandle, compiler: Compiler, identity: Identity, roster: Roster) -> Self {
        Self { engine, compiler, identity, roster }
    }

    /// What the worker says about itself.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What computes.
    pub(crate) fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    /// Checks a request, compiles its constraint, and runs it. Dropping the events ends it within one step.
    pub(crate) async fn start(&self, request: GenerateRequest) -> Result<handle::EventStream, Status> {
        let limits = self.identity.limits;
        let (mut job, constraint) = request::valid_job(request, limits, Instant::now()).map_err(status::invalid)?;
        if let Some(constraint) = constraint {
            let compiled = self.compiler.compile(constraint, job.params.stop_token_ids.clone()).await;
            job.constraint = Some(Box::new(compiled.map_err(|error| status::constraint(&error))?));
        }
        self.engine.submit(job).await.map_err(|error| status::engine(&error))
    }

    /// Checks a request, and embeds its prompt: `[embedding_size]`.
    pub(crate) async fn embedding(&self, request: EmbedRequest) -> Result<Vec<f32>, Status> {
        let limits = self.identity.limits;
        let job = request::valid_embedding(request, limits, Instant::now()).map_err(status::invalid)?;
        self.engine.embed(job).await.map_err(|error| status::engine(&error))
    }
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerService for Service {
    type GenerateStream = EventStream<GenerateResponse>;
    type WatchStatusStream = EventStream<WatchStatusResponse>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let events = self.start(request.into_inner()).await?;
        let responses = events.map(|event| event.map(response).map_err(|error| status::engine(&error)));
        Ok(Response::new(Box::pin(responses)))
    }

    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        Ok(Response::new(EmbedResponse { values: self.embedding(request.into_inner()).await? }))
    }

    async fn end_choice(&self, request: Request<EndChoiceRequest>) -> Result<Response<EndChoiceResponse>, Status> {
        let EndChoiceRequest { generation_id, choice } = request.into_inner();
        let generation = request::valid_generation(&generation_id).map_err(status::invalid)?;
        self.engine.end_choice(generation, choice).map_err(|error| status::engine(&error))?;
        Ok(Response::new(EndChoiceResponse {}))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let status = wire_status(&self.engine.status().borrow(), &self.identity, &self.roster);
        Ok(Response::new(GetStatusResponse { status: Some(status) }))
    }

    async fn watch_status(&self, _: Request<WatchStatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        let (identity, roster) = (self.identity.clone(), self.roster.clone());
        let watcher = Watcher { status: self.engine.status(), identity, roster, last: None };
        let stream = futures_util::stream::unfold(watcher, |mut watcher| async move {
            let status = watcher.next().await?;
            Some((Ok(WatchStatusResponse { status: Some(status) }), watcher))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        self.engine.drain().await;
        Ok(Response::new(DrainResponse {}))
    }
}

/// One caller of `WatchStatus`.
struct Watcher {
    status: watch::Receiver<EngineStatus>,
    identity: Identity,
    roster: Roster,
    last: Option<WireStatus>,
}

impl Watcher {
    /// The next status worth sending; `None` when the engine is gone.
    async fn next(&mut self) -> Option<WireStatus> {
        let repeat_at = tokio::time::Instant::now() + STATUS_INTERVAL_MAX;
        if self.last.is_some() {
            tokio::time::sleep(STATUS_INTERVAL_MIN).await;
        }
        loop {
            let now = wire_status(&self.status.borrow_and_update(), &self.identity, &self.roster);
            if self.last.as_ref() != Some(&now) || tokio::time::Instant::now() >= repeat_at {
                self.last = Some(now.clone());
                return Some(now);
            }
            let changed = tokio::time::timeout_at(repeat_at, self.status.changed()).await;
            if let Ok(Err(_engine_gone)) = changed {
                return None;
            }
        }
    }
}

fn wire_status(status: &EngineStatus, identity: &Identity, roster: &Roster) -> WireStatus {
    WireStatus {
        ready: status.ready,
        draining: status.draining,
        model: identity.model.clone(),
        model_digest: identity.model_digest.clone(),
        engine_version: crate::VERSION.to_owned(),
        context_length: identity.limits.context_length as u32,
        vocab_size: identity.limits.vocab_size as u32,
        world_size: identity.world_size,
        epoch: status.epoch,
        waiting_sequences: status.stats.waiting as u32,
        running_sequences: status.stats.running as u32,
        outstanding_tokens: status.stats.outstanding_tokens,
        total_blocks: status.stats.blocks.total as u32,
        free_blocks: status.stats.blocks.free as u32,
        cached_blocks: status.stats.blocks.cached as u32,
        block_size: identity.block_size,
        embedding_size: identity.embedding_size,
        device: identity.device.clone(),
        decode_step_ms: status.decode_step.map(|step| step.as_secs_f32() * 1e3),
        generated_tokens: status.generated_tokens,
        ranks: roster.ranks().into_iter().map(wire_rank).collect(),
    }
}

fn wire_rank(presence: Presence) -> RankStatus {
    let state = match presence.state {
        RankState::Missing => WireRankState::Missing,
        RankState::Waiting => WireRankState::Waiting,
        RankState::Joined => WireRankState::Joined,
    };
    let silent_s = presence.silence.map(|silence| u32::try_from(silence.as_secs()).unwrap_or(u32::MAX));
    RankStatus { rank: presence.rank as u32, state: state.into(), silent_s }
}

fn response(event: Event) -> GenerateResponse {
    use generate_response::Event as Wire;
    let event = match event {
        Event::Started { generation, cached_tokens } => {
            Wire::Started(Started { generation_id: generation.0.to_vec(), cached_tokens })
        }
        Event::PromptLogprobs(tokens) => {
            Wire::PromptLogprobs(PromptLogprobs { tokens: tokens.into_iter().map(wire_logprobs).collect() })
        }
        Event::Token { choice, position, token_id, logprobs } => Wire::Tokens(Tokens {
            choice,
            position,
            token_ids: vec![token_id],
            logprobs: logprobs.into_iter().map(wire_logprobs).collect(),
        }),
        Event::Finish { choice, reason } => {
            let (reason, stop_token_id) = match reason {
                FinishReason::StopToken(id) => (WireReason::StopToken, Some(id)),
                FinishReason::Length => (WireReason::Length, None),
                FinishReason::Deadline => (WireReason::Deadline, None),
                FinishReason::Ended => (WireReason::Ended, None),
                FinishReason::Complete => (WireReason::Complete, None),
            };
            Wire::Finish(ChoiceFinish { choice, reason: reason.into(), stop_token_id })
        }
    };
    GenerateResponse { event: Some(event) }
}

fn wire_logprobs(logprobs: TokenLogprobs) -> WireLogprobs {
    let entry = |entry: crate::sampler::Logprob| Logprob { token_id: entry.id, logprob: entry.logprob };
    WireLogprobs { token: Some(entry(logprobs.token)), top: logprobs.top.into_iter().map(entry).collect() }
}

//! A stub: a worker that has no weights and answers with the prompt's own tokens, over and over, as fast as they are
//! read. It stands in for a group where all but the model is to be measured. Everything that it says about itself says so.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures_util::{StreamExt as _, stream};
use lockstep_checkpoint::Checkpoint;
use lockstep_proto::{
    server::{Readiness, Server, Shutdown},
    telemetry,
    worker::v1::{
        ChoiceFinish, DrainRequest, DrainResponse, EmbedRequest, EmbedResponse, EndChoiceRequest, EndChoiceResponse,
        FinishReason, GenerateRequest, GenerateResponse, GetStatusRequest, GetStatusResponse, Started,
        Status as WireStatus, Tokens, WatchStatusRequest, WatchStatusResponse,
        generate_response::Event,
        worker_service_server::{WorkerService, WorkerServiceServer},
    },
};
use tokio_stream::{Stream, wrappers::IntervalStream};
use tonic::{Request, Response, Status, service::Routes};

use crate::{
    config::WorkerConfig,
    engine::Job,
    model::load::Source,
    request::{self, Limits},
    serve::{BACKGROUND_CALLS, HEALTH_NAME},
    status,
};

/// What stands where a worker's digest and version do.
const STUB: &str = "stub";

/// How often the state is repeated, as a sign of life.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The service.
#[derive(Debug, Clone)]
struct Stub {
    status: WireStatus,
    limits: Limits,
    /// Pause before each token of a stream; zero: none.
    interval: Duration,
}

/// Serves a stub until it is told to end.
///
/// # Errors
/// A port that is taken, or a model whose sizes cannot be read.
pub async fn serve(config: &WorkerConfig) -> Result<()> {
    telemetry::init(&config.log)?;
    let shutdown = Shutdown::on_signals(config.exit_with_parent)?;
    let registry = telemetry::registry("worker");
    let server =
        Server::bind(config.server(), Arc::new(registry))?.health_names(&[HEALTH_NAME]).background(&BACKGROUND_CALLS);
    let stub = Stub::new(config)?;
    tracing::warn!("a stub: tokens are repeated from the prompt, no model computes them");
    let routes =
        Routes::new(WorkerServiceServer::new(stub).max_decoding_message_size(config.limits.max_message_bytes()));
    let readiness = Readiness::new();
    readiness.set_ready(true);
    server.announce()?;
    Ok(server.serve(routes, &readiness, &shutdown).await?)
}

// === impl Stub ===

impl Stub {
    fn new(config: &WorkerConfig) -> Result<Self> {
        let path = &config.model.path;
        let source =
            Source::open(Arc::new(Checkpoint::open(path)?), 0, 1).with_context(|| path.display().to_string())?;
        let (vocab_size, context_length) = (source.config().vocab_size, source.config().context_length);
        let status = WireStatus {
            ready: true,
            model: config.model.name.clone(),
            model_digest: STUB.to_owned(),
            engine_version: STUB.to_owned(),
            context_length: u32::try_from(context_length)?,
            vocab_size: u32::try_from(vocab_size)?,
            world_size: 1,
            embedding_size: u32::try_from(source.config().hidden_dim)?,
            epoch: 1,
            ..WireStatus::default()
        };
        let interval = Duration::from_millis(config.stub_interval_ms);
        Ok(Self { status, limits: Limits { vocab_size, context_length }, interval })
    }
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerService for Stub {
    type GenerateStream = EventStream<GenerateResponse>;
    type WatchStatusStream = EventStream<WatchStatusResponse>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        if request.logprobs.is_some() || request.prompt_logprobs.is_some() {
            return Err(status::unimplemented("a stub knows no probabilities"));
        }
        let (job, constraint) = request::valid_job(request, self.limits, Instant::now()).map_err(status::invalid)?;
        if constraint.is_some() {
            return Err(status::unimplemented("a stub holds no constraints"));
        }
        let events = stream::iter(events(job)).map(|event| Ok(GenerateResponse { event: Some(event) }));
        if self.interval.is_zero() {
            return Ok(Response::new(Box::pin(events)));
        }
        let ticks = IntervalStream::new(tokio::time::interval(self.interval));
        Ok(Response::new(Box::pin(ticks.zip(events).map(|(_, event)| event))))
    }

    async fn embed(&self, _: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        Err(status::unimplemented("a stub has no embeddings"))
    }

    async fn end_choice(&self, _: Request<EndChoiceRequest>) -> Result<Response<EndChoiceResponse>, Status> {
        Ok(Response::new(EndChoiceResponse {}))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        Ok(Response::new(GetStatusResponse { status: Some(self.status.clone()) }))
    }

    async fn watch_status(&self, _: Request<WatchStatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        let response = WatchStatusResponse { status: Some(self.status.clone()) };
        let ticks = IntervalStream::new(tokio::time::interval(STATUS_INTERVAL));
        Ok(Response::new(Box::pin(ticks.map(move |_| Ok(response.clone())))))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Ok(Response::new(DrainResponse {}))
    }
}

/// What a stub answers, one event at a time: nothing of it is made before it is read.
fn events(job: Job) -> impl Iterator<Item = Event> + Send {
    let Job { prompt, max_new_tokens, n, .. } = job;
    let started = Event::Started(Started { generation_id: vec![0; 16], cached_tokens: 0 });
    let tokens = (0..max_new_tokens).flat_map(move |position| {
        let token_ids = prompt.get(position as usize % prompt.len().max(1)).copied().into_iter().collect::<Vec<_>>();
        (0..n).map(move |choice| {
            Event::Tokens(Tokens { choice, position, token_ids: token_ids.clone(), logprobs: Vec::new() })
        })
    });
    let finish =
        move |choice| Event::Finish(ChoiceFinish { choice, reason: FinishReason::Length.into(), stop_token_id: None });
    std::iter::once(started).chain(tokens).chain((0..n).map(finish))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompt_comes_back_over_and_over() {
        let request = GenerateRequest {
            request_id: "r".into(),
            prompt_token_ids: vec![5, 6],
            sampling: Some(lockstep_proto::worker::v1::ResolvedSampling {
                max_new_tokens: 3,
                top_p: 1.0,
                typical_p: 1.0,
                repetition_penalty: 1.0,
                ..Default::default()
            }),
            n: 2,
            ..GenerateRequest::default()
        };
        let limits = Limits { vocab_size: 10, context_length: 20 };
        let (job, _) = request::valid_job(request, limits, Instant::now()).unwrap();
        let (mut first, mut ends) = (Vec::new(), 0);
        for event in events(job) {
            match event {
                Event::Tokens(tokens) if tokens.choice == 0 => first.push((tokens.position, tokens.token_ids)),
                Event::Finish(_) => ends += 1,
                _ => {}
            }
        }
        assert_eq!((first, ends), (vec![(0, vec![5]), (1, vec![6]), (2, vec![5])], 2));
    }
}

//! A worker in the test's own process, without a model, which knows when it has sent what: what others add is then the
//! time between. It answers our gateway, and the Shepherd Model Gateway.

mod vllm;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::{Stream, StreamExt as _, stream};
use lockstep_proto::vllm::grpc::engine::vllm_engine_server::VllmEngineServer;
use lockstep_proto::worker::v1::{
    ChoiceFinish, DrainRequest, DrainResponse, EmbedRequest, EmbedResponse, EndChoiceRequest, EndChoiceResponse,
    FinishReason, GenerateRequest, GenerateResponse, GetStatusRequest, GetStatusResponse, Started, Status, Tokens,
    WatchStatusRequest, WatchStatusResponse,
    generate_response::Event,
    worker_service_server::{WorkerService, WorkerServiceServer},
};
use tokio_stream::wrappers::{IntervalStream, TcpListenerStream};
use tonic::{Request, Response, codegen::BoxStream, transport::Server};

/// How often the state is repeated, as a sign of life.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// What it says of itself: that it is the demo model.
const MODEL: &str = "demo";
const CONTEXT_LENGTH: u32 = 8192;
const VOCAB_SIZE: u32 = 49_152;

/// See the module's documentation. Clones are the same stub.
#[derive(Clone, Debug, Default)]
pub struct TimedStub {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Pause before each token but the first. Unit: microseconds.
    pause_us: AtomicU64,
    /// When the tokens of the last stream went out.
    sent: Mutex<Vec<Instant>>,
}

// === impl TimedStub ===

impl TimedStub {
    /// Serves on a free port for as long as the runtime lives.
    ///
    /// # Errors
    /// Without a port.
    pub async fn serve(&self) -> Result<SocketAddr> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let connections = TcpListenerStream::new(listener).map(|stream| {
            stream.and_then(|stream| {
                stream.set_nodelay(true)?;
                Ok(stream)
            })
        });
        let server = Server::builder()
            .max_concurrent_streams(u32::MAX)
            .add_service(WorkerServiceServer::new(self.clone()))
            .add_service(VllmEngineServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(connections));
        Ok(address)
    }

    /// Pauses before each token but the first from now on.
    pub fn pause(&self, pause: Duration) {
        self.inner.pause_us.store(pause.as_micros() as u64, Ordering::Relaxed);
    }

    /// When the tokens since the last call went out.
    pub fn take_sent(&self) -> Vec<Instant> {
        std::mem::take(&mut *self.inner.sent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The token in the middle of the prompt, over and over, each with its position and after the pause.
    fn tokens(&self, prompt: &[u32], n_tokens: u32) -> impl Stream<Item = (u32, u32)> + Send + use<> {
        let token = prompt.get(prompt.len() / 2).copied().unwrap_or_default();
        let pause = Duration::from_micros(self.inner.pause_us.load(Ordering::Relaxed));
        let stub = self.clone();
        stream::iter(0..n_tokens).then(move |position| {
            let stub = stub.clone();
            async move {
                if position > 0 && !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                stub.note();
                (position, token)
            }
        })
    }

    fn note(&self) {
        self.inner.sent.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
    }

    fn status() -> Status {
        Status {
            ready: true,
            model: MODEL.into(),
            model_digest: "stub".into(),
            engine_version: "stub".into(),
            context_length: CONTEXT_LENGTH,
            vocab_size: VOCAB_SIZE,
            world_size: 1,
            epoch: 1,
            ..Status::default()
        }
    }
}

#[tonic::async_trait]
impl WorkerService for TimedStub {
    type GenerateStream = BoxStream<GenerateResponse>;
    type WatchStatusStream = BoxStream<WatchStatusResponse>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, tonic::Status> {
        let request = request.into_inner();
        let started = Event::Started(Started { generation_id: vec![0; 16], cached_tokens: 0 });
        let tokens =
            self.tokens(&request.prompt_token_ids, request.sampling.map_or(1, |sampling| sampling.max_new_tokens));
        let tokens = tokens.map(|(position, token)| {
            Event::Tokens(Tokens { choice: 0, position, token_ids: vec![token], logprobs: Vec::new() })
        });
        let finish = ChoiceFinish { choice: 0, reason: FinishReason::Length.into(), stop_token_id: None };
        let events = stream::iter([started]).chain(tokens).chain(stream::iter([Event::Finish(finish)]));
        Ok(Response::new(Box::pin(events.map(|event| Ok(GenerateResponse { event: Some(event) })))))
    }

    async fn embed(&self, _: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, tonic::Status> {
        Err(tonic::Status::unimplemented("a stub has no embeddings"))
    }

    async fn end_choice(&self, _: Request<EndChoiceRequest>) -> Result<Response<EndChoiceResponse>, tonic::Status> {
        Ok(Response::new(EndChoiceResponse {}))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, tonic::Status> {
        Ok(Response::new(GetStatusResponse { status: Some(Self::status()) }))
    }

    async fn watch_status(
        &self,
        _: Request<WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, tonic::Status> {
        let ticks = IntervalStream::new(tokio::time::interval(STATUS_INTERVAL));
        Ok(Response::new(Box::pin(ticks.map(|_| Ok(WatchStatusResponse { status: Some(Self::status()) })))))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, tonic::Status> {
        Ok(Response::new(DrainResponse {}))
    }
}

//! A worker group whose leader is the test: each request waits to be acted out.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
};

use futures_util::{Stream, StreamExt as _};
use lockstep_proto::worker::v1::{
    self as worker, ChoiceFinish, DrainRequest, DrainResponse, EmbedRequest, EmbedResponse, EndChoiceRequest,
    EndChoiceResponse, FinishReason, GenerateRequest, GenerateResponse, GetStatusRequest, GetStatusResponse, Started,
    TokenLogprobs, Tokens, WatchStatusRequest, WatchStatusResponse, generate_response::Event,
    worker_service_server::WorkerService,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::fake_tokenizer::VOCAB_SIZE;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct FakeWorker {
    pub(crate) status: watch::Sender<worker::Status>,
    /// Requests are answered so instead of being acted out.
    pub(crate) refusal: Arc<Mutex<Option<Status>>>,
    /// What the gateway has asked to end; the answer never comes.
    pub(crate) endings: watch::Sender<Vec<EndChoiceRequest>>,
    requests: mpsc::Sender<Session>,
    embeddings: mpsc::Sender<Embedding>,
}

/// A prompt to be embedded, by the test.
#[derive(Debug)]
pub(crate) struct Embedding {
    pub(crate) request: EmbedRequest,
    pub(crate) answer: oneshot::Sender<Result<Vec<f32>, Status>>,
}

/// How every generation is named, and what the prefix cache held of it.
pub(crate) const GENERATION: [u8; 16] = [7; 16];
const CACHED_TOKENS: u32 = 3;

/// Values of an embedding.
pub(crate) const EMBEDDING_SIZE: u32 = 4;

/// One request, acted out by the test.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) request: GenerateRequest,
    pub(crate) metadata: MetadataMap,
    events: mpsc::Sender<Result<GenerateResponse, Status>>,
    started: bool,
    /// By choice, tokens sent.
    sent: Vec<u32>,
}

impl FakeWorker {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Session>, mpsc::Receiver<Embedding>) {
        let (requests, sessions) = mpsc::channel(64);
        let (embeddings, to_embed) = mpsc::channel(64);
        let status = watch::Sender::new(worker::Status {
            ready: true,
            model: "m".into(),
            model_digest: "d1".into(),
            engine_version: "v1".into(),
            context_length: 1_000,
            vocab_size: VOCAB_SIZE,
            embedding_size: EMBEDDING_SIZE,
            epoch: 1,
            ..worker::Status::default()
        });
        let worker = Self { status, refusal: Arc::default(), endings: watch::Sender::default(), requests, embeddings };
        (worker, sessions, to_embed)
    }
}

impl Session {
    /// Sends an event, and before the first one what comes first.
    pub(crate) async fn send(&mut self, event: Event) {
        if !std::mem::replace(&mut self.started, true) {
            let started = Started { generation_id: GENERATION.to_vec(), cached_tokens: CACHED_TOKENS };
            self.send_alone(Event::Started(started)).await;
        }
        self.send_alone(event).await;
    }

    /// Sends an event and nothing before it.
    pub(crate) async fn send_alone(&self, event: Event) {
        let _ = self.events.send(Ok(GenerateResponse { event: Some(event) })).await;
    }

    pub(crate) async fn ids(&mut self, choice: u32, ids: &[u32]) {
        self.ids_with(choice, ids, Vec::new()).await;
    }

    pub(crate) async fn text(&mut self, choice: u32, text: &str) {
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        self.ids(choice, &ids).await;
    }

    pub(crate) async fn ids_with(&mut self, choice: u32, ids: &[u32], logprobs: Vec<TokenLogprobs>) {
        let sent = &mut self.sent[choice as usize];
        let position = std::mem::replace(sent, *sent + u32::try_from(ids.len()).unwrap());
        self.send(Event::Tokens(Tokens { choice, position, token_ids: ids.to_vec(), logprobs })).await;
    }

    pub(crate) async fn finish(&mut self, choice: u32, reason: FinishReason, stop_token_id: Option<u32>) {
        let finish = ChoiceFinish { choice, reason: reason.into(), stop_token_id };
        self.send(Event::Finish(finish)).await;
    }

    pub(crate) async fn fail(&self, status: Status) {
        let _ = self.events.send(Err(status)).await;
    }

    /// Resolves when the gateway has let go of the stream.
    pub(crate) async fn dropped(&self) {
        self.events.closed().await;
    }
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl WorkerService for FakeWorker {
    type GenerateStream = ReceiverStream<Result<GenerateResponse, Status>>;
    type WatchStatusStream = EventStream<WatchStatusResponse>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        let (events, stream) = mpsc::channel(4);
        let metadata = request.metadata().clone();
        let request = request.into_inner();
        let sent = vec![0; request.n as usize];
        let session = Session { request, metadata, events, started: false, sent };
        self.requests.send(session).await.map_err(|_| Status::internal("nobody acts"))?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let (answer, values) = oneshot::channel();
        let embedding = Embedding { request: request.into_inner(), answer };
        self.embeddings.send(embedding).await.map_err(|_| Status::internal("nobody acts"))?;
        let values = values.await.map_err(|_| Status::internal("nobody answers"))??;
        Ok(Response::new(EmbedResponse { values }))
    }

    async fn end_choice(&self, request: Request<EndChoiceRequest>) -> Result<Response<EndChoiceResponse>, Status> {
        self.endings.send_modify(|endings| endings.push(request.into_inner()));
        std::future::pending().await
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        Ok(Response::new(GetStatusResponse { status: Some(self.status.borrow().clone()) }))
    }

    async fn watch_status(&self, _: Request<WatchStatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        let reports = WatchStream::new(self.status.subscribe());
        Ok(Response::new(Box::pin(reports.map(|status| Ok(WatchStatusResponse { status: Some(status) })))))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Ok(Response::new(DrainResponse {}))
    }
}

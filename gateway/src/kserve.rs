//! KServe's Open Inference Protocol, version 2, over gRPC, with Triton's stream: requests become those of `lockstep.v1`,
//! and answers become tensors. What a model takes and gives is what Triton's vLLM backend does, so that its clients need
//! no change.

mod parameters;
mod request;
mod response;
mod signature;
mod tensors;

use std::{future::ready, pin::Pin, sync::Arc, time::Instant};

use futures_util::{FutureExt as _, Stream, StreamExt as _, stream, stream::BoxStream};
use http::HeaderMap;
use lockstep_proto::{
    client::deadline_of,
    error::Error,
    fields::{self, Names},
    inference::{
        ModelInferRequest, ModelInferResponse, ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest,
        ModelReadyResponse, ModelStreamInferResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
        ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
        grpc_inference_service_server::GrpcInferenceService,
    },
    server::Shutdown,
    trace::Trace,
};
use prost::Message as _;
use tokio::sync::oneshot;
use tonic::{Request, Response, Status, Streaming};

use self::{
    request::{Ask, versioned},
    response::{Responses, marked},
};
use crate::{
    pipeline::{Answering, Arrival, Pipeline},
    request::RequestError,
    status::Failure,
};

/// The service, as health and reflection name it.
pub const NAME: &str = "inference.GRPCInferenceService";

/// A call that asks about the process alone, by its path: a drain answers it.
pub const LIVENESS: &str = "/inference.GRPCInferenceService/ServerLive";

/// Calls that probes repeat every few seconds, by the beginnings of their paths.
pub const PROBES: [&str; 2] =
    ["/inference.GRPCInferenceService/ServerReady", "/inference.GRPCInferenceService/ModelReady"];

/// Most requests of one stream that are answered at a time. Further ones are not read before there is room.
const MAX_AT_A_TIME: usize = 32;

/// What the protocol calls the fields of `lockstep.v1`.
const NAMES: &Names = &[
    ("sampling.", ""),
    ("output.", ""),
    ("prompt.text", "inputs.text_input"),
    ("prompt", "inputs.text_input"),
    ("body", "parameters"),
];

/// `GRPCInferenceService`. Clones share the pipeline.
#[derive(Debug, Clone)]
pub struct KServe {
    pipeline: Arc<Pipeline>,
    shutdown: Shutdown,
}

/// What a call says beside its messages.
#[derive(Debug)]
struct Head {
    method: &'static str,
    headers: HeaderMap,
    trace: Trace,
    deadline: Option<Instant>,
}

type Responding = BoxStream<'static, Result<ModelInferResponse, Failure>>;
type Answers = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

// === impl KServe ===

impl KServe {
    /// The service over this pipeline, whose streams end when a shutdown begins.
    pub fn new(pipeline: Arc<Pipeline>, shutdown: Shutdown) -> Self {
        Self { pipeline, shutdown }
    }

    async fn begin(&self, head: &Head, n_bytes: usize, ask: Ask) -> Result<(Answering, Responses), Failure> {
        let left = head.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let call = self.pipeline.enter(Arrival {
            method: head.method,
            trace: head.trace.clone(),
            headers: &head.headers,
            n_bytes,
            timeout: [left, ask.timeout].into_iter().flatten().min(),
        })?;
        let n = ask.generate.sampling.as_ref().and_then(|sampling| sampling.n).unwrap_or(1);
        let answering = self.pipeline.generate(call, ask.generate).await?;
        Ok((answering, Responses::new(ask.id, ask.outputs, n)))
    }

    async fn infer(&self, head: &Head, request: ModelInferRequest) -> Result<ModelInferResponse, Failure> {
        let (n_bytes, ask) = (request.encoded_len(), Ask::read(request)?);
        if ask.stream {
            return Err(RequestError::invalid("inputs.stream", "ModelStreamInfer is the call for streams").into());
        }
        let (answering, responses) = self.begin(head, n_bytes, ask).await?;
        Ok(responses.whole(answering.collect().await?))
    }

    /// The responses to a request of a stream.
    async fn respond(&self, head: &Head, request: ModelInferRequest) -> Result<Responding, Failure> {
        let (n_bytes, ask) = (request.encoded_len(), Ask::read(request)?);
        let in_pieces = ask.stream;
        let (answering, mut responses) = self.begin(head, n_bytes, ask).await?;
        if in_pieces {
            let events = answering.events().await?;
            let piece = move |event: Result<_, _>| ready(event.map(|event| responses.piece(event)).transpose());
            return Ok(events.filter_map(piece).boxed());
        }
        let response = marked(responses.whole(answering.collect().await?), true);
        Ok(stream::once(ready(Ok(response))).boxed())
    }

    /// The responses to a request of a stream; one that fails is no end of the stream.
    fn answer(self, head: Arc<Head>, request: ModelInferRequest) -> BoxStream<'static, ModelStreamInferResponse> {
        let id = request.id.clone();
        let responding = async move { self.respond(&head, request).await };
        let responses = responding.map(|begun| match begun {
            Ok(responses) => responses,
            Err(failure) => stream::once(ready(Err(failure))).boxed(),
        });
        responses.flatten_stream().map(move |response| stream_response(response, &id)).boxed()
    }

    /// The requests of a stream, until its client ends it, it breaks off or a shutdown begins; and what there is to say
    /// after the last answer, if it was not the client that ended it.
    fn requests(
        &self,
        wire: Streaming<ModelInferRequest>,
    ) -> (impl Stream<Item = ModelInferRequest> + Send + use<>, oneshot::Receiver<Status>) {
        let (last_word, to_say) = oneshot::channel();
        let shutdown = self.shutdown.clone();
        let requests = stream::unfold((wire, last_word), move |(mut wire, last_word)| {
            let shutdown = shutdown.clone();
            async move {
                let ended = tokio::select! {
                    message = wire.message() => match message.transpose()? {
                        Ok(request) => return Some((request, (wire, last_word))),
                        Err(status) => status,
                    },
                    () = shutdown.started() => Failure::Draining.into(),
                };
                // Nobody listens if the client is gone.
                let _ = last_word.send(ended);
                None
            }
        });
        (requests, to_say)
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for KServe {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.pipeline.readiness.is_ready() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = versioned(name, &version).is_ok_and(|name| self.pipeline.models.ready(&name));
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _: Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: signature::PLATFORM.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: vec!["parameters".to_owned()],
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let (headers, trace) = (request.metadata().as_ref(), Trace::of(&request));
        let ModelMetadataRequest { name, version } = request.get_ref();
        let name = versioned(name.clone(), version)?;
        let model = self.pipeline.model(&name, headers, &trace).await?;
        Ok(Response::new(signature::metadata(model.name)))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
        let head = Head::of("ModelInfer", &request);
        let response = self.infer(&head, request.into_inner()).await;
        Ok(Response::new(response.map_err(|failure| error(&failure))?))
    }

    type ModelStreamInferStream = Answers;

    async fn model_stream_infer(
        &self,
        request: Request<Streaming<ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        let (front, head) = (self.clone(), Arc::new(Head::of("ModelStreamInfer", &request)));
        let (requests, to_say) = self.requests(request.into_inner());
        let answers = requests
            .map(move |request| front.clone().answer(Arc::clone(&head), request))
            .flatten_unordered(MAX_AT_A_TIME)
            .map(Ok);
        let last_word = stream::once(to_say).filter_map(|said| ready(said.ok().map(Err)));
        Ok(Response::new(Box::pin(answers.chain(last_word))))
    }
}

fn stream_response(response: Result<ModelInferResponse, Failure>, id: &str) -> ModelStreamInferResponse {
    match response {
        Ok(response) => ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) },
        Err(failure) => {
            let named = ModelInferResponse { id: id.to_owned(), ..ModelInferResponse::default() };
            let error_message = error(&failure).message().to_owned();
            ModelStreamInferResponse { error_message, infer_response: Some(marked(named, true)) }
        }
    }
}

/// A failure in the protocol's names.
fn error(failure: &Failure) -> Error {
    fields::rename(&failure.to_error(), |path| fields::name(NAMES, path))
}

// === impl Head ===

impl Head {
    fn of<T>(method: &'static str, request: &Request<T>) -> Self {
        Self {
            method,
            headers: request.metadata().as_ref().clone(),
            trace: Trace::of(request),
            deadline: deadline_of(request),
        }
    }
}

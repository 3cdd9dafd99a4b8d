//! KServe's protocol: its streams, and how they end.

use futures_util::StreamExt as _;
use lockstep_gateway::admission::ApiKey;
use lockstep_proto::{
    error::{Error, Reason},
    inference::{
        InferParameter, InferTensorContents, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest,
        ModelStreamInferResponse, ServerLiveRequest, ServerReadyRequest, infer_parameter::ParameterChoice,
        model_infer_request::InferInputTensor,
    },
    worker::v1::FinishReason as WorkerReason,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use super::cluster::{Cluster, Setup, in_time};

fn request(id: &str, text: &str, stream: bool) -> ModelInferRequest {
    let input = |name: &str, datatype: &str, contents| InferInputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: vec![1],
        contents: Some(contents),
        ..InferInputTensor::default()
    };
    let text = InferTensorContents { bytes_contents: vec![text.into()], ..InferTensorContents::default() };
    let stream = InferTensorContents { bool_contents: vec![stream], ..InferTensorContents::default() };
    ModelInferRequest {
        id: id.into(),
        inputs: vec![input("text_input", "BYTES", text), input("stream", "BOOL", stream)],
        ..ModelInferRequest::default()
    }
}

/// A stream of a client that sends what it is told to.
struct Client {
    requests: mpsc::Sender<ModelInferRequest>,
    responses: Streaming<ModelStreamInferResponse>,
}

impl Client {
    async fn open(cluster: &Cluster) -> Self {
        let (requests, stream) = mpsc::channel(64);
        let responses = cluster.kserve().model_stream_infer(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Self { requests, responses }
    }

    async fn send(&self, request: ModelInferRequest) {
        self.requests.send(request).await.unwrap();
    }

    async fn next(&mut self) -> Option<Result<ModelStreamInferResponse, Status>> {
        in_time(self.responses.next()).await
    }

    /// The next response: id, text of its only choice, and whether it is the last to its request.
    async fn text(&mut self) -> (String, String, bool) {
        let ModelStreamInferResponse { error_message, infer_response } = self.next().await.unwrap().unwrap();
        assert_eq!(error_message, "");
        let response = infer_response.unwrap();
        let last =
            response.parameters["triton_final_response"].parameter_choice == Some(ParameterChoice::BoolParam(true));
        let text = String::from_utf8(response.raw_output_contents[0][4..].to_vec()).unwrap();
        (response.id, text, last)
    }
}

#[tokio::test]
async fn answers_of_one_stream_interleave_and_a_failure_is_only_its_own() {
    let mut cluster = Cluster::start().await;
    let mut client = Client::open(&cluster).await;
    client.send(request("a", "x", true)).await;
    let mut first = cluster.session().await;
    client.send(request("b", "y", false)).await;
    let mut second = cluster.session().await;
    first.text(0, "one").await;
    assert_eq!(client.text().await, ("a".into(), "one".into(), false));
    second.text(0, "whole").await;
    second.finish(0, WorkerReason::Length, None).await;
    assert_eq!(client.text().await, ("b".into(), "ywhole".into(), true));

    client.send(ModelInferRequest { model_version: "2".into(), ..request("c", "z", true) }).await;
    let failed = client.next().await.unwrap().unwrap();
    assert_eq!(failed.error_message, "no model `version 2` is served");
    assert_eq!(failed.infer_response.unwrap().id, "c");

    first.fail(Status::internal("broken")).await;
    let cut = client.next().await.unwrap().unwrap();
    assert!(cut.error_message.contains("broken"), "{}", cut.error_message);
    assert_eq!(cut.infer_response.unwrap().id, "a");
    drop(client.requests);
    assert!(in_time(client.responses.next()).await.is_none(), "it ends well");
}

#[tokio::test]
async fn a_stream_has_a_bounded_number_of_requests_under_way() {
    let mut cluster = Cluster::start().await;
    let client = Client::open(&cluster).await;
    for n in 0..40 {
        client.send(request(&n.to_string(), "x", true)).await;
    }
    let mut sessions = Vec::new();
    for _ in 0..32 {
        sessions.push(cluster.session().await);
    }
    assert!(cluster.metrics().await.contains("lockstep_gateway_requests_in_flight 32"), "no more were let in");
    sessions[7].text(0, "a").await;
    sessions[7].finish(0, WorkerReason::Length, None).await;
    drop(cluster.session().await);
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_requests() {
    let mut cluster = Cluster::start().await;
    let client = Client::open(&cluster).await;
    client.send(request("a", "x", true)).await;
    let mut session = cluster.session().await;
    session.text(0, "one").await;
    drop(client);
    in_time(session.dropped()).await;
}

#[tokio::test]
async fn a_drain_ends_streams_when_what_runs_has_ended() {
    let mut cluster = Cluster::start().await;
    let mut client = Client::open(&cluster).await;
    let mut idle = Client::open(&cluster).await;
    client.send(request("a", "x", true)).await;
    let mut session = cluster.session().await;
    session.text(0, "one").await;
    assert_eq!(client.text().await.1, "one");
    cluster.shutdown.start();
    let word = idle.next().await.unwrap().unwrap_err();
    assert_eq!(Error::from_status(&word).reason(), Reason::Draining);
    session.text(0, "two").await;
    session.finish(0, WorkerReason::Length, None).await;
    assert_eq!(client.text().await.1, "two");
    assert!(client.text().await.2);
    let word = client.next().await.unwrap().unwrap_err();
    assert_eq!(Error::from_status(&word).reason(), Reason::Draining);
}

#[tokio::test]
async fn probes_need_no_key_and_requests_do() {
    let settings = |settings: &mut lockstep_gateway::config::GatewaySettings| {
        settings.api_keys = vec![ApiKey::new("sesame").unwrap()];
    };
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    let mut client = cluster.kserve();
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    assert!(client.model_ready(ModelReadyRequest::default()).await.unwrap().into_inner().ready);
    let refused = client.model_infer(request("a", "x", false)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let refused = client.model_metadata(ModelMetadataRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let mut known = Request::new(ModelMetadataRequest::default());
    known.metadata_mut().insert("authorization", "Bearer sesame".parse().unwrap());
    assert_eq!(client.model_metadata(known).await.unwrap().into_inner().name, "m");
}

#[tokio::test]
async fn readiness_follows_the_groups() {
    let groups = |_: usize, worker: &super::fake_worker::FakeWorker| {
        worker.status.send_modify(|status| status.ready = false);
    };
    let cluster = Cluster::with_unready(Setup { groups, ..Setup::default() }).await;
    let mut client = cluster.kserve();
    assert!(!client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    assert!(!client.model_ready(ModelReadyRequest::default()).await.unwrap().into_inner().ready);
    cluster.groups[0].worker.status.send_modify(|status| status.ready = true);
    cluster.wait_for_health(true).await;
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    assert!(client.model_ready(ModelReadyRequest::default()).await.unwrap().into_inner().ready);
}

#[tokio::test]
async fn errors_have_the_names_of_the_protocol() {
    let cluster = Cluster::start().await;
    let parameter = |value| InferParameter { parameter_choice: Some(ParameterChoice::DoubleParam(value)) };
    let parameters = [("top_p".to_owned(), parameter(2.0)), ("temperature".to_owned(), parameter(-1.0))].into();
    let refused = cluster.kserve().model_infer(ModelInferRequest { parameters, ..request("a", "x", false) }).await;
    let error = Error::from_status(&refused.unwrap_err());
    assert_eq!(error.reason(), Reason::InvalidArgument);
    let mut paths: Vec<_> = error.field_violations().iter().map(|violation| violation.path.as_str()).collect();
    paths.sort_unstable();
    assert_eq!(paths, ["temperature", "top_p"]);
}

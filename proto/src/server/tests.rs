use std::{
    future::pending,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, transport::Channel};

use super::*;
use crate::{
    client::{connect_lazy, health},
    error::{Error, Reason},
    telemetry,
    trace::{REQUEST_ID, Trace},
    worker::v1::{
        self as pb,
        worker_service_client::WorkerServiceClient,
        worker_service_server::{WorkerService, WorkerServiceServer},
    },
};

const NAME: &str = "lockstep.worker.v1.WorkerService";

/// Far longer than anything here takes: a test that would hang fails instead.
const HANG: Duration = Duration::from_secs(20);

/// A worker whose generations go on until the test releases them.
#[derive(Debug, Default)]
struct Fake {
    release: watch::Sender<bool>,
    running: AtomicUsize,
    most_running: AtomicUsize,
    dropped: AtomicBool,
}

type Events = ReceiverStream<Result<pb::GenerateResponse, Status>>;

#[tonic::async_trait]
impl WorkerService for Arc<Fake> {
    type GenerateStream = Events;
    type WatchStatusStream = tokio_stream::Pending<Result<pb::WatchStatusResponse, Status>>;

    async fn generate(&self, request: Request<pb::GenerateRequest>) -> Result<Response<Events>, Status> {
        let request_id = Trace::of(&request).request_id().to_owned();
        let (events, stream) = mpsc::channel(1);
        let fake = Arc::clone(self);
        tokio::spawn(async move {
            let running = fake.running.fetch_add(1, Ordering::SeqCst) + 1;
            fake.most_running.fetch_max(running, Ordering::SeqCst);
            let _ = events.send(Ok(tokens(request_id.len()))).await;
            let mut release = fake.release.subscribe();
            tokio::select! {
                _ = release.wait_for(|go| *go) => {}
                () = events.closed() => fake.dropped.store(true, Ordering::SeqCst),
            }
            fake.running.fetch_sub(1, Ordering::SeqCst);
            let _ = events.send(Ok(tokens(0))).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn embed(&self, _: Request<pb::EmbedRequest>) -> Result<Response<pb::EmbedResponse>, Status> {
        pending().await
    }

    async fn end_choice(&self, _: Request<pb::EndChoiceRequest>) -> Result<Response<pb::EndChoiceResponse>, Status> {
        Ok(Response::new(pb::EndChoiceResponse {}))
    }

    /// The request id as the model's name.
    async fn get_status(
        &self,
        request: Request<pb::GetStatusRequest>,
    ) -> Result<Response<pb::GetStatusResponse>, Status> {
        let model = Trace::of(&request).request_id().to_owned();
        assert!(request.remote_addr().is_some());
        Ok(Response::new(pb::GetStatusResponse { status: Some(pb::Status { model, ..pb::Status::default() }) }))
    }

    async fn watch_status(
        &self,
        _: Request<pb::WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        Ok(Response::new(tokio_stream::pending()))
    }

    async fn drain(&self, _: Request<pb::DrainRequest>) -> Result<Response<pb::DrainResponse>, Status> {
        pending().await
    }
}

fn tokens(count: usize) -> pb::GenerateResponse {
    let tokens = pb::Tokens { token_ids: vec![7; count], ..pb::Tokens::default() };
    pb::GenerateResponse { event: Some(pb::generate_response::Event::Tokens(tokens)) }
}

/// A server on free ports with a fake worker behind it.
struct Running {
    fake: Arc<Fake>,
    readiness: Readiness,
    shutdown: Shutdown,
    grpc: SocketAddr,
    metrics: SocketAddr,
    served: JoinHandle<Result<(), ServerError>>,
}

impl Running {
    fn start(limits: Limits) -> Self {
        Self::start_with(limits, None)
    }

    fn start_with(limits: Limits, tls: Option<Tls>) -> Self {
        let free: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let max_message_bytes = limits.max_message_bytes();
        let settings = ServerSettings { service: "worker", listen: free, metrics_listen: Some(free), limits };
        let server = Server::bind(settings, Arc::new(telemetry::registry("worker"))).unwrap();
        let server =
            server.tls(tls).health_names(&[NAME]).background(&["/lockstep.worker.v1.WorkerService/WatchStatus"]);
        let (grpc, metrics) = (server.grpc_address(), server.metrics_address().unwrap());
        let (fake, readiness, shutdown) = (Arc::new(Fake::default()), Readiness::new(), Shutdown::new());
        let service = WorkerServiceServer::new(Arc::clone(&fake)).max_decoding_message_size(max_message_bytes);
        let served = tokio::spawn({
            let (readiness, shutdown) = (readiness.clone(), shutdown.clone());
            async move { server.serve(Routes::new(service), &readiness, &shutdown).await }
        });
        Self { fake, readiness, shutdown, grpc, metrics, served }
    }

    fn channel(&self) -> Channel {
        connect_lazy(&self.grpc.to_string(), &ClientLimits::default()).unwrap()
    }

    fn client(&self) -> WorkerServiceClient<Channel> {
        WorkerServiceClient::new(self.channel())
    }

    async fn check_health(&self, name: &str) -> Result<i32, Error> {
        let request = health::HealthCheckRequest { service: name.into() };
        let answer = health::health_client::HealthClient::new(self.channel()).check(request).await;
        answer.map(|answer| answer.into_inner().status).map_err(|status| Error::from_status(&status))
    }

    async fn ended(self) {
        timeout(HANG, self.served).await.expect("the server ends").unwrap().unwrap();
    }
}

/// Sends bytes to a port and reads until the peer closes.
async fn converse(address: SocketAddr, send: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(send.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = timeout(HANG, stream.read_to_end(&mut answer)).await.expect("the server closes the connection");
    String::from_utf8_lossy(&answer).into_owned()
}

fn serving(status: health::health_check_response::ServingStatus) -> i32 {
    status.into()
}

#[tokio::test]
async fn health_tells_the_process_from_its_services() {
    use health::health_check_response::ServingStatus::{NotServing, Serving};
    let server = Running::start(Limits::default());
    assert_eq!(server.check_health("").await, Ok(serving(Serving)));
    assert_eq!(server.check_health(NAME).await, Ok(serving(NotServing)));
    server.readiness.set_ready(true);
    assert_eq!(server.check_health(NAME).await, Ok(serving(Serving)));
    assert_eq!(server.check_health("other").await.unwrap_err().reason(), Reason::NotFound);
}

#[tokio::test]
async fn health_watch_follows_readiness_and_shutdown() {
    use health::health_check_response::ServingStatus::{NotServing, ServiceUnknown, Serving};
    let server = Running::start(Limits::default());
    let mut client = health::health_client::HealthClient::new(server.channel());
    let mut watch = async |name: &str| {
        client.watch(health::HealthCheckRequest { service: name.into() }).await.unwrap().into_inner()
    };
    let next = async |stream: &mut tonic::Streaming<health::HealthCheckResponse>| {
        timeout(HANG, stream.next()).await.unwrap().unwrap().unwrap().status
    };
    let (mut named, mut unknown) = (watch(NAME).await, watch("other").await);
    assert_eq!(next(&mut unknown).await, serving(ServiceUnknown));
    assert_eq!(next(&mut named).await, serving(NotServing));
    server.readiness.set_ready(true);
    assert_eq!(next(&mut named).await, serving(Serving));
    // A call that runs keeps the drain from ending, and so the watch from being closed.
    let mut running = server.client().generate(pb::GenerateRequest::default()).await.unwrap().into_inner();
    running.next().await.unwrap().unwrap();
    server.shutdown.start();
    assert_eq!(next(&mut named).await, serving(NotServing));
}

#[tokio::test]
async fn reflection_lists_what_is_served_here_in_both_versions() {
    use tonic_reflection::pb::{v1, v1alpha};
    let server = Running::start(Limits::default());
    let request = v1::ServerReflectionRequest {
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(server.channel());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let text = format!("{:?}", answers.next().await.unwrap().unwrap());
    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let alpha = format!("{:?}", answers.next().await.unwrap().unwrap());
    for name in [NAME, "grpc.health.v1.Health"] {
        assert!(text.contains(name) && alpha.contains(name), "{name}: {text}");
    }
    assert!(text.contains("grpc.reflection.v1.ServerReflection") && alpha.contains("v1alpha.ServerReflection"));
    let elsewhere = "lockstep.v1.InferenceService";
    assert!(!text.contains(elsewhere) && !alpha.contains(elsewhere), "{elsewhere} is not served here: {text}");
}

#[tokio::test]
async fn message_over_the_limit_is_refused_and_the_connection_goes_on() {
    let server = Running::start(Limits { max_message_bytes: 1000, ..Limits::default() });
    let mut client = server.client();
    let request = pb::GenerateRequest { prompt_token_ids: vec![1; 2000], ..Default::default() };
    let refusal = client.generate(request).await.unwrap_err();
    check_refusal(&refusal, Reason::MessageTooLarge, "the limit is: 1000 bytes");
    client.get_status(pb::GetStatusRequest {}).await.unwrap();
}

#[tokio::test]
async fn what_never_reaches_a_service_is_refused_in_the_words_of_the_table() {
    let server = Running::start(Limits::default());
    let call = async |method: &str| {
        // Field 1 of this message is of type bytes, for which the service expects a string.
        let not_text = vec![0xff_u8, 0xfe];
        let path = format!("/{NAME}/{method}").parse().unwrap();
        let mut client = tonic::client::Grpc::new(server.channel());
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<Vec<u8>, pb::GenerateResponse>::default();
        client.server_streaming(Request::new(not_text), path, codec).await.unwrap_err()
    };
    check_refusal(&call("Generate").await, Reason::InvalidArgument, "GenerateRequest.request_id: invalid string value");
    check_refusal(&call("Other").await, Reason::Unimplemented, "no such method");
}

/// That a refusal carries its reason, not only a code from which one can be guessed.
fn check_refusal(status: &Status, reason: Reason, message: &str) {
    assert!(!status.details().is_empty(), "{status:?}");
    assert_eq!(Error::from_status(status).reason(), reason);
    assert!(status.message().contains(message), "{status:?}");
}

#[tokio::test]
async fn calls_over_the_stream_limit_wait_their_turn() {
    let server = Running::start(Limits { max_concurrent_streams: 2, ..Limits::default() });
    let channel = server.channel();
    // A client knows the limit once the server's settings have come; calls before that would be refused, not held back.
    WorkerServiceClient::new(channel.clone()).get_status(pb::GetStatusRequest {}).await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let mut client = WorkerServiceClient::new(channel.clone());
        calls.spawn(async move {
            let stream = client.generate(pb::GenerateRequest::default()).await.unwrap().into_inner();
            stream.collect::<Vec<_>>().await.len()
        });
    }
    let fake = Arc::clone(&server.fake);
    timeout(HANG, async {
        while fake.running.load(Ordering::SeqCst) < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    fake.release.send_replace(true);
    for events in timeout(HANG, calls.join_all()).await.unwrap() {
        assert_eq!(events, 2);
    }
    assert_eq!(fake.most_running.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn connection_over_the_limit_is_closed_at_once() {
    let server = Running::start(Limits { max_connections: 1, ..Limits::default() });
    let mut first = server.client();
    first.get_status(pb::GetStatusRequest {}).await.unwrap();
    assert_eq!(converse(server.grpc, "").await, "");
    first.get_status(pb::GetStatusRequest {}).await.unwrap();
}

#[tokio::test]
async fn silent_and_half_spoken_connections_are_cut() {
    let limits = Limits { handshake_timeout_ms: 30, header_read_timeout_ms: 30, ..Limits::default() };
    let server = Running::start(limits);
    let half_head = "GET /metrics HTTP/1.1\r\nHost: a-host-with-a-long-name.example\r\nX-Half";
    for address in [server.grpc, server.metrics] {
        for beginning in ["", "PRI * HTTP/2.0\r\n", half_head] {
            let answer = converse(address, beginning).await;
            assert!(!answer.contains("200 OK"), "{beginning:?}: {answer}");
        }
    }
}

#[tokio::test]
async fn who_speaks_no_tls_is_cut_and_who_does_is_served() {
    let issued = tls::tests::Issued::new();
    let limits = Limits { handshake_timeout_ms: 500, ..Limits::default() };
    let server = Running::start_with(limits, Tls::read(&issued.settings).unwrap());
    assert_eq!(converse(server.grpc, "").await, "");
    let answer = converse(server.grpc, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(!answer.contains("HTTP"), "{answer}");

    let trusted = tonic::transport::Certificate::from_pem(&issued.certificate_pem);
    let config = tonic::transport::ClientTlsConfig::new().ca_certificate(trusted);
    let endpoint = Channel::from_shared(format!("https://localhost:{}", server.grpc.port())).unwrap();
    let channel = endpoint.tls_config(config).unwrap().connect().await.unwrap();
    let mut stream = WorkerServiceClient::new(channel).generate(pb::GenerateRequest::default()).await.unwrap();
    assert!(stream.get_mut().message().await.unwrap().is_some());
    let metrics = converse(server.metrics, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
}

#[tokio::test]
async fn idle_connection_is_closed() {
    let hour = 3_600_000;
    let limits =
        Limits { idle_timeout_ms: 30, handshake_timeout_ms: hour, header_read_timeout_ms: hour, ..Limits::default() };
    let server = Running::start(limits);
    converse(server.metrics, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
}

#[tokio::test]
async fn running_call_keeps_its_connection_from_being_idle() {
    let server = Running::start(Limits { idle_timeout_ms: 1, ..Limits::default() });
    let mut stream = server.client().generate(pb::GenerateRequest::default()).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    // A second connection, which is idle, closes by the same limit.
    converse(server.metrics, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    server.fake.release.send_replace(true);
    assert!(stream.next().await.unwrap().is_ok());
}

#[tokio::test]
async fn metrics_are_on_their_own_port_and_nothing_else_is() {
    let server = Running::start(Limits::default());
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let answer = converse(server.metrics, &get("/metrics")).await;
    assert!(answer.contains("lockstep_build_info{service=\"worker\""), "{answer}");
    assert!(answer.contains(telemetry::METRICS_CONTENT_TYPE), "{answer}");
    assert!(converse(server.metrics, &get("/")).await.starts_with("HTTP/1.1 404"));
    let post = "POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    assert!(converse(server.metrics, post).await.starts_with("HTTP/1.1 405"));
}

#[tokio::test]
async fn taken_port_is_an_error_that_names_it() {
    let server = Running::start(Limits::default());
    let settings =
        ServerSettings { service: "x", listen: server.grpc, metrics_listen: None, limits: Limits::default() };
    let text = Server::bind(settings, Arc::new(telemetry::registry("x"))).unwrap_err().to_string();
    assert!(text.contains(&format!("cannot listen on {}", server.grpc)), "{text}");
}

#[tokio::test]
async fn request_id_of_the_client_reaches_the_service() {
    let server = Running::start(Limits::default());
    let mut request = Request::new(pb::GetStatusRequest {});
    request.metadata_mut().insert(REQUEST_ID, "order-66".parse().unwrap());
    let answer = server.client().get_status(request).await.unwrap().into_inner();
    assert_eq!(answer.status.unwrap().model, "order-66");
}

#[tokio::test]
async fn client_that_goes_away_drops_its_stream() {
    let server = Running::start(Limits::default());
    let mut stream = server.client().generate(pb::GenerateRequest::default()).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    timeout(HANG, async {
        while !server.fake.dropped.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the service sees the stream dropped");
}

#[tokio::test]
async fn drain_lets_running_calls_end_and_refuses_new_ones() {
    let server = Running::start(Limits::default());
    let mut client = server.client();
    let mut background = client.watch_status(pb::WatchStatusRequest {}).await.unwrap().into_inner();
    let mut stream = client.generate(pb::GenerateRequest::default()).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    server.shutdown.start();
    let refusal = Error::from_status(&client.get_status(pb::GetStatusRequest {}).await.unwrap_err());
    assert_eq!(refusal.reason(), Reason::Draining);
    assert_eq!(refusal.retry_delay(), Some(Duration::from_secs(1)));
    // Another connection may still ask, and is told.
    assert_eq!(server.check_health("").await, Ok(1));
    server.fake.release.send_replace(true);
    assert!(stream.next().await.unwrap().is_ok());
    assert!(stream.next().await.is_none());
    server.ended().await;
    assert!(matches!(background.next().await, None | Some(Err(_))), "the background call is closed");
}

#[tokio::test]
async fn drain_waits_for_work_that_is_no_call() {
    let free: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let settings = ServerSettings { service: "worker", listen: free, metrics_listen: None, limits: Limits::default() };
    let server = Server::bind(settings, Arc::new(telemetry::registry("worker"))).unwrap();
    let (work, shutdown, readiness) = (server.work(), Shutdown::new(), Readiness::new());
    let (routes, switch) = (Routes::default(), shutdown.clone());
    let mut served = tokio::spawn(async move { server.serve(routes, &readiness, &switch).await });
    shutdown.start();
    // The end, if it came, would take the time in which connections close.
    assert!(timeout(2 * CLOSE_GRACE, &mut served).await.is_err(), "the drain did not wait");
    drop(work);
    timeout(HANG, served).await.expect("the server ends").unwrap().unwrap();
}

#[tokio::test]
async fn drain_cuts_what_outlives_its_limit() {
    let server = Running::start(Limits { drain_timeout_ms: 0, ..Limits::default() });
    check_cut(server, Shutdown::start).await;
}

#[tokio::test]
async fn forced_shutdown_does_not_wait() {
    let server = Running::start(Limits { drain_timeout_ms: u64::from(u32::MAX), ..Limits::default() });
    check_cut(server, Shutdown::force).await;
}

/// A stream that would never end is cut, and its client told why.
async fn check_cut(server: Running, end: impl FnOnce(&Shutdown)) {
    let mut stream = server.client().generate(pb::GenerateRequest::default()).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    end(&server.shutdown);
    server.ended().await;
    let cut = timeout(HANG, stream.next()).await.unwrap().unwrap().unwrap_err();
    check_refusal(&cut, Reason::Draining, "shut down before the call had ended");
}

#[tokio::test]
async fn limits_of_zero_are_refused_by_name() {
    let text = Limits { idle_timeout_ms: 0, ..Limits::default() }.validate().unwrap_err().to_string();
    assert!(text.contains("limits.idle_timeout_ms"), "{text}");
    assert!(Limits { drain_timeout_ms: 0, ..Limits::default() }.validate().is_ok());
}

//! A cluster in one process: a real gateway, fakes behind it, sockets between them.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use lockstep_gateway::{
    app::{App, Plan},
    config::GatewaySettings,
    sampling::Policy,
};
use lockstep_proto::{
    client::{ClientLimits, connect_lazy, health},
    inference::grpc_inference_service_client::GrpcInferenceServiceClient,
    server::{Limits, Readiness, Server, ServerSettings, Shutdown},
    telemetry,
    tokenizer::v1::tokenizer_service_server::TokenizerServiceServer,
    v1::{inference_service_client::InferenceServiceClient, model_service_client::ModelServiceClient},
    worker::v1::worker_service_server::WorkerServiceServer,
};
use tokio::{sync::mpsc, task::AbortHandle};
use tokio_util::task::AbortOnDropHandle;
use tonic::{service::Routes, transport::Channel};

use super::{
    fake_tokenizer::FakeTokenizer,
    fake_worker::{Embedding, FakeWorker, Session},
};

/// Far longer than anything here takes: a test that would hang fails instead.
const HANG: Duration = Duration::from_secs(20);

/// What a cluster is made of.
pub(crate) struct Setup {
    pub(crate) n_groups: usize,
    pub(crate) n_tokenizers: usize,
    pub(crate) policy: &'static str,
    pub(crate) settings: fn(&mut GatewaySettings),
    /// Status of the groups, as they start.
    pub(crate) groups: fn(usize, &FakeWorker),
    /// The same of the tokenizers.
    pub(crate) tokenizers: fn(&FakeTokenizer),
}

impl Default for Setup {
    fn default() -> Self {
        Self { n_groups: 1, n_tokenizers: 1, policy: "", settings: |_| {}, groups: |_, _| {}, tokenizers: |_| {} }
    }
}

pub(crate) struct Group {
    pub(crate) worker: FakeWorker,
    sessions: mpsc::Receiver<Session>,
    to_embed: mpsc::Receiver<Embedding>,
    server: AbortHandle,
}

pub(crate) struct Cluster {
    pub(crate) groups: Vec<Group>,
    pub(crate) tokenizers: Vec<FakeTokenizer>,
    pub(crate) http_address: SocketAddr,
    pub(crate) metrics_address: SocketAddr,
    pub(crate) shutdown: Shutdown,
    channel: Channel,
    _servers: Vec<AbortOnDropHandle<()>>,
}

impl Group {
    /// The next request that this group gets.
    pub(crate) async fn session(&mut self) -> Session {
        in_time(self.sessions.recv()).await.expect("the worker lives")
    }

    /// The next prompt that this group is to embed.
    pub(crate) async fn embedding(&mut self) -> Embedding {
        in_time(self.to_embed.recv()).await.expect("the worker lives")
    }

    /// Kills the leader: its connections break without a word.
    pub(crate) fn kill(&self) {
        self.server.abort();
    }
}

impl Cluster {
    /// A cluster of one group and one tokenizer, which is ready.
    pub(crate) async fn start() -> Self {
        Self::with(Setup::default()).await
    }

    /// A cluster that is ready.
    pub(crate) async fn with(setup: Setup) -> Self {
        let cluster = Self::with_unready(setup).await;
        cluster.wait_for_health(true).await;
        cluster
    }

    pub(crate) async fn with_unready(setup: Setup) -> Self {
        let mut servers = Vec::new();
        let (mut groups, mut group_addresses) = (Vec::new(), Vec::new());
        for n_th in 0..setup.n_groups {
            let (worker, sessions, to_embed) = FakeWorker::new();
            (setup.groups)(n_th, &worker);
            let (address, server) = serve(Routes::new(WorkerServiceServer::new(worker.clone())));
            group_addresses.push(address.to_string());
            groups.push(Group { worker, sessions, to_embed, server: server.abort_handle() });
            servers.push(server);
        }
        let (mut tokenizers, mut tokenizer_addresses) = (Vec::new(), Vec::new());
        for _ in 0..setup.n_tokenizers {
            let tokenizer = FakeTokenizer::default();
            (setup.tokenizers)(&tokenizer);
            let max_bytes = Limits::default().max_message_bytes();
            let service = TokenizerServiceServer::new(tokenizer.clone()).max_decoding_message_size(max_bytes);
            let (address, server) = serve(Routes::new(service));
            tokenizer_addresses.push(address.to_string());
            tokenizers.push(tokenizer);
            servers.push(server);
        }
        let mut settings = GatewaySettings {
            listen: localhost(),
            http_listen: localhost(),
            metrics_listen: Some(localhost()),
            groups: group_addresses,
            tokenizers: tokenizer_addresses,
            ..GatewaySettings::default()
        };
        (setup.settings)(&mut settings);
        let keys = settings.api_keys.clone();
        let app = App::bind(Plan { settings, keys, policy: Policy::parse(setup.policy).unwrap(), tls: None }).unwrap();
        let (address, http_address) = (app.server().grpc_address(), app.server().http_address().unwrap());
        let metrics_address = app.server().metrics_address().unwrap();
        let shutdown = Shutdown::new();
        let stop = shutdown.clone();
        servers.push(AbortOnDropHandle::new(tokio::spawn(async move { app.serve(&stop).await.unwrap() })));
        let channel = connect_lazy(&address.to_string(), &ClientLimits::default()).unwrap();
        Self { groups, tokenizers, http_address, metrics_address, shutdown, channel, _servers: servers }
    }

    pub(crate) fn client(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::new(self.channel.clone())
    }

    pub(crate) fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone())
    }

    pub(crate) fn kserve(&self) -> GrpcInferenceServiceClient<Channel> {
        GrpcInferenceServiceClient::new(self.channel.clone())
    }

    /// The next request that the only group gets.
    pub(crate) async fn session(&mut self) -> Session {
        self.groups[0].session().await
    }

    /// Waits until the gateway says that it is ready, or that it is not.
    pub(crate) async fn wait_for_health(&self, ready: bool) {
        use health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
        let request = HealthCheckRequest { service: "lockstep.v1.InferenceService".into() };
        let wanted = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        let mut states = HealthClient::new(self.channel.clone()).watch(request).await.unwrap().into_inner();
        in_time(async {
            while let Some(state) = states.message().await.unwrap() {
                if state.status() == wanted {
                    return;
                }
            }
            panic!("health stopped");
        })
        .await;
    }

    /// What `/metrics` says.
    pub(crate) async fn metrics(&self) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(self.metrics_address).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        in_time(stream.read_to_string(&mut text)).await.unwrap();
        text
    }
}

/// The outcome of something that must not take long.
pub(crate) async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(HANG, work).await.expect("it hangs")
}

fn localhost() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn serve(routes: Routes) -> (SocketAddr, AbortOnDropHandle<()>) {
    let settings =
        ServerSettings { service: "fake", listen: localhost(), metrics_listen: None, limits: Limits::default() };
    let server = Server::bind(settings, Arc::new(telemetry::registry("fake"))).unwrap();
    let address = server.grpc_address();
    let serving = async move { server.serve(routes, &Readiness::new(), &Shutdown::new()).await.unwrap() };
    (address, AbortOnDropHandle::new(tokio::spawn(serving)))
}

//! The app: a whole gateway, from its settings to a server that is bound.

use std::sync::Arc;

use axum::{Router, extract::Request, response::Response};
use http::StatusCode;
use lockstep_proto::{
    client::AddressError,
    config::Settings as _,
    error::Error,
    inference::grpc_inference_service_server::GrpcInferenceServiceServer,
    server::{HttpFront, Readiness, Server, ServerError, ServerSettings, Shutdown, tls::Tls},
    telemetry,
    v1::{inference_service_server::InferenceServiceServer, model_service_server::ModelServiceServer},
};
use tonic::{body::Body, service::Routes};

use crate::{
    admission::{Admission, ApiKey},
    backends::Backends,
    config::GatewaySettings,
    http::Front,
    kserve::{self, KServe},
    metrics::Metrics,
    models::Models,
    openai,
    openapi::{self, Api},
    page,
    pipeline::Pipeline,
    sampling::Policy,
    service::Services,
    status::Failure,
    tgi,
};

/// The services that health reports by name.
const NAMES: [&str; 3] = ["lockstep.v1.InferenceService", "lockstep.v1.ModelService", kserve::NAME];

/// Paths that carry no client's work.
const BACKGROUND: &[&str] = &[openapi::PATH, page::CLUSTER];

/// What a gateway is made from: its settings, and what the files say that these name.
#[derive(Debug)]
pub struct Plan {
    /// The settings, which are valid.
    pub settings: GatewaySettings,
    /// Keys that callers may show; none: everyone may call.
    pub keys: Vec<ApiKey>,
    /// What the operator allows.
    pub policy: Policy,
    /// What the ports speak, if they are not to be open to all who listen.
    pub tls: Option<Tls>,
}

/// A gateway that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The address of a tokenizer or a group is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Its own address cannot be used, or its services cannot be described.
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// A gateway whose ports are bound.
#[derive(Debug)]
pub struct App {
    server: Server,
    routes: Routes,
    pipeline: Arc<Pipeline>,
    /// Names of the models to serve.
    models: Vec<String>,
    /// Largest message that is read.
    max_bytes: usize,
}

// === impl App ===

impl App {
    /// Puts a gateway together. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Names the address that cannot be used.
    pub fn bind(plan: Plan) -> Result<Self, AppError> {
        let Plan { settings, keys, policy, tls } = plan;
        let backends = Arc::new(Backends::new(&settings)?);
        let mut registry = telemetry::registry(GatewaySettings::SERVICE);
        let metrics = Metrics::register(&mut registry, Arc::clone(&backends.groups));
        let pipeline = Arc::new(Pipeline {
            admission: Admission::new(keys, settings.requests.admission()),
            models: Models::new(Arc::clone(&backends), settings.models.clone()),
            backends,
            policy,
            metrics,
            readiness: Readiness::new(),
            max_duration: settings.requests.max_duration(),
        });
        let services = Services::new(Arc::clone(&pipeline));
        let max_bytes = settings.limits.max_message_bytes();
        let inference = InferenceServiceServer::new(services.clone()).max_decoding_message_size(max_bytes);
        let models = ModelServiceServer::new(services).max_decoding_message_size(max_bytes);
        let GatewaySettings { listen, http_listen, metrics_listen, limits, models: names, .. } = settings;
        let server = ServerSettings { service: GatewaySettings::SERVICE, listen, metrics_listen, limits };
        let http = HttpFront {
            listen: http_listen,
            routes: http_routes(Front { pipeline: Arc::clone(&pipeline), max_bytes }).into(),
            background: BACKGROUND,
            refuse: |path, error| refusal(path, error).map(Body::new),
        };
        let server = Server::bind(server, Arc::new(registry))?.http(http)?.tls(tls).health_names(&NAMES);
        Ok(Self {
            server: server.background(&[kserve::LIVENESS]).quiet(&kserve::PROBES).quiet(&[tgi::HEALTH]),
            routes: Routes::new(inference).add_service(models),
            pipeline,
            models: names,
            max_bytes,
        })
    }

    /// The server, which knows its addresses.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Answers until a shutdown has run its course.
    ///
    /// # Errors
    /// When the server cannot be set up; nothing that a client does ends it.
    pub async fn serve(self, shutdown: &Shutdown) -> Result<(), AppError> {
        let Self { server, routes, pipeline, models, max_bytes } = self;
        let readiness = pipeline.readiness.clone();
        let _watchers = pipeline.backends.watch(readiness.clone(), models);
        let kserve = GrpcInferenceServiceServer::new(KServe::new(pipeline, shutdown.clone()));
        let routes = routes.add_service(kserve.max_decoding_message_size(max_bytes));
        Ok(server.serve(routes, &readiness, shutdown).await?)
    }
}

/// Everything that is answered by HTTP and described.
pub(crate) fn apis() -> Vec<Api> {
    vec![openai::api(), tgi::api(), page::api()]
}

/// Everything that is answered by HTTP.
fn http_routes(front: Front) -> Router {
    let keyed = front.pipeline.admission.needs_key();
    let routes = openapi::router(apis(), keyed).merge(page::files());
    let routes = routes.with_state(front);
    routes.fallback(no_such_path).method_not_allowed_fallback(no_such_method)
}

async fn no_such_path(request: Request) -> Response {
    let path = request.uri().path();
    refusal(path, &Failure::NoSuchPath(path.to_owned()).to_error())
}

async fn no_such_method(request: Request) -> Response {
    let path = request.uri().path();
    let mut response = refusal(path, &Failure::NoSuchPath(format!("{} {path}", request.method())).to_error());
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// How a request of this path is refused, in the shape of the front that has the path.
fn refusal(path: &str, error: &Error) -> Response {
    if openai::has(path) || page::has(path) { openai::refusal(error) } else { tgi::refusal(error) }
}

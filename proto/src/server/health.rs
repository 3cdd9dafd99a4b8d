//! [`Readiness`] is whether a service can take work now, as `grpc.health.v1` reports it.
//!
//! Health never waits for work: it is answered on the async runtime from two flags, so a busy server stays a healthy
//! one. `""` stands for the process and always answers SERVING; the service's own names follow readiness and turn
//! NOT_SERVING when a shutdown begins; any other name is NOT_FOUND.

use std::pin::Pin;

use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt as _, wrappers::WatchStream};
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health, HealthServer},
};

use super::shutdown::Shutdown;
use crate::error::{Error, Reason};

/// Whether the service can take work. Clones share it.
#[derive(Debug, Clone)]
pub struct Readiness(watch::Sender<bool>);

struct Service {
    names: Vec<&'static str>,
    readiness: Readiness,
    shutdown: Shutdown,
}

// === impl Readiness ===

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// Not ready yet.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Says whether the service can take work from now on.
    pub fn set_ready(&self, ready: bool) {
        self.0.send_if_modified(|now| std::mem::replace(now, ready) != ready);
    }

    /// Whether the service can take work.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        *self.0.borrow()
    }
}

/// The health service for these names.
pub(super) fn service(names: &[&'static str], readiness: Readiness, shutdown: Shutdown) -> HealthServer<impl Health> {
    HealthServer::new(Service { names: names.to_vec(), readiness, shutdown })
}

// === impl Service ===

impl Service {
    /// `None` for a name that is not served.
    fn status(&self, name: &str) -> Option<ServingStatus> {
        if name.is_empty() {
            return Some(ServingStatus::Serving);
        }
        self.names.contains(&name).then(|| serving(self.readiness.is_ready() && !self.shutdown.is_started()))
    }
}

#[tonic::async_trait]
impl Health for Service {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let name = request.into_inner().service;
        let status = self.status(&name);
        let status = status.ok_or_else(|| Error::new(Reason::NotFound, format!("no service `{name}` here")))?;
        Ok(Response::new(response(status)))
    }

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let name = request.into_inner().service;
        if !self.names.contains(&name.as_str()) {
            // Neither changes. The watch of an unknown name says so and stays open, as the protocol asks.
            let status = self.status(&name).unwrap_or(ServingStatus::ServiceUnknown);
            let only = tokio_stream::once(Ok(response(status)));
            return Ok(Response::new(Box::pin(only.chain(tokio_stream::pending()))));
        }
        let (readiness, shutdown) = (self.readiness.clone(), self.shutdown.clone());
        let ready = WatchStream::new(readiness.0.subscribe()).map(|_| ());
        let phases = shutdown.phases().map(|_| ());
        let mut last = None;
        let changes = ready.merge(phases).filter_map(move |()| {
            let status = serving(readiness.is_ready() && !shutdown.is_started());
            (last.replace(status) != Some(status)).then(|| Ok(response(status)))
        });
        Ok(Response::new(Box::pin(changes)))
    }
}

fn serving(yes: bool) -> ServingStatus {
    if yes { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

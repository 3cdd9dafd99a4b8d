//! A [`Server`] is what every Lockstep service does alike around its own RPCs: sockets, limits, health, reflection,
//! metrics and an end without broken streams.
//!
//! # Life
//!
//! 1. [`Server::bind`] takes both ports, so that a taken one fails before any model is loaded, and
//!    [`Server::announce`] says on stdout where they are.
//! 2. [`Server::serve`] answers. `grpc.health.v1` says SERVING for `""` from the first moment (the process is alive) and
//!    for the service's own names while [`Readiness`] says so.
//! 3. When [`Shutdown`] starts, the names turn NOT_SERVING, new calls are refused with `DRAINING`, and calls that run
//!    end in their own time, at most `limits.drain_timeout_ms`; so does [`Work`] that is no call. What still runs then
//!    ends with `DRAINING`, and connections close with a GOAWAY.
//!
//! # Limits
//!
//! tonic's and hyper's defaults are none for most of these; [`Limits`] documents each. The limit on message sizes is
//! part of the generated services: `XServer::new(service).max_decoding_message_size(limits.max_message_bytes())`.
//!
//! hyper is driven directly rather than through tonic's `Server`, which cannot bound the number of connections, the time
//! to a first byte, or a drain, and which cuts unary calls at the client's deadline before their service could answer
//! with what it has.

mod connections;
mod health;
mod requests;
mod shutdown;
pub mod tls;

use std::{
    future::pending,
    io::{self, Write as _},
    net::{SocketAddr, TcpListener as StdListener},
    sync::Arc,
    time::Duration,
};

use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::watch};
use tonic::{body::Body, service::Routes};

use crate::{
    announcement::Announcement,
    client::ClientLimits,
    config::{ConfigError, Key},
    error::Error,
};

use self::{connections::Port, tls::Tls};

pub use self::{
    health::Readiness,
    requests::Work,
    shutdown::{Phase, Shutdown},
};

/// The keys that every service has: fields `listen`, `metrics_listen`, `exit_with_parent` and `limits` of its settings.
pub const KEYS: &[Key] = &[
    Key { path: "listen", help: "Address for gRPC; port 0 takes a free one." },
    Key { path: "metrics_listen", help: "Address for Prometheus' /metrics; port 0 takes a free one. Default: none." },
    Key {
        path: "exit_with_parent",
        help: "Shut down when standard input ends, for a supervisor that holds its other end. Default: false.",
    },
    Key {
        path: "limits.max_connections",
        help: "Connections at a time; further ones are closed at once. Default: 1024. More cost memory and files.",
    },
    Key {
        path: "limits.max_concurrent_streams",
        help: "Calls at a time on one connection; clients hold further ones back. Default: 1024. More cost memory.",
    },
    Key {
        path: "limits.max_message_bytes",
        help: "Largest message that is read. Default: 8388608. More lets one request take more memory.",
    },
    Key {
        path: "limits.max_header_bytes",
        help: "Largest head of a request. Default: 16384. More lets one request take more memory.",
    },
    Key {
        path: "limits.handshake_timeout_ms",
        help: "Wait for the first bytes of a connection. Default: 5000. More lets silent clients hold connections.",
    },
    Key {
        path: "limits.header_read_timeout_ms",
        help: "Wait for the rest of an HTTP/1 head. Default: 10000. More lets slow clients hold connections.",
    },
    Key {
        path: "limits.idle_timeout_ms",
        help: "How long a connection without calls is kept. Default: 600000. Less makes clients reconnect.",
    },
    Key {
        path: "limits.keepalive_interval_ms",
        help: "Time between pings, here and in calls to other services. Default: 5000. Less finds a dead peer sooner.",
    },
    Key {
        path: "limits.keepalive_timeout_ms",
        help: "Wait for the answer to a ping. Default: 3000. Less finds a dead peer sooner and may cut a busy one.",
    },
    Key {
        path: "limits.connect_timeout_ms",
        help: "Wait for a connection to another service. Default: 2000. Less finds a dead peer sooner.",
    },
    Key {
        path: "limits.drain_timeout_ms",
        help: "How long running calls may go on after SIGTERM. Default: 30000. Less cuts long answers.",
    },
];

/// What every server serves beside its own services.
const HEALTH: &str = "grpc.health.v1.Health";
const REFLECTION_V1: &str = "grpc.reflection.v1.ServerReflection";
const REFLECTION_V1ALPHA: &str = "grpc.reflection.v1alpha.ServerReflection";

/// How long connections have, after the last call of a drain, to flush what is written and to say goodbye.
const CLOSE_GRACE: Duration = Duration::from_millis(250);

/// Limits of a server and of its own calls to other services. Unit of every `_ms`: milliseconds; see [`KEYS`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Connections at a time.
    pub max_connections: u32,
    /// Calls at a time on one connection.
    pub max_concurrent_streams: u32,
    /// Largest message that is read. Unit: bytes.
    pub max_message_bytes: u32,
    /// Largest head of a request. Unit: bytes.
    pub max_header_bytes: u32,
    /// Wait for the first bytes of a connection.
    pub handshake_timeout_ms: u64,
    /// Wait for the rest of an HTTP/1 head.
    pub header_read_timeout_ms: u64,
    /// How long a connection without calls is kept.
    pub idle_timeout_ms: u64,
    /// Time between pings.
    pub keepalive_interval_ms: u64,
    /// Wait for the answer to a ping.
    pub keepalive_timeout_ms: u64,
    /// Wait for a connection to another service.
    pub connect_timeout_ms: u64,
    /// How long running calls may go on once shutdown has begun.
    pub drain_timeout_ms: u64,
}

/// Where a server listens, and within which limits.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// The service's short name, such as `gateway`.
    pub service: &'static str,
    /// For gRPC; port 0 takes a free one.
    pub listen: SocketAddr,
    /// For `/metrics`; port 0 takes a free one.
    pub metrics_listen: Option<SocketAddr>,
    /// The limits.
    pub limits: Limits,
}

/// What a server answers on a port for HTTP: requests that are no gRPC.
#[derive(Debug, Clone)]
pub struct HttpFront {
    /// Where; port 0 takes a free one.
    pub listen: SocketAddr,
    /// What is served.
    pub routes: Routes,
    /// Paths whose requests carry no client's work, by their beginning: a drain neither refuses them nor waits for them.
    pub background: &'static [&'static str],
    /// How a call of this path is refused.
    pub refuse: fn(path: &str, error: &Error) -> http::Response<Body>,
}

/// A server that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be used.
    #[error("cannot listen on {address}: {cause}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        cause: io::Error,
    },
    /// A descriptor set cannot be served.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A server whose ports are bound.
#[derive(Debug)]
pub struct Server {
    settings: ServerSettings,
    grpc: TcpListener,
    grpc_address: SocketAddr,
    http: Option<(HttpFront, TcpListener, SocketAddr)>,
    tls: Option<Tls>,
    metrics: Option<(TcpListener, SocketAddr)>,
    registry: Arc<Registry>,
    names: Vec<&'static str>,
    background: Vec<&'static str>,
    quiet: Vec<&'static str>,
    /// Calls and other work that a drain waits for.
    running: watch::Sender<usize>,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        let client = ClientLimits::default();
        Self {
            max_connections: 1024,
            max_concurrent_streams: 1024,
            max_message_bytes: client.max_message_bytes,
            max_header_bytes: 16 << 10,
            handshake_timeout_ms: 5_000,
            header_read_timeout_ms: 10_000,
            idle_timeout_ms: 600_000,
            keepalive_interval_ms: client.keepalive_interval_ms,
            keepalive_timeout_ms: client.keepalive_timeout_ms,
            connect_timeout_ms: client.connect_timeout_ms,
            drain_timeout_ms: 30_000,
        }
    }
}

impl Limits {
    /// Checks that no limit is zero; a drain alone may end at once.
    ///
    /// # Errors
    /// Names the first limit that is.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let limits = [
            ("limits.max_connections", u64::from(self.max_connections)),
            ("limits.max_concurrent_streams", u64::from(self.max_concurrent_streams)),
            ("limits.max_message_bytes", u64::from(self.max_message_bytes)),
            ("limits.max_header_bytes", u64::from(self.max_header_bytes)),
            ("limits.handshake_timeout_ms", self.handshake_timeout_ms),
            ("limits.header_read_timeout_ms", self.header_read_timeout_ms),
            ("limits.idle_timeout_ms", self.idle_timeout_ms),
            ("limits.keepalive_interval_ms", self.keepalive_interval_ms),
            ("limits.keepalive_timeout_ms", self.keepalive_timeout_ms),
            ("limits.connect_timeout_ms", self.connect_timeout_ms),
        ];
        match limits.iter().find(|(_, value)| *value == 0) {
            Some((key, value)) => Err(ConfigError::invalid(*key, value, "must be at least 1")),
            None => Ok(()),
        }
    }

    /// [`Limits::max_message_bytes`] as the generated services take it.
    #[must_use]
    pub fn max_message_bytes(&self) -> usize {
        usize::try_from(self.max_message_bytes).unwrap_or(usize::MAX)
    }

    /// The limits for calls that this service makes.
    #[must_use]
    pub fn client(&self) -> ClientLimits {
        ClientLimits {
            connect_timeout_ms: self.connect_timeout_ms,
            keepalive_interval_ms: self.keepalive_interval_ms,
            keepalive_timeout_ms: self.keepalive_timeout_ms,
            max_message_bytes: self.max_message_bytes,
        }
    }
}

// === impl Server ===

impl Server {
    /// Binds the ports. Must be called within a tokio runtime.
    ///
    /// `registry` is what `/metrics` shows.
    ///
    /// # Errors
    /// Names the address that cannot be used.
    pub fn bind(settings: ServerSettings, registry: Arc<Registry>) -> Result<Self, ServerError> {
        let (grpc, grpc_address) = bind(settings.listen)?;
        let metrics = settings.metrics_listen.map(bind).transpose()?;
        Ok(Self {
            settings,
            grpc,
            grpc_address,
            http: None,
            tls: None,
            metrics,
            registry,
            names: Vec::new(),
            background: Vec::new(),
            quiet: Vec::new(),
            running: watch::Sender::new(0),
        })
    }

    /// Binds a port for HTTP. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Names the address that cannot be used.
    pub fn http(mut self, front: HttpFront) -> Result<Self, ServerError> {
        let (listener, address) = bind(front.listen)?;
        self.http = Some((front, listener, address));
        Ok(self)
    }

    /// Encrypts all that is said over the ports for gRPC and HTTP.
    #[must_use]
    pub fn tls(self, tls: Option<Tls>) -> Self {
        Self { tls, ..self }
    }

    /// Names the services that are here for clients, such as `lockstep.v1.InferenceService`: reflection lists them, and
    /// health reports them by [`Readiness`].
    #[must_use]
    pub fn health_names(mut self, names: &[&'static str]) -> Self {
        self.names.extend(names);
        self
    }

    /// Names calls that carry no client's work, by the beginning of their path (`/lockstep.worker.v1.GroupService/`): a
    /// drain neither refuses them nor waits for them. Health and reflection are such calls anyway.
    #[must_use]
    pub fn background(mut self, paths: &[&'static str]) -> Self {
        self.background.extend(paths);
        self
    }

    /// Names calls that peers repeat every few seconds, by the beginning of their path: one that ends well is worth no
    /// line in the log but at level debug.
    #[must_use]
    pub fn quiet(mut self, paths: &[&'static str]) -> Self {
        self.quiet.extend(paths);
        self
    }

    /// Work that is no call of this server, for as long as the result lives: a drain waits for it as for calls.
    #[must_use]
    pub fn work(&self) -> Work {
        Work::new(&self.running)
    }

    /// Where gRPC is answered.
    #[must_use]
    pub fn grpc_address(&self) -> SocketAddr {
        self.grpc_address
    }

    /// Where HTTP is answered.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(|(_, _, address)| *address)
    }

    /// Where `/metrics` is answered.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(|(_, address)| *address)
    }

    /// Says where the server listens, in one line on stdout for supervisors and tests: an [`Announcement`].
    ///
    /// # Errors
    /// If stdout is closed.
    pub fn announce(&self) -> io::Result<()> {
        let announcement = Announcement {
            service: self.settings.service.to_owned(),
            grpc: self.grpc_address,
            http: self.http_address(),
            metrics: self.metrics_address(),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{announcement}")?;
        out.flush()
    }

    /// Answers until a shutdown has run its course. See the module for what happens then.
    ///
    /// # Errors
    /// If reflection cannot be built; nothing that a client does ends the server.
    pub async fn serve(self, routes: Routes, readiness: &Readiness, shutdown: &Shutdown) -> Result<(), ServerError> {
        let limits = &self.settings.limits;
        let routes = routes
            .add_service(health::service(&self.names, readiness.clone(), shutdown.clone()))
            .add_service(reflection(&self.names).with_service_name(REFLECTION_V1).build_v1()?)
            .add_service(reflection(&self.names).with_service_name(REFLECTION_V1ALPHA).build_v1alpha()?)
            .prepare();
        let closing = watch::Sender::new(false);
        let calls = requests::Calls::new(shutdown.clone(), closing.subscribe(), self.running);
        let grpc = requests::Wire::grpc(&self.background, &self.quiet);

        let tls = &self.tls;
        let port = Port { listener: self.grpc, tls: tls.clone(), builder: connections::any(limits) };
        let rpcs = connections::serve(port, limits, closing.subscribe(), |connection| {
            calls.service(&grpc, routes.clone(), connection)
        });
        let http = async {
            let Some((front, listener, _)) = self.http else { return };
            let (wire, routes) = (requests::Wire::http(&front, &self.quiet), front.routes.prepare());
            let port = Port { listener, tls: tls.clone(), builder: connections::any(limits) };
            connections::serve(port, limits, closing.subscribe(), |connection| {
                calls.service(&wire, routes.clone(), connection)
            })
            .await;
        };
        let metrics = async {
            let Some((listener, _)) = self.metrics else { return };
            let port = Port { listener, tls: None, builder: connections::http1(limits) };
            connections::serve(port, limits, closing.subscribe(), |connection| {
                requests::metrics_service(Arc::clone(&self.registry), connection)
            })
            .await;
        };
        let drain = async {
            shutdown.started().await;
            tracing::info!(running = calls.running(), "draining");
            let deadline = tokio::time::sleep(Duration::from_millis(limits.drain_timeout_ms));
            tokio::select! {
                () = calls.ended() => {}
                () = shutdown.forced() => tracing::warn!(running = calls.running(), "drain cut short"),
                () = deadline => tracing::warn!(running = calls.running(), "drain timed out"),
            }
            closing.send_replace(true);
        };
        let served = async { tokio::join!(rpcs, http, metrics, drain) };
        let followed = async {
            if let Some(tls) = tls {
                tls.follow().await;
            }
            pending().await
        };
        tokio::select! {
            _ = served => {}
            () = followed => {}
        }
        Ok(())
    }
}

fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServerError> {
    let listener = StdListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    });
    listener.map_err(|cause| ServerError::Bind { address, cause })
}

/// Reflection that knows the whole contract and lists what is served here: the contract has other services' parts, too.
fn reflection(names: &[&'static str]) -> tonic_reflection::server::Builder<'static> {
    let builder = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(crate::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(HEALTH);
    names.iter().fold(builder, |builder, name| builder.with_service_name(*name))
}

#[cfg(test)]
mod tests;

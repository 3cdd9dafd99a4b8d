//! A call is one request with its whole response. Every call gets its [`Trace`], a log line at its end, and a place in
//! the count that a drain waits for.

use std::{
    convert::Infallible,
    fmt,
    future::{Future, pending},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tonic::{Code, Status, body::Body, service::Routes, transport::server::TcpConnectInfo};
use tower::Service as _;
use tracing::{Instrument as _, Span};

use super::{
    HttpFront,
    connections::{Connection, ConnectionCall},
    shutdown::Shutdown,
};
use crate::{
    error::{Error, Reason},
    telemetry::{METRICS_CONTENT_TYPE, metrics_text},
    trace::Trace,
};

/// Calls that carry no client's work on any server.
const BACKGROUND: [&str; 2] = ["/grpc.health.v1.Health/", "/grpc.reflection."];

/// How tonic begins to say that a request cannot be decoded.
const UNREADABLE: &str = "failed to decode Protobuf message: ";

/// When a client that met a drain should try again: by then a balancer has seen it, or a successor is up.
const DRAIN_RETRY: Duration = Duration::from_secs(1);

/// All calls of a server. Clones share the count.
#[derive(Debug, Clone)]
pub(super) struct Calls {
    shutdown: Shutdown,
    /// Turns true when the drain is over and calls that still run are cut.
    closing: watch::Receiver<bool>,
    running: watch::Sender<usize>,
}

/// What the calls of one port speak.
#[derive(Debug, Clone)]
pub(super) struct Wire {
    background: Arc<[&'static str]>,
    quiet: Arc<[&'static str]>,
    /// How a call is refused; `None`: by a gRPC status.
    refuse: Option<fn(&str, &Error) -> Response<Body>>,
}

/// One more in a count for as long as it lives.
#[derive(Debug)]
struct Counted(watch::Sender<usize>);

/// A piece of work that a drain waits for, until it is dropped; see [`Server::work`](super::Server::work).
#[derive(Debug)]
pub struct Work {
    _counted: Counted,
}

/// The service of one connection.
#[derive(Debug)]
pub(super) struct CallService {
    calls: Calls,
    wire: Wire,
    routes: Routes,
    connection: Connection,
}

/// A response's body, which ends the call when it ends or is dropped.
pub(super) struct CallBody {
    inner: Body,
    cut: Cut,
    call: Call,
}

/// Resolves when a call has to end because the drain is over.
type Cut = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What is remembered until a call's end.
#[derive(Debug)]
struct Call {
    span: Span,
    started: Instant,
    outcome: Outcome,
    line: Line,
    _on_connection: ConnectionCall,
    _work: Option<Counted>,
}

/// How a call ended, as far as it is known.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// Without a status the peer went away first.
    Unknown,
    Grpc(Code),
    /// The status in the head, and whether all of the body followed.
    Http(StatusCode, bool),
}

/// When a call's end is worth a line of the log at level info; otherwise it has one at level debug.
#[derive(Debug, Clone, Copy)]
enum Line {
    Always,
    UnlessOk,
    Never,
}

// === impl Calls ===

impl Calls {
    pub(super) fn new(shutdown: Shutdown, closing: watch::Receiver<bool>, running: watch::Sender<usize>) -> Self {
        Self { shutdown, closing, running }
    }

    pub(super) fn service(&self, wire: &Wire, routes: Routes, connection: Connection) -> CallService {
        CallService { calls: self.clone(), wire: wire.clone(), routes, connection }
    }

    /// Calls with a client's work, and other work, that run now.
    pub(super) fn running(&self) -> usize {
        *self.running.borrow()
    }

    /// Waits until none runs.
    pub(super) async fn ended(&self) {
        // The sender is `self`, so the channel cannot close while this waits.
        let _ = self.running.subscribe().wait_for(|running| *running == 0).await;
    }

    /// The end of a call that outlives the drain. Background calls end with their connections.
    fn cut(&self, background: bool) -> Cut {
        let mut closing = self.closing.clone();
        Box::pin(async move {
            if background || closing.wait_for(|closing| *closing).await.is_err() {
                pending::<()>().await;
            }
        })
    }

    /// Counts a call in, or refuses it. Counting comes first: a drain that begins in between waits for it.
    fn admit(&self, background: bool) -> Result<Option<Counted>, Error> {
        if background {
            return Ok(None);
        }
        let counted = Counted::new(&self.running);
        if self.shutdown.is_started() {
            return Err(Error::new(Reason::Draining, "the server is shutting down").retry_after(DRAIN_RETRY));
        }
        Ok(Some(counted))
    }
}

// === impl Wire ===

impl Wire {
    /// gRPC, with these calls in the background, beside those of every server, and these worth no line in the log.
    pub(super) fn grpc(background: &[&'static str], quiet: &[&'static str]) -> Self {
        let background = background.iter().chain(&BACKGROUND).copied().collect();
        Self { background, quiet: quiet.into(), refuse: None }
    }

    /// Plain HTTP, with these calls worth no line in the log.
    pub(super) fn http(front: &HttpFront, quiet: &[&'static str]) -> Self {
        Self { background: front.background.into(), quiet: quiet.into(), refuse: Some(front.refuse) }
    }

    fn refuse(&self, path: &str, error: Error) -> Response<Body> {
        match self.refuse {
            Some(refuse) => refuse(path, &error),
            None => Status::from(error).into_http(),
        }
    }

    fn answer(&self, response: Response<Body>) -> Response<Body> {
        if self.refuse.is_some() { response } else { in_our_words(response) }
    }

    /// What the head says of the outcome: a gRPC call that was refused or failed at once has its status there.
    fn outcome(&self, response: &Response<Body>) -> Outcome {
        match self.refuse {
            Some(_) => Outcome::Http(response.status(), response.body().is_end_stream()),
            None => outcome_in(response.headers()),
        }
    }
}

// === impl Work ===

impl Work {
    pub(super) fn new(running: &watch::Sender<usize>) -> Self {
        Self { _counted: Counted::new(running) }
    }
}

// === impl CallService ===

impl hyper::service::Service<Request<Incoming>> for CallService {
    type Response = Response<CallBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let method = path.as_str();
        let is_one_of = |prefixes: &[&str]| prefixes.iter().any(|prefix| method.starts_with(prefix));
        let background = is_one_of(&self.wire.background);
        let line = match background {
            true => Line::Never,
            false if is_one_of(&self.wire.quiet) => Line::UnlessOk,
            false => Line::Always,
        };
        let trace = Trace::from_headers(request.headers());
        let peer = self.connection.peer;
        let span = tracing::info_span!("call", method, request_id = trace.request_id(), %peer);
        let on_connection = self.connection.calls.begin();
        let (work, refusal) = match self.calls.admit(background) {
            Ok(work) => (work, None),
            Err(refusal) => (None, Some(refusal)),
        };
        let mut call = Call {
            span: span.clone(),
            started: Instant::now(),
            outcome: Outcome::Unknown,
            line,
            _on_connection: on_connection,
            _work: work,
        };
        request.extensions_mut().insert(trace);
        let (local_addr, remote_addr) = (self.connection.local, Some(peer));
        request.extensions_mut().insert(TcpConnectInfo { local_addr, remote_addr });
        let mut routes = self.routes.clone();
        let mut cut = self.calls.cut(background);
        let wire = self.wire.clone();
        let respond = async move {
            let response = match refusal {
                Some(refusal) => wire.refuse(&path, refusal),
                None => tokio::select! {
                    response = routes.call(request) => wire.answer(response?),
                    () = &mut cut => {
                        cut = Box::pin(pending());
                        wire.refuse(&path, outlived())
                    }
                },
            };
            call.outcome = wire.outcome(&response);
            Ok(response.map(|inner| CallBody { inner, cut, call }))
        };
        Box::pin(respond.instrument(span))
    }
}

// === impl CallBody ===

impl http_body::Body for CallBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Self { inner, cut, call } = &mut *self;
        let Call { span, outcome, .. } = call;
        let _entered = span.enter();
        if cut.as_mut().poll(cx).is_ready() {
            *cut = Box::pin(pending());
            // Drops what the service was doing.
            *inner = Body::empty();
            if let Outcome::Http(..) = outcome {
                // An HTTP body has no way to say why it ends too soon, but to break off.
                return Poll::Ready(Some(Err(outlived().into())));
            }
            let mut trailers = HeaderMap::new();
            // It could fail for metadata that is no header's; this status has none.
            let _ = Status::from(outlived()).add_header(&mut trailers);
            *outcome = outcome_in(&trailers);
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        let frame = Pin::new(&mut *inner).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            *outcome = outcome_in(trailers);
        }
        if matches!(frame, Poll::Ready(None)) || inner.is_end_stream() {
            outcome.complete();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl fmt::Debug for CallBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallBody").field("call", &self.call).finish_non_exhaustive()
    }
}

// === impl Call ===

impl Drop for Call {
    fn drop(&mut self) {
        let _entered = self.span.enter();
        let elapsed_ms = self.started.elapsed().as_micros() as f64 / 1e3;
        let code = self.outcome;
        match self.line {
            Line::Never => tracing::debug!(%code, elapsed_ms, "call ended"),
            Line::UnlessOk if code.is_ok() => tracing::debug!(%code, elapsed_ms, "call ended"),
            _ => tracing::info!(%code, elapsed_ms, "call ended"),
        }
    }
}

// === impl Outcome ===

impl Outcome {
    /// The body is complete.
    fn complete(&mut self) {
        if let Self::Http(_, complete) = self {
            *complete = true;
        }
    }

    fn is_ok(self) -> bool {
        match self {
            Self::Unknown => false,
            Self::Grpc(code) => code == Code::Ok,
            Self::Http(status, complete) => status.is_success() && complete,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grpc(code) => write!(f, "{code:?}"),
            Self::Http(status, true) => write!(f, "{}", status.as_u16()),
            Self::Unknown | Self::Http(..) => write!(f, "{:?}", Code::Cancelled),
        }
    }
}

// === impl Counted ===

impl Counted {
    fn new(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// What becomes of a call that outlives the drain.
fn outlived() -> Error {
    Error::new(Reason::Draining, "the server shut down before the call had ended").retry_after(DRAIN_RETRY)
}

/// Replaces what tonic answers to a request that it cannot hand to a service by the table's error for it: tonic calls
/// bytes that are no message INTERNAL, and never gives details.
fn in_our_words(response: Response<Body>) -> Response<Body> {
    let Some(status) = Status::from_header_map(response.headers()).filter(|status| status.details().is_empty()) else {
        return response;
    };
    let (reason, message) = match status.code() {
        Code::Internal => match status.message().strip_prefix(UNREADABLE) {
            Some(why) => (Reason::InvalidArgument, format!("the request is no message of its type: {why}")),
            None => return response,
        },
        Code::OutOfRange => (Reason::MessageTooLarge, status.message().to_owned()),
        Code::Unimplemented => (Reason::Unimplemented, "no such method is served here".to_owned()),
        _ => return response,
    };
    Status::from(Error::new(reason, message)).into_http()
}

fn outcome_in(headers: &HeaderMap) -> Outcome {
    let code = headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()));
    code.map_or(Outcome::Unknown, Outcome::Grpc)
}

/// The service behind the metrics port: `GET /metrics`.
pub(super) fn metrics_service(
    registry: Arc<Registry>,
    connection: Connection,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = Response<String>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<String>, Infallible>> + Send + 'static,
> + Send
+ 'static {
    hyper::service::service_fn(move |request: Request<Incoming>| {
        let counted = connection.calls.begin();
        let response = metrics_response(&request, &registry);
        async move {
            drop(counted);
            Ok(response)
        }
    })
}

fn metrics_response(request: &Request<Incoming>, registry: &Registry) -> Response<String> {
    let refused = |status, text: &str| {
        let mut response = Response::new(text.to_owned());
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return refused(StatusCode::NOT_FOUND, "only /metrics is here\n");
    }
    if request.method() != Method::GET {
        return refused(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n");
    }
    match metrics_text(registry) {
        Ok(text) => {
            let mut response = Response::new(text);
            response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(METRICS_CONTENT_TYPE));
            response
        }
        Err(error) => {
            tracing::error!(%error, "metrics cannot be encoded");
            refused(StatusCode::INTERNAL_SERVER_ERROR, "metrics cannot be encoded\n")
        }
    }
}

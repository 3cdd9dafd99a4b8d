//! A connection is served by one task, which the accept loop of its port owns; it ends with its peer, by a limit, or
//! when the server closes.
//!
//! ```text
//! accepted ── 33 bytes within handshake_timeout ──► open ── no call for idle_timeout, or closing ──► GOAWAY ──► closed
//!     └────────────── else ─────────────► closed      └── ping unanswered, HTTP/1 head too slow ──► closed
//! ```

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{Request, Response};
use hyper::{body::Incoming, service::Service};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;

use super::{CLOSE_GRACE, Limits, tls::Tls};

/// Bytes that any client sends unasked: HTTP/2's preface and the head of its first SETTINGS frame (RFC 9113, 3.4).
/// A complete HTTP/1 request may be shorter; it counts as a call, and so as an open connection.
const GREETING_BYTES: u64 = 24 + 9;

/// Pause after a failed accept, which is nearly always a want of file descriptors that an instant retry would not end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a service may know about the connection that a call came over.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    pub(super) local: Option<SocketAddr>,
    pub(super) peer: SocketAddr,
    /// Calls that run on this connection; the service counts them.
    pub(super) calls: Arc<ConnectionCalls>,
}

/// Calls that run on a connection. To count one wakes nobody: between a call's first byte and its service lies nothing else.
#[derive(Debug)]
pub(super) struct ConnectionCalls {
    running: AtomicUsize,
    opened: Instant,
    /// When the last call ended, from `opened` on. Unit: microseconds.
    quiet_since_us: AtomicU64,
}

/// One of them, for as long as it lives.
#[derive(Debug)]
pub(super) struct ConnectionCall(Arc<ConnectionCalls>);

// === impl ConnectionCalls ===

impl ConnectionCalls {
    fn new() -> Self {
        Self { running: AtomicUsize::new(0), opened: Instant::now(), quiet_since_us: AtomicU64::new(0) }
    }

    /// One more.
    pub(super) fn begin(self: &Arc<Self>) -> ConnectionCall {
        self.running.fetch_add(1, Ordering::AcqRel);
        ConnectionCall(Arc::clone(self))
    }

    /// When the connection is idle, if no call begins until then: `limit` after the last, or later while one runs.
    fn idle_at(&self, limit: Duration) -> Instant {
        let quiet_since = self.opened + Duration::from_micros(self.quiet_since_us.load(Ordering::Acquire));
        if self.is_running() { Instant::now() + limit } else { quiet_since + limit }
    }

    fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire) > 0
    }
}

impl Drop for ConnectionCall {
    fn drop(&mut self) {
        let Self(calls) = self;
        let since_us = calls.opened.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        calls.quiet_since_us.store(since_us, Ordering::Release);
        calls.running.fetch_sub(1, Ordering::AcqRel);
    }
}

/// HTTP/2 and HTTP/1 with the limits: gRPC needs the former, most other clients speak the latter.
pub(super) fn any(limits: &Limits) -> Builder<TokioExecutor> {
    let mut builder = http(limits);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.max_concurrent_streams)
        .max_header_list_size(limits.max_header_bytes)
        .keep_alive_interval(Duration::from_millis(limits.keepalive_interval_ms))
        .keep_alive_timeout(Duration::from_millis(limits.keepalive_timeout_ms));
    builder
}

/// HTTP/1 alone with the limits.
pub(super) fn http1(limits: &Limits) -> Builder<TokioExecutor> {
    http(limits).http1_only()
}

fn http(limits: &Limits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(limits.header_read_timeout_ms))
        .max_buf_size((limits.max_header_bytes as usize).max(8 << 10)); // hyper panics below 8 KiB
    builder
}

/// A port that is bound, and how connections to it are served.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) listener: TcpListener,
    pub(super) tls: Option<Tls>,
    pub(super) builder: Builder<TokioExecutor>,
}

/// Accepts connections until `closing`, then closes them; those which do not end in time are cut.
pub(super) async fn serve<S, B>(
    port: Port,
    limits: &Limits,
    mut closing: watch::Receiver<bool>,
    mut make_service: impl FnMut(Connection) -> S,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + 'static,
    S::Future: Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Port { listener, tls, builder } = port;
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = closing.wait_for(|closing| *closing) => break,
            Some(_) = open.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) if open.len() < limits.max_connections as usize => {
                let calls = Arc::new(ConnectionCalls::new());
                let connection = Connection { local: stream.local_addr().ok(), peer, calls: Arc::clone(&calls) };
                let service = make_service(connection);
                let connection = Open { stream, tls: tls.clone(), builder: builder.clone(), service, calls };
                open.spawn(connection.drive(limits.clone(), closing.clone()));
            }
            Ok((_, peer)) => tracing::warn!(%peer, limit = limits.max_connections, "too many connections, closed one"),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let all_ended = async { while open.join_next().await.is_some() {} };
    let _ = timeout(CLOSE_GRACE, all_ended).await;
    open.shutdown().await;
}

/// A connection from its first byte.
struct Open<S> {
    stream: TcpStream,
    tls: Option<Tls>,
    builder: Builder<TokioExecutor>,
    service: S,
    /// Calls that run on it.
    calls: Arc<ConnectionCalls>,
}

// === impl Open ===

impl<S, B> Open<S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Send + 'static,
    S::Future: Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Serves the connection to its end.
    async fn drive(self, limits: Limits, mut closing: watch::Receiver<bool>) {
        // Tokens are small and late ones are useless, so none waits for a fuller packet.
        let _ = self.stream.set_nodelay(true);
        let mut handshake = pin!(tokio::time::sleep(Duration::from_millis(limits.handshake_timeout_ms)));
        let stream = tokio::select! {
            stream = meet(self.stream, self.tls) => stream,
            () = &mut handshake => Err(io::ErrorKind::TimedOut.into()),
            _ = closing.wait_for(|closing| *closing) => return,
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => return tracing::debug!(%error, "connection closed: no TLS"),
        };
        let received = Arc::new(AtomicU64::new(0));
        let stream = Counted { stream, received: Arc::clone(&received) };
        let mut connection = pin!(self.builder.serve_connection(TokioIo::new(stream), self.service));
        let calls = self.calls;
        let mut idle = pin!(idle(Arc::clone(&calls), Duration::from_millis(limits.idle_timeout_ms)));
        let (mut greeted, mut leaving) = (false, false);
        loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        tracing::debug!(error, "connection failed");
                    }
                    return;
                }
                () = &mut handshake, if !greeted => {
                    greeted = received.load(Ordering::Relaxed) >= GREETING_BYTES || calls.is_running();
                    if !greeted {
                        tracing::debug!("connection closed: no greeting in time");
                        return;
                    }
                }
                () = &mut idle, if !leaving => {
                    leaving = true;
                    connection.as_mut().graceful_shutdown();
                }
                _ = closing.wait_for(|closing| *closing), if !leaving => {
                    leaving = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// What is said over a connection. A connection without TLS sets no room aside for it.
type Said = Either<TcpStream, Box<TlsStream<TcpStream>>>;

async fn meet(stream: TcpStream, tls: Option<Tls>) -> io::Result<Said> {
    match tls {
        None => Ok(Either::Left(stream)),
        Some(tls) => Ok(Either::Right(Box::new(Box::pin(tls.accept(stream)).await?))),
    }
}

/// Waits until no call has run for so long.
async fn idle(calls: Arc<ConnectionCalls>, limit: Duration) {
    let mut idle_at = calls.idle_at(limit);
    while Instant::now() < idle_at {
        tokio::time::sleep_until(idle_at.into()).await;
        idle_at = calls.idle_at(limit);
    }
}

/// A stream that counts what it has received.
#[derive(Debug)]
struct Counted {
    stream: Said,
    received: Arc<AtomicU64>,
}

// === impl Counted ===

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        let count = buf.filled().len() - before;
        self.received.fetch_add(count as u64, Ordering::Relaxed);
        result
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

//! A client's side of a connection: a [`Channel`] with the limits that tonic leaves out, and deadlines that travel.
//!
//! tonic sets neither a connect timeout nor keep-alive by default, so that a call into a network partition hangs for as
//! long as TCP retransmits. [`connect_lazy`] sets both. A limit on message sizes belongs to the generated clients:
//! `XClient::new(channel).max_decoding_message_size(limits.max_message_bytes())`.
//!
//! ```no_run
//! # use std::time::Duration;
//! use lockstep_proto::{
//!     client::{self, ClientLimits},
//!     v1::{GenerateRequest, RawPrompt, inference_service_client::InferenceServiceClient, raw_prompt::Prompt},
//! };
//! # async fn call() -> Result<(), Box<dyn std::error::Error>> {
//! let limits = ClientLimits::default();
//! let channel = client::connect_lazy("127.0.0.1:50051", &limits)?;
//! let mut inference = InferenceServiceClient::new(channel).max_decoding_message_size(limits.max_message_bytes());
//! let prompt = RawPrompt { prompt: Some(Prompt::Text("The capital of France is".into())) };
//! let request = GenerateRequest { prompt: Some(prompt), ..GenerateRequest::default() };
//! let answer = inference.generate(client::with_deadline(request, Duration::from_secs(60))).await?;
//! # Ok(())
//! # }
//! ```

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tonic::{
    Request,
    metadata::MetadataMap,
    transport::{Channel, ClientTlsConfig, Endpoint},
};

pub use tonic_health::pb as health;

/// Limits of outgoing connections.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct ClientLimits {
    /// Longest wait for a connection. Unit: milliseconds. Lower finds a dead peer sooner, higher spares a slow one.
    pub connect_timeout_ms: u64,
    /// Time between pings on a quiet connection. Unit: milliseconds.
    pub keepalive_interval_ms: u64,
    /// Wait for the answer to a ping, after which the connection counts as dead. Unit: milliseconds.
    pub keepalive_timeout_ms: u64,
    /// Largest message that is read. Unit: bytes.
    pub max_message_bytes: u32,
}

/// An address that is none.
#[derive(Debug, Error)]
#[error("`{address}` is not an address such as 127.0.0.1:50051 or http://worker-0:50051: {cause}")]
pub struct AddressError {
    address: String,
    cause: String,
}

// === impl ClientLimits ===

impl Default for ClientLimits {
    fn default() -> Self {
        Self {
            connect_timeout_ms: 2_000,
            keepalive_interval_ms: 5_000,
            keepalive_timeout_ms: 3_000,
            max_message_bytes: 8 << 20,
        }
    }
}

impl ClientLimits {
    /// [`ClientLimits::max_message_bytes`] as the generated clients take it.
    #[must_use]
    pub fn max_message_bytes(&self) -> usize {
        usize::try_from(self.max_message_bytes).unwrap_or(usize::MAX)
    }
}

/// A channel to `host:port`, `http://host:port` or `https://host:port` that connects with the first call and again whenever
/// it must. By `https` the server shows a certificate that this machine trusts, or one that the PEM file named by the
/// environment variable `SSL_CERT_FILE` has signed.
///
/// Must be called within a tokio runtime.
///
/// # Errors
/// If the address is none.
pub fn connect_lazy(address: &str, limits: &ClientLimits) -> Result<Channel, AddressError> {
    Ok(endpoint(address, limits)?.connect_lazy())
}

/// What [`connect_lazy`] connects to, for callers that want the connection now.
///
/// # Errors
/// If the address is none.
pub fn endpoint(address: &str, limits: &ClientLimits) -> Result<Endpoint, AddressError> {
    let failed = |cause: String| AddressError { address: address.to_owned(), cause };
    let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let uri: http::Uri = uri.parse().map_err(|error: http::uri::InvalidUri| failed(error.to_string()))?;
    if uri.port_u16().is_none() {
        return Err(failed("it has no port".into()));
    }
    let endpoint = match uri.scheme_str() {
        Some("http") => Endpoint::from(uri),
        Some("https") => {
            let tls = ClientTlsConfig::new().with_native_roots();
            Endpoint::from(uri).tls_config(tls).map_err(|error| failed(error.to_string()))?
        }
        _ => return Err(failed("its scheme is neither http nor https".into())),
    };
    Ok(endpoint
        .connect_timeout(Duration::from_millis(limits.connect_timeout_ms))
        .http2_keep_alive_interval(Duration::from_millis(limits.keepalive_interval_ms))
        .keep_alive_timeout(Duration::from_millis(limits.keepalive_timeout_ms))
        .keep_alive_while_idle(true)
        .tcp_nodelay(true))
}

/// A request that carries a deadline: `grpc-timeout`, which tonic also enforces on this side until the response's
/// head has come.
pub fn with_deadline<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

/// When the deadline of an incoming request passes, reckoned from now. `None` if it has none or if the header breaks
/// the specification.
pub fn deadline_of<T>(request: &Request<T>) -> Option<Instant> {
    Instant::now().checked_add(timeout_of(request.metadata())?)
}

/// Reads `grpc-timeout`: at most eight digits and a unit ("gRPC over HTTP2", section Requests).
fn timeout_of(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadline_reads_what_with_deadline_wrote() {
        for timeout in [Duration::from_millis(1500), Duration::from_micros(7), Duration::from_secs(86_400)] {
            let before = Instant::now();
            let deadline = deadline_of(&with_deadline((), timeout)).unwrap();
            assert!(deadline >= before + timeout && deadline <= Instant::now() + timeout);
        }
        assert_eq!(deadline_of(&Request::new(())), None);
    }

    #[test]
    fn timeouts_follow_the_specification() {
        let timeout = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            timeout_of(&metadata)
        };
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(timeout("2M"), Some(Duration::from_secs(120)));
        assert_eq!(timeout("3S"), Some(Duration::from_secs(3)));
        assert_eq!(timeout("4m"), Some(Duration::from_millis(4)));
        assert_eq!(timeout("0n"), Some(Duration::ZERO));
        for bad in ["", "S", "1", "123456789S", "-1S", "+1S", "1.5S", "1s"] {
            assert_eq!(timeout(bad), None, "{bad}");
        }
    }

    #[test]
    fn addresses_need_a_host_and_a_port() {
        for good in ["127.0.0.1:1", "http://worker-0:50051", "https://worker:1", "[::1]:7"] {
            assert!(endpoint(good, &ClientLimits::default()).is_ok(), "{good}");
        }
        for bad in ["", "worker", "127.0.0.1", "ftp://worker:1", "a b:1", "http://"] {
            let text = endpoint(bad, &ClientLimits::default()).unwrap_err().to_string();
            assert!(text.contains(&format!("`{bad}`")), "{text}");
        }
    }
}

//! A [`Trace`] is the identity of one client call on its way through the cluster: one request id in the logs of the
//! gateway, the tokenizer service and every rank.
//!
//! It travels as W3C Trace Context (`traceparent`, <https://www.w3.org/TR/trace-context/>, level 1) and as
//! `x-request-id`. A client may send either; a header that breaks its rules is ignored, and a new trace starts, since
//! a wrong id must never fail a request. Without a request id of the client's own, the trace id serves as one.

use std::fmt;

use http::HeaderMap;
use tonic::{Request, metadata::MetadataMap};

/// The header of W3C Trace Context.
pub const TRACEPARENT: &str = "traceparent";

/// The header of the request id.
pub const REQUEST_ID: &str = "x-request-id";

/// Longest request id that a client may choose, as the worker's contract has it. Unit: bytes.
pub const MAX_REQUEST_ID_BYTES: usize = 64;

/// The identity of one client call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    trace_id: u128,
    span_id: u64,
    flags: u8,
    request_id: String,
}

// === impl Trace ===

impl Trace {
    /// A new trace with random ids.
    #[must_use]
    pub fn start() -> Self {
        Self::child(random_u128(), 0, None)
    }

    /// Goes on with the trace that the headers of an incoming call name, or starts one.
    #[must_use]
    pub fn from_headers(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let (trace_id, flags) = text(TRACEPARENT).and_then(parse).unwrap_or_else(|| (random_u128(), 0));
        Self::child(trace_id, flags, text(REQUEST_ID).filter(|id| is_request_id(id)))
    }

    /// The trace of a request: the one that the server has put into its extensions, else from its metadata.
    #[must_use]
    pub fn of<T>(request: &Request<T>) -> Self {
        let known = request.extensions().get::<Self>().cloned();
        known.unwrap_or_else(|| Self::from_headers(request.metadata().as_ref()))
    }

    /// Writes the trace into the metadata of an outgoing call.
    pub fn inject(&self, metadata: &mut MetadataMap) {
        if let Ok(value) = self.traceparent().parse() {
            metadata.insert(TRACEPARENT, value);
        }
        if let Ok(value) = self.request_id.parse() {
            metadata.insert(REQUEST_ID, value);
        }
    }

    /// The id that every log line of this call carries: 1 to [`MAX_REQUEST_ID_BYTES`] visible ASCII characters.
    #[must_use]
    pub fn request_id(&self) -> &str {
        &self.request_id
    }

    /// The value of `traceparent` for calls made on behalf of this one.
    #[must_use]
    pub fn traceparent(&self) -> String {
        format!("00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, self.flags)
    }

    /// A new span of a trace.
    fn child(trace_id: u128, flags: u8, request_id: Option<&str>) -> Self {
        let request_id = request_id.map_or_else(|| format!("{trace_id:032x}"), str::to_owned);
        Self { trace_id, span_id: random_u64(), flags, request_id }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.request_id)
    }
}

/// Reads trace id and flags of a `traceparent`: `version "-" trace-id "-" parent-id "-" flags`, lower-case
/// hexadecimal, ids not all zero. A later version may have more fields behind these.
fn parse(text: &str) -> Option<(u128, u8)> {
    let mut fields = text.split('-');
    let version = u8::from_str_radix(hex(fields.next()?, 2)?, 16).ok()?;
    let trace_id = u128::from_str_radix(hex(fields.next()?, 32)?, 16).ok()?;
    let parent_id = u64::from_str_radix(hex(fields.next()?, 16)?, 16).ok()?;
    let flags = u8::from_str_radix(hex(fields.next()?, 2)?, 16).ok()?;
    let too_long = version == 0 && fields.next().is_some();
    (version != 0xff && trace_id != 0 && parent_id != 0 && !too_long).then_some((trace_id, flags))
}

fn hex(field: &str, length: usize) -> Option<&str> {
    let digits = field.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (field.len() == length && digits).then_some(field)
}

fn is_request_id(text: &str) -> bool {
    (1..=MAX_REQUEST_ID_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Not zero, as the standard asks of both ids.
fn random_u128() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has a source of random numbers");
    u128::from_ne_bytes(bytes).max(1)
}

fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("the system has a source of random numbers");
    u64::from_ne_bytes(bytes).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn trace(headers: &[(&'static str, &str)]) -> Trace {
        Trace::from_headers(&headers.iter().map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap())).collect())
    }

    #[test]
    fn client_trace_goes_on_under_a_new_span() {
        let trace = trace(&[(TRACEPARENT, PARENT)]);
        assert_eq!(trace.request_id(), TRACE_ID);
        let sent = trace.traceparent();
        assert!(sent.starts_with(&format!("00-{TRACE_ID}-")) && sent.ends_with("-01"), "{sent}");
        assert_ne!(sent, PARENT);
    }

    #[test]
    fn injected_trace_is_the_same_call_at_the_next_server() {
        let first = trace(&[(TRACEPARENT, PARENT), (REQUEST_ID, "order-66")]);
        let mut metadata = MetadataMap::new();
        first.inject(&mut metadata);
        let second = Trace::from_headers(metadata.as_ref());
        assert_eq!(second.request_id(), "order-66");
        assert_eq!(second.trace_id, first.trace_id);
    }

    #[test]
    fn malformed_traceparent_starts_a_new_trace() {
        let bad = [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-+bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        ];
        for header in bad {
            let trace = trace(&[(TRACEPARENT, header)]);
            assert_ne!(trace.request_id(), TRACE_ID, "{header}");
            assert_eq!(trace.request_id().len(), 32);
        }
    }

    #[test]
    fn later_version_may_have_more_fields() {
        let header = PARENT.replacen("00", "01", 1) + "-more";
        assert_eq!(trace(&[(TRACEPARENT, &header)]).request_id(), TRACE_ID);
    }

    #[test]
    fn request_id_that_breaks_the_rules_gives_way_to_the_trace_id() {
        let long = "x".repeat(MAX_REQUEST_ID_BYTES + 1);
        for id in ["", "two words", "tab\there", &long] {
            assert_eq!(trace(&[(TRACEPARENT, PARENT), (REQUEST_ID, id)]).request_id(), TRACE_ID, "{id:?}");
        }
    }

    #[test]
    fn traces_differ() {
        assert_ne!(Trace::start().request_id(), Trace::start().request_id());
    }
}

//! What the fronts for HTTP share: how a request comes in, and how a failure becomes a status.

pub mod sse;

use std::{sync::Arc, time::Duration};

use axum::{body::Body, extract::Request};
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use lockstep_proto::{
    error::{Error, Reason},
    trace::Trace,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    json::{Object, parse},
    pipeline::{Arrival, Call, Pipeline},
    request::RequestError,
    status::Failure,
};

/// Longest wait for a body: long enough for the largest one over a slow line.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// What every front has. Clones share the pipeline.
#[derive(Debug, Clone)]
pub struct Front {
    /// Where requests go.
    pub pipeline: Arc<Pipeline>,
    /// Largest body that is read.
    pub max_bytes: usize,
}

/// A request whose body has been read.
#[derive(Debug)]
pub struct Inbound {
    /// Its headers.
    pub headers: HeaderMap,
    /// Names it.
    pub trace: Trace,
    body: Bytes,
}

// === impl Front ===

impl Front {
    /// Reads a request of a caller whom the gate knows: nobody else's body is read.
    ///
    /// # Errors
    /// When no key that is known is shown; when the body is too large, breaks off or does not come in time.
    pub async fn read(&self, request: Request) -> Result<Inbound, Failure> {
        self.pipeline.admission.authenticate(request.headers())?;
        Inbound::read(request, self.max_bytes).await
    }

    /// Lets a call in and reads its message: what is read out of a body may take many times its bytes, and so needs a
    /// place first.
    ///
    /// # Errors
    /// When there is no place, or the body is no such JSON.
    pub fn enter<T: DeserializeOwned>(&self, inbound: &Inbound, method: &'static str) -> Result<(Call, T), Failure> {
        let mut call = self.pipeline.enter(Arrival {
            method,
            trace: inbound.trace.clone(),
            headers: &inbound.headers,
            n_bytes: inbound.body.len(),
            timeout: None,
        })?;
        let Object(message) = call.note(parse(&inbound.body))?;
        Ok((call, message))
    }

    /// Lets in what is a request of its own to all that follows, and part of one whose body has a place already.
    ///
    /// # Errors
    /// When there is no place.
    pub fn enter_part(&self, inbound: &Inbound, method: &'static str) -> Result<Call, Failure> {
        let Inbound { trace, headers, .. } = inbound;
        self.pipeline.enter(Arrival { method, trace: trace.clone(), headers, n_bytes: 0, timeout: None })
    }
}

// === impl Inbound ===

impl Inbound {
    async fn read(request: Request, max_bytes: usize) -> Result<Self, Failure> {
        let (head, body) = request.into_parts();
        let trace = head.extensions.get().cloned().unwrap_or_else(|| Trace::from_headers(&head.headers));
        let body = tokio::time::timeout(BODY_TIMEOUT, read_body(body, max_bytes)).await;
        let body = body.map_err(|_| RequestError::invalid("body", "it did not come in time"))??;
        Ok(Self { headers: head.headers, trace, body })
    }
}

async fn read_body(body: Body, max_bytes: usize) -> Result<Bytes, Failure> {
    let mut chunks = body.into_data_stream();
    let mut whole = Vec::new();
    loop {
        let chunk = chunks.try_next().await.map_err(|_| Failure::ClientGone)?;
        let Some(chunk) = chunk else { return Ok(whole.into()) };
        if whole.len() + chunk.len() > max_bytes {
            return Err(Failure::BodyTooLarge(max_bytes));
        }
        whole.extend_from_slice(&chunk);
    }
}

/// A response with a JSON body.
pub fn json_response(status: StatusCode, body: &impl Serialize) -> Response<Body> {
    let Ok(text) = serde_json::to_vec(body) else {
        // Only maps with keys that are no strings, and types that refuse to be written, do that; ours are neither.
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        return response;
    };
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A response that says that a request failed, in a front's own shape: its status, when to come back, and
/// what to show.
pub fn failure_response(status: StatusCode, error: &Error, body: &impl Serialize) -> Response<Body> {
    let mut response = json_response(status, body);
    if let Some(delay) = error.retry_delay() {
        let seconds = HeaderValue::from(delay.as_secs().max(1));
        response.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    if error.reason() == Reason::Unauthenticated {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

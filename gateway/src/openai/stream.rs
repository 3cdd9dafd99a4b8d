//! Streams, as OpenAI's clients read them: `[DONE]` ends a whole answer; one that is cut ends with an object
//! `{"error": ...}` instead.

use axum::response::{Response, sse::Event as Sse};
use futures_util::Stream;
use lockstep_proto::fields::Names;

pub(super) use crate::http::sse::data;

use super::error::ErrorBody;
use crate::{http::sse, status::Failure};

/// The data of the event that ends a whole answer.
pub(super) const DONE: &str = "[DONE]";

/// Streams what `pieces` makes of each event; if the answer is cut, what went wrong.
pub(super) fn response<E: Send + 'static>(
    names: &'static Names,
    events: impl Stream<Item = Result<E, Failure>> + Send + 'static,
    mut pieces: impl FnMut(E) -> Vec<Sse> + Send + 'static,
) -> Response {
    sse::response(events, move |event| match event {
        Ok(event) => pieces(event),
        Err(failure) => vec![data(&ErrorBody::new(names, &failure.to_error()))],
    })
}

/// The end of a whole answer.
pub(super) fn done() -> Sse {
    Sse::default().data(DONE)
}

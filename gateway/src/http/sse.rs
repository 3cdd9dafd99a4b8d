//! Server-sent events: each `data:` is one JSON object.

use std::{convert::Infallible, time::Duration};

use axum::response::{
    IntoResponse as _, Response,
    sse::{Event as Sse, KeepAlive},
};
use futures_util::{Stream, StreamExt as _, future::ready, stream};
use serde::Serialize;

use crate::status::Failure;

/// A comment is sent after so long a silence, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Streams what `pieces` makes of each event, and of what went wrong if the answer is cut.
pub fn response<E: Send + 'static>(
    events: impl Stream<Item = Result<E, Failure>> + Send + 'static,
    mut pieces: impl FnMut(Result<E, Failure>) -> Vec<Sse> + Send + 'static,
) -> Response {
    // What went wrong is the last that is said.
    let events = events.scan(false, |cut, event| {
        let goes_on = !std::mem::replace(cut, event.is_err());
        ready(goes_on.then_some(event))
    });
    let events = events.flat_map(move |event| stream::iter(pieces(event)));
    let events = events.map(Ok::<_, Infallible>);
    axum::response::Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// One object of a stream.
pub fn data(object: &impl Serialize) -> Sse {
    // Only maps with keys that are no strings cannot be written; there are none.
    Sse::default().data(serde_json::to_string(object).unwrap_or_default())
}

//! OpenAI's HTTP API: its requests become those of `lockstep.v1`, and answers become its JSON, whole or as server-sent
//! events. The names are those of <https://platform.openai.com/docs/api-reference>; parameters that the ecosystem has
//! added (`top_k`, `min_p`, ...) have the names that vLLM gives them.

mod chat;
mod completions;
mod constraint;
mod embeddings;
mod error;
mod logprobs;
mod messages;
mod models;
mod parameters;
mod prompts;
mod responses;
mod stream;
mod tokens;
mod usage;

use std::sync::Arc;

use axum::{
    Router,
    extract::{Path, Request, State},
    response::Response,
    routing::{get, post},
};

use http::StatusCode;

use crate::{http::Inbound, pipeline::Pipeline, status::Failure};

pub use error::refuse;

/// The front. Clones share the pipeline.
#[derive(Debug, Clone)]
struct Front {
    pipeline: Arc<Pipeline>,
    max_bytes: usize,
}

type Answer = Result<Response, Failure>;

/// Everything under `/v1`; bodies of at most `max_bytes`.
pub fn routes(pipeline: Arc<Pipeline>, max_bytes: usize) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/responses", post(responses))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*name}", get(get_model))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .with_state(Front { pipeline, max_bytes })
}

async fn no_such_path(request: Request) -> Response {
    say(Err(Failure::NoSuchPath(request.uri().path().to_owned())))
}

async fn no_such_method(request: Request) -> Response {
    let mut response = say(Err(Failure::NoSuchPath(format!("{} {}", request.method(), request.uri().path()))));
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

async fn chat_completions(State(front): State<Front>, request: Request) -> Response {
    say(chat::answer(&front, request).await)
}

async fn completions(State(front): State<Front>, request: Request) -> Response {
    say(completions::answer(&front, request).await)
}

async fn embeddings(State(front): State<Front>, request: Request) -> Response {
    say(embeddings::answer(&front, request).await)
}

async fn responses(State(front): State<Front>, request: Request) -> Response {
    say(responses::answer(&front, request).await)
}

async fn tokenize(State(front): State<Front>, request: Request) -> Response {
    say(tokens::tokenize(&front, request).await)
}

async fn detokenize(State(front): State<Front>, request: Request) -> Response {
    say(tokens::detokenize(&front, request).await)
}

async fn list_models(State(front): State<Front>, request: Request) -> Response {
    say(models::list(&front, request).await)
}

async fn get_model(State(front): State<Front>, Path(name): Path<String>, request: Request) -> Response {
    say(models::get(&front, &name, request).await)
}

fn say(answer: Answer) -> Response {
    answer.unwrap_or_else(|failure| error::response(&failure.to_error()))
}

// === impl Front ===

impl Front {
    async fn read(&self, request: Request) -> Result<Inbound, Failure> {
        Inbound::read(request, self.max_bytes).await
    }
}

//! The HTTP API of Hugging Face's Text Generation Inference: raw prompts become requests of `lockstep.v1`, and answers
//! become its JSON, whole or as server-sent events. The names are those of
//! <https://huggingface.github.io/text-generation-inference>; its chats are OpenAI's, which [`openai`](crate::openai)
//! answers.

mod answer;
mod error;
mod info;
mod request;
mod stream;
mod token;

use axum::{
    Router,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::StatusCode;

use self::request::Path;
use crate::{
    http::{Front, json_response},
    status::Failure,
};

pub use error::response as refusal;

type Answer = Result<Response, Failure>;

/// Everything that is at the server's root.
pub fn routes(front: Front) -> Router {
    Router::new()
        .route("/", post(compatible))
        .route("/generate", post(generate))
        .route("/generate_stream", post(generate_stream))
        .route("/info", get(get_info))
        .route("/health", get(health))
        .with_state(front)
}

async fn compatible(State(front): State<Front>, request: Request) -> Response {
    say(answer(&front, Path::Root, request).await)
}

async fn generate(State(front): State<Front>, request: Request) -> Response {
    say(answer(&front, Path::Generate, request).await)
}

async fn generate_stream(State(front): State<Front>, request: Request) -> Response {
    say(answer(&front, Path::GenerateStream, request).await)
}

async fn get_info(State(front): State<Front>, request: Request) -> Response {
    say(info::get(&front, request).await)
}

async fn health(State(front): State<Front>) -> Response {
    if front.pipeline.readiness.is_ready() { StatusCode::OK.into_response() } else { error::unhealthy() }
}

async fn answer(front: &Front, path: Path, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let (mut call, body) = front.enter::<request::Body>(&inbound, path.method())?;
    let request::Ask { generate, view, stream } = call.note(body.into_ask(path))?;
    let answering = front.pipeline.generate(call, generate).await?;
    let facts = answering.facts().clone();
    if stream {
        return Ok(stream::response(answering.events().await?, view, facts));
    }
    let generated = answer::Generated::new(answering.collect().await?, view, &facts);
    Ok(match path {
        // As the API does there, for clients of its predecessor.
        Path::Root => json_response(StatusCode::OK, &[generated]),
        Path::Generate | Path::GenerateStream => json_response(StatusCode::OK, &generated),
    })
}

fn say(answer: Answer) -> Response {
    answer.unwrap_or_else(|failure| refusal(&failure.to_error()))
}

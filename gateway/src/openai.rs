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

use axum::{
    extract::{Path, Request, State, rejection::PathRejection},
    response::Response,
};
use lockstep_proto::{error::Reason, fields::Names};
use schemars::SchemaGenerator;

use crate::{
    http::Front,
    openapi::{Api, Route},
    status::Failure,
};

pub(crate) use error::ErrorBody;
pub use error::response as refusal;

type Answer = Result<Response, Failure>;

/// Whether a path is of this API.
pub fn has(path: &str) -> bool {
    path.starts_with("/v1/") || path == "/tokenize" || path == "/detokenize"
}

/// Everything under `/v1`, and what belongs to it.
pub fn api() -> Api {
    let routes = vec![
        Route::post("/v1/chat/completions", chat_completions, chat::operation()),
        Route::post("/v1/completions", completions, completions::operation()),
        Route::post("/v1/embeddings", embeddings, embeddings::operation()),
        Route::post("/v1/responses", responses, responses::operation()),
        Route::post("/tokenize", tokenize, tokens::tokenize_operation()),
        Route::post("/detokenize", detokenize, tokens::detokenize_operation()),
        Route::get("/v1/models", list_models, models::list_operation()),
        Route::get("/v1/models/{*name}", get_model, models::get_operation()),
    ];
    Api {
        name: "OpenAI",
        description: "The API of OpenAI, with parameters that the ecosystem has added.",
        error: SchemaGenerator::subschema_for::<error::ErrorBody>,
        status: Reason::http_status,
        routes,
    }
}

async fn chat_completions(State(front): State<Front>, request: Request) -> Response {
    say(chat::answer(&front, request).await)
}

async fn completions(State(front): State<Front>, request: Request) -> Response {
    say_of(error::COMPLETIONS, completions::answer(&front, request).await)
}

async fn embeddings(State(front): State<Front>, request: Request) -> Response {
    say(embeddings::answer(&front, request).await)
}

async fn responses(State(front): State<Front>, request: Request) -> Response {
    say_of(error::RESPONSES, responses::answer(&front, request).await)
}

async fn tokenize(State(front): State<Front>, request: Request) -> Response {
    say(tokens::tokenize(&front, request).await)
}

async fn detokenize(State(front): State<Front>, request: Request) -> Response {
    say_of(error::TOKENS, tokens::detokenize(&front, request).await)
}

async fn list_models(State(front): State<Front>, request: Request) -> Response {
    say(models::list(&front, request).await)
}

async fn get_model(
    State(front): State<Front>,
    name: Result<Path<String>, PathRejection>,
    request: Request,
) -> Response {
    // What is no UTF-8 is no model's name.
    let name = name.map_or_else(|_| char::REPLACEMENT_CHARACTER.to_string(), |Path(name)| name);
    say(models::get(&front, &name, request).await)
}

fn say(answer: Answer) -> Response {
    say_of(error::CHATS, answer)
}

/// The same of an endpoint that has names of its own.
fn say_of(names: &Names, answer: Answer) -> Response {
    answer.unwrap_or_else(|failure| error::response_of(names, &failure.to_error()))
}

/// The model that a request names, if any. Hugging Face's clients write one of these where nobody has named one.
fn model_name(named: Option<String>) -> String {
    named.filter(|name| name != "dummy" && name != "tgi").unwrap_or_default()
}

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
    extract::{Request, State},
    response::{IntoResponse as _, Response},
};
use http::StatusCode;
use lockstep_proto::error::Reason;
use schemars::SchemaGenerator;

use self::request::Path;
use crate::{
    http::{Front, json_response},
    openapi::{Api, OF_MODELS, OF_PROMPTS, Operation, Route, SchemaOf},
    status::Failure,
};

pub use error::response as refusal;

/// Where probes ask by HTTP whether work can be taken.
pub const HEALTH: &str = "/health";

type Answer = Result<Response, Failure>;

/// Everything that is at the server's root.
pub fn api() -> Api {
    let routes = vec![
        Route::post("/", compatible, Path::Root.operation()),
        Route::post("/generate", generate, Path::Generate.operation()),
        Route::post("/generate_stream", generate_stream, Path::GenerateStream.operation()),
        Route::get("/info", get_info, info::operation()),
        Route::get(
            HEALTH,
            health,
            Operation::open("Says by its status whether work can be taken.").fails(&[Reason::Draining]),
        ),
    ];
    Api {
        name: "Text Generation Inference",
        description: "The API of Hugging Face's Text Generation Inference, for raw prompts.",
        error: SchemaGenerator::subschema_for::<error::ErrorBody>,
        status: error::status,
        routes,
    }
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

impl Path {
    fn operation(self) -> Operation {
        let schema: SchemaOf = match self {
            Self::Root => request::schema,
            Self::Generate => request::schema_of_whole,
            Self::GenerateStream => request::schema_of_streamed,
        };
        let operation = Operation::call(match self {
            Self::Root => "Continues a raw prompt, whole or as a stream.",
            Self::Generate => "Continues a raw prompt.",
            Self::GenerateStream => "Continues a raw prompt, token by token.",
        });
        let operation = operation.takes_schema(schema).fails(OF_MODELS).fails(OF_PROMPTS);
        match self {
            Self::Root => operation.answers::<[answer::Generated; 1]>().streams::<stream::Piece>(None),
            Self::Generate => operation.answers::<answer::Generated>(),
            Self::GenerateStream => operation.streams::<stream::Piece>(None),
        }
    }
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

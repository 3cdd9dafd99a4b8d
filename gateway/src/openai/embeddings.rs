//! `/v1/embeddings`.

use axum::extract::Request;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::StatusCode;
use lockstep_proto::v1;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};

use super::{
    Answer, Front,
    prompts::{PromptItem, bound_prompts, prompts},
};
use crate::{
    http::json_response,
    json::OneOrMany,
    openapi::{OF_MODELS, OF_PROMPTS, Operation},
};

/// Most inputs of one request, as the contract states it.
const MAX_INPUTS: usize = 256;

/// What a client sends.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct EmbeddingRequest {
    /// Raw prompts: a text, several, the token ids of one, or lists of token ids.
    #[schemars(transform = bound_inputs)]
    input: OneOrMany<PromptItem>,
    /// The model. Default: the only one that is served.
    model: Option<String>,
    /// How the numbers are written. Default: as numbers.
    encoding_format: Option<Encoding>,
    /// How many values of each embedding are kept, no more than it has. Default: all.
    #[schemars(range(min = 1))]
    dimensions: Option<u32>,
    /// How the states of a prompt's tokens become one. Default: their mean.
    pooling: Option<Pooling>,
    /// Whether an embedding is scaled to length 1. Default: true.
    normalize: Option<bool>,
    /// Whose request it is: for the client's own records.
    #[serde(rename = "user")]
    _user: Option<String>,
}

/// How numbers are written.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    /// As JSON has them.
    #[default]
    Float,
    /// The same numbers, as little-endian `f32`.
    Base64,
}

/// How the states of a prompt's tokens become one.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Pooling {
    Mean,
    Last,
}

/// Embeddings, in the order of the inputs.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "EmbeddingList")]
struct List {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: Usage,
}

/// The embedding of an input.
#[derive(Debug, Serialize, JsonSchema)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Values,
}

/// Numbers, or their bytes in Base64.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "EmbeddingValues")]
enum Values {
    Float(Vec<f32>),
    Base64(String),
}

/// Tokens of all inputs.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "EmbeddingUsage")]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
}

pub(super) fn operation() -> Operation {
    Operation::call("Turns raw prompts into vectors.")
        .takes::<EmbeddingRequest>()
        .answers::<List>()
        .fails(OF_MODELS)
        .fails(OF_PROMPTS)
}

fn bound_inputs(inputs: &mut Schema) {
    bound_prompts(inputs, MAX_INPUTS);
}

pub(super) async fn answer(front: &Front, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let (mut call, request) = front.enter::<EmbeddingRequest>(&inbound, "embeddings")?;
    let encoding = request.encoding_format.unwrap_or_default();
    let inputs = call.note(prompts("input", &request.input, MAX_INPUTS))?;
    let pooling = match request.pooling {
        None => v1::Pooling::Unspecified,
        Some(Pooling::Mean) => v1::Pooling::Mean,
        Some(Pooling::Last) => v1::Pooling::Last,
    };
    let wire = v1::EmbedRequest {
        model: super::model_name(request.model),
        inputs: inputs.into_iter().map(|prompt| v1::RawPrompt { prompt: Some(prompt) }).collect(),
        pooling: pooling.into(),
        normalize: request.normalize,
        dimensions: request.dimensions,
    };
    let answer = front.pipeline.embed(call, wire).await?;
    let embedding = |(index, embedding): (usize, v1::Embedding)| Embedding {
        object: "embedding",
        index,
        embedding: Values::new(embedding.values, encoding),
    };
    let prompt_tokens = answer.prompt_tokens;
    let body = List {
        object: "list",
        data: answer.embeddings.into_iter().enumerate().map(embedding).collect(),
        model: answer.model,
        usage: Usage { prompt_tokens, total_tokens: prompt_tokens },
    };
    Ok(json_response(StatusCode::OK, &body))
}

// === impl Values ===

impl Values {
    fn new(values: Vec<f32>, encoding: Encoding) -> Self {
        match encoding {
            Encoding::Float => Self::Float(values),
            Encoding::Base64 => {
                let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
                Self::Base64(BASE64_STANDARD.encode(bytes))
            }
        }
    }
}

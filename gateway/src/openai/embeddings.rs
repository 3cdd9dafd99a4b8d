//! `/v1/embeddings`.

use axum::extract::Request;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::StatusCode;
use lockstep_proto::v1;
use serde::{Deserialize, Serialize};

use super::{
    Answer, Front,
    prompts::{PromptItem, prompts},
};
use crate::{http::json_response, json::OneOrMany};

/// Most inputs of one request, as the contract states it.
const MAX_INPUTS: usize = 256;

/// What a client sends.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EmbeddingRequest {
    input: OneOrMany<PromptItem>,
    model: Option<String>,
    encoding_format: Option<Encoding>,
    dimensions: Option<u32>,
    pooling: Option<Pooling>,
    normalize: Option<bool>,
    #[serde(rename = "user")]
    _user: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    #[default]
    Float,
    /// The same numbers, as little-endian `f32`.
    Base64,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Pooling {
    Mean,
    Last,
}

#[derive(Debug, Serialize)]
struct List {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: Usage,
}

#[derive(Debug, Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Values,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Values {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Serialize)]
struct Usage {
    prompt_tokens: u32,
    total_tokens: u32,
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

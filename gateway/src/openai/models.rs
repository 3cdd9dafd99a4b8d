//! `/v1/models`.

use axum::{extract::Request, response::Response};
use http::StatusCode;
use lockstep_proto::v1;
use schemars::JsonSchema;
use serde::Serialize;

use super::{Answer, Front};
use crate::{
    http::json_response,
    openapi::{OF_MODELS, Operation},
};

/// All models.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ModelList")]
struct List {
    object: &'static str,
    data: Vec<Model>,
}

/// A model that is served.
#[derive(Debug, Serialize, JsonSchema)]
struct Model {
    id: String,
    object: &'static str,
    /// When the model was made, which its files do not say.
    created: u64,
    owned_by: &'static str,
    /// What its context holds, prompt and answer together. Unit: tokens.
    max_model_len: u32,
    /// What a chat or a completion that sets nothing is sampled with.
    sampling_defaults: Option<SamplingDefaults>,
}

/// Parameters by the names that requests have for them.
#[derive(Debug, Serialize, JsonSchema)]
struct SamplingDefaults {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    /// Of a chat; null: what the context leaves.
    max_tokens: Option<u32>,
}

pub(super) fn list_operation() -> Operation {
    Operation::call("Lists the models that are served.").answers::<List>()
}

pub(super) fn get_operation() -> Operation {
    Operation::call("Describes a model that is served.")
        .of("name", "The model's name.")
        .answers::<Model>()
        .fails(OF_MODELS)
}

pub(super) async fn list(front: &Front, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let models = front.pipeline.list_models(&inbound.headers, &inbound.trace).await?;
    Ok(ok(&List { object: "list", data: models.into_iter().map(Model::from).collect() }))
}

pub(super) async fn get(front: &Front, name: &str, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let model = front.pipeline.model(name, &inbound.headers, &inbound.trace).await?;
    Ok(ok(&Model::from(model)))
}

fn ok(body: &impl Serialize) -> Response {
    json_response(StatusCode::OK, body)
}

impl From<v1::Model> for Model {
    fn from(model: v1::Model) -> Self {
        Self {
            id: model.name,
            object: "model",
            created: 0,
            owned_by: "lockstep",
            max_model_len: model.context_length,
            sampling_defaults: model.sampling_defaults.map(SamplingDefaults::from),
        }
    }
}

impl From<v1::SamplingParams> for SamplingDefaults {
    fn from(params: v1::SamplingParams) -> Self {
        Self {
            temperature: params.temperature,
            top_p: params.top_p,
            top_k: params.top_k,
            min_p: params.min_p,
            typical_p: params.typical_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            max_tokens: params.max_new_tokens,
        }
    }
}

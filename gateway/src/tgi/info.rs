//! `/info`: the model and the limits.

use axum::extract::Request;
use http::StatusCode;
use schemars::JsonSchema;
use serde::Serialize;

use super::Answer;
use crate::{
    http::{Front, json_response},
    openapi::{OF_MODELS, Operation},
    sampling::read::MAX_STOP,
};

/// The model that is served, and the limits.
#[derive(Debug, Serialize, JsonSchema)]
struct Info {
    model_id: String,
    /// The digest of its files and settings.
    model_sha: String,
    model_pipeline_tag: &'static str,
    max_concurrent_requests: u32,
    max_best_of: u32,
    max_stop_sequences: usize,
    max_input_tokens: u32,
    max_total_tokens: u32,
    router: &'static str,
    version: &'static str,
}

pub(super) fn operation() -> Operation {
    Operation::call("Describes the model that is served, and the limits.").answers::<Info>().fails(OF_MODELS)
}

pub(super) async fn get(front: &Front, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let model = front.pipeline.model("", &inbound.headers, &inbound.trace).await?;
    let info = Info {
        model_id: model.name,
        model_sha: model.digest,
        model_pipeline_tag: "text-generation",
        max_concurrent_requests: front.pipeline.admission.limits().requests,
        max_best_of: 1,
        max_stop_sequences: MAX_STOP,
        // At least one token must fit behind a prompt.
        max_input_tokens: model.context_length.saturating_sub(1),
        max_total_tokens: model.context_length,
        router: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
    };
    Ok(json_response(StatusCode::OK, &info))
}

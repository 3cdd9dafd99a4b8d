//! `/v1/models`.

use axum::{extract::Request, response::Response};
use http::StatusCode;
use lockstep_proto::v1;
use serde::Serialize;

use super::{Answer, Front};
use crate::http::json_response;

#[derive(Debug, Serialize)]
struct List {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Debug, Serialize)]
struct Model {
    id: String,
    object: &'static str,
    /// When the model was made, which its files do not say.
    created: u64,
    owned_by: &'static str,
    max_model_len: u32,
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
        let max_model_len = model.context_length;
        Self { id: model.name, object: "model", created: 0, owned_by: "lockstep", max_model_len }
    }
}

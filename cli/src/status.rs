//! `lockstep status`: whether a cluster takes work, and which models it serves.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use lockstep_proto::{
    client::health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient},
    v1::{ListModelsRequest, Model},
};

use crate::{
    failure::{Done, EX_UNAVAILABLE, Failure},
    target::Target,
};

/// The service whose health is the cluster's readiness.
pub(crate) const INFERENCE: &str = "lockstep.v1.InferenceService";

/// Prints the state; the exit status says whether the cluster takes work.
pub(crate) async fn run(target: &Target) -> Done {
    let ready = is_ready(target).await?;
    let answer = target.models()?.list_models(target.request(ListModelsRequest {})?).await;
    let models = answer.map_err(|status| target.failure(&status))?.into_inner().models;
    let mut out = io::stdout().lock();
    writeln!(out, "{}  {}", target.target, if ready { "ready" } else { "not ready" })?;
    for model in &models {
        writeln!(out, "{}", describe(model))?;
    }
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::from(EX_UNAVAILABLE) })
}

/// Whether the gateway says that it can take work.
pub(crate) async fn is_ready(target: &Target) -> Result<bool, Failure> {
    let request = target.request(HealthCheckRequest { service: INFERENCE.into() })?;
    let answer = HealthClient::new(target.channel()?).check(request).await;
    let answer = answer.map_err(|status| target.failure(&status))?.into_inner();
    Ok(answer.status() == ServingStatus::Serving)
}

fn describe(model: &Model) -> String {
    let digest = model.digest.get(..12).unwrap_or(&model.digest);
    let chat = if model.has_chat_template { "chat" } else { "no chat template" };
    format!(
        "  {}  {}/{} replicas  context {}  vocabulary {}  {chat}  digest {digest}",
        model.name, model.ready_replicas, model.replicas, model.context_length, model.vocab_size
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_line_holds_what_an_operator_asks_for() {
        let model = Model {
            name: "m".into(),
            digest: "0123456789abcdef".into(),
            context_length: 2048,
            vocab_size: 49152,
            embedding_size: 576,
            has_chat_template: true,
            ready_replicas: 1,
            replicas: 2,
            sampling_defaults: None,
        };
        let expected = "  m  1/2 replicas  context 2048  vocabulary 49152  chat  digest 0123456789ab";
        assert_eq!(describe(&model), expected);
    }
}

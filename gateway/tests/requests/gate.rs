//! Requests that do not get in, or ask for what they cannot have.

use lockstep_gateway::admission::ApiKey;
use lockstep_proto::{
    error::{Error, Reason},
    v1::{ChatRequest, GenerateRequest, GetModelRequest, ListModelsRequest, OutputOptions, SamplingParams},
};
use tonic::{Request, Status};

use super::{
    cluster::{Cluster, Setup},
    life::{conversation, generate},
};

fn paths(error: &Error) -> Vec<&str> {
    error.field_violations().iter().map(|violation| violation.path.as_str()).collect()
}

fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Error {
    Error::from_status(&outcome.unwrap_err())
}

#[tokio::test]
async fn every_field_at_fault_is_named() {
    let cluster = Cluster::start().await;
    let sampling = SamplingParams {
        top_p: Some(1.5),
        temperature: Some(-1.0),
        stop: vec![String::new()],
        ..SamplingParams::default()
    };
    let output = OutputOptions { logprobs: Some(21), ..OutputOptions::default() };
    let request = GenerateRequest { sampling: Some(sampling), output: Some(output), ..GenerateRequest::default() };
    let error = refused(cluster.client().generate(request).await);
    assert_eq!(error.reason(), Reason::InvalidArgument);
    let mut found = paths(&error);
    found.sort_unstable();
    assert_eq!(found, ["output.logprobs", "prompt", "sampling.stop[0]", "sampling.temperature", "sampling.top_p"]);
}

#[tokio::test]
async fn a_prompt_must_leave_room_for_what_is_asked() {
    let cluster = Cluster::start().await;
    let full = "x".repeat(999);
    let error = refused(cluster.client().generate(generate(&full)).await);
    assert_eq!((error.reason(), paths(&error)), (Reason::PromptTooLong, vec!["prompt"]), "{error}");
    let sampling = SamplingParams { max_new_tokens: Some(990), ..SamplingParams::default() };
    let request = GenerateRequest { sampling: Some(sampling), ..generate("twelve bytes") };
    let error = refused(cluster.client().generate(request).await);
    assert_eq!((error.reason(), paths(&error)), (Reason::InvalidArgument, vec!["sampling.max_new_tokens"]));
}

#[tokio::test]
async fn the_policy_refuses_by_name() {
    let policy = "[models.m.caps]\nn = 2\n";
    let cluster = Cluster::with(Setup { policy, ..Setup::default() }).await;
    let sampling = SamplingParams { n: Some(3), ..SamplingParams::default() };
    let request = GenerateRequest { sampling: Some(sampling), ..generate("x") };
    let error = refused(cluster.client().generate(request).await);
    assert_eq!((error.reason(), paths(&error)), (Reason::OverPolicy, vec!["sampling.n"]));
}

#[tokio::test]
async fn a_chat_needs_a_template_and_a_conversation_that_it_takes() {
    let cluster = Cluster::start().await;
    let error = refused(cluster.client().chat(ChatRequest::default()).await);
    assert_eq!((error.reason(), paths(&error)), (Reason::InvalidArgument, vec!["conversation.messages"]));

    let cluster = Cluster::with_unready(Setup::default()).await;
    cluster.tokenizers[0].has_no_template.store(true, std::sync::atomic::Ordering::SeqCst);
    cluster.wait_for_health(true).await;
    let chat = ChatRequest { conversation: conversation(&["hi"]), ..ChatRequest::default() };
    assert_eq!(refused(cluster.client().chat(chat).await).reason(), Reason::NoChatTemplate);
}

#[tokio::test]
async fn only_callers_with_a_key_get_in() {
    let settings = |settings: &mut lockstep_gateway::config::GatewaySettings| {
        settings.api_keys = vec![ApiKey::new("sesame").unwrap()];
    };
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    let with_key = |key: &str| {
        let mut request = Request::new(ListModelsRequest::default());
        request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        request
    };
    assert_eq!(refused(cluster.client().generate(generate("x")).await).reason(), Reason::Unauthenticated);
    assert_eq!(refused(cluster.models().get_model(GetModelRequest::default()).await).reason(), Reason::Unauthenticated);
    assert_eq!(refused(cluster.models().list_models(with_key("Sesame")).await).reason(), Reason::Unauthenticated);
    assert_eq!(cluster.models().list_models(with_key("sesame")).await.unwrap().into_inner().models.len(), 1);
    assert!(cluster.metrics().await.contains("outcome=\"UNAUTHENTICATED\"} 1"));
}

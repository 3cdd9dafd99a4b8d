//! What is served, and readiness.

use lockstep_proto::{
    error::{Error, Reason},
    v1::{GenerateRequest, GetModelRequest, ListModelsRequest, Model, SamplingParams},
};

use super::{
    cluster::{Cluster, Setup},
    fake_tokenizer::VOCAB_SIZE,
    fake_worker::EMBEDDING_SIZE,
    life::generate,
};

async fn refusal(cluster: &Cluster, model: &str) -> Error {
    let request = GenerateRequest { model: model.into(), ..generate("x") };
    Error::from_status(&cluster.client().generate(request).await.unwrap_err())
}

#[tokio::test]
async fn a_model_is_described_by_its_groups_and_its_tokenizer() {
    let cluster = Cluster::start().await;
    let sampling_defaults = SamplingParams {
        do_sample: Some(true),
        temperature: Some(1.0),
        top_k: Some(0),
        top_p: Some(1.0),
        min_p: Some(0.0),
        typical_p: Some(1.0),
        repetition_penalty: Some(1.0),
        presence_penalty: Some(0.0),
        frequency_penalty: Some(0.0),
        ..SamplingParams::default()
    };
    let expected = Model {
        name: "m".into(),
        digest: "d1".into(),
        context_length: 1_000,
        vocab_size: VOCAB_SIZE,
        embedding_size: EMBEDDING_SIZE,
        has_chat_template: true,
        ready_replicas: 1,
        replicas: 1,
        sampling_defaults: Some(sampling_defaults),
    };
    let listed = cluster.models().list_models(ListModelsRequest::default()).await.unwrap().into_inner().models;
    assert_eq!(listed, std::slice::from_ref(&expected));
    for name in ["", "m"] {
        let got = cluster.models().get_model(GetModelRequest { name: name.into() }).await.unwrap().into_inner();
        assert_eq!(got.model.as_ref(), Some(&expected));
    }
}

#[tokio::test]
async fn a_model_that_is_not_served_is_not_found() {
    let cluster = Cluster::start().await;
    assert_eq!(refusal(&cluster, "other").await.reason(), Reason::ModelNotFound);
    let status = cluster.models().get_model(GetModelRequest { name: "other".into() }).await.unwrap_err();
    assert_eq!(Error::from_status(&status).reason(), Reason::ModelNotFound);
}

#[tokio::test]
async fn with_several_models_a_request_must_name_one() {
    let two = |n_th: usize, worker: &super::fake_worker::FakeWorker| {
        worker.status.send_modify(|status| status.model = format!("m{n_th}"));
    };
    let mut cluster = Cluster::with(Setup { n_groups: 2, groups: two, ..Setup::default() }).await;
    while cluster.models().list_models(ListModelsRequest::default()).await.unwrap().into_inner().models.len() < 2 {}
    let error = refusal(&cluster, "").await;
    assert_eq!(error.reason(), Reason::InvalidArgument);
    assert!(error.message().contains("`m0`, `m1`"), "{error}");
    let mut client = cluster.client();
    let request = GenerateRequest { model: "m1".into(), ..generate("x") };
    let call = tokio::spawn(async move { client.generate(request).await });
    drop(cluster.groups[1].session().await);
    call.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn configured_names_narrow_what_is_served() {
    let settings =
        |settings: &mut lockstep_gateway::config::GatewaySettings| settings.models = vec!["m1".into(), "absent".into()];
    let groups = |n_th: usize, worker: &super::fake_worker::FakeWorker| {
        worker.status.send_modify(|status| status.model = format!("m{n_th}"));
    };
    let cluster = Cluster::with(Setup { n_groups: 2, settings, groups, ..Setup::default() }).await;
    let listed = cluster.models().list_models(ListModelsRequest::default()).await.unwrap().into_inner().models;
    assert_eq!(listed.iter().map(|model| model.name.as_str()).collect::<Vec<_>>(), ["m1"]);
    assert_eq!(refusal(&cluster, "m0").await.reason(), Reason::ModelNotFound);
    assert_eq!(refusal(&cluster, "absent").await.reason(), Reason::GroupUnavailable);
}

#[tokio::test]
async fn the_gateway_is_ready_when_a_group_and_a_tokenizer_are() {
    let groups = |_: usize, worker: &super::fake_worker::FakeWorker| {
        worker.status.send_modify(|status| status.ready = false);
    };
    let cluster = Cluster::with_unready(Setup { groups, ..Setup::default() }).await;
    cluster.wait_for_health(false).await;
    assert_eq!(refusal(&cluster, "").await.reason(), Reason::GroupUnavailable);
    cluster.groups[0].worker.status.send_modify(|status| status.ready = true);
    cluster.wait_for_health(true).await;
    cluster.shutdown.start();
    cluster.wait_for_health(false).await;
}

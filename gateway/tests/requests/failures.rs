//! Groups and tokenizers that go away or break their contracts.

use std::sync::atomic::Ordering;

use lockstep_proto::{
    error::{Error, Reason},
    v1::{Constraint, GenerateRequest, GenerateResponse, SamplingParams, constraint::Kind},
    worker::v1::{FinishReason as WorkerReason, Tokens, generate_response::Event},
};
use tonic::{Code, Status};

use super::{
    backpressure::ready,
    cluster::{Cluster, Setup, in_time},
    fake_tokenizer::FakeTokenizer,
    fake_worker::Session,
    life::{generate, stream},
};

async fn answer(mut session: Session) {
    session.text(0, "a").await;
    session.finish(0, WorkerReason::Length, None).await;
}

fn call(cluster: &Cluster) -> tokio::task::JoinHandle<Result<GenerateResponse, Error>> {
    let mut client = cluster.client();
    tokio::spawn(async move {
        let response = client.generate(generate("x")).await;
        response.map(tonic::Response::into_inner).map_err(|status| Error::from_status(&status))
    })
}

#[tokio::test]
async fn a_group_that_fails_before_its_first_token_is_replaced_unseen() {
    let prefer_first = |n_th: usize, worker: &super::fake_worker::FakeWorker| {
        worker.status.send_modify(|status| status.outstanding_tokens = n_th as u64 * 10_000);
    };
    let mut cluster = Cluster::with(Setup { n_groups: 2, groups: prefer_first, ..Setup::default() }).await;
    ready(&cluster, 2).await;
    let call = call(&cluster);
    let session = cluster.groups[0].session().await;
    session.fail(Status::unavailable("a rank is gone")).await;
    let session = cluster.groups[1].session().await;
    answer(session).await;
    assert_eq!(call.await.unwrap().unwrap().choices[0].text, "a");
}

#[tokio::test]
async fn a_group_that_fails_after_its_first_token_is_seen() {
    let mut cluster = Cluster::with(Setup { n_groups: 2, ..Setup::default() }).await;
    ready(&cluster, 2).await;
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.stream_generate(stream("x")).await.unwrap().into_inner() });
    let (first, second) = cluster.groups.split_at_mut(1);
    let mut session = tokio::select! {
        session = first[0].session() => session,
        session = second[0].session() => session,
    };
    session.text(0, "a").await;
    let mut events = call.await.unwrap();
    for _ in 0..2 {
        assert!(in_time(events.message()).await.unwrap().is_some());
    }
    session.fail(Status::unavailable("a rank is gone")).await;
    let error = Error::from_status(&in_time(events.message()).await.unwrap_err());
    assert_eq!((error.reason(), error.code()), (Reason::GroupUnavailable, Code::Unavailable));
    assert!(error.message().contains("a rank is gone"), "{error}");
}

#[tokio::test]
async fn a_leader_that_is_killed_is_unavailable_and_the_gateway_no_longer_ready() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.stream_generate(stream("x")).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    session.text(0, "a").await;
    let mut events = call.await.unwrap();
    for _ in 0..2 {
        assert!(in_time(events.message()).await.unwrap().is_some());
    }
    cluster.groups[0].kill();
    let error = Error::from_status(&in_time(events.message()).await.unwrap_err());
    assert_eq!(error.reason(), Reason::GroupUnavailable, "{error}");
    cluster.wait_for_health(false).await;
    let error = Error::from_status(&cluster.client().generate(generate("x")).await.unwrap_err());
    assert_eq!(error.reason(), Reason::GroupUnavailable, "{error}");
    assert!(error.retry_delay().is_some());
}

#[tokio::test]
async fn a_stream_that_ends_before_its_choices_is_no_success() {
    let mut cluster = Cluster::start().await;
    let call = call(&cluster);
    let mut session = cluster.session().await;
    session.text(0, "a").await;
    drop(session);
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::GroupUnavailable, "{error}");
}

#[tokio::test]
async fn groups_that_drain_or_are_not_ready_get_nothing() {
    let mut cluster = Cluster::with(Setup { n_groups: 2, ..Setup::default() }).await;
    ready(&cluster, 2).await;
    cluster.groups[0].worker.status.send_modify(|status| status.draining = true);
    ready(&cluster, 1).await;
    for _ in 0..3 {
        let call = call(&cluster);
        let session = cluster.groups[1].session().await;
        answer(session).await;
        call.await.unwrap().unwrap();
    }
    cluster.groups[1].worker.status.send_modify(|status| status.ready = false);
    cluster.wait_for_health(false).await;
    cluster.groups[0].worker.status.send_modify(|status| status.draining = false);
    cluster.wait_for_health(true).await;
}

#[tokio::test]
async fn a_worker_that_breaks_its_contract_is_our_bug() {
    let mut cluster = Cluster::start().await;
    for wrong in [
        Tokens { choice: 1, position: 0, token_ids: vec![97], logprobs: Vec::new() },
        Tokens { choice: 0, position: 7, token_ids: vec![97], logprobs: Vec::new() },
    ] {
        let call = call(&cluster);
        let mut session = cluster.session().await;
        session.send(Event::Tokens(wrong)).await;
        assert_eq!(call.await.unwrap().unwrap_err().reason(), Reason::Internal);
        in_time(session.dropped()).await;
    }
    let call = call(&cluster);
    let session = cluster.session().await;
    session.send_alone(Event::Tokens(Tokens { token_ids: vec![97], ..Tokens::default() })).await;
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::Internal, "tokens before the start: {error}");
}

#[tokio::test]
async fn a_constraint_that_the_worker_refuses_is_named_as_the_request_names_it() {
    let cluster = Cluster::start().await;
    let constraint = Constraint { kind: Some(Kind::Gbnf("root ::= <nobody>".into())) };
    let sampling = SamplingParams { constraint: Some(constraint), ..SamplingParams::default() };
    let request = GenerateRequest { sampling: Some(sampling), ..generate("x") };
    let refuse = |error: Error| *cluster.groups[0].worker.refusal.lock().unwrap() = Some(error.into());
    let unknown = Error::new(Reason::InvalidArgument, "not valid");
    refuse(unknown.clone().violation("sampling.constraint.lark", "unknown special token"));
    let status = cluster.client().generate(request.clone()).await.unwrap_err();
    let error = Error::from_status(&status);
    assert_eq!(error.reason(), Reason::InvalidArgument, "{error}");
    let [found] = error.field_violations() else { panic!("{error:?}") };
    assert_eq!((found.path.as_str(), found.message.as_str()), ("sampling.constraint.gbnf", "unknown special token"));

    refuse(unknown.violation("request_id", "has 0 bytes"));
    let status = cluster.client().generate(request.clone()).await.unwrap_err();
    assert_eq!(Error::from_status(&status).reason(), Reason::Internal, "that is the gateway's own fault");

    refuse(Error::new(Reason::Unimplemented, "this model's files have no vocabulary"));
    let error = Error::from_status(&cluster.client().generate(request).await.unwrap_err());
    assert_eq!(error.reason(), Reason::Unimplemented, "{error}");
    assert!(error.message().contains("no vocabulary"), "{error}");
}

#[tokio::test]
async fn what_is_too_large_for_the_tokenizer_is_said_to_be() {
    let cluster = Cluster::start().await;
    let refusal = Error::new(Reason::MessageTooLarge, "decoded message length too large");
    *cluster.tokenizers[0].refusal.lock().unwrap() = Some(refusal.into());
    let error = call(&cluster).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::MessageTooLarge, "{error}");
    assert!(error.message().starts_with("tokenizer 127.0.0.1:"), "{error}");
}

#[tokio::test]
async fn calls_go_on_with_the_tokenizers_that_answer() {
    let mut cluster = Cluster::with(Setup { n_tokenizers: 2, ..Setup::default() }).await;
    cluster.tokenizers[0].is_down.store(true, Ordering::SeqCst);
    for _ in 0..4 {
        let call = call(&cluster);
        answer(cluster.session().await).await;
        call.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn without_a_tokenizer_requests_fail_by_name_until_one_is_back() {
    let mut cluster = Cluster::start().await;
    cluster.tokenizers[0].is_down.store(true, Ordering::SeqCst);
    let error = call(&cluster).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::TokenizerUnavailable);
    assert!(error.message().contains("no tokenizer answers: 127.0.0.1:"), "{error}");
    cluster.wait_for_health(false).await;
    cluster.tokenizers[0].is_down.store(false, Ordering::SeqCst);
    cluster.wait_for_health(true).await;
    let call = call(&cluster);
    answer(cluster.session().await).await;
    call.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_tokenizer_that_goes_down_in_the_middle_ends_no_stream() {
    let mut cluster = Cluster::start().await;
    let call = call(&cluster);
    let mut session = cluster.session().await;
    cluster.tokenizers[0].is_down.store(true, Ordering::SeqCst);
    cluster.wait_for_health(false).await;
    session.text(0, "a").await;
    session.finish(0, WorkerReason::Length, None).await;
    assert_eq!(call.await.unwrap().unwrap().choices[0].text, "a");
}

/// Why a gateway with such tokenizers cannot answer.
async fn refusal(cluster: &Cluster) -> Error {
    in_time(async {
        loop {
            let error = call(cluster).await.unwrap().unwrap_err();
            // At first no group is known.
            if error.reason() != Reason::GroupUnavailable {
                return error;
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_vocabulary_that_does_not_fit_is_said_to_be() {
    let tokenizers = |tokenizer: &FakeTokenizer| tokenizer.has_no_vocabulary.store(true, Ordering::SeqCst);
    let cluster = Cluster::with_unready(Setup { tokenizers, ..Setup::default() }).await;
    let error = refusal(&cluster).await;
    assert_eq!(error.reason(), Reason::TokenizerUnavailable, "{error}");
    assert!(error.message().contains("its vocabulary has 0 ids instead of 259"), "{error}");
}

#[tokio::test]
async fn a_vocabulary_of_another_fingerprint_is_not_taken() {
    let tokenizers = |tokenizer: &FakeTokenizer| {
        *tokenizer.fingerprint_of_vocabulary.lock().unwrap() = Some("new".into());
    };
    let mut cluster = Cluster::with_unready(Setup { tokenizers, ..Setup::default() }).await;
    let error = refusal(&cluster).await;
    assert_eq!(error.reason(), Reason::TokenizerUnavailable, "{error}");
    assert!(error.message().contains("its model has just changed"), "{error}");
    *cluster.tokenizers[0].fingerprint.lock().unwrap() = "new".into();
    cluster.wait_for_health(true).await;
    let call = call(&cluster);
    answer(cluster.session().await).await;
    call.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_id_that_the_tokenizer_lacks_is_named() {
    let mut cluster = Cluster::start().await;
    let call = call(&cluster);
    let mut session = cluster.session().await;
    session.ids(0, &[259]).await;
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::Internal, "{error}");
    assert!(error.message().ends_with("token id 259 is not below the vocabulary's 259"), "{error}");
    in_time(session.dropped()).await;
}

#[tokio::test]
async fn a_tokenizer_that_comes_back_changed_is_noticed() {
    let mut cluster = Cluster::start().await;
    let tokenizer = cluster.tokenizers[0].clone();
    tokenizer.is_down.store(true, Ordering::SeqCst);
    call(&cluster).await.unwrap().unwrap_err();
    cluster.wait_for_health(false).await;
    *tokenizer.fingerprint.lock().unwrap() = "changed".into();
    tokenizer.has_no_template.store(true, Ordering::SeqCst);
    tokenizer.is_down.store(false, Ordering::SeqCst);
    cluster.wait_for_health(true).await;
    let model = cluster.models().get_model(lockstep_proto::v1::GetModelRequest::default()).await.unwrap();
    assert!(!model.into_inner().model.unwrap().has_chat_template);
    let call = call(&cluster);
    answer(cluster.session().await).await;
    call.await.unwrap().unwrap();
}

//! Embeddings: many prompts in one call.

use std::time::Duration;

use lockstep_proto::{
    client::with_deadline,
    error::{Error, Reason},
    v1::{self, EmbedRequest, EmbedResponse, RawPrompt, TokenIds, raw_prompt::Prompt},
    worker::v1::Pooling,
};
use tokio::task::JoinHandle;
use tonic::Status;

use super::{
    backpressure::ready,
    cluster::{Cluster, Setup, in_time},
    fake_tokenizer::BOS,
    fake_worker::{Embedding, FakeWorker},
    life::prompt,
};

fn ids(ids: &[u32]) -> RawPrompt {
    RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids: ids.to_vec() })) }
}

fn embed(inputs: Vec<RawPrompt>) -> EmbedRequest {
    EmbedRequest { inputs, ..EmbedRequest::default() }
}

fn call(cluster: &Cluster, request: EmbedRequest) -> JoinHandle<Result<EmbedResponse, Error>> {
    let mut client = cluster.client();
    tokio::spawn(async move {
        let response = client.embed(with_deadline(request, Duration::from_secs(10))).await;
        response.map(tonic::Response::into_inner).map_err(|status| Error::from_status(&status))
    })
}

fn refused(error: &Error) -> (Reason, Vec<&str>) {
    (error.reason(), error.field_violations().iter().map(|violation| violation.path.as_str()).collect())
}

#[tokio::test]
async fn inputs_are_embedded_in_their_order_cut_and_then_scaled() {
    let mut cluster = Cluster::start().await;
    let inputs = vec![ids(&[7]), prompt("Hi").unwrap(), ids(&[7])];
    let call = call(&cluster, EmbedRequest { pooling: 2, dimensions: Some(3), ..embed(inputs) });
    cluster.groups[0].embedding().await.answer.send(Ok(vec![0.0; 4])).unwrap();
    let (first, second) = (cluster.groups[0].embedding().await, cluster.groups[0].embedding().await);
    let is_text = |embedding: &Embedding| embedding.request.prompt_token_ids.len() == 3;
    let (text, other) = if is_text(&first) { (first, second) } else { (second, first) };
    assert_eq!(text.request.prompt_token_ids, [BOS, u32::from(b'H'), u32::from(b'i')]);
    assert_eq!(other.request.prompt_token_ids, [7]);
    assert_eq!((text.request.pooling(), other.request.pooling()), (Pooling::Last, Pooling::Last));
    assert!((1..=9_800).contains(&other.request.budget_ms.unwrap()));
    let request_id = text.request.request_id.clone();
    other.answer.send(Ok(vec![0.0, 2.0, 0.0, 9.0])).unwrap();
    text.answer.send(Ok(vec![3.0, 0.0, -4.0, 9.0])).unwrap();
    let EmbedResponse { embeddings, .. } = &call.await.unwrap().unwrap();
    let embedding = |values: &[f32], prompt_tokens| v1::Embedding { values: values.to_vec(), prompt_tokens };
    let expected = [embedding(&[0.0; 3], 1), embedding(&[0.6, 0.0, -0.8], 3), embedding(&[0.0, 1.0, 0.0], 1)];
    assert_eq!(*embeddings, expected);

    let request = EmbedRequest { normalize: Some(false), ..embed(vec![ids(&[1, 2])]) };
    let call = self::call(&cluster, request);
    let last = cluster.groups[0].embedding().await;
    assert_eq!(last.request.pooling(), Pooling::Mean, "by default");
    assert_ne!(last.request.request_id, request_id);
    last.answer.send(Ok(vec![3.0, 0.0, -4.0, 9.0])).unwrap();
    let response = call.await.unwrap().unwrap();
    assert_eq!(response.embeddings, [embedding(&[3.0, 0.0, -4.0, 9.0], 2)]);
    assert_eq!((response.model.as_str(), response.model_digest.as_str(), response.prompt_tokens), ("m", "d1", 2));
    let metrics = cluster.metrics().await;
    for line in [
        "lockstep_gateway_requests_total{method=\"Embed\",outcome=\"OK\"} 2",
        "lockstep_gateway_prompt_tokens_total 7",
        "lockstep_gateway_requests_in_flight 0",
    ] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
}

#[tokio::test]
async fn the_first_input_goes_alone_and_then_only_so_many_at_a_time() {
    const AT_ONCE: usize = 16;
    let mut cluster = Cluster::start().await;
    let inputs: Vec<_> = (0..40).map(|id| ids(&[id])).collect();
    let call = call(&cluster, embed(inputs));
    let mut running = Vec::new();
    for n_answered in 0..40 {
        let at_once = if n_answered == 0 { 1 } else { AT_ONCE };
        while running.len() < at_once.min(40 - n_answered) {
            running.push(cluster.groups[0].embedding().await);
        }
        let Embedding { request, answer } = running.remove(0);
        let value = request.prompt_token_ids[0] as f32;
        answer.send(Ok(vec![value, 1.0, 0.0, 0.0])).unwrap();
        // Were there no bound, all would be there by now.
        let sent: Vec<u32> = running.iter().flat_map(|other| other.request.prompt_token_ids.clone()).collect();
        assert!(sent.iter().all(|id| (*id as usize) < n_answered + at_once), "{sent:?} beside {n_answered} answered");
    }
    let response = call.await.unwrap().unwrap();
    for (id, embedding) in response.embeddings.iter().enumerate() {
        let ratio = embedding.values[0] / embedding.values[1];
        assert!((ratio - id as f32).abs() < 1e-4, "{id}: {embedding:?}");
    }
}

#[tokio::test]
async fn a_group_that_fails_is_replaced_unseen() {
    let prefer_first = |n_th: usize, worker: &FakeWorker| {
        worker.status.send_modify(|status| status.outstanding_tokens = n_th as u64 * 10_000);
    };
    let mut cluster = Cluster::with(Setup { n_groups: 2, groups: prefer_first, ..Setup::default() }).await;
    ready(&cluster, 2).await;
    let call = call(&cluster, embed(vec![ids(&[1])]));
    cluster.groups[0].embedding().await.answer.send(Err(Status::unavailable("a rank is gone"))).unwrap();
    cluster.groups[1].embedding().await.answer.send(Ok(vec![1.0, 0.0, 0.0, 0.0])).unwrap();
    assert_eq!(call.await.unwrap().unwrap().embeddings[0].values, [1.0, 0.0, 0.0, 0.0]);
}

#[tokio::test]
async fn vectors_of_two_models_do_not_come_in_one_answer() {
    let differ = |n_th: usize, worker: &FakeWorker| {
        worker.status.send_modify(|status| status.model_digest = format!("d{n_th}"));
    };
    let mut cluster = Cluster::with(Setup { n_groups: 2, groups: differ, ..Setup::default() }).await;
    ready(&cluster, 2).await;
    let call = call(&cluster, embed(vec![ids(&[1]), ids(&[2])]));
    for group in &mut cluster.groups {
        group.embedding().await.answer.send(Ok(vec![1.0; 4])).unwrap();
    }
    let error = call.await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Reason::GroupUnavailable, "{error}");
    assert!(error.retry_delay().is_some());
}

#[tokio::test]
async fn who_gives_up_or_is_late_lets_the_worker_go() {
    let mut cluster = Cluster::start().await;
    let left = call(&cluster, embed(vec![ids(&[1])]));
    let mut embedding = cluster.groups[0].embedding().await;
    left.abort();
    in_time(embedding.answer.closed()).await;

    let mut client = cluster.client();
    let request = with_deadline(embed(vec![ids(&[1])]), Duration::from_millis(300));
    let late = tokio::spawn(async move { client.embed(request).await });
    let mut embedding = cluster.groups[0].embedding().await;
    let error = Error::from_status(&late.await.unwrap().unwrap_err());
    assert_eq!(error.reason(), Reason::Deadline, "{error}");
    in_time(embedding.answer.closed()).await;
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_named() {
    let cluster = Cluster::start().await;
    let check = async |request: EmbedRequest, expected: (Reason, Vec<&str>)| {
        let error = call(&cluster, request).await.unwrap().unwrap_err();
        assert_eq!(refused(&error), expected, "{error}");
    };
    check(embed(Vec::new()), (Reason::InvalidArgument, vec!["inputs"])).await;
    let wrong_id = embed(vec![ids(&[1]), ids(&[9_999])]);
    check(wrong_id, (Reason::InvalidArgument, vec!["inputs[1].token_ids.ids[0]"])).await;
    let too_wide = EmbedRequest { dimensions: Some(5), ..embed(vec![ids(&[1])]) };
    check(too_wide, (Reason::InvalidArgument, vec!["dimensions"])).await;
    // With the beginning-of-text token one too many; ids alone may fill the context.
    let too_long = embed(vec![ids(&[1]), prompt(&"a".repeat(1_000)).unwrap()]);
    check(too_long, (Reason::PromptTooLong, vec!["inputs[1]"])).await;
}

#[tokio::test]
async fn a_worker_s_refusal_is_passed_on_and_its_breach_is_our_bug() {
    let mut cluster = Cluster::start().await;
    let full = Error::new(Reason::Overloaded, "full").retry_after(Duration::from_millis(70));
    for (answer, expected) in [
        (Err(full.into()), Reason::Overloaded),
        (Ok(vec![1.0; 3]), Reason::Internal),
        (Err(Error::new(Reason::Deadline, "late").into()), Reason::Deadline),
    ] {
        let call = call(&cluster, embed(vec![ids(&[1])]));
        cluster.groups[0].embedding().await.answer.send(answer).unwrap();
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(error.reason(), expected, "{error}");
    }
}

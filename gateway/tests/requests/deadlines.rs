//! Deadlines and clients that go away.

use std::time::Duration;

use lockstep_proto::{
    client::with_deadline,
    error::{Error, Reason},
    v1::{FinishReason, stream_generate_response::Event},
    worker::v1::FinishReason as WorkerReason,
};
use tonic::{Code, Status};

use super::{
    cluster::{Cluster, Setup, in_time},
    life::{Streamed, generate, stream},
};

#[tokio::test]
async fn the_worker_gets_what_is_left_of_the_clients_time_less_a_margin() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let request = with_deadline(generate("x"), Duration::from_secs(10));
    let call = tokio::spawn(async move { client.generate(request).await });
    let session = cluster.session().await;
    let budget = session.request.budget_ms.unwrap();
    assert!((1..=9_800).contains(&budget), "{budget}");
    drop(session);
    call.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_request_without_a_deadline_has_the_gateways() {
    let setup = Setup { settings: |settings| settings.requests.max_duration_ms = 5_000, ..Setup::default() };
    let mut cluster = Cluster::with(setup).await;
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.generate(generate("x")).await });
    let session = cluster.session().await;
    let budget = session.request.budget_ms.unwrap();
    assert!((1..=4_900).contains(&budget), "{budget}");
    drop(session);
    call.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_stream_that_expires_ends_with_what_it_has_though_the_worker_hangs() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let request = with_deadline(stream("x"), Duration::from_millis(600));
    let call = tokio::spawn(async move { client.stream_generate(request).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    session.text(0, "so far").await;
    session.ids(0, &[0xc3]).await;
    let streamed = Streamed::read(call.await.unwrap()).await;
    in_time(session.dropped()).await;
    assert_eq!(streamed.text(0), "so far\u{fffd}", "what was held back comes out");
    assert_eq!(streamed.finish.choices[0].reason(), FinishReason::Deadline);
    assert_eq!(streamed.finish.usage.unwrap().completion_tokens, 7);
}

#[tokio::test]
async fn a_unary_call_that_expires_is_answered_with_what_there_is() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let request = with_deadline(generate("x"), Duration::from_millis(600));
    let call = tokio::spawn(async move { client.generate(request).await });
    let mut session = cluster.session().await;
    session.text(0, "so far").await;
    session.finish(0, WorkerReason::Deadline, None).await;
    let answer = call.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.choices[0].text, "so far");
    assert_eq!(answer.choices[0].finish.as_ref().unwrap().reason(), FinishReason::Deadline);
}

#[tokio::test]
async fn a_worker_that_answers_deadline_exceeded_in_the_middle_ends_the_stream_the_same_way() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.stream_generate(stream("x")).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    session.text(0, "so far").await;
    session.fail(Status::deadline_exceeded("no time")).await;
    let streamed = Streamed::read(call.await.unwrap()).await;
    assert_eq!(streamed.text(0), "so far");
    assert_eq!(streamed.finish.choices[0].reason(), FinishReason::Deadline);
}

#[tokio::test]
async fn a_request_that_expires_before_its_first_token_is_a_plain_error() {
    let mut cluster = Cluster::start().await;
    // The worker ends the choice for lack of time, or says nothing at all.
    for worker_speaks in [true, false] {
        let mut client = cluster.client();
        let request = with_deadline(stream("x"), Duration::from_millis(300));
        let call = tokio::spawn(async move { client.stream_generate(request).await });
        let mut session = cluster.session().await;
        if worker_speaks {
            session.finish(0, WorkerReason::Deadline, None).await;
        }
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_eq!(Error::from_status(&status).reason(), Reason::Deadline);
        in_time(session.dropped()).await;
    }
}

#[tokio::test]
async fn a_client_that_drops_its_stream_ends_everything_downstream() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let call = tokio::spawn(async move {
        let mut events = client.stream_generate(stream("x")).await.unwrap().into_inner();
        let first = events.message().await.unwrap().unwrap().event.unwrap();
        assert!(matches!(first, Event::Start(_)));
    });
    let mut session = cluster.session().await;
    session.text(0, "a").await;
    call.await.unwrap();
    in_time(session.dropped()).await;
    in_time(async { while !cluster.metrics().await.contains("lockstep_gateway_cancels_total 1") {} }).await;
    let metrics = cluster.metrics().await;
    assert!(metrics.contains("lockstep_gateway_requests_in_flight 0"), "{metrics}");
    assert!(metrics.contains("\"} 0\n# HELP lockstep_gateway_group_ready"), "nothing is outstanding: {metrics}");
}

#[tokio::test]
async fn a_client_that_gives_up_a_unary_call_ends_it_before_and_after_the_first_token() {
    let mut cluster = Cluster::start().await;
    for has_begun in [false, true] {
        let mut client = cluster.client();
        let call = tokio::spawn(async move { client.generate(generate("x")).await });
        let mut session = cluster.session().await;
        if has_begun {
            session.text(0, "a").await;
        }
        call.abort();
        in_time(session.dropped()).await;
    }
}

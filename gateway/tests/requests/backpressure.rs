//! Clients that do not read, and more work than there is room for.

use std::time::Duration;

use lockstep_proto::{
    error::{Error, Reason},
    worker::v1::FinishReason as WorkerReason,
};
use tonic::{Code, Status};

use super::{
    cluster::{Cluster, Setup, in_time},
    life::{Streamed, generate, stream},
};

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_and_nobody_else_waits() {
    let setup = Setup { settings: |settings| settings.requests.slow_reader_timeout_ms = 200, ..Setup::default() };
    let mut cluster = Cluster::with(setup).await;
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.stream_generate(stream("slow")).await.unwrap().into_inner() });
    let mut slow = cluster.session().await;
    slow.text(0, "a").await;
    let mut unread = call.await.unwrap();

    let flood = tokio::spawn(async move {
        let text = "x".repeat(1_000);
        tokio::select! {
            () = async { loop { slow.text(0, &text).await } } => {}
            () = async { loop { tokio::task::yield_now().await } } => {}
        }
    });
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.stream_generate(stream("quick")).await.unwrap().into_inner() });
    let mut quick = cluster.session().await;
    quick.text(0, "b").await;
    quick.finish(0, WorkerReason::Length, None).await;
    assert_eq!(Streamed::read(call.await.unwrap()).await.text(0), "b");

    in_time(async { while !cluster.metrics().await.contains("outcome=\"SLOW_READER\"} 1") {} }).await;
    flood.abort();
    let cut = in_time(async {
        loop {
            match unread.message().await {
                Ok(event) => assert!(event.is_some(), "it does not look complete"),
                Err(status) => return status,
            }
        }
    })
    .await;
    assert_eq!(cut.code(), Code::ResourceExhausted);
    assert_eq!(Error::from_status(&cut).reason(), Reason::SlowReader);
}

#[tokio::test]
async fn more_requests_than_the_gateway_takes_are_refused_with_a_time_to_come_back() {
    let setup = Setup { settings: |settings| settings.requests.max_in_flight = 1, ..Setup::default() };
    let mut cluster = Cluster::with(setup).await;
    let mut client = cluster.client();
    let first = tokio::spawn(async move { client.generate(generate("x")).await });
    let mut session = cluster.session().await;
    let refused = Error::from_status(&cluster.client().generate(generate("x")).await.unwrap_err());
    assert_eq!((refused.reason(), refused.retry_delay()), (Reason::Overloaded, Some(Duration::from_secs(1))));
    session.text(0, "a").await;
    session.finish(0, WorkerReason::Length, None).await;
    first.await.unwrap().unwrap();
    let mut client = cluster.client();
    let next = tokio::spawn(async move { client.generate(generate("x")).await });
    drop(cluster.session().await);
    next.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_full_group_is_left_for_another_one_once() {
    let full = |n_th: usize, worker: &super::fake_worker::FakeWorker| {
        if n_th < 2 {
            *worker.refusal.lock().unwrap() = Some(Status::resource_exhausted("the line is full"));
        }
        // The more are full, the less they have to do: they are asked first.
        worker.status.send_modify(|status| status.outstanding_tokens = n_th as u64 * 10_000);
    };
    let mut cluster = Cluster::with(Setup { n_groups: 3, groups: full, ..Setup::default() }).await;
    ready(&cluster, 3).await;
    let refused = Error::from_status(&cluster.client().generate(generate("x")).await.unwrap_err());
    assert_eq!(refused.reason(), Reason::Overloaded);
    assert!(refused.retry_delay().is_some() && refused.message().contains("the line is full"), "{refused}");

    *cluster.groups[1].worker.refusal.lock().unwrap() = None;
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.generate(generate("x")).await });
    let mut session = cluster.groups[1].session().await;
    session.text(0, "a").await;
    session.finish(0, WorkerReason::Length, None).await;
    call.await.unwrap().unwrap();
}

/// Waits until the gateway knows that so many groups are ready.
pub(crate) async fn ready(cluster: &Cluster, n_groups: u32) {
    let request = lockstep_proto::v1::GetModelRequest::default();
    in_time(async {
        loop {
            let model = cluster.models().get_model(request.clone()).await.unwrap().into_inner().model.unwrap();
            if model.ready_replicas == n_groups {
                return;
            }
        }
    })
    .await;
}

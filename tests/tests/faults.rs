//! Faults: what happens to requests when clients and ranks go away.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lockstep_proto::v1::{
    RawPrompt, SamplingParams, StreamGenerateRequest, TokenIds, raw_prompt::Prompt, stream_generate_response::Event,
};
use lockstep_tests::cluster::Cluster;
use tokio_stream::StreamExt;
use tonic::Code;

/// A request that runs for much longer than a test.
fn endless() -> StreamGenerateRequest {
    let sampling = SamplingParams { max_new_tokens: Some(4_000), ignore_eos: Some(true), ..SamplingParams::default() };
    StreamGenerateRequest {
        prompt: Some(RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids: (100..140).collect() })) }),
        sampling: Some(sampling),
        ..StreamGenerateRequest::default()
    }
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_blocks() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = cluster.inference().await?;
    let mut stream = client.stream_generate(endless()).await?.into_inner();
    while let Some(response) = stream.next().await {
        if matches!(response?.event, Some(Event::Chunk(_))) {
            break;
        }
    }
    let busy = cluster.wait_for_status(0, |status| status.running_sequences == 1).await?;
    assert!(busy.free_blocks + busy.cached_blocks < busy.total_blocks);
    drop(stream);
    let idle = cluster.wait_for_status(0, |status| status.running_sequences == 0).await?;
    assert_eq!(idle.free_blocks + idle.cached_blocks, idle.total_blocks);
    cluster.stop().await
}

#[tokio::test]
async fn a_killed_follower_is_unavailable_within_two_seconds_and_may_return() -> Result<()> {
    let mut cluster = Cluster::builder().world_size(2).start().await?;
    let mut client = cluster.inference().await?;
    let mut stream = client.stream_generate(endless()).await?.into_inner();
    stream.next().await.context("a start")??;
    cluster.wait_for_status(0, |status| status.running_sequences == 1).await?;

    cluster.groups[0][1].kill().await?;
    let killed = Instant::now();
    let status = loop {
        match stream.next().await.context("an error, not an end")? {
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    let waited = killed.elapsed();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(waited < Duration::from_secs(2), "the client waited {waited:?}");

    let epoch = cluster.status(0).await?.epoch;
    cluster.restart_follower(0, 1).await?;
    cluster.wait_for_status(0, |status| status.ready && status.epoch > epoch).await?;
    cluster.gateway.wait_ready("lockstep.v1.InferenceService").await?;
    let mut again = client.stream_generate(endless()).await?.into_inner();
    again.next().await.context("a start")??;
    drop(again);
    cluster.stop().await
}

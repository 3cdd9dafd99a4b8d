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
    of_length(4_000)
}

/// A request for exactly so many tokens.
fn of_length(n_tokens: u32) -> StreamGenerateRequest {
    let sampling =
        SamplingParams { max_new_tokens: Some(n_tokens), ignore_eos: Some(true), ..SamplingParams::default() };
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

/// Streams 200 tokens at world size 2, asks the given ranks to end once the first has come, and expects all of it.
/// Returns the cluster, whose asked ranks have ended.
async fn drained_by_ending(ranks: &[usize]) -> Result<Cluster> {
    let mut cluster = Cluster::builder().world_size(2).start().await?;
    let mut client = cluster.inference().await?;
    let mut stream = client.stream_generate(of_length(200)).await?.into_inner();
    let (mut n_tokens, mut finished, mut asked) = (0, false, false);
    while let Some(response) = stream.next().await {
        match response?.event {
            Some(Event::Chunk(chunk)) => n_tokens += chunk.token_ids.len(),
            Some(Event::Finish(_)) => finished = true,
            _ => {}
        }
        if n_tokens > 0 && !asked {
            asked = true;
            for rank in ranks {
                cluster.groups[0][*rank].ask_to_end().await?;
            }
            // The group takes nothing new from now on, and says so before anybody is refused.
            if ranks == [1] {
                cluster.wait_for_status(0, |status| status.draining).await?;
            }
        }
    }
    assert_eq!((n_tokens, finished), (200, true), "the stream was cut");
    for rank in ranks {
        cluster.groups[0][*rank].ended().await?;
    }
    Ok(cluster)
}

#[tokio::test]
async fn a_stream_outlives_the_end_of_all_ranks() -> Result<()> {
    let mut cluster = drained_by_ending(&[0, 1]).await?;
    cluster.gateway.terminate().await?;
    cluster.tokenizer.terminate().await
}

#[tokio::test]
async fn a_stream_outlives_the_end_of_a_follower_and_the_group_forms_anew() -> Result<()> {
    let mut cluster = drained_by_ending(&[1]).await?;
    let log = cluster.groups[0][0].log();
    assert!(log.contains("rank 1 shuts down"), "{log}");
    cluster.restart_follower(0, 1).await?;
    cluster.wait_for_status(0, |status| status.ready && !status.draining).await?;
    cluster.gateway.wait_ready("lockstep.v1.InferenceService").await?;
    let mut client = cluster.inference().await?;
    let mut again = client.stream_generate(of_length(4)).await?.into_inner();
    while let Some(response) = again.next().await {
        response?;
    }
    cluster.stop().await
}

//! Embeddings through the whole cluster: the real programs, started and called as users do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::Checkpoint;
use lockstep_proto::{
    error::{Error, Reason},
    v1::{EmbedRequest, EmbedResponse, GetModelRequest, Pooling, RawPrompt, TokenIds, raw_prompt::Prompt},
};
use lockstep_tests::{
    cluster::{Cluster, demo_model},
    oracle,
};
use tonic::Code;

/// Values of the demo model's embeddings.
const WIDTH: usize = 576;

fn ids(ids: &[u32]) -> RawPrompt {
    RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids: ids.to_vec() })) }
}

fn text(text: &str) -> RawPrompt {
    RawPrompt { prompt: Some(Prompt::Text(text.to_owned())) }
}

fn request(pooling: Pooling, inputs: Vec<RawPrompt>) -> EmbedRequest {
    EmbedRequest { inputs, pooling: pooling.into(), ..EmbedRequest::default() }
}

/// Some prompts, short and of several chunks, two with a common beginning.
fn prompts() -> Vec<RawPrompt> {
    let long: Vec<u32> = (0..700).map(|i| 1_000 + i * 7 % 5_000).collect();
    vec![text("The capital of France is Paris."), ids(&long), ids(&[17]), ids(&long[..699]), text("A short one.")]
}

async fn embed(cluster: &Cluster, request: EmbedRequest) -> Result<Vec<Vec<f32>>> {
    let n_inputs = request.inputs.len();
    let EmbedResponse { embeddings, prompt_tokens, .. } = cluster.inference().await?.embed(request).await?.into_inner();
    ensure!(embeddings.len() == n_inputs);
    ensure!(prompt_tokens == embeddings.iter().map(|embedding| embedding.prompt_tokens).sum::<u32>());
    Ok(embeddings.into_iter().map(|embedding| embedding.values).collect())
}

fn bits(embeddings: &[Vec<f32>]) -> Vec<Vec<u32>> {
    embeddings.iter().map(|values| values.iter().map(|value| value.to_bits()).collect()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[tokio::test]
async fn embeddings_are_the_same_bits_at_every_world_size_alone_and_together() -> Result<()> {
    let mut found = Vec::new();
    for world_size in [1, 2, 3] {
        let cluster = Cluster::builder().world_size(world_size).start().await?;
        for pooling in [Pooling::Mean, Pooling::Last] {
            let together = embed(&cluster, request(pooling, prompts())).await?;
            let mut alone = Vec::new();
            for input in prompts() {
                alone.extend(embed(&cluster, request(pooling, vec![input])).await?);
            }
            assert_eq!(bits(&alone), bits(&together), "{world_size} ranks, {pooling:?}");
            for values in &together {
                assert_eq!(values.len(), WIDTH);
                assert!((dot(values, values) - 1.0).abs() < 1e-5);
            }
            found.push((pooling, bits(&together)));
        }
        cluster.stop().await?;
    }
    let (first, others) = found.split_at(2);
    assert_ne!(first[0].1, first[1].1, "the mean is not the last");
    for other in others {
        assert!(first.contains(other), "another world size, {:?}", other.0);
    }
    Ok(())
}

#[tokio::test]
async fn embeddings_are_those_of_the_oracle_within_the_rounding_of_activations() -> Result<()> {
    let prompt: Vec<u32> = (0..24).map(|i| 1_000 + i * 37).collect();
    let hidden = oracle::hidden(&Checkpoint::open(&demo_model())?, &prompt)?;
    let mean: Vec<f64> =
        (0..WIDTH).map(|i| hidden.iter().map(|row| row[i]).sum::<f64>() / hidden.len() as f64).collect();
    let last = hidden.last().context("a row for each token")?;
    let cluster = Cluster::builder().start().await?;
    for (pooling, wanted) in [(Pooling::Mean, &mean), (Pooling::Last, last)] {
        let raw = EmbedRequest { normalize: Some(false), ..request(pooling, vec![ids(&prompt)]) };
        let got = embed(&cluster, raw).await?.remove(0);
        let length = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let off = length(&mut got.iter().zip(wanted).map(|(got, wanted)| f64::from(*got) - wanted));
        let off = off / length(&mut wanted.iter().copied());
        println!("{pooling:?}: off by {off:.4} of the length");
        assert!(off < 0.1, "{pooling:?}: {off}");
        let cut = EmbedRequest { dimensions: Some(10), normalize: Some(false), ..request(pooling, vec![ids(&prompt)]) };
        assert_eq!(embed(&cluster, cut).await?.remove(0), got[..10]);
    }
    let model = cluster.models().await?.get_model(GetModelRequest::default()).await?.into_inner().model;
    assert_eq!(model.context("the demo model")?.embedding_size, WIDTH as u32);
    cluster.stop().await
}

/// The demo model was made to chat, not to embed; with means it does well enough for this.
#[tokio::test]
async fn what_is_alike_is_near() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let inputs = [
        "How do I bake a loaf of bread at home?",
        "A simple recipe for homemade bread with flour, water, salt and yeast.",
        "The central bank raised its interest rates by half a percent on Thursday.",
    ];
    let found = embed(&cluster, request(Pooling::Mean, inputs.map(text).to_vec())).await?;
    let (near, far) = (dot(&found[0], &found[1]), dot(&found[0], &found[2]));
    println!("{near:.3} and {far:.3}");
    assert!(near > far, "{near} is not more than {far}");
    cluster.stop().await
}

#[tokio::test]
async fn a_prompt_may_fill_the_context_and_what_is_wrong_is_named() -> Result<()> {
    let cluster = Cluster::builder().worker_env("LOCKSTEP_WORKER__ENGINE__CONTEXT_LENGTH", "64").start().await?;
    let full = embed(&cluster, request(Pooling::Last, vec![ids(&[5; 64])])).await?;
    assert_eq!(full[0].len(), WIDTH);
    for (wrong, reason, path) in [
        (request(Pooling::Last, vec![ids(&[5; 65])]), Reason::InvalidArgument, "inputs[0].token_ids.ids"),
        (request(Pooling::Last, vec![text("a"), text(&"a b ".repeat(64))]), Reason::PromptTooLong, "inputs[1]"),
        (
            request(Pooling::Mean, vec![ids(&[5]), ids(&[1, 1 << 20])]),
            Reason::InvalidArgument,
            "inputs[1].token_ids.ids[1]",
        ),
        (EmbedRequest { pooling: 9, ..request(Pooling::Mean, vec![ids(&[5])]) }, Reason::InvalidArgument, "pooling"),
        (
            EmbedRequest { dimensions: Some(577), ..request(Pooling::Mean, vec![ids(&[5])]) },
            Reason::InvalidArgument,
            "dimensions",
        ),
        (request(Pooling::Mean, Vec::new()), Reason::InvalidArgument, "inputs"),
    ] {
        let status = cluster.inference().await?.embed(wrong).await.err().context("refused")?;
        let error = Error::from_status(&status);
        let paths: Vec<_> = error.field_violations().iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!((error.reason(), paths), (reason, vec![path]), "{error}");
    }
    cluster.stop().await
}

/// Work that takes longer than a test waits for the beginning of it.
fn much() -> EmbedRequest {
    let prompt: Vec<u32> = (0..2_000).map(|i| 1_000 + i).collect();
    request(Pooling::Mean, vec![ids(&prompt); 16])
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_blocks() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = cluster.inference().await?;
    let call = tokio::spawn(async move { client.embed(much()).await });
    let busy = cluster.wait_for_status(0, |status| status.running_sequences > 0).await?;
    assert!(busy.free_blocks + busy.cached_blocks < busy.total_blocks);
    call.abort();
    let idle = cluster.wait_for_status(0, |status| status.running_sequences + status.waiting_sequences == 0).await?;
    assert_eq!(idle.free_blocks + idle.cached_blocks, idle.total_blocks);
    cluster.stop().await
}

#[tokio::test]
async fn what_is_not_embedded_in_time_is_refused_and_frees_its_blocks() -> Result<()> {
    let in_half_a_second = ["--requests.max-duration-ms", "500"];
    let cluster = in_half_a_second.iter().fold(Cluster::builder(), |builder, arg| builder.gateway_arg(*arg));
    let cluster = cluster.start().await?;
    let status = cluster.inference().await?.embed(much()).await.err().context("late")?;
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    cluster.wait_for_status(0, |status| status.running_sequences + status.waiting_sequences == 0).await?;
    cluster.stop().await
}

#[tokio::test]
async fn a_rank_that_dies_ends_an_embedding_and_the_group_embeds_again() -> Result<()> {
    let mut cluster = Cluster::builder().world_size(2).start().await?;
    let before = embed(&cluster, request(Pooling::Mean, prompts())).await?;
    let mut client = cluster.inference().await?;
    let call = tokio::spawn(async move { client.embed(much()).await });
    cluster.wait_for_status(0, |status| status.running_sequences > 0).await?;
    cluster.groups[0][1].kill().await?;
    let status = call.await?.err().context("an error")?;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let epoch = cluster.status(0).await?.epoch;
    cluster.restart_follower(0, 1).await?;
    cluster.wait_for_status(0, |status| status.ready && status.epoch > epoch).await?;
    // So many failures at once: the gateway leaves the group alone for a while, and then tries it with one prompt.
    let deadline = Instant::now() + Duration::from_secs(30);
    let after = loop {
        match embed(&cluster, request(Pooling::Mean, prompts())).await {
            Ok(after) => break after,
            Err(failure) => ensure!(Instant::now() < deadline, "the gateway never tries again: {failure:?}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(bits(&after), bits(&before));
    cluster.stop().await
}

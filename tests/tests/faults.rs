//! Faults: what happens to requests when clients and ranks go away.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::Checkpoint;
use lockstep_proto::{
    client::ClientLimits,
    error::{Error, Reason},
    v1::{
        RawPrompt, SamplingParams, StreamGenerateRequest, TokenIds, raw_prompt::Prompt, stream_generate_response::Event,
    },
    worker::v1::{GenerateRequest, ResolvedSampling, worker_service_client::WorkerServiceClient},
};
use lockstep_tests::cluster::{Cluster, Process, demo_model};
use lockstep_worker::{
    config::EngineSettings,
    device::Device,
    group::{FollowerGroup, GroupConfig},
    model::{load::Source, output::StepOutput},
    model_runner::{self, warm_up},
    serve::attest,
};
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
    // On a busy machine 200 tokens may take longer than the default lets a drain last.
    let builder = Cluster::builder().world_size(2).worker_arg("--limits.drain-timeout-ms=300000");
    let mut cluster = builder.start().await?;
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

/// Rank 1 of two as a thread of this test: the real group, transport and model, but an engine that can be made to hang.
/// A process could only be stopped as a whole, and its heartbeats with it.
struct StandIn {
    hang: Arc<AtomicBool>,
    /// When it has stopped taking part, in the middle of a step.
    hangs: mpsc::Receiver<Instant>,
    /// Dropped, it ends the hang.
    _release: mpsc::Sender<()>,
}

impl StandIn {
    /// Begins to follow, and goes on until it is to hang.
    fn start(leader: &str) -> Self {
        let hang = Arc::new(AtomicBool::new(false));
        let (hanging, hangs) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let (asked, leader) = (Arc::clone(&hang), leader.to_owned());
        let runtime = tokio::runtime::Handle::current();
        std::thread::spawn(move || -> Result<()> {
            let checkpoint = Arc::new(Checkpoint::open(&demo_model())?);
            let source = Source::open(Arc::clone(&checkpoint), 1, 2)?;
            let settings = EngineSettings { threads: 1, ..EngineSettings::default() }.runner(&source, Device::Cpu)?;
            let mut runner = model_runner::build(&source, &settings)?;
            let digest: String = checkpoint.digest().iter().map(|byte| format!("{byte:02x}")).collect();
            let config = GroupConfig { rank: 1, world_size: 2, leader: Some(leader), ..GroupConfig::default() };
            let attestation = attest(&digest, &settings, 2);
            let mut group = FollowerGroup::new(config, attestation, None, &ClientLimits::default(), &runtime)?;
            let mut epoch = group.join()?;
            warm_up(runner.as_mut(), epoch.collective.as_mut())?;
            let mut out = StepOutput::default();
            loop {
                let plan = group.next_plan()?;
                if asked.load(Ordering::SeqCst) {
                    break;
                }
                runner.run(&plan, epoch.collective.as_mut(), &mut out)?;
            }
            hanging.send(Instant::now())?;
            // Its heartbeats go on, on the runtime, and its end of the collective stays.
            let _dropped = released.recv();
            Ok(())
        });
        Self { hang, hangs, _release: release }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_hangs_is_named_long_before_the_collective_times_out() -> Result<()> {
    let model = demo_model().display().to_string();
    let args = ["--model.path", &model, "--group.world-size", "2", "--engine.threads", "1"].map(str::to_owned);
    let mut leader = Process::start("lockstep-worker", "leader", args.to_vec()).await?;
    let stand_in = StandIn::start(&format!("http://{}", leader.grpc()));
    leader.wait_ready("lockstep.worker.v1.WorkerService").await?;
    let sampling = ResolvedSampling {
        max_new_tokens: 4_000,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..ResolvedSampling::default()
    };
    let request = GenerateRequest {
        request_id: "hung".into(),
        prompt_token_ids: (100..140).collect(),
        sampling: Some(sampling),
        n: 1,
        ..GenerateRequest::default()
    };
    let mut stream = WorkerServiceClient::new(leader.channel().await?).generate(request).await?.into_inner();
    stream.next().await.context("a token")??;

    stand_in.hang.store(true, Ordering::SeqCst);
    let status = loop {
        match stream.next().await.context("an error, not an end")? {
            Ok(_) => {}
            Err(status) => break status,
        }
    };
    let waited = stand_in.hangs.recv()?.elapsed();
    println!("an error after {waited:?}");
    let error = Error::from_status(&status);
    assert_eq!(error.reason(), Reason::GroupUnavailable, "{status:?}");
    assert!(error.message().contains("rank 1 hangs: the others wait for "), "{status:?}");
    // Two seconds are meant. A busy machine may take longer, but not as long as a collective waits, 30 s.
    ensure!(waited < Duration::from_secs(10), "the client waited {waited:?}");
    leader.terminate().await
}

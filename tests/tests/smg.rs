//! The Shepherd Model Gateway (PyPI's `smg`), the real program, in front of two groups that our own gateway serves, too.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::Encoding;
use lockstep_proto::{
    smg::grpc::common::GetTokenizerRequest,
    vllm::grpc::engine::{
        GenerateRequest, GetModelInfoRequest, SamplingParams, TokenizedInput, generate_request::Input,
        sampling_params::Constraint, vllm_engine_client::VllmEngineClient,
    },
};
use lockstep_tests::{
    cluster::{Cluster, repository},
    smg::{Smg, write_tokenizer},
    tiny_model::{Container, TinyModel},
};
use tokio::process::Command;

fn leaders(cluster: &Cluster) -> Vec<&str> {
    cluster.groups.iter().map(|ranks| ranks[0].grpc()).collect()
}

/// Runs those of `tests/clients/test_smg.py` that an expression of pytest's picks.
async fn pytest(cluster: &Cluster, smg: &Smg, tests: &str) -> Result<()> {
    let output = Command::new(repository().join(".venv/clients/bin/python"))
        .current_dir(repository().join("tests/clients"))
        .args(["-m", "pytest", "-q", "test_smg.py", "-k", tests])
        .env("LOCKSTEP_SMG", format!("http://{}", smg.http))
        .env("LOCKSTEP_SMG_METRICS", &smg.metrics)
        .env("LOCKSTEP_WORKER", cluster.groups[0][0].grpc())
        .env("LOCKSTEP_HTTP", format!("http://{}", cluster.gateway.http().context("the gateway answers HTTP")?))
        .env("LOCKSTEP_MODEL", "demo")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{text}");
    ensure!(output.status.success(), "{text}\n{}", smg.log());
    Ok(())
}

#[tokio::test]
async fn smg_answers_what_our_own_gateway_answers() -> Result<()> {
    let cluster = Cluster::builder().replicas(2).start().await?;
    let folder = tempfile::tempdir()?;
    write_tokenizer(folder.path())?;
    let tokenizer = folder.path().display().to_string();
    let smg = Smg::start(&leaders(&cluster), folder.path(), "round_robin", &["--tokenizer-path", &tokenizer])?;
    pytest(&cluster, &smg, "not prefix_cache and not tokenizer").await?;
    // The last of them left a stream of minutes.
    let gone = Instant::now();
    for group in 0..2 {
        let status = cluster.wait_for_status(group, |status| status.running_sequences == 0).await?;
        assert_eq!(status.free_blocks + status.cached_blocks, status.total_blocks);
        assert!(status.cached_blocks > 0, "smg asked both groups");
    }
    assert!(gone.elapsed() < Duration::from_secs(5), "{:?}", gone.elapsed());
    smg.stop().await?;
    cluster.stop().await
}

#[tokio::test]
async fn smg_knows_what_our_prefix_caches_hold() -> Result<()> {
    let cluster = Cluster::builder().replicas(2).start().await?;
    let folder = tempfile::tempdir()?;
    write_tokenizer(folder.path())?;
    let tokenizer = folder.path().display().to_string();
    let smg = Smg::start(&leaders(&cluster), folder.path(), "cache_aware", &["--tokenizer-path", &tokenizer])?;
    pytest(&cluster, &smg, "prefix_cache").await?;
    smg.stop().await?;
    cluster.stop().await
}

#[tokio::test]
async fn smg_takes_the_tokenizer_of_a_folder_from_the_worker() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tiny");
    let float = Encoding::F16;
    let model =
        TinyModel { container: Container::Folder, encoding: float, embedding_encoding: float, ..TinyModel::default() };
    model.write(&path)?;
    let cluster = Cluster::builder().model(&path).start().await?;
    // What the worker needs of its files it reads once. Then they go where smg does not find them, as on another machine.
    let mut worker = VllmEngineClient::new(cluster.groups[0][0].channel().await?);
    worker.get_model_info(GetModelInfoRequest {}).await?;
    worker.get_tokenizer(GetTokenizerRequest {}).await?;
    let constraint = Some(Constraint::Regex("a".into()));
    let request = GenerateRequest {
        request_id: "first".into(),
        input: Some(Input::Tokenized(TokenizedInput { input_ids: vec![5], ..TokenizedInput::default() })),
        sampling_params: Some(SamplingParams { constraint, ..SamplingParams::default() }),
        ..GenerateRequest::default()
    };
    worker.generate(request).await?.into_inner().message().await?.context("it ends")?;
    std::fs::rename(&path, folder.path().join("elsewhere"))?;
    let smg = Smg::start(&leaders(&cluster), folder.path(), "round_robin", &[])?;
    pytest(&cluster, &smg, "tokenizer").await?;
    smg.stop().await?;
    cluster.stop().await
}

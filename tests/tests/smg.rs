//! The Shepherd Model Gateway (PyPI's `smg`), the real program, in front of two groups that our own gateway serves, too.

use std::{
    net::TcpListener,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::{Checkpoint, Encoding};
use lockstep_proto::{
    smg::grpc::common::GetTokenizerRequest,
    vllm::grpc::engine::{
        GenerateRequest, GetModelInfoRequest, SamplingParams, TokenizedInput, generate_request::Input,
        sampling_params::Constraint, vllm_engine_client::VllmEngineClient,
    },
};
use lockstep_tests::{
    cluster::{Cluster, PATIENCE, demo_model, repository},
    tiny_model::{Container, TinyModel},
};
use serde_json::{Map, Value, json};
use tokio::process::{Child, Command};

/// A running `smg`. Dropping it kills the program.
struct Smg {
    child: Child,
    url: String,
    metrics: String,
    log: std::path::PathBuf,
}

/// Writes the demo model's tokenizer as `transformers` would: single digits, then GPT-2's words. A router cannot read a
/// GGUF file's own.
fn write_tokenizer(folder: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(&demo_model())?;
    let (metadata, vocabulary) = (checkpoint.metadata(), checkpoint.vocabulary()?);
    let tokens = || (0..).zip(&vocabulary.tokens);
    let ids: Map<String, Value> = tokens().map(|(id, token)| (token.text.clone(), Value::from(id))).collect();
    let control = tokens().filter(|(_, token)| token.is_reserved).map(|(id, token): (u32, _)| {
        json!({ "id": id, "content": token.text, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false })
    });
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let digits = json!({ "type": "Digits", "individual_digits": true });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": control.collect::<Vec<_>>(),
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [digits, byte_level] },
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": ids, "merges": metadata.strings("tokenizer.ggml.merges")? },
    });
    let template = metadata.str("tokenizer.chat_template")?;
    let config = json!({ "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": template });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string())?;
    Ok(())
}

/// A port that was free a moment ago.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

impl Smg {
    /// Starts it in front of a cluster's groups, between which a policy chooses. `args` are further ones; its log is in
    /// `folder`.
    async fn start(cluster: &Cluster, folder: &Path, policy: &str, args: &[&str]) -> Result<Self> {
        let program = repository().join(".venv/clients/bin/smg");
        ensure!(program.is_file(), "{} is missing: run `make fetch`", program.display());
        let (port, metrics_port) = (free_port()?, free_port()?);
        let log = folder.join("smg.log");
        let file = std::fs::File::create(&log)?;
        let child = Command::new(program)
            .args(["launch", "--host", "127.0.0.1", "--policy", policy])
            .args(["--port", &port.to_string(), "--prometheus-port", &metrics_port.to_string()])
            .args(args)
            .arg("--worker-urls")
            .args(cluster.groups.iter().map(|ranks| format!("grpc://{}", ranks[0].grpc())))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true)
            .spawn()?;
        let at = |port: u16| format!("http://127.0.0.1:{port}");
        Ok(Self { child, url: at(port), metrics: at(metrics_port) + "/metrics", log })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    async fn stop(mut self) -> Result<()> {
        let id = self.child.id().with_context(|| self.log())?;
        Command::new("kill").args(["-TERM", &id.to_string()]).status().await?;
        tokio::time::timeout(PATIENCE, self.child.wait()).await??;
        Ok(())
    }
}

/// Runs those of `tests/clients/test_smg.py` that an expression of pytest's picks.
async fn pytest(cluster: &Cluster, smg: &Smg, tests: &str) -> Result<()> {
    let output = Command::new(repository().join(".venv/clients/bin/python"))
        .current_dir(repository().join("tests/clients"))
        .args(["-m", "pytest", "-q", "test_smg.py", "-k", tests])
        .env("LOCKSTEP_SMG", &smg.url)
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
    let smg = Smg::start(&cluster, folder.path(), "round_robin", &["--tokenizer-path", &tokenizer]).await?;
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
    let smg = Smg::start(&cluster, folder.path(), "cache_aware", &["--tokenizer-path", &tokenizer]).await?;
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
    let smg = Smg::start(&cluster, folder.path(), "round_robin", &[]).await?;
    pytest(&cluster, &smg, "tokenizer").await?;
    smg.stop().await?;
    cluster.stop().await
}

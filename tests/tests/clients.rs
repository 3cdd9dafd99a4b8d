//! Clients against the real programs: those that nobody here wrote (`tests/clients`), ours for Python, and the examples in
//! `clients`, each run by Python, pytest or node.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lockstep_tests::cluster::{Cluster, Process, repository};
use tokio::process::Command;

/// What a client must show where the gateway asks for a key.
const KEY: &str = "sesame";

/// A program of those that `make fetch` installs, to be run in `tests/clients`.
fn client(cluster: &Cluster, program: &str, args: &[&str]) -> Result<Command> {
    let path: PathBuf = repository().join(".venv").join(program);
    ensure!(path.is_file(), "{} is missing: run `make fetch`", path.display());
    let mut command = Command::new(path);
    command
        .current_dir(repository().join("tests/clients"))
        .args(args)
        .env("LOCKSTEP_HTTP", format!("http://{}", cluster.gateway.http().context("the gateway answers HTTP")?))
        .env("LOCKSTEP_GRPC", cluster.gateway.grpc())
        .env("LOCKSTEP_MODEL", "demo")
        .env("LOCKSTEP_KEY", KEY)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .kill_on_drop(true);
    Ok(command)
}

/// Runs a program and shows what it says.
async fn finish(mut command: Command) -> Result<()> {
    let output = command.output().await?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{text}");
    ensure!(output.status.success(), "{command:?}: {text}");
    Ok(())
}

async fn run(cluster: &Cluster, program: &str, args: &[&str]) -> Result<()> {
    finish(client(cluster, program, args)?).await.with_context(|| cluster.gateway.log())
}

async fn pytest(file: &str) -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    run(&cluster, "clients/bin/python", &["-m", "pytest", "-q", file]).await?;
    cluster.stop().await
}

#[tokio::test]
async fn openai() -> Result<()> {
    pytest("test_openai.py").await
}

#[tokio::test]
async fn openapi() -> Result<()> {
    let policy = repository().join("tests/clients/policy.toml");
    let cluster = Cluster::builder()
        .gateway_arg(format!("--policy-file={}", policy.display()))
        .gateway_arg(format!("--api-keys={KEY}"));
    let cluster = cluster.start().await?;
    run(&cluster, "clients/bin/python", &["-m", "pytest", "-q", "test_openapi.py"]).await?;
    cluster.stop().await
}

#[tokio::test]
async fn openai_for_node() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    run(&cluster, "bin/node", &["--test", "node/openai.test.mjs"]).await?;
    cluster.stop().await
}

/// In a browser. The suite kills the follower first, and waits for another one.
#[tokio::test]
async fn page() -> Result<()> {
    let mut cluster = Cluster::builder().world_size(2).gateway_arg("--api-keys=sesame").start().await?;
    let ranks: Vec<_> = cluster.groups[0].iter().filter_map(Process::id).map(|id| id.to_string()).collect();
    let mut suite = client(&cluster, "bin/node", &["--test", "node/page.test.mjs"])?;
    suite.env("LOCKSTEP_KEY", "sesame").env("LOCKSTEP_RANKS", ranks.join(","));
    let revived = async {
        cluster.groups[0][1].exit_status().await?;
        cluster.restart_follower(0, 1).await
    };
    let ran = tokio::try_join!(finish(suite), revived);
    ran.with_context(|| cluster.gateway.log())?;
    cluster.stop().await
}

#[tokio::test]
async fn langchain() -> Result<()> {
    pytest("test_langchain.py").await
}

#[tokio::test]
async fn grpc_health() -> Result<()> {
    pytest("test_health.py").await
}

#[tokio::test]
async fn kserve() -> Result<()> {
    pytest("test_kserve.py").await
}

#[tokio::test]
async fn text_generation() -> Result<()> {
    pytest("test_text_generation.py").await
}

#[tokio::test]
async fn lockstep_client() -> Result<()> {
    pytest("../../clients/python/tests").await
}

#[tokio::test]
async fn examples() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    for example in ["python_chat.py", "generic_grpc.py", "langchain_agent.py"] {
        run(&cluster, "clients/bin/python", &[&format!("../../clients/examples/{example}")]).await?;
    }
    run(&cluster, "bin/node", &["../../clients/examples/node/chat.mjs"]).await?;
    cluster.stop().await
}

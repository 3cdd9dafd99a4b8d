//! Clients against the real programs: those that nobody here wrote (`tests/clients`), ours for Python, and the examples in
//! `clients`, each run by Python, pytest or node.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lockstep_tests::cluster::{Cluster, repository};
use tokio::process::Command;

/// Runs a program of those that `make fetch` installs, in `tests/clients`, and shows what it says.
async fn run(cluster: &Cluster, program: &str, args: &[&str]) -> Result<()> {
    let path: PathBuf = repository().join(".venv").join(program);
    ensure!(path.is_file(), "{} is missing: run `make fetch`", path.display());
    let output = Command::new(path)
        .current_dir(repository().join("tests/clients"))
        .args(args)
        .env("LOCKSTEP_HTTP", format!("http://{}", cluster.gateway.http().context("the gateway answers HTTP")?))
        .env("LOCKSTEP_GRPC", cluster.gateway.grpc())
        .env("LOCKSTEP_MODEL", "demo")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{text}");
    ensure!(output.status.success(), "{args:?}: {text}\n{}", cluster.gateway.log());
    Ok(())
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
async fn openai_for_node() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    run(&cluster, "bin/node", &["--test", "node/openai.test.mjs"]).await?;
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

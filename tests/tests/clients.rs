//! Clients that nobody here wrote, against the real programs: the files of `tests/clients`, each run by pytest.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use lockstep_tests::cluster::{Cluster, repository};
use tokio::process::Command;

/// Runs a file of `tests/clients` with the packages of one of the folders that `make fetch` installs them in.
async fn pytest(cluster: &Cluster, packages: &str, file: &str) -> Result<()> {
    let python: PathBuf = repository().join(".venv").join(packages).join("bin/python");
    ensure!(python.is_file(), "{} is missing: run `make fetch`", python.display());
    let output = Command::new(python)
        .current_dir(repository().join("tests/clients"))
        .args(["-m", "pytest", "-q", "-p", "no:cacheprovider", file])
        .env("LOCKSTEP_HTTP", format!("http://{}", cluster.gateway.http().context("the gateway answers HTTP")?))
        .env("LOCKSTEP_GRPC", cluster.gateway.grpc())
        .env("LOCKSTEP_MODEL", "demo")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    ensure!(
        output.status.success(),
        "{file}: {text}\n{}\n{}",
        String::from_utf8_lossy(&output.stderr),
        cluster.gateway.log()
    );
    Ok(())
}

#[tokio::test]
async fn openai() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    pytest(&cluster, "clients", "test_openai.py").await?;
    cluster.stop().await
}

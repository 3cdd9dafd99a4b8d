//! A gateway whose ports speak TLS, and clients that want to know whom they talk to.

use std::{path::Path, process::Output};

use anyhow::{Context, Result, ensure};
use lockstep_tests::{
    cluster::{PATIENCE, Process, binary, demo_model, repository},
    timed_stub::TimedStub,
};
use tempfile::TempDir;
use tokio::process::Command;

/// A gateway with a certificate for `localhost`.
struct Encrypted {
    gateway: Process,
    _tokenizer: Process,
    folder: TempDir,
}

// === impl Encrypted ===

impl Encrypted {
    async fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let issued = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        let file = |name: &str, text: String| -> Result<String> {
            let path = folder.path().join(name);
            std::fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let certificate = file("tls.crt", issued.cert.pem())?;
        let key = file("tls.key", issued.signing_key.serialize_pem())?;
        let models = vec!["--models".into(), format!("demo={}", demo_model().display())];
        let tokenizer = Process::start("lockstep-tokenizer-svc", "tokenizer", models).await?;
        let worker = TimedStub::default().serve().await?.to_string();
        let args = [
            ["--tokenizers", tokenizer.grpc()],
            ["--groups", &worker],
            ["--http-listen", "127.0.0.1:0"],
            ["--tls.certificate-file", &certificate],
            ["--tls.key-file", &key],
        ];
        let args = args.as_flattened().iter().map(|arg| (*arg).to_owned()).collect();
        let gateway = Process::start("lockstep-gateway", "gateway", args).await?;
        Ok(Self { gateway, _tokenizer: tokenizer, folder })
    }

    fn certificate(&self) -> std::path::PathBuf {
        self.folder.path().join("tls.crt")
    }

    /// `localhost:port` of the port for gRPC.
    fn grpc(&self) -> Result<String> {
        at_localhost(self.gateway.grpc())
    }

    async fn lockstep(&self, args: &[&str], trusted: Option<&Path>) -> Result<Output> {
        let mut command = Command::new(binary("lockstep")?);
        command.args(args).args(["--target", &format!("https://{}", self.grpc()?)]).kill_on_drop(true);
        command.env_remove("SSL_CERT_FILE").envs(trusted.map(|path| ("SSL_CERT_FILE", path)));
        Ok(tokio::time::timeout(PATIENCE, command.output()).await??)
    }

    /// Waits until the cluster says that it takes work.
    async fn ready(&self) -> Result<()> {
        let certificate = self.certificate();
        let ready = async {
            while !self.lockstep(&["status"], Some(&certificate)).await?.status.success() {}
            anyhow::Ok(())
        };
        tokio::time::timeout(PATIENCE, ready).await.with_context(|| self.gateway.log())?
    }
}

/// The same port by the name that the certificate has.
fn at_localhost(address: &str) -> Result<String> {
    let (_, port) = address.rsplit_once(':').context("no port")?;
    Ok(format!("localhost:{port}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn lockstep_itself_asks_for_a_certificate_that_it_trusts() -> Result<()> {
    let encrypted = Encrypted::start().await?;
    encrypted.ready().await?;
    let args = ["generate", "Hello", "--set", "max_new_tokens=3"];
    let answer = encrypted.lockstep(&args, Some(&encrypted.certificate())).await?;
    ensure!(answer.status.success(), "{answer:?}");
    let answer = encrypted.lockstep(&args, None).await?;
    let said = String::from_utf8_lossy(&answer.stderr);
    ensure!(!answer.status.success() && said.contains("certificate"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_nobody_here_wrote_are_answered() -> Result<()> {
    let encrypted = Encrypted::start().await?;
    encrypted.ready().await?;
    let http = at_localhost(encrypted.gateway.http().context("no HTTP")?)?;
    let output = Command::new(repository().join(".venv/clients/bin/python"))
        .current_dir(repository().join("tests/clients"))
        .args(["-m", "pytest", "-q", "test_tls.py"])
        .env("LOCKSTEP_HTTP", format!("https://{http}"))
        .env("LOCKSTEP_GRPC", encrypted.grpc()?)
        .env("LOCKSTEP_CERTIFICATE", encrypted.certificate())
        .env("LOCKSTEP_MODEL", "demo")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{text}");
    ensure!(output.status.success(), "{text}\n{}", encrypted.gateway.log());
    Ok(())
}

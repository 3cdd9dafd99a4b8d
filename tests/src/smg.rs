//! The Shepherd Model Gateway (PyPI's `smg`), the real program.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::Checkpoint;
use serde_json::{Map, Value, json};
use tokio::process::{Child, Command};

use crate::cluster::{PATIENCE, demo_model, repository};

/// A running `smg`. Dropping it kills the program.
#[derive(Debug)]
pub struct Smg {
    child: Child,
    /// `host:port` of its API.
    pub http: String,
    /// The page of its metrics.
    pub metrics: String,
    log: PathBuf,
}

/// Writes the demo model's tokenizer as `transformers` would: single digits, then GPT-2's words. A router cannot read a
/// GGUF file's own.
///
/// # Errors
/// A model that is not there, or a folder that cannot be written to.
pub fn write_tokenizer(folder: &Path) -> Result<()> {
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
    // Without one, smg looks for it anew at each request, now and then for five seconds.
    std::fs::write(folder.join("config.json"), json!({ "model_type": "llama" }).to_string())?;
    Ok(())
}

/// Ports that were free a moment ago.
fn free_ports() -> Result<[u16; 2]> {
    let (one, other) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok([one.local_addr()?.port(), other.local_addr()?.port()])
}

impl Smg {
    /// Starts it in front of workers (`host:port`), between which a policy chooses. `args` are further ones; its log is in
    /// `folder`.
    ///
    /// # Errors
    /// A program that was not fetched.
    pub fn start(workers: &[&str], folder: &Path, policy: &str, args: &[&str]) -> Result<Self> {
        let program = repository().join(".venv/clients/bin/smg");
        ensure!(program.is_file(), "{} is missing: run `make fetch`", program.display());
        let [port, metrics_port] = free_ports()?;
        let log = folder.join("smg.log");
        let file = std::fs::File::create(&log)?;
        let child = Command::new(program)
            .args(["launch", "--host", "127.0.0.1", "--policy", policy])
            .args(["--port", &port.to_string(), "--prometheus-port", &metrics_port.to_string()])
            .args(args)
            .arg("--worker-urls")
            .args(workers.iter().map(|worker| format!("grpc://{worker}")))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true)
            .spawn()?;
        let metrics = format!("http://127.0.0.1:{metrics_port}/metrics");
        Ok(Self { child, http: format!("127.0.0.1:{port}"), metrics, log })
    }

    /// All that it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn stop(mut self) -> Result<()> {
        let id = self.child.id().with_context(|| self.log())?;
        Command::new("kill").args(["-TERM", &id.to_string()]).status().await?;
        tokio::time::timeout(PATIENCE, self.child.wait()).await??;
        Ok(())
    }
}

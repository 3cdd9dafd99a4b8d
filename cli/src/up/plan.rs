//! A [`Plan`] is what has to run for a cluster: which programs, with which flags.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    thread,
};

use super::{Options, Transport, child::Spec};
use crate::{
    failure::Failure,
    worker::{GATEWAY, TOKENIZER, WORKER, program},
};

/// Loopback, at a port that the system chooses.
const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// What has to run for a cluster.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) model_name: String,
    pub(super) world_size: u32,
    pub(super) replicas: u32,
    model: PathBuf,
    draft_model: Option<PathBuf>,
    threads: u32,
    transport: Transport,
    gateway_listen: SocketAddr,
    http_listen: SocketAddr,
    gateway_config: Option<PathBuf>,
    worker_config: Option<PathBuf>,
    tokenizer_config: Option<PathBuf>,
    drain_timeout_ms: u64,
}

// === impl Plan ===

impl Plan {
    pub(super) fn new(options: &Options) -> Result<Self, Failure> {
        let model = found("model", &options.model)?;
        let draft_model = options.draft_model.as_ref().map(|path| found("draft model", path)).transpose()?;
        let ranks = options.world_size * options.replicas;
        let cores = thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(1));
        let plan = Self {
            model_name: options.name.clone().unwrap_or_else(|| model_name(&model)),
            world_size: options.world_size,
            replicas: options.replicas,
            threads: options.threads.unwrap_or((cores / ranks).max(1)),
            transport: options.transport,
            gateway_listen: options.gateway_listen,
            http_listen: options.http_listen,
            gateway_config: options.gateway_config.clone(),
            worker_config: options.worker_config.clone(),
            tokenizer_config: options.tokenizer_config.clone(),
            drain_timeout_ms: options.drain_timeout.saturating_mul(1000),
            model,
            draft_model,
        };
        plan.check_names()?;
        Ok(plan)
    }

    /// Names and paths reach the tokenizer service as `NAME=PATH` in a list with commas.
    fn check_names(&self) -> Result<(), Failure> {
        let name = &self.model_name;
        if name.is_empty() || name.contains([',', '=']) {
            return Err(Failure::Usage(format!(
                "`{name}` cannot name a model: give it a --name without comma or equals sign"
            )));
        }
        match self.model.to_str() {
            Some(path) if !path.contains(',') => Ok(()),
            _ => Err(Failure::Usage(format!("model {}: the path holds a comma or is not UTF-8", self.model.display()))),
        }
    }

    pub(super) fn tokenizer(&self) -> Result<Spec, Failure> {
        let mut flags = config_flag(self.tokenizer_config.as_ref());
        let mut entry = OsString::from(format!("{}=", self.model_name));
        entry.push(&self.model);
        flags.extend(["--models".into(), entry]);
        self.spec("tokenizer", TOKENIZER, ANY_PORT, flags)
    }

    /// One rank of a group; `leader` is where rank 0 answers, for the others.
    pub(super) fn worker(&self, group: u32, rank: u32, leader: Option<SocketAddr>) -> Result<Spec, Failure> {
        let mut flags = config_flag(self.worker_config.as_ref());
        flags.extend(["--model.path".into(), self.model.clone().into()]);
        if let (0, Some(path)) = (rank, &self.draft_model) {
            flags.extend(["--model.draft-path".into(), path.into()]);
        }
        let mut add = |flag: &str, value: String| flags.extend([OsString::from(flag), value.into()]);
        add("--model.name", self.model_name.clone());
        add("--engine.threads", self.threads.to_string());
        add("--group.rank", rank.to_string());
        add("--group.world-size", self.world_size.to_string());
        if self.world_size > 1 {
            add("--group.transport", self.transport.name().into());
            add("--group.collective-listen", ANY_PORT.to_string());
        }
        if let Some(leader) = leader {
            add("--group.leader", format!("http://{leader}"));
        }
        self.spec(&format!("worker-{group}.{rank}"), WORKER, ANY_PORT, flags)
    }

    pub(super) fn gateway(&self, tokenizer: SocketAddr, leaders: &[SocketAddr]) -> Result<Spec, Failure> {
        let mut flags = config_flag(self.gateway_config.as_ref());
        let leaders: Vec<String> = leaders.iter().map(SocketAddr::to_string).collect();
        flags.extend(["--tokenizers".into(), tokenizer.to_string().into()]);
        flags.extend(["--groups".into(), leaders.join(",").into()]);
        let spec = self.spec("gateway", GATEWAY, self.gateway_listen, flags)?;
        Ok(Spec { http_listen: Some(self.http_listen), ..spec })
    }

    /// What all children have in common.
    fn spec(&self, name: &str, binary: &str, listen: SocketAddr, flags: Vec<OsString>) -> Result<Spec, Failure> {
        let mut args = flags;
        args.push("--exit-with-parent".into());
        args.extend(["--limits.drain-timeout-ms".into(), self.drain_timeout_ms.to_string().into()]);
        let (name, program) = (name.to_owned(), program(binary)?);
        Ok(Spec { name, program, args, listen, http_listen: None, metrics_listen: ANY_PORT })
    }
}

fn config_flag(file: Option<&PathBuf>) -> Vec<OsString> {
    file.map(|file| vec!["--config".into(), file.into()]).unwrap_or_default()
}

/// Where a file is, whatever the folder that a child is started in.
fn found(what: &str, path: &Path) -> Result<PathBuf, Failure> {
    path.canonicalize().map_err(|error| Failure::Usage(format!("{what} {}: {error}", path.display())))
}

/// A folder's name, or a file's without `.gguf`.
fn model_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_is_named_after_its_file_or_folder() {
        assert_eq!(model_name("/m/SmolLM2-135M-Instruct.Q4_1.gguf".as_ref()), "SmolLM2-135M-Instruct.Q4_1");
        assert_eq!(model_name("/m/Llama-3".as_ref()), "Llama-3");
    }
}

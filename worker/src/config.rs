//! Settings of a worker.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use lockstep_kernels::KvEncoding;
use lockstep_proto::{
    config::{ConfigError, Key, Settings},
    server::{self, Limits, ServerSettings},
    telemetry::{self, LogSettings},
};
use serde::{Deserialize, Serialize};

use crate::{
    device::{Device, DeviceChoice, DeviceSettings},
    group::{self, GroupConfig},
    kv_room,
    model::{LoadError, load::Source},
    model_runner::RunnerSettings,
    scheduler::{SchedulerConfig, speculation::Speculation},
};

/// Everything that an operator can choose about a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// Address for gRPC.
    pub listen: SocketAddr,
    /// Address for Prometheus.
    pub metrics_listen: Option<SocketAddr>,
    /// Whether the end of standard input ends the worker.
    pub exit_with_parent: bool,
    /// Answers without a model.
    pub stub: bool,
    /// Pause before each token of a stub. Unit: milliseconds.
    pub stub_interval_ms: u64,
    /// The model.
    pub model: ModelSettings,
    /// The group that this rank belongs to.
    pub group: GroupConfig,
    /// The engine.
    pub engine: EngineSettings,
    /// Limits of the server.
    pub limits: Limits,
    /// The log.
    pub log: LogSettings,
}

/// Which model is served.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSettings {
    /// A GGUF file or a Hugging Face folder.
    pub path: PathBuf,
    /// The name that requests use.
    pub name: String,
    /// A smaller model that drafts, likewise.
    pub draft_path: Option<PathBuf>,
}

/// How the engine computes. See [`KEYS`] for what each setting costs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineSettings {
    /// What computes.
    pub device: DeviceChoice,
    /// Number of the GPU; `None`: the rank, modulo the number of GPUs.
    pub gpu: Option<usize>,
    /// Where compiled kernels are kept; `None`: `lockstep/kernels` in the user's cache folder.
    pub kernel_cache: Option<PathBuf>,
    /// Threads that compute; 0: one for each core.
    pub threads: usize,
    /// Tokens whose keys and values fit into the cache; 0: see [`kv_room`].
    pub kv_cache_tokens: usize,
    /// Part of a GPU's memory that weights and cache may take.
    pub gpu_memory_fraction: f64,
    /// How keys and values are stored.
    pub kv_cache_encoding: KvEncoding,
    /// Whether GPUs keep the lockstep rule. Others always do.
    pub deterministic: bool,
    /// Positions in a block.
    pub block_size: usize,
    /// Longest sequence; 0: what the model was trained for.
    pub context_length: usize,
    /// Rows of a step; 0: as many as the device likes.
    pub max_step_tokens: usize,
    /// Rows of one sequence in a step; 0: as many as the device likes.
    pub max_prefill_chunk: usize,
    /// Sequences that run at a time; 0: as many as the device likes.
    pub max_running: usize,
    /// Sequences that may wait.
    pub max_waiting: usize,
    /// Whether tokens are drafted.
    pub speculation: Speculation,
    /// A step loop that has not gone round for so long makes the worker not ready.
    pub stall_after_ms: u64,
}

/// Rows of a step whose logits are asked for because they are a prompt's. With a vocabulary of 128,256 they take 31 MiB; a
/// whole step of `max_step_tokens` rows would take 250.
const MAX_PROMPT_LOGITS_ROWS: usize = 64;

/// The keys of a worker's own settings.
pub const KEYS: &[Key] = &[
    Key {
        path: "stub",
        help: "Serve no model: answer with the prompt's own tokens, over and over, to measure the rest of a cluster. \
               Takes sizes from model.path, and no weights. Default: false.",
    },
    Key { path: "stub_interval_ms", help: "Pause before each token of a stub. Default: 0, which is none." },
    Key { path: "model.path", help: "GGUF file or Hugging Face folder to serve. Default: none, it must be given." },
    Key { path: "model.name", help: "Name that requests use for the model. Default: default." },
    Key {
        path: "model.draft_path",
        help: "GGUF file or Hugging Face folder of a smaller model with the same vocabulary, which drafts where \
               engine.speculation finds nothing to repeat. Default: none. Rank 0 alone loads it, with a cache of \
               engine.kv_cache_tokens; the others need not have it. Not with engine.speculation = off. Text comes faster \
               if it is much faster than the model and often right, and at most 2 % slower if not, once it has read the \
               prompt. What comes is the same.",
    },
    Key {
        path: "engine.device",
        help: "auto (a GPU if one can be used, else the CPU; the log says which and why), cuda (a GPU, or an error), cpu, or \
               reference (candle tensors on the CPU: plain and slow, for comparison). Default: auto. Ranks must come to \
               the same.",
    },
    Key {
        path: "engine.gpu",
        help: "Number of the GPU, from 0, among those that CUDA_VISIBLE_DEVICES shows. Default: none, the rank modulo the \
               number of GPUs.",
    },
    Key {
        path: "engine.kernel_cache",
        help: "Folder for compiled GPU kernels, at most 256 MiB; only trusted users may write it. Default: none, \
               lockstep/kernels in $XDG_CACHE_HOME or ~/.cache. Kernels that it lacks are compiled at start, which takes \
               seconds and libnvrtc; `lockstep-worker kernels` fills it in advance.",
    },
    Key {
        path: "engine.threads",
        help: "Threads that compute; 0 is one for each core. Default: 0. More than cores slow every step.",
    },
    Key {
        path: "engine.kv_cache_tokens",
        help: "Tokens whose keys and values fit into the cache, over all sequences; 0 is 32768 on a CPU, and on a GPU what \
               engine.gpu_memory_fraction leaves beside the weights. Default: 0. More take memory (see `lockstep \
               inspect`), on a CPU once they are used; fewer make sequences wait or be computed again.",
    },
    Key {
        path: "engine.gpu_memory_fraction",
        help: "Part of a GPU's memory that weights and cache take, over 0 and up to 1, where engine.kv_cache_tokens = 0. \
               Default: 0.9. The rest is for the driver, NCCL and what steps compute on their way: too little of it ends \
               in an error. Ranks that share a GPU must share this, too.",
    },
    Key {
        path: "engine.kv_cache_encoding",
        help: "f16, or int8: 8-bit integers with a scale for each key and each value of a head, in about half the \
               memory and half the time to read it (see `lockstep inspect`), for log-probabilities that move by some \
               hundredths. Default: f16. Ranks must have the same, and so should all groups that serve a model.",
    },
    Key {
        path: "engine.deterministic",
        help: "true, or false: GPUs add sums over ranks in whatever order NCCL finds fastest, and have cuBLASLt compute steps \
               of many rows in dense bf16. Then a seed no longer gives the same tokens in every group and at every load, a \
               stream that is resumed elsewhere may go on differently, and speculation may change what comes. Default: \
               true. false changes nothing on CPUs. Ranks must have the same.",
    },
    Key {
        path: "engine.block_size",
        help: "Positions in a KV block. Default: 16. Larger blocks share prefixes more coarsely.",
    },
    Key {
        path: "engine.context_length",
        help: "Longest prompt and output together, in tokens; 0 is what the model was trained for. Default: 0.",
    },
    Key {
        path: "engine.max_step_tokens",
        help: "Rows of a step; 0 is 512, on a GPU 2048. Default: 0. More make prefills faster and gaps between tokens longer.",
    },
    Key {
        path: "engine.max_prefill_chunk",
        help: "Rows of one sequence in a step; 0 is 256, on a GPU 2048. Default: 0. Fewer let prompts share steps more evenly.",
    },
    Key {
        path: "engine.max_running",
        help: "Sequences that run at a time; 0 is 64, on a GPU 256. Default: 0. More raise throughput and slow each stream.",
    },
    Key {
        path: "engine.max_waiting",
        help: "Sequences that may wait; further ones are refused with RESOURCE_EXHAUSTED. Default: 256.",
    },
    Key {
        path: "engine.speculation",
        help: "ngram (while at most 4 sequences decode, each also computes up to 7 tokens that it may be about to repeat, \
               and keeps those that turn out right; model.draft_path gives more of them) or off. Default: ngram. Text \
               that copies comes faster; other text at most 2 % slower, and who shares a step with one that copies waits \
               longer for it. What comes is the same. Rank 0 decides; the others need not have the same value.",
    },
    Key {
        path: "engine.stall_after_ms",
        help: "A step loop that has not gone round for so long makes the worker not ready. Default: 60000. Must be \
               more than the longest step takes.",
    },
];

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50_061)),
            metrics_listen: None,
            exit_with_parent: false,
            stub: false,
            stub_interval_ms: 0,
            model: ModelSettings::default(),
            group: GroupConfig::default(),
            engine: EngineSettings::default(),
            limits: Limits::default(),
            log: LogSettings::default(),
        }
    }
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self { path: PathBuf::new(), name: "default".into(), draft_path: None }
    }
}

impl Default for EngineSettings {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            gpu: None,
            kernel_cache: None,
            threads: 0,
            kv_cache_tokens: 0,
            gpu_memory_fraction: 0.9,
            kv_cache_encoding: KvEncoding::F16,
            deterministic: true,
            block_size: 16,
            context_length: 0,
            max_step_tokens: 0,
            max_prefill_chunk: 0,
            max_running: 0,
            max_waiting: 256,
            speculation: Speculation::Ngram,
            stall_after_ms: 60_000,
        }
    }
}

impl Settings for WorkerConfig {
    const SERVICE: &'static str = "worker";
    const KEYS: &'static [&'static [Key]] = &[server::KEYS, telemetry::KEYS, group::config::KEYS, KEYS];

    fn validate(&self) -> Result<(), ConfigError> {
        if self.model.path.as_os_str().is_empty() {
            return Err(ConfigError::invalid("model.path", "``", "must name a GGUF file or a Hugging Face folder"));
        }
        if self.stub && self.group.world_size != 1 {
            return Err(ConfigError::invalid("stub", true, "needs group.world_size = 1"));
        }
        let engine = &self.engine;
        for (key, value) in [("engine.block_size", engine.block_size), ("engine.max_waiting", engine.max_waiting)] {
            if !(1..=1 << 30).contains(&value) {
                return Err(ConfigError::invalid(key, value, "must be in 1..=1073741824"));
            }
        }
        for (key, value) in [
            ("engine.kv_cache_tokens", engine.kv_cache_tokens),
            ("engine.max_step_tokens", engine.max_step_tokens),
            ("engine.max_prefill_chunk", engine.max_prefill_chunk),
            ("engine.max_running", engine.max_running),
        ] {
            if value > 1 << 30 {
                return Err(ConfigError::invalid(key, value, "must be in 0..=1073741824"));
            }
        }
        if !(engine.gpu_memory_fraction > 0.0 && engine.gpu_memory_fraction <= 1.0) {
            let rule = "must be over 0 and at most 1";
            return Err(ConfigError::invalid("engine.gpu_memory_fraction", engine.gpu_memory_fraction, rule));
        }
        if engine.max_step_tokens != 0 && engine.max_step_tokens < engine.max_running {
            let rule = format!("must be at least engine.max_running = {}", engine.max_running);
            return Err(ConfigError::invalid("engine.max_step_tokens", engine.max_step_tokens, rule));
        }
        self.check_draft_model()?;
        self.group.validate()?;
        self.limits.validate()?;
        self.log.validate()
    }
}

impl WorkerConfig {
    /// The draft model's file, on the rank that drafts.
    pub fn draft_path(&self) -> Option<&Path> {
        self.model.draft_path.as_deref().filter(|_| self.group.rank == 0)
    }

    fn check_draft_model(&self) -> Result<(), ConfigError> {
        match self.draft_path() {
            Some(path) if self.engine.speculation == Speculation::Off => {
                let rule = "has no use with engine.speculation = off: leave out one of the two";
                Err(ConfigError::invalid("model.draft_path", path.display(), rule))
            }
            _ => Ok(()),
        }
    }

    /// What the server needs.
    pub fn server(&self) -> ServerSettings {
        ServerSettings {
            service: Self::SERVICE,
            listen: self.listen,
            metrics_listen: self.metrics_listen,
            limits: self.limits.clone(),
        }
    }
}

impl EngineSettings {
    /// Which device `rank` opens.
    pub fn device(&self, rank: usize) -> DeviceSettings {
        DeviceSettings {
            choice: self.device,
            gpu: self.gpu,
            rank,
            kernel_cache: self.kernel_cache.clone().or_else(default_kernel_cache),
            threads: self.n_threads(),
        }
    }

    fn n_threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if self.threads == 0 { cores } else { self.threads }
    }

    /// How the runner of `source`'s rank is built.
    ///
    /// # Errors
    /// The device has no room for keys and values.
    pub fn runner(&self, source: &Source, device: Device) -> Result<RunnerSettings, LoadError> {
        let (encoding, block_size) = (self.kv_cache_encoding, self.block_size);
        let n_blocks = match self.kv_cache_tokens {
            // What fits, and no more.
            0 => kv_room::tokens(source, &device, encoding, self.gpu_memory_fraction, block_size)? / block_size,
            tokens => tokens.div_ceil(block_size),
        };
        let trained = source.config().context_length;
        Ok(RunnerSettings {
            device,
            threads: self.n_threads(),
            n_blocks,
            block_size,
            kv_encoding: encoding,
            context_length: if self.context_length == 0 { trained } else { self.context_length },
            deterministic: self.deterministic,
        })
    }

    /// How rank 0 schedules.
    pub fn scheduler(&self, runner: &RunnerSettings) -> SchedulerConfig {
        let [step_tokens, prefill_chunk, running] = match runner.device {
            // Enough rows for every multiprocessor of a large one to have some of each product.
            Device::Cuda(_) => [2048, 2048, 256],
            Device::Cpu | Device::Reference => [512, 256, 64],
        };
        let chosen = |setting: usize, else_this: usize| if setting == 0 { else_this } else { setting };
        let max_step_tokens = chosen(self.max_step_tokens, step_tokens.max(self.max_running));
        SchedulerConfig {
            max_step_tokens,
            max_prefill_chunk: chosen(self.max_prefill_chunk, prefill_chunk),
            max_running: chosen(self.max_running, running.min(max_step_tokens)),
            max_prompt_logits_rows: MAX_PROMPT_LOGITS_ROWS,
            max_waiting: self.max_waiting,
            n_blocks: runner.n_blocks as u32,
            block_size: runner.block_size as u32,
            context_length: runner.context_length as u32,
            speculation: self.speculation,
        }
    }
}

/// As the XDG Base Directory Specification (version 0.8) has it; none for a user without a home.
pub(crate) fn default_kernel_cache() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(caches.join("lockstep/kernels"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_has_a_key() {
        lockstep_proto::config::assert_keys_match_fields::<WorkerConfig>();
    }

    #[test]
    fn a_draft_model_that_nobody_asks_is_refused_where_it_would_be_loaded() {
        let mut config = WorkerConfig::default();
        config.model.path = "model.gguf".into();
        config.model.draft_path = Some("small.gguf".into());
        assert!(config.validate().is_ok());
        config.engine.speculation = Speculation::Off;
        let error = config.validate().unwrap_err().to_string();
        for part in ["model.draft_path", "small.gguf", "engine.speculation = off"] {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
        config.group.rank = 1;
        config.group.world_size = 2;
        assert_eq!(config.draft_path(), None);
        assert!(config.check_draft_model().is_ok(), "rank 0 alone drafts");
    }
}

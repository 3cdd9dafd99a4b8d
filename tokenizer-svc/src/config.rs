//! The service's settings: [`TokenizerSettings`], read as every service reads its own ([`lockstep_proto::config`]).

use std::{collections::HashSet, net::SocketAddr, thread};

use lockstep_proto::{
    config::{ConfigError, Key, Settings},
    server::{self, Limits},
    telemetry::{self, LogSettings},
};
use serde::{Deserialize, Serialize};

/// Everything that an operator can choose about a tokenizer service; [`KEYS`](Settings::KEYS) says what each costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerSettings {
    /// For gRPC.
    pub listen: SocketAddr,
    /// For `/metrics`.
    pub metrics_listen: Option<SocketAddr>,
    /// Shut down when standard input ends.
    pub exit_with_parent: bool,
    /// Limits of the server.
    pub limits: Limits,
    /// Logs.
    pub log: LogSettings,
    /// The models to encode for.
    pub models: Vec<ModelEntry>,
    /// How much is encoded at a time.
    pub work: WorkLimits,
}

/// How much is encoded at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkLimits {
    /// Requests that are worked on at a time, each on a thread of its own.
    pub threads: u32,
    /// Requests that may wait for one of those threads; further ones are refused.
    pub max_waiting: u32,
}

/// A model of the catalog. On the command line and in the environment: `NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WrittenEntry")]
pub struct ModelEntry {
    /// The name that requests use.
    pub name: String,
    /// A Hugging Face folder with a `tokenizer.json`, or a GGUF file.
    pub path: String,
}

/// The two forms of a [`ModelEntry`].
#[derive(Deserialize)]
#[serde(untagged)]
enum WrittenEntry {
    Short(String),
    Table { name: String, path: String },
}

// === impl TokenizerSettings ===

impl Default for TokenizerSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7450)),
            metrics_listen: None,
            exit_with_parent: false,
            limits: Limits::default(),
            log: LogSettings::default(),
            models: Vec::new(),
            work: WorkLimits::default(),
        }
    }
}

impl Settings for TokenizerSettings {
    const SERVICE: &'static str = "tokenizer-svc";
    const KEYS: &'static [&'static [Key]] = &[
        server::KEYS,
        telemetry::KEYS,
        &[
            Key {
                path: "models",
                help: "Models to encode for, each NAME=PATH of a Hugging Face folder or a GGUF file; in a config \
                       file tables with name and path. Required.",
            },
            Key {
                path: "work.threads",
                help: "Requests worked on at a time. Default: the number of cores. More only let long texts hold up \
                       short ones less.",
            },
            Key {
                path: "work.max_waiting",
                help: "Requests that may wait; further ones are refused. Default: 1024. More cost memory, and wait \
                       longer.",
            },
        ],
    ];

    fn validate(&self) -> Result<(), ConfigError> {
        self.limits.validate()?;
        self.log.validate()?;
        for (key, value) in [("work.threads", self.work.threads), ("work.max_waiting", self.work.max_waiting)] {
            if value == 0 {
                return Err(ConfigError::invalid(key, value, "must be at least 1"));
            }
        }
        if self.models.is_empty() {
            return Err(ConfigError::invalid("models", "[]", "must name at least one model, as NAME=PATH"));
        }
        let mut names = HashSet::new();
        match self.models.iter().find(|model| !names.insert(&model.name)) {
            Some(model) => Err(ConfigError::invalid("models", &model.name, "must name each model once")),
            None => Ok(()),
        }
    }
}

// === impl WorkLimits ===

impl Default for WorkLimits {
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX));
        Self { threads: cores, max_waiting: 1024 }
    }
}

// === impl ModelEntry ===

impl TryFrom<WrittenEntry> for ModelEntry {
    type Error = String;

    fn try_from(written: WrittenEntry) -> Result<Self, String> {
        let (name, path) = match &written {
            WrittenEntry::Short(text) => text.split_once('=').ok_or("a model is written NAME=PATH")?,
            WrittenEntry::Table { name, path } => (name.as_str(), path.as_str()),
        };
        if name.is_empty() || path.is_empty() {
            return Err("a model has a name and a path, neither empty".to_owned());
        }
        Ok(Self { name: name.to_owned(), path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use lockstep_proto::config::{Command, assert_keys_match_fields, load_from};

    use super::*;

    /// Settings from flags, or the error's text.
    fn settings(flags: &[&str]) -> Result<TokenizerSettings, String> {
        let args = ["lockstep-tokenizer-svc"].iter().chain(flags).map(OsString::from);
        match load_from(args, std::iter::empty()) {
            Ok(Command::Run(settings)) => Ok(settings),
            Ok(other) => Err(format!("{other:?}")),
            Err(e) => Err(e.to_string()),
        }
    }

    #[test]
    fn every_field_has_a_key() {
        assert_keys_match_fields::<TokenizerSettings>();
    }

    #[test]
    fn models_come_as_name_and_path() {
        let settings = settings(&["--models", "a=/x/y=z.gguf", "--models", "b=models/b"]).unwrap();
        let entry = |name: &str, path: &str| ModelEntry { name: name.into(), path: path.into() };
        assert_eq!(settings.models, [entry("a", "/x/y=z.gguf"), entry("b", "models/b")]);
    }

    #[test]
    fn a_table_in_a_file_is_the_same_as_a_flag() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.toml");
        std::fs::write(&file, "[[models]]\nname = \"a\"\npath = \"/x\"\n").unwrap();
        let from_file = settings(&["--config", file.to_str().unwrap()]).unwrap();
        assert_eq!(from_file, settings(&["--models", "a=/x"]).unwrap());
    }

    #[test]
    fn broken_settings_name_the_key() {
        let check = |flags: &[&str], named: &str| {
            let refusal = settings(flags).unwrap_err();
            assert!(refusal.contains("models") && refusal.contains(named), "{refusal}");
        };
        check(&[], "at least one model");
        check(&["--models", "a"], "NAME=PATH");
        check(&["--models", "=x"], "a name and a path");
        check(&["--models", "a=x,a=y"], "each model once");
    }
}

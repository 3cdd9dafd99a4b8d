//! [`Settings`] are everything that an operator can choose about one service: a single struct, read from four sources.
//!
//! A later source wins, key by key: the struct's `Default`, a TOML file (`--config FILE`), environment variables
//! (`LOCKSTEP_GATEWAY__LIMITS__MAX_CONNECTIONS=64`; two underscores nest) and flags (`--limits.max-connections 64`).
//! File, environment and flags share one list of [`Key`]s, so that a key has one name everywhere, and an unknown key
//! is an error wherever it stands. Every error names the key, the source and the value.
//!
//! The prefix of an environment variable ends in *two* underscores because Kubernetes injects variables such as
//! `LOCKSTEP_GATEWAY_PORT` for a service called `lockstep-gateway`, which must not be read as settings.

mod layers;

use std::{ffi::OsString, path::PathBuf};

use clap::{Arg, ArgAction, ArgMatches, error::ErrorKind};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use self::layers::{Layer, Schema};

/// Exit status of a service whose settings are wrong (`EX_USAGE` of BSD's `sysexits.h`). No port has been bound then.
pub const EXIT_CODE: u8 = 64;

/// One setting, as operators see it.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Where it stands in the struct: `limits.max_connections`. The flag has hyphens for underscores.
    pub path: &'static str,
    /// Meaning, unit, default, and what a higher or lower value costs.
    pub help: &'static str,
}

/// The settings of one service. Implementors derive `Serialize` and `Deserialize` with `deny_unknown_fields`.
///
/// A setting is a scalar, a string, a list, or an `Option` of a scalar. From environment and flags a list is given
/// with commas (and repeated flags), so its elements are strings or deserialize from one.
pub trait Settings: Serialize + DeserializeOwned + Default {
    /// The service's short name, such as `gateway`; the program is `lockstep-gateway`.
    const SERVICE: &'static str;

    /// Every key, in groups, so that services share the groups which they have in common:
    /// `&[server::KEYS, &[Key { .. }]]`.
    const KEYS: &'static [&'static [Key]];

    /// Checks rules that a type cannot express, with [`ConfigError::invalid`] for a value that breaks one.
    ///
    /// # Errors
    /// The first broken rule.
    fn validate(&self) -> Result<(), ConfigError>;
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Command<S> {
    /// Run with these settings.
    Run(S),
    /// Print the effective settings (`--print-config`), a TOML document that `--config` takes back once
    /// secrets are put in.
    Print(String),
    /// Print the help text.
    Help(String),
    /// Print the version.
    Version(String),
}

/// Settings that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The command line cannot be read.
    #[error("{0}")]
    Usage(String),
    /// The file cannot be read or is no TOML.
    #[error("config file {}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// No setting has this name.
    #[error("unknown key `{key}` in {origin}")]
    UnknownKey {
        /// The key as a path.
        key: String,
        /// The source.
        origin: String,
    },
    /// A value is of the wrong type or breaks a rule.
    #[error("`{key}` = {value} from {origin}: {rule}")]
    Invalid {
        /// The key as a path.
        key: String,
        /// The value as it was given.
        value: String,
        /// The source.
        origin: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// The effective settings cannot be shown as TOML.
    #[error("cannot print the configuration: {0}")]
    Print(#[from] toml::ser::Error),
}

/// Reads the settings of a service from its command line (`std::env::args_os()`, program name first), the file that
/// this names, and the environment.
///
/// # Errors
/// The first unknown key, unreadable value or broken rule; the caller exits with [`EXIT_CODE`].
pub fn load<S: Settings>(args: impl Iterator<Item = OsString>) -> Result<Command<S>, ConfigError> {
    load_from(args, std::env::vars_os())
}

/// Like [`load`], with the environment given.
///
/// # Errors
/// As [`load`].
pub fn load_from<S: Settings>(
    args: impl Iterator<Item = OsString>,
    env: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Command<S>, ConfigError> {
    let schema = Schema::of::<S>();
    let matches = match command_line(&schema, S::SERVICE).try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => {
            return match error.kind() {
                ErrorKind::DisplayHelp => Ok(Command::Help(error.to_string())),
                ErrorKind::DisplayVersion => Ok(Command::Version(error.to_string())),
                _ => Err(ConfigError::Usage(first_line(&error.to_string()))),
            };
        }
    };
    let mut layers = Vec::new();
    if let Some(path) = matches.get_one::<PathBuf>("config") {
        layers.push(Layer::from_file(path, &schema)?);
    }
    layers.push(Layer::from_env(env, S::SERVICE, &schema)?);
    layers.push(from_flags(&matches, &schema));
    let settings = layers::merge::<S>(&layers, &schema)?;
    settings.validate().map_err(|error| layers::with_origin(error, &layers))?;
    if matches.get_flag("print-config") {
        return Ok(Command::Print(toml::to_string(&settings)?));
    }
    Ok(Command::Run(settings))
}

/// Panics unless [`Settings::KEYS`] names exactly the settings that the struct has: for one test in each service.
///
/// # Panics
/// If a key has no field, a field has no key, or a key has no help.
pub fn assert_keys_match_fields<S: Settings>() {
    let schema = Schema::of::<S>();
    let keys: Vec<_> = schema.keys().map(|(key, _)| key.path.to_owned()).collect();
    let fields = layers::leaves_of_default::<S>();
    let unknown: Vec<_> = keys.iter().filter(|key| !fields.contains(key)).collect();
    let missing: Vec<_> = fields.iter().filter(|field| !keys.contains(field)).collect();
    assert!(unknown.is_empty(), "keys without a field: {unknown:?}");
    assert!(missing.is_empty(), "fields without a key: {missing:?}");
    assert!(schema.keys().all(|(key, _)| !key.help.is_empty()), "a key has no help");
}

// === impl Command ===

impl<S> Command<S> {
    /// The settings to run with, or `None` after printing what was asked for instead.
    #[allow(clippy::print_stdout, reason = "this is what --help, --version and --print-config are for")]
    pub fn run_or_print(self) -> Option<S> {
        match self {
            Self::Run(settings) => Some(settings),
            Self::Print(text) | Self::Help(text) | Self::Version(text) => {
                print!("{text}");
                None
            }
        }
    }
}

// === impl ConfigError ===

impl ConfigError {
    /// A value that breaks a rule; [`load`] adds where the value came from.
    pub fn invalid(key: impl Into<String>, value: impl ToString, rule: impl Into<String>) -> Self {
        Self::Invalid { key: key.into(), value: value.to_string(), origin: "the defaults".into(), rule: rule.into() }
    }
}

/// The command line: one flag for each key, and `--config` and `--print-config`.
fn command_line(schema: &Schema, service: &str) -> clap::Command {
    let prefix = layers::env_prefix(service);
    let flags = schema.keys().map(|(key, kind)| {
        let arg = Arg::new(key.path).long(flag(key.path)).help(key.help).value_name("VALUE");
        match kind {
            layers::Kind::List => arg.action(ArgAction::Append),
            // `--flag` alone means true; a value is joined by `=`, so that it cannot swallow what follows.
            layers::Kind::Bool => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
            layers::Kind::Scalar => arg.allow_hyphen_values(true),
        }
    });
    clap::Command::new(format!("lockstep-{service}"))
        .version(env!("CARGO_PKG_VERSION"))
        .after_help(format!(
            "Defaults < --config file < environment < flags. In the environment every key is {prefix}KEY, with two \
             underscores for a dot; in the file it is a TOML key."
        ))
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .help("TOML file with settings"),
        )
        .arg(
            Arg::new("print-config")
                .long("print-config")
                .action(ArgAction::SetTrue)
                .help("Print the effective settings as TOML and exit"),
        )
        .args(flags)
}

/// The flag's name without its hyphens in front.
fn flag(path: &str) -> String {
    path.replace('_', "-")
}

fn from_flags(matches: &ArgMatches, schema: &Schema) -> Layer {
    let mut layer = Layer::default();
    for (key, kind) in schema.keys() {
        let origin = format!("flag --{}", flag(key.path));
        if let Some(texts) = matches.get_many::<String>(key.path) {
            let texts: Vec<&str> = texts.map(String::as_str).collect();
            layer.push_text(key.path, &texts.join(","), kind, origin);
        }
    }
    layer
}

/// The first line of clap's message, which says what is wrong; the rest shows usage.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

#[cfg(test)]
mod tests;

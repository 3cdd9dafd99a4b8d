//! The worker's own program knows models and machines; `inspect`, `make-model`, `doctor`, `bench engine` and
//! `bench memory` are its subcommands, and this module passes them on. The command itself stays small and links no engine.

use std::{
    ffi::OsString,
    io::{self, Write as _},
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{Command, ExitCode},
};

use clap::Args;

use crate::{
    failure::{Done, Failure},
    target::DEFAULT_TARGET,
};

/// The programs of a cluster, in the order in which they start.
pub(crate) const TOKENIZER: &str = "lockstep-tokenizer-svc";
/// See [`TOKENIZER`].
pub(crate) const WORKER: &str = "lockstep-worker";
/// See [`TOKENIZER`].
pub(crate) const GATEWAY: &str = "lockstep-gateway";

/// What is passed on as it stands.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// Arguments of the worker's subcommand; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

/// Where a program of the cluster is: beside this one.
pub(crate) fn program(name: &str) -> Result<PathBuf, Failure> {
    let own = std::env::current_exe()?;
    let path = own.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    let folder = own.parent().map(|folder| folder.display().to_string()).unwrap_or_default();
    Err(Failure::Failed(format!("{name} is not in {folder}; `cargo build --release` builds all programs")))
}

/// Runs a subcommand of the worker's program; its exit status becomes ours.
pub(crate) fn run(subcommand: &str, arguments: &Arguments) -> Done {
    run_in(&[subcommand], arguments)
}

/// Like [`run`], for a subcommand of a subcommand.
pub(crate) fn run_in(subcommands: &[&str], arguments: &Arguments) -> Done {
    let status = Command::new(program(WORKER)?).args(subcommands).args(&arguments.arguments).status()?;
    // Without a code the worker died of a signal.
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// What the machine offers to a cluster, then what it offers to the engine.
pub(crate) fn doctor(arguments: &Arguments) -> Done {
    if arguments.arguments.is_empty() {
        let mut out = io::stdout().lock();
        for name in [TOKENIZER, WORKER, GATEWAY] {
            match program(name) {
                Ok(path) => writeln!(out, "program  {}", path.display())?,
                Err(missing) => writeln!(out, "program  {missing}")?,
            }
        }
        writeln!(out, "port     {DEFAULT_TARGET} (gateway) {}", port_state())?;
    }
    run("doctor", arguments)
}

fn port_state() -> String {
    let address: Option<SocketAddr> = DEFAULT_TARGET.parse().ok();
    match address.map(TcpListener::bind) {
        Some(Ok(_)) => "is free".into(),
        Some(Err(error)) => format!("cannot be used: {error}"),
        None => "is no address".into(),
    }
}

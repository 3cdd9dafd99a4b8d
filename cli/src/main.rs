//! The `lockstep` command: start a cluster on this machine, talk to one, measure one.
//!
//! # Layout
//!
//! * [`up`] runs a cluster in the foreground; [`status`] asks one how it is.
//! * [`chat`], [`generate`] and [`embed`] talk to it: [`target`] finds it, [`sampling`] reads `--set`, [`events`] prints a stream.
//! * [`bench`] measures it; [`worker`] hands `inspect`, `make-model`, `doctor`, `bench engine` and
//!   `bench memory` to the worker's own program.
//! * [`failure`] is the one way in which any of them fails.
//!
//! # Exit status
//!
//! 0: done; 1: failed; 64: the command line or a setting is wrong; 69: the cluster does not answer or takes no work.
#![forbid(unsafe_code)]

mod bench;
mod chat;
mod embed;
mod events;
mod failure;
mod generate;
mod sampling;
mod status;
mod target;
mod up;
mod worker;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::{Done, EX_USAGE};

#[derive(Debug, Parser)]
#[command(name = "lockstep", version, about = "Start a Lockstep cluster, talk to it, measure it")]
#[command(after_help = "Exit status: 0 done, 1 failed, 64 wrong usage or settings, 69 cluster unavailable.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a whole cluster on this machine, in the foreground, until Ctrl-C
    Up(up::Options),
    /// Talk with a model; /help lists what can be typed
    Chat(chat::Options),
    /// Continue a prompt as it stands, without a chat template
    Generate(generate::Options),
    /// Turn texts into vectors, one line of JSON each
    Embed(embed::Options),
    /// Say whether a cluster takes work, and which models it serves
    Status(target::Target),
    /// Show a model's architecture, tensors and memory for each rank
    Inspect(worker::Arguments),
    /// Write a model of random weights in a real model's shape, to measure an engine with
    MakeModel(worker::Arguments),
    /// Show what this machine offers and what Lockstep will make of it
    Doctor(worker::Arguments),
    /// Measure the engine alone or a running cluster
    #[command(subcommand)]
    Bench(bench::Command),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(EX_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    match run(cli.command) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("lockstep: {failure}");
            failure.exit_code()
        }
    }
}

fn run(command: Command) -> Done {
    let runtime = tokio::runtime::Runtime::new()?;
    match command {
        Command::Up(options) => runtime.block_on(up::run(options)),
        // The conversation waits for lines on this thread, and for answers on the runtime.
        Command::Chat(options) => chat::run(&options, &runtime),
        Command::Generate(options) => runtime.block_on(generate::run(options)),
        Command::Embed(options) => runtime.block_on(embed::run(options)),
        Command::Status(target) => runtime.block_on(status::run(&target)),
        Command::Inspect(arguments) => worker::run("inspect", &arguments),
        Command::MakeModel(arguments) => worker::run("make-model", &arguments),
        Command::Doctor(arguments) => worker::doctor(&arguments),
        Command::Bench(bench::Command::Engine(arguments)) => worker::run_in(&["bench", "engine"], &arguments),
        Command::Bench(bench::Command::Memory(arguments)) => worker::run_in(&["bench", "memory"], &arguments),
        Command::Bench(bench::Command::Serve(options)) => runtime.block_on(bench::serve(options)),
    }
}

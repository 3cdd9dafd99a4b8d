//! The worker program: serves one rank of a group, or looks at a model or at this machine.

#![forbid(unsafe_code)]

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use lockstep_proto::config::{self, ConfigError};
use lockstep_worker::{
    bench::{EngineBench, MemoryBench, SumsBench},
    config::WorkerConfig,
    constraint::trial,
    doctor,
    inspect::Inspect,
    kernels::Kernels,
    make_model::MakeModel,
    serve, stub,
};

/// The words that name a [`Tool`].
const TOOLS: [&str; 6] = ["inspect", "make-model", "kernels", "bench", "doctor", trial::COMMAND];

/// Further things that the program does; without one of these words it serves.
#[derive(Debug, Parser)]
#[command(name = "lockstep-worker", version)]
enum Tool {
    /// Describe a model file, and what each rank of a group would hold of it
    Inspect(Inspect),
    /// Write a model of random weights in a real model's shape, to measure an engine with
    MakeModel(MakeModel),
    /// Compile the kernels for GPUs in advance; needs no GPU, and NVRTC
    Kernels(Kernels),
    /// Measure this machine
    #[command(subcommand)]
    Bench(Bench),
    /// Say what this machine offers a worker
    Doctor,
    /// Compile a constraint that a worker was sent; for workers alone
    #[command(name = trial::COMMAND, hide = true)]
    TryConstraint,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Prefill and decode rates of a model, in this process, without servers
    Engine(EngineBench),
    /// How fast memory is read: the limit of decoding
    Memory(MemoryBench),
    /// What it costs to add the partial sums of several GPUs in one order, beside NCCL's all-reduce
    Sums(SumsBench),
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let is_tool = args.get(1).is_some_and(|word| TOOLS.iter().any(|tool| word == tool));
    let result = match is_tool.then(|| Tool::try_parse_from(&args)) {
        Some(Ok(tool)) => run_tool(tool),
        Some(Err(error)) => {
            // Nobody may be left to read it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { config::EXIT_CODE } else { 0 });
        }
        None => run_server(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lockstep-worker: {error:#}");
            ExitCode::from(if error.is::<ConfigError>() { config::EXIT_CODE } else { 1 })
        }
    }
}

fn run_tool(tool: Tool) -> Result<()> {
    match tool {
        Tool::Inspect(inspect) => inspect.run(),
        Tool::MakeModel(make) => make.run(),
        Tool::Kernels(kernels) => kernels.run(),
        Tool::Bench(Bench::Engine(bench)) => bench.run(),
        Tool::Bench(Bench::Memory(bench)) => bench.run(),
        Tool::Bench(Bench::Sums(bench)) => bench.run(),
        Tool::Doctor => {
            doctor::run();
            Ok(())
        }
        Tool::TryConstraint => trial::answer(),
    }
}

fn run_server(args: Vec<OsString>) -> Result<()> {
    let Some(config) = config::load::<WorkerConfig>(args.into_iter())?.run_or_print() else { return Ok(()) };
    // Two threads move messages; the engine computes on threads of its own.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(async { if config.stub { stub::serve(&config).await } else { serve::serve(config).await } })
}

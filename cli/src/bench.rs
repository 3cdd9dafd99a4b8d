//! `lockstep bench`: how fast a running cluster is, as its clients see it, or the engine alone.

mod load;
mod prompts;
mod report;

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lockstep_proto::v1::GetModelRequest;

use self::{
    load::{Load, Plan},
    prompts::Prompts,
};
use crate::{
    failure::{Done, Failure, line},
    target::Target,
    worker,
};

/// What can be measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The engine alone, in one process and without servers
    Engine(worker::Arguments),
    /// How fast this machine reads memory: the limit of decoding
    Memory(worker::Arguments),
    /// A running cluster under load
    Serve(Options),
}

/// What `lockstep bench serve` takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Requests at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,
    /// Requests in all; default: 256, or each line of --prompts once
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: Option<u32>,
    /// Tokens of each prompt, random ones, so that no prefix is in a cache
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    prompt_tokens: u32,
    /// Prompts to ask in turn instead of random ones: JSON lines, each {"prompt": TEXT} or {"messages": [{"role": ROLE,
    /// "content": TEXT}, ...]}
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_tokens")]
    prompts: Option<PathBuf>,
    /// Tokens to generate for each request; end-of-turn tokens are ignored after random prompts
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_new_tokens: u32,
    /// Requests that arrive each second, at random times; default: the next as soon as one ends
    #[arg(long, value_parser = parse_rate)]
    rate: Option<f64>,
    /// Decides prompts and arrival times
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Name of the model; the only one served may be left out
    #[arg(long, default_value = "")]
    model: String,
    /// Print the figures as one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

/// Puts the load on the cluster and prints what came of it. It fails if no request succeeded.
pub(crate) async fn serve(options: Options) -> Done {
    let target = &options.target;
    let request = target.request(GetModelRequest { name: options.model.clone() })?;
    let answer = target.models()?.get_model(request).await.map_err(|status| target.failure(&status))?;
    let model = answer.into_inner().model.unwrap_or_default();
    let prompts = match &options.prompts {
        Some(path) => Prompts::read(path)?,
        None => Prompts::Random { tokens: options.prompt_tokens, vocab_size: model.vocab_size, seed: options.seed },
    };
    let plan = Plan {
        concurrency: options.concurrency,
        requests: options.requests.unwrap_or(prompts.default_requests()),
        prompts,
        max_new_tokens: options.max_new_tokens,
        rate: options.rate,
        seed: options.seed,
        model: model.name,
    };
    let progress = progress_bar(plan.requests);
    let load = Load::new(plan.clone(), options.target.clone())?;
    let outcomes = load.run(|_| progress.inc(1)).await;
    progress.finish_and_clear();
    let report = report::Report::new(&plan, &outcomes);
    let mut out = io::stdout().lock();
    if options.json {
        let json = serde_json::to_string_pretty(&report).map_err(|error| Failure::Failed(error.to_string()))?;
        writeln!(out, "{json}")?;
    } else {
        write!(out, "{report}")?;
    }
    if let Some(error) = outcomes.each.iter().find_map(|outcome| outcome.error.as_ref()) {
        eprintln!("lockstep: the first request that failed: {}", line(error));
    }
    Ok(if report.succeeded > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn progress_bar(requests: u32) -> ProgressBar {
    let shown = io::stderr().is_terminal();
    let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(requests.into()), target);
    match ProgressStyle::with_template("{bar:40} {pos}/{len} requests  {per_sec}  {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("must be a number above 0".into()),
    }
}

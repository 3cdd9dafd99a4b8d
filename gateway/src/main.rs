//! Runs a gateway: reads its settings, binds its ports, serves until it is told to stop.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Context as _;
use lockstep_gateway::{
    app::{App, Plan},
    config::{GatewaySettings, parse_api_keys},
    sampling::Policy,
    template::QUICK_STACK_BYTES,
};
use lockstep_proto::{
    config,
    server::{Shutdown, tls::Tls},
    telemetry,
};
use tokio::runtime::Builder;

fn main() -> ExitCode {
    match plan() {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(plan)) => run(plan).map_or_else(|error| fail(&error, 1), |()| ExitCode::SUCCESS),
        Err(error) => fail(&error, config::EXIT_CODE),
    }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("lockstep-gateway: {error:#}");
    ExitCode::from(code)
}

/// What to run, if anything. Whatever can be wrong with the settings is found here, before a port is bound.
fn plan() -> anyhow::Result<Option<Plan>> {
    let Some(settings) = config::load::<GatewaySettings>(std::env::args_os())?.run_or_print() else {
        return Ok(None);
    };
    telemetry::init(&settings.log)?;
    let mut keys = settings.api_keys.clone();
    if let Some(path) = &settings.api_keys_file {
        let listed = parse_api_keys(&read("api_keys_file", path)?)?;
        anyhow::ensure!(!listed.is_empty(), "`api_keys_file` = {path}: it holds no key");
        keys.extend(listed);
    }
    let policy = match &settings.policy_file {
        Some(path) => Policy::parse(&read("policy_file", path)?).with_context(|| format!("`policy_file` = {path}"))?,
        None => Policy::default(),
    };
    let tls = Tls::read(&settings.tls)?;
    Ok(Some(Plan { settings, keys, policy, tls }))
}

fn read(key: &str, path: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("`{key}` = {path}"))
}

fn run(plan: Plan) -> anyhow::Result<()> {
    // Pages that are not touched cost nothing.
    let runtime = Builder::new_multi_thread().enable_all().thread_stack_size(2 * QUICK_STACK_BYTES).build()?;
    runtime.block_on(serve(plan))
}

async fn serve(plan: Plan) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals(plan.settings.exit_with_parent)?;
    let app = App::bind(plan)?;
    app.server().announce()?;
    Ok(app.serve(&shutdown).await?)
}

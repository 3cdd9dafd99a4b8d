//! Runs a tokenizer service: reads its settings, binds its ports, loads its catalog, serves until it is told to stop.
#![forbid(unsafe_code)]

use std::{process::ExitCode, sync::Arc};

use lockstep_proto::{
    config::{self, Settings as _},
    server::{Readiness, Server, ServerSettings, Shutdown},
    telemetry,
    tokenizer::v1::tokenizer_service_server::TokenizerServiceServer,
};
use lockstep_tokenizer_svc::{catalog::Catalog, config::TokenizerSettings, metrics::Metrics, service::TokenizerServer};
use tonic::service::Routes;

/// The service that health reports by name.
const NAMES: [&str; 1] = ["lockstep.tokenizer.v1.TokenizerService"];

/// What every gateway asks every few seconds.
const PROBE: &str = "/lockstep.tokenizer.v1.TokenizerService/GetTokenizer";

/// Encoding is many small things of short life, which this allocator is quicker with than the system's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let settings = match prepare() {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(settings)) => settings,
        Err(error) => return fail(&error, config::EXIT_CODE),
    };
    match run(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error, 1),
    }
}

fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("lockstep-tokenizer-svc: {error}");
    ExitCode::from(code)
}

fn prepare() -> anyhow::Result<Option<TokenizerSettings>> {
    let Some(settings) = config::load::<TokenizerSettings>(std::env::args_os())?.run_or_print() else {
        return Ok(None);
    };
    telemetry::init(&settings.log)?;
    Ok(Some(settings))
}

#[tokio::main]
async fn run(settings: TokenizerSettings) -> anyhow::Result<()> {
    let TokenizerSettings { listen, metrics_listen, exit_with_parent, limits, log: _, models, work } = settings;
    let shutdown = Shutdown::on_signals(exit_with_parent)?;
    let readiness = Readiness::new();
    let max_bytes = limits.max_message_bytes();
    let mut registry = telemetry::registry(TokenizerSettings::SERVICE);
    let metrics = Metrics::register(&mut registry);

    // Ports first: a taken one is the quicker answer.
    let service = TokenizerSettings::SERVICE;
    let server = Server::bind(ServerSettings { service, listen, metrics_listen, limits }, Arc::new(registry))?;
    let catalog = tokio::task::spawn_blocking(move || Catalog::open(&models)).await??;
    for model in catalog.models() {
        let tokenizer = &model.tokenizer;
        let (vocab_size, fingerprint) = (tokenizer.vocab_size(), tokenizer.fingerprint());
        tracing::info!(model = model.name, vocab_size, fingerprint, "tokenizer loaded");
    }
    let answers = TokenizerServer::new(catalog, work, metrics);
    let routes = Routes::new(TokenizerServiceServer::new(answers).max_decoding_message_size(max_bytes));

    readiness.set_ready(true);
    server.announce()?;
    server.health_names(&NAMES).quiet(&[PROBE]).serve(routes, &readiness, &shutdown).await?;
    Ok(())
}

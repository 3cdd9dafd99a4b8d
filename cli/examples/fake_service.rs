//! A stand-in for any service of a cluster, for the tests of `lockstep up`: the shared server with nothing behind it.
//!
//! It goes by the name under which it is started, says its process id on stderr, and is ready at once. A model whose
//! file is empty makes a worker fail as a broken model does; one that says `unready` makes it a group that never forms.

use std::{env, fs, process::ExitCode, sync::Arc};

use lockstep_proto::{
    server::{Limits, Readiness, Server, ServerSettings, Shutdown},
    telemetry,
};
use tonic::service::Routes;

const SERVICES: [&str; 3] = ["tokenizer-svc", "worker", "gateway"];

#[tokio::main]
async fn main() -> ExitCode {
    let program = env::args().next().unwrap_or_default();
    let service = SERVICES.into_iter().find(|service| program.ends_with(service)).expect("started as a service");
    eprintln!("pid {}", std::process::id());
    let model = value_of("--model.path").map(|path| fs::read_to_string(path).expect("a model"));
    if model.as_deref() == Some("") {
        eprintln!("lockstep-{service}: the model is empty");
        return ExitCode::FAILURE;
    }
    let settings = ServerSettings {
        service,
        listen: value_of("--listen").and_then(|address| address.parse().ok()).expect("an address"),
        metrics_listen: value_of("--metrics-listen").and_then(|address| address.parse().ok()),
        limits: Limits::default(),
    };
    telemetry::init(&telemetry::LogSettings::default()).expect("the default filter");
    let parent = env::args().any(|arg| arg == "--exit-with-parent");
    let shutdown = Shutdown::on_signals(parent).expect("signal handlers");
    let server = match Server::bind(settings, Arc::new(telemetry::registry(service))) {
        Ok(server) => server.health_names(&["lockstep.v1.InferenceService", "lockstep.worker.v1.WorkerService"]),
        Err(error) => {
            eprintln!("lockstep-{service}: {error}");
            return ExitCode::FAILURE;
        }
    };
    server.announce().expect("stdout");
    let readiness = Readiness::new();
    readiness.set_ready(model.as_deref() != Some("unready"));
    server.serve(Routes::default(), &readiness, &shutdown).await.expect("reflection");
    ExitCode::SUCCESS
}

/// The value of a flag, as `--flag value`.
fn value_of(flag: &str) -> Option<String> {
    env::args().skip_while(|arg| arg != flag).nth(1)
}

//! Serving: puts one rank together — server, model, engine, group — and takes it apart again.

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use lockstep_checkpoint::Checkpoint;
use lockstep_proto::{
    server::{Readiness, Server, Shutdown, Work},
    telemetry,
    vllm::grpc::engine::vllm_engine_server::VllmEngineServer,
    worker::v1::{group_service_server::GroupServiceServer, worker_service_server::WorkerServiceServer},
};
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::service::Routes;
use tracing::info;

use crate::{
    VERSION,
    config::WorkerConfig,
    constraint::compiler::Compiler,
    device::Device,
    engine::{
        EngineFailure,
        draft_model::DraftModel,
        follower::Follower,
        handle::{self, EngineHandle},
        leader::Leader,
        metrics::Metrics,
    },
    group::{Attestation, FollowerGroup, GroupError, LeaderGroup, StopHandle},
    model::load::Source,
    model_runner::{self, RunStep, RunnerSettings},
    request::Limits,
    scheduler::Scheduler,
    service::{Identity, Service},
    vllm,
};

/// The name under which health reports every rank: it belongs to a group that is together.
pub(crate) const HEALTH_NAME: &str = "lockstep.worker.v1.WorkerService";

/// Calls that a drain leaves alone: those between ranks, those by which running work ends sooner, and questions about the
/// state.
pub(crate) const BACKGROUND_CALLS: [&str; 4] = [
    "/lockstep.worker.v1.GroupService/",
    "/lockstep.worker.v1.WorkerService/EndChoice",
    "/lockstep.worker.v1.WorkerService/GetStatus",
    "/lockstep.worker.v1.WorkerService/WatchStatus",
];

/// How often a leader's readiness is looked at when its engine says nothing.
const READINESS_INTERVAL: Duration = Duration::from_millis(500);

/// A rank's loaded shard, and what it says about itself.
struct Shard {
    runner: Box<dyn RunStep>,
    draft_model: Option<DraftModel>,
    settings: RunnerSettings,
    identity: Identity,
    attestation: Attestation,
    /// Has the vocabulary.
    checkpoint: Arc<Checkpoint>,
}

/// What an engine and its server tell each other.
struct Switches {
    readiness: Readiness,
    shutdown: Shutdown,
}

/// A running engine.
struct Engine {
    routes: Routes,
    thread: JoinHandle<Result<(), EngineFailure>>,
    stop: StopHandle,
    /// Cancelled if the engine hangs.
    hung: CancellationToken,
    handle: Option<EngineHandle>,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// Serves one rank until it is told to end.
///
/// # Errors
/// A port that is taken, a model that cannot be loaded, a leader that refuses this rank, a GPU that fails, or an engine
/// that hangs.
pub async fn serve(config: WorkerConfig) -> Result<()> {
    telemetry::init(&config.log)?;
    let shutdown = Shutdown::on_signals(config.exit_with_parent)?;
    let mut registry = telemetry::registry("worker");
    let metrics = Metrics::register(&mut registry, config.group.rank == 0);
    let mut server =
        Server::bind(config.server(), Arc::new(registry))?.health_names(&[HEALTH_NAME]).background(&BACKGROUND_CALLS);
    if config.group.rank == 0 {
        server = server.health_names(&[vllm::NAME]).background(&vllm::BACKGROUND_CALLS).quiet(&vllm::PROBES);
    }
    let config = Arc::new(config);
    let loading = Arc::clone(&config);
    let shard = tokio::task::spawn_blocking(move || load(&loading)).await.context("loading panicked")??;
    let switches = Switches { readiness: Readiness::new(), shutdown };
    let engine = if config.group.rank == 0 {
        start_leader(&config, shard, metrics, &switches)?
    } else {
        start_follower(&config, shard, metrics, &switches, server.work())?
    };
    server.announce()?;
    tokio::select! {
        served = server.serve(engine.routes, &switches.readiness, &switches.shutdown) => served?,
        // Its thread cannot be joined. Whoever supervises the process starts it anew.
        () = engine.hung.cancelled() => bail!(GroupError::Hung { rank: config.group.rank }),
    }
    engine.stop.stop();
    if let Some(handle) = &engine.handle {
        handle.stop();
    }
    let ended = tokio::task::spawn_blocking(|| engine.thread.join()).await?;
    ended.map_err(|_| anyhow!("the engine panicked"))??;
    Ok(())
}

fn load(config: &WorkerConfig) -> Result<Shard> {
    let start = Instant::now();
    let path = &config.model.path;
    let checkpoint = Arc::new(Checkpoint::open(path)?);
    let (digesting, kept) = (Arc::clone(&checkpoint), Arc::clone(&checkpoint));
    let digest = std::thread::spawn(move || digesting.digest());
    let (rank, world_size) = (config.group.rank, config.group.world_size);
    let source = Source::open(checkpoint, rank, world_size).with_context(|| path.display().to_string())?;
    let draft_source = open_draft_model(config, &source)?;
    let device = config.engine.device(rank).open().context("engine.device = cuda")?;
    check_draft_room(config, &device)?;
    let deterministic = is_deterministic(config, &device);
    let settings = config.engine.runner(&source, device).with_context(|| path.display().to_string())?;
    let settings = RunnerSettings { deterministic, ..settings };
    let runner = model_runner::build(&source, &settings).with_context(|| path.display().to_string())?;
    let digest = hex(&digest.join().map_err(|_| anyhow!("the digest panicked"))?);
    let (vocab_size, hidden_dim) = (source.config().vocab_size, source.config().hidden_dim);
    info!(rank, world_size, seconds = start.elapsed().as_secs_f64(), "loaded {}", path.display());
    Ok(Shard {
        runner,
        draft_model: draft_source.map(|source| load_draft_model(&source, &settings)).transpose()?,
        attestation: attest(&digest, &settings, world_size),
        identity: Identity {
            model: config.model.name.clone(),
            model_digest: model_digest(&digest, &settings),
            world_size: world_size as u32,
            block_size: settings.block_size as u32,
            embedding_size: hidden_dim as u32,
            device: settings.device.to_string(),
            limits: Limits { vocab_size, context_length: settings.context_length },
        },
        settings,
        checkpoint: kept,
    })
}

/// Whether the rank keeps the lockstep rule. If that is not wanted and cannot be helped, the log says so.
fn is_deterministic(config: &WorkerConfig, device: &Device) -> bool {
    let gives_up = matches!(device, Device::Cuda(_));
    if !config.engine.deterministic && !gives_up {
        info!("engine.deterministic = false changes nothing: this rank does not compute on a GPU");
    }
    config.engine.deterministic || !gives_up
}

/// How much a draft model leaves, rank 0 alone could reckon, and all ranks must know.
fn check_draft_room(config: &WorkerConfig, device: &Device) -> Result<()> {
    let is_reckoned = matches!(device, Device::Cuda(_)) && config.engine.kv_cache_tokens == 0;
    if config.draft_path().is_some() && is_reckoned {
        bail!("model.draft_path on a GPU needs a number for engine.kv_cache_tokens, the same on every rank");
    }
    Ok(())
}

/// The model that drafts for `target`, whole, where one is wanted.
fn open_draft_model(config: &WorkerConfig, target: &Source) -> Result<Option<Source>> {
    let Some(path) = config.draft_path() else { return Ok(None) };
    let open = || -> Result<Source> {
        let source =
            Source::open(Arc::new(Checkpoint::open(path)?), 0, 1).with_context(|| path.display().to_string())?;
        source.check_same_vocabulary(target)?;
        Ok(source)
    };
    open().map(Some).context("model.draft_path")
}

/// It computes in turn with the model that is served: the threads of one sleep while those of the other work.
fn load_draft_model(source: &Source, target: &RunnerSettings) -> Result<DraftModel> {
    let start = Instant::now();
    let context_length = target.context_length.min(source.config().context_length);
    let settings = RunnerSettings { context_length, ..target.clone() };
    let path = source.checkpoint().path().display();
    let runner = model_runner::build(source, &settings).with_context(|| format!("model.draft_path: {path}"))?;
    info!(seconds = start.elapsed().as_secs_f64(), "loaded {path} to draft");
    Ok(DraftModel::new(runner, &settings))
}

/// SHA-256 of all that decides a model's logits, whatever group runs it: groups of one digest are replicas.
fn model_digest(weights_digest: &str, settings: &RunnerSettings) -> String {
    let RunnerSettings { device, kv_encoding, deterministic, .. } = settings;
    let order = if *deterministic { "" } else { " in any order" };
    hex(&Sha256::digest(format!("{weights_digest} {device} {kv_encoding:?}{order}")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All that decides the result of a step.
pub fn attest(digest: &str, settings: &RunnerSettings, world_size: usize) -> Attestation {
    let entries = [
        ("weights_digest", digest.to_owned()),
        ("engine_version", VERSION.to_owned()),
        ("world_size", world_size.to_string()),
        ("device", settings.device.to_string()),
        ("block_size", settings.block_size.to_string()),
        ("kv_cache_encoding", format!("{:?}", settings.kv_encoding).to_lowercase()),
        ("deterministic", settings.deterministic.to_string()),
        ("n_blocks", settings.n_blocks.to_string()),
        ("context_length", settings.context_length.to_string()),
    ];
    entries.into_iter().collect()
}

fn start_leader(config: &WorkerConfig, shard: Shard, metrics: Metrics, switches: &Switches) -> Result<Engine> {
    let Shard { runner, draft_model, settings, identity, attestation, checkpoint } = shard;
    let compiler =
        Compiler::new(Arc::clone(&checkpoint), identity.limits.vocab_size, metrics.constraint_compile.clone())?;
    let stream = settings.device.collective_stream()?;
    let (group, rpc) = LeaderGroup::new(config.group.clone(), attestation, stream, &Handle::current())?;
    let (stop, hung, roster) = (group.stop_handle(), group.hung(), group.roster());
    let scheduler_config = config.engine.scheduler(&settings);
    let description = vllm::Description {
        cache_tokens: settings.n_blocks * settings.block_size,
        max_running: scheduler_config.max_running,
        kv_cache_encoding: format!("{:?}", settings.kv_encoding).to_lowercase(),
    };
    metrics.observe_block_size(settings.block_size);
    let scheduler = Scheduler::new(scheduler_config)?;
    let (handle, port) = handle::channel(Instant::now());
    let leader = Leader::new(group, runner, scheduler, metrics, port).with_draft_model(draft_model);
    let ended = switches.shutdown.clone();
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        let result = leader.run();
        // A rank that cannot compute has nothing left to do.
        ended.start();
        result
    })?;
    let stall_after = Duration::from_millis(config.engine.stall_after_ms);
    let watch = watch_readiness(handle.clone(), switches.readiness.clone(), stall_after);
    let drain = drain_at_shutdown(handle.clone(), switches.shutdown.clone());
    let max_bytes = config.limits.max_message_bytes();
    let service = Arc::new(Service::new(handle.clone(), compiler, identity, roster));
    let vllm = vllm::Front::new(Arc::clone(&service), checkpoint, description, switches.readiness.clone());
    let routes = Routes::new(WorkerServiceServer::from_arc(service).max_decoding_message_size(max_bytes))
        .add_service(GroupServiceServer::new(rpc).max_decoding_message_size(max_bytes))
        .add_service(VllmEngineServer::new(vllm).max_decoding_message_size(max_bytes));
    let tasks = vec![AbortOnDropHandle::new(tokio::spawn(watch)), AbortOnDropHandle::new(tokio::spawn(drain))];
    Ok(Engine { routes, thread, stop, hung, handle: Some(handle), _tasks: tasks })
}

/// `work` lasts as long as the engine: the server's drain is then the follower's, too.
fn start_follower(
    config: &WorkerConfig,
    shard: Shard,
    metrics: Metrics,
    switches: &Switches,
    work: Work,
) -> Result<Engine> {
    let limits = config.limits.client();
    let stream = shard.settings.device.collective_stream()?;
    let group = FollowerGroup::new(config.group.clone(), shard.attestation, stream, &limits, &Handle::current())?;
    let (stop, leave, hung) = (group.stop_handle(), group.leave_handle(), group.hung());
    let follower = Follower::new(group, shard.runner, metrics, switches.readiness.clone());
    let ended = switches.shutdown.clone();
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        let result = follower.run();
        // A rank that was refused, or cannot compute, has nothing left to do.
        ended.start();
        drop(work);
        result
    })?;
    let shutdown = switches.shutdown.clone();
    let leaving = AbortOnDropHandle::new(tokio::spawn(async move {
        shutdown.started().await;
        leave.stop();
    }));
    Ok(Engine { routes: Routes::default(), thread, stop, hung, handle: None, _tasks: vec![leaving] })
}

/// Has the leader's engine say, too, that it takes nothing more, so that gateways look elsewhere before they are
/// refused.
async fn drain_at_shutdown(engine: EngineHandle, shutdown: Shutdown) {
    shutdown.started().await;
    engine.drain().await;
}

/// Keeps a leader's readiness true to its engine: together, warm, going round, and taking work.
async fn watch_readiness(engine: EngineHandle, readiness: Readiness, stall_after: Duration) {
    let mut status = engine.status();
    loop {
        let ready = {
            let status = status.borrow_and_update();
            status.ready && !status.draining && status.last_turn.elapsed() < stall_after
        };
        readiness.set_ready(ready);
        let changed = tokio::time::timeout(READINESS_INTERVAL, status.changed()).await;
        if let Ok(Err(_engine_gone)) = changed {
            readiness.set_ready(false);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use lockstep_kernels::KvEncoding;

    use super::*;

    #[test]
    fn a_model_is_what_decides_its_logits() {
        let settings = RunnerSettings {
            device: Device::Cpu,
            threads: 2,
            n_blocks: 64,
            block_size: 16,
            kv_encoding: KvEncoding::F16,
            context_length: 512,
            deterministic: true,
        };
        let same = RunnerSettings { threads: 1, n_blocks: 8, block_size: 32, ..settings.clone() };
        let other_encoding = RunnerSettings { kv_encoding: KvEncoding::Int8, ..settings.clone() };
        let other_device = RunnerSettings { device: Device::Reference, ..settings.clone() };
        let other_order = RunnerSettings { deterministic: false, ..settings.clone() };
        let digest = model_digest("ab12", &settings);
        assert_eq!(model_digest("ab12", &same), digest);
        assert_ne!(model_digest("ab12", &other_encoding), digest);
        assert_ne!(model_digest("ab12", &other_device), digest);
        assert_ne!(model_digest("ab12", &other_order), digest);
        assert_ne!(model_digest("cd34", &settings), digest);
    }
}

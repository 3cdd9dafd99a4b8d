//! `lockstep up`: a whole cluster on this machine, as child processes of this one.
//!
//! # Life
//!
//! 1. Start, each on ports that the system chooses and the child announces: tokenizer service; for each group its
//!    leader, then its followers; gateway. A child that ends before all groups and the gateway say SERVING ends it all,
//!    with what the child said last.
//! 2. Run: a child that ends is started again on the same ports, after a pause that grows with repeated failures.
//! 3. Stop, on Ctrl-C or SIGTERM: gateway, then workers, then tokenizer service, each with its own drain. A second
//!    signal kills what is left. If this process itself is killed, every child sees its standard input end and drains
//!    (`--exit-with-parent`), so none is left behind.

mod backoff;
mod child;
mod plan;

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, ValueEnum};
use lockstep_proto::{
    announcement::Announcement,
    client::{
        ClientLimits, connect_lazy,
        health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient},
    },
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{sleep, timeout},
};

use self::{
    child::{Child, Exit, Order, Spec},
    plan::Plan,
};
use crate::{
    failure::{Done, Failure},
    status::INFERENCE,
    target::DEFAULT_TARGET,
};

/// The service whose health says that a group is together.
const WORKER_SERVICE: &str = "lockstep.worker.v1.WorkerService";

/// Time between questions whether the cluster is ready.
const POLL: Duration = Duration::from_millis(100);

/// What a child may take beyond its own drain before it is killed.
const STOP_SLACK: Duration = Duration::from_secs(5);

/// Exits that may wait to be read. Only those before readiness are read, and the first of them ends it all.
const EXIT_QUEUE: usize = 16;

/// What `lockstep up` takes. Every other setting of a service comes from its file or its environment variables.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// The model: a GGUF file or a Hugging Face folder
    model: PathBuf,
    /// Name under which it is served; default: the file's name
    #[arg(long)]
    name: Option<String>,
    /// Ranks that share one copy of the model
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    world_size: u32,
    /// Copies of the model, each a group of ranks
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    replicas: u32,
    /// Threads of each rank; default: this machine's, divided by the number of ranks
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
    /// How ranks of a group exchange sums
    #[arg(long, value_enum, default_value_t = Transport::Auto)]
    transport: Transport,
    /// A smaller model with the same vocabulary, which guesses what the model says next: the same text,
    /// faster where it is often right
    #[arg(long, value_name = "PATH")]
    draft_model: Option<PathBuf>,
    /// Where the gateway answers
    #[arg(long, value_name = "ADDR", default_value = DEFAULT_TARGET)]
    gateway_listen: SocketAddr,
    /// Where the gateway answers HTTP: the page, and the APIs of OpenAI and of Text Generation Inference
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    http_listen: SocketAddr,
    /// Settings of the gateway, such as policy and API keys
    #[arg(long, value_name = "FILE")]
    gateway_config: Option<PathBuf>,
    /// Settings of the workers, such as cache sizes
    #[arg(long, value_name = "FILE")]
    worker_config: Option<PathBuf>,
    /// Settings of the tokenizer service
    #[arg(long, value_name = "FILE")]
    tokenizer_config: Option<PathBuf>,
    /// Longest wait until the cluster is ready
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    ready_timeout: u64,
    /// Longest drain of each service before it is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
}

/// How ranks of a group exchange sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Transport {
    /// NCCL if every rank has a GPU of its own, shared memory otherwise
    Auto,
    /// Shared memory, on one host
    Shm,
    /// TCP, as across hosts
    Tcp,
    /// NCCL, between GPUs
    Nccl,
}

/// The children, in the order in which they start.
#[derive(Debug)]
struct Cluster {
    tokenizers: Vec<Child>,
    workers: Vec<Child>,
    gateways: Vec<Child>,
    exits: mpsc::Receiver<Exit>,
    exit_sender: mpsc::Sender<Exit>,
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

/// Runs the cluster until a signal.
pub(crate) async fn run(options: Options) -> Done {
    let mut signals = Signals::new()?;
    let plan = Plan::new(&options)?;
    let mut cluster = Cluster::new();
    let started = tokio::select! {
        started = cluster.start(&plan, Duration::from_secs(options.ready_timeout)) => started,
        () = signals.next() => Ok(()),
    };
    let outcome = match started {
        Ok(()) => match banner(&plan, &cluster) {
            Ok(true) => {
                signals.next().await;
                Ok(())
            }
            Ok(false) => Ok(()),
            Err(error) => Err(error.into()),
        },
        Err(failure) => Err(failure),
    };
    eprintln!("lockstep: stopping; once more kills what is left");
    let limit = Duration::from_secs(options.drain_timeout) + STOP_SLACK;
    tokio::select! {
        () = cluster.stop(limit) => {}
        () = signals.next() => {}
    }
    cluster.kill().await;
    outcome.map(|()| ExitCode::SUCCESS)
}

// === impl Cluster ===

impl Cluster {
    fn new() -> Self {
        let (exit_sender, exits) = mpsc::channel(EXIT_QUEUE);
        Self { tokenizers: Vec::new(), workers: Vec::new(), gateways: Vec::new(), exits, exit_sender }
    }

    /// Starts everything and waits until every group and the gateway take work.
    async fn start(&mut self, plan: &Plan, limit: Duration) -> Result<(), Failure> {
        let started = async {
            let tokenizer = launch(plan.tokenizer()?, &mut self.tokenizers, &self.exit_sender).await?;
            let mut leaders = Vec::new();
            for group in 0..plan.replicas {
                let leader = launch(plan.worker(group, 0, None)?, &mut self.workers, &self.exit_sender).await?;
                for rank in 1..plan.world_size {
                    let follower = plan.worker(group, rank, Some(leader.grpc))?;
                    launch(follower, &mut self.workers, &self.exit_sender).await?;
                }
                leaders.push(leader.grpc);
            }
            let gateway = plan.gateway(tokenizer.grpc, &leaders)?;
            let gateway = launch(gateway, &mut self.gateways, &self.exit_sender).await?;
            // The gateway takes work as soon as one group does; a cluster is up when all do.
            for leader in leaders {
                ready(leader, WORKER_SERVICE).await?;
            }
            ready(gateway.grpc, INFERENCE).await
        };
        tokio::select! {
            started = timeout(limit, started) => {
                let late = || Failure::Failed(format!("the cluster is not ready after {} s", limit.as_secs()));
                started.map_err(|_| late())??;
            }
            Some(exit) = self.exits.recv() => return Err(exit.failure()),
        }
        // From here on a child that ends is started again.
        self.children().for_each(|child| child.keep());
        Ok(())
    }

    fn children(&self) -> impl Iterator<Item = &Child> {
        self.gateways.iter().chain(&self.workers).chain(&self.tokenizers)
    }

    /// Ends all children, those that carry requests first; each stage has `limit`.
    async fn stop(&mut self, limit: Duration) {
        for stage in [&mut self.gateways, &mut self.workers, &mut self.tokenizers] {
            stage.iter().for_each(|child| child.order(Order::Terminate));
            let ended = async {
                for child in &mut *stage {
                    child.ended().await;
                }
            };
            if timeout(limit, ended).await.is_err() {
                stage.iter().for_each(|child| child.order(Order::Kill));
            }
            for child in stage {
                child.ended().await;
            }
        }
    }

    /// Kills what is left and waits until it is gone.
    async fn kill(&mut self) {
        for stage in [&mut self.gateways, &mut self.workers, &mut self.tokenizers] {
            for child in stage {
                child.order(Order::Kill);
                child.ended().await;
            }
        }
    }
}

/// Starts one child and waits for its announcement. It is on the list before, so that it is stopped in any case.
async fn launch(spec: Spec, list: &mut Vec<Child>, exits: &mpsc::Sender<Exit>) -> Result<Announcement, Failure> {
    let name = spec.name.clone();
    let mut child = Child::start(spec, exits.clone());
    let mut announced = child.announced();
    list.push(child);
    // The channel closes when the child has ended; why, is on its way through `exits`.
    match announced.wait_for(Option::is_some).await.ok().and_then(|found| found.clone()) {
        Some(announcement) => Ok(announcement),
        None => {
            sleep(STOP_SLACK).await;
            Err(Failure::Failed(format!("{name} ended before it listened")))
        }
    }
}

/// Waits until a server says that one of its services takes work.
async fn ready(server: SocketAddr, service: &str) -> Result<(), Failure> {
    let channel = connect_lazy(&server.to_string(), &ClientLimits::default());
    let mut health = HealthClient::new(channel.map_err(|error| Failure::Failed(error.to_string()))?);
    loop {
        let answer = health.check(HealthCheckRequest { service: service.into() }).await;
        if answer.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving) {
            return Ok(());
        }
        sleep(POLL).await;
    }
}

/// Says where everything is and what to try. `false` if the cluster was stopped before it was ready.
fn banner(plan: &Plan, cluster: &Cluster) -> io::Result<bool> {
    let listening = |child: &Child| child.announcement().map(|announcement| (child.name().to_owned(), announcement));
    let found: Vec<_> = cluster.children().filter_map(listening).collect();
    let Some((_, gateway)) = found.first().filter(|_| cluster.children().all(Child::is_kept)) else {
        return Ok(false);
    };
    let mut out = io::stdout().lock();
    writeln!(out, "\nLockstep serves {} at {}\n", plan.model_name, gateway.grpc)?;
    for (name, announcement) in &found {
        let metrics = announcement.metrics.map(|address| format!("  http://{address}/metrics")).unwrap_or_default();
        let http = announcement.http.map(|address| format!("  http://{address}/v1")).unwrap_or_default();
        writeln!(out, "  {name:<12} grpc {}{http}{metrics}", announcement.grpc)?;
    }
    let command = std::env::args().next().unwrap_or_else(|| "lockstep".into());
    let target = match gateway.grpc.to_string() {
        address if address == DEFAULT_TARGET => String::new(),
        address => format!(" --target {address}"),
    };
    let message = r#"{"conversation":{"messages":[{"role":"ROLE_USER","content":[{"text":"Hello"}]}]}}"#;
    writeln!(out, "\nTry:\n  {command} chat{target}")?;
    writeln!(out, "  {command} generate{target} -n 32 \"The capital of France is\"")?;
    writeln!(out, "  buf curl --http2-prior-knowledge --protocol grpc -d '{message}' \\")?;
    writeln!(out, "    http://{}/{INFERENCE}/StreamChat\n", gateway.grpc)?;
    writeln!(out, "Ctrl-C ends the cluster.")?;
    out.flush()?;
    Ok(true)
}

// === impl Transport ===

impl Transport {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Nccl => "nccl",
        }
    }
}

// === impl Signals ===

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

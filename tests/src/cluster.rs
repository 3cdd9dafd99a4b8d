//! A cluster of the real programs, as child processes on free ports of the loopback interface.

use std::{
    collections::VecDeque,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lockstep_proto::{
    client::health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient},
    v1::{inference_service_client::InferenceServiceClient, model_service_client::ModelServiceClient},
    worker::v1::{GetStatusRequest, Status, worker_service_client::WorkerServiceClient},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
    task::JoinHandle,
};
use tonic::transport::Channel;

/// How long anything may take that is bound to happen. Generous: two cores run many processes at once.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Lines of a program's log that are kept for a failing test to show.
const LOG_LINES: usize = 200;

/// The demo model, which `make fetch` brings.
pub fn demo_model() -> PathBuf {
    repository().join("models/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct ClusterBuilder {
    model: PathBuf,
    world_size: usize,
    replicas: usize,
    transport: &'static str,
    device: &'static str,
    worker_args: Vec<String>,
    /// Variable, value, and the rank that has it if not all do.
    worker_env: Vec<(Option<usize>, &'static str, OsString)>,
    gateway_args: Vec<String>,
}

/// A running cluster. Dropping it kills its programs.
#[derive(Debug)]
pub struct Cluster {
    builder: ClusterBuilder,
    /// The gateway.
    pub gateway: Process,
    /// The tokenizer service.
    pub tokenizer: Process,
    /// Ranks, group by group.
    pub groups: Vec<Vec<Process>>,
}

/// One program.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    grpc: String,
    http: Option<String>,
    metrics: Option<String>,
    log: Arc<Mutex<VecDeque<String>>>,
    /// Reads the log, until the program ends.
    reader: JoinHandle<()>,
}

impl Cluster {
    /// A cluster of one rank, one group, on the demo model.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder {
            model: demo_model(),
            world_size: 1,
            replicas: 1,
            transport: "shm",
            device: "cpu",
            worker_args: Vec::new(),
            worker_env: Vec::new(),
            gateway_args: Vec::new(),
        }
    }

    /// A client of the gateway.
    pub async fn inference(&self) -> Result<InferenceServiceClient<Channel>> {
        Ok(InferenceServiceClient::new(self.gateway.channel().await?))
    }

    /// A client of the gateway's model list.
    pub async fn models(&self) -> Result<ModelServiceClient<Channel>> {
        Ok(ModelServiceClient::new(self.gateway.channel().await?))
    }

    /// A client of a group's leader.
    pub async fn leader(&self, group: usize) -> Result<WorkerServiceClient<Channel>> {
        Ok(WorkerServiceClient::new(self.groups[group][0].channel().await?))
    }

    /// The state of a group.
    pub async fn status(&self, group: usize) -> Result<Status> {
        let response = self.leader(group).await?.get_status(GetStatusRequest {}).await?;
        response.into_inner().status.context("no status")
    }

    /// Waits until a group's state is as wanted.
    pub async fn wait_for_status(&self, group: usize, wanted: impl Fn(&Status) -> bool) -> Result<Status> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status(group).await;
            match status {
                Ok(status) if wanted(&status) => return Ok(status),
                other => ensure!(Instant::now() < deadline, "group {group} never came to that: {other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Starts one rank again after it was killed. Only for followers: a leader's address is known to others.
    pub async fn restart_follower(&mut self, group: usize, rank: usize) -> Result<()> {
        let leader = self.groups[group][0].grpc.clone();
        self.groups[group][rank] = self.builder.start_worker(group, rank, Some(&leader)).await?;
        Ok(())
    }

    /// Ends every program as an operator would, gateway first.
    pub async fn stop(mut self) -> Result<()> {
        self.gateway.terminate().await?;
        for group in &mut self.groups {
            for rank in group.iter_mut().rev() {
                rank.terminate().await?;
            }
        }
        self.tokenizer.terminate().await
    }
}

impl ClusterBuilder {
    /// Another model.
    #[must_use]
    pub fn model(mut self, model: impl Into<PathBuf>) -> Self {
        self.model = model.into();
        self
    }

    /// Ranks in each group.
    #[must_use]
    pub fn world_size(mut self, world_size: usize) -> Self {
        self.world_size = world_size;
        self
    }

    /// Groups.
    #[must_use]
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.replicas = replicas;
        self
    }

    /// `shm` or `tcp`.
    #[must_use]
    pub fn transport(mut self, transport: &'static str) -> Self {
        self.transport = transport;
        self
    }

    /// What the workers compute on, as `engine.device` has it. `cpu` unless it is said: a test means the same whatever
    /// the machine.
    #[must_use]
    pub fn device(mut self, device: &'static str) -> Self {
        self.device = device;
        self
    }

    /// A further flag for every worker.
    #[must_use]
    pub fn worker_arg(mut self, arg: impl Into<String>) -> Self {
        self.worker_args.push(arg.into());
        self
    }

    /// An environment variable of every worker.
    #[must_use]
    pub fn worker_env(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.worker_env.push((None, name, value.into()));
        self
    }

    /// An environment variable of one rank of every group.
    #[must_use]
    pub fn rank_env(mut self, rank: usize, name: &'static str, value: impl Into<OsString>) -> Self {
        self.worker_env.push((Some(rank), name, value.into()));
        self
    }

    /// A further flag for the gateway.
    #[must_use]
    pub fn gateway_arg(mut self, arg: impl Into<String>) -> Self {
        self.gateway_args.push(arg.into());
        self
    }

    /// Starts the programs and waits until the gateway is ready.
    ///
    /// # Errors
    /// A program that ends or does not become ready.
    pub async fn start(self) -> Result<Cluster> {
        let tokenizer = self.start_tokenizer().await?;
        let mut groups = Vec::new();
        for group in 0..self.replicas {
            let mut ranks = vec![self.start_worker(group, 0, None).await?];
            let leader = ranks[0].grpc.clone();
            for rank in 1..self.world_size {
                ranks.push(self.start_worker(group, rank, Some(&leader)).await?);
            }
            groups.push(ranks);
        }
        let gateway = self.start_gateway(&tokenizer, &groups).await?;
        let cluster = Cluster { builder: self, gateway, tokenizer, groups };
        for ranks in &cluster.groups {
            ranks[0].wait_ready("lockstep.worker.v1.WorkerService").await?;
        }
        cluster.gateway.wait_ready("lockstep.v1.InferenceService").await?;
        Ok(cluster)
    }

    async fn start_tokenizer(&self) -> Result<Process> {
        let args = vec!["--models".into(), format!("demo={}", self.model.display())];
        Process::start("lockstep-tokenizer-svc", "tokenizer", args).await
    }

    /// Starts one worker.
    async fn start_worker(&self, group: usize, rank: usize, leader: Option<&str>) -> Result<Process> {
        let mut args: Vec<String> = [
            ("--model.path", self.model.display().to_string()),
            ("--model.name", "demo".into()),
            ("--group.rank", rank.to_string()),
            ("--group.world-size", self.world_size.to_string()),
            ("--group.transport", self.transport.into()),
            ("--engine.device", self.device.into()),
            ("--engine.threads", "1".into()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        if let Some(leader) = leader {
            args.extend(["--group.leader".into(), format!("http://{leader}")]);
        }
        args.extend(self.worker_args.iter().cloned());
        let is_its_own = |of: Option<usize>| of.is_none_or(|of| of == rank);
        let env = self.worker_env.iter().filter(|(of, ..)| is_its_own(*of)).map(|(_, name, value)| (*name, value));
        Process::start_in("lockstep-worker", &format!("worker-{group}.{rank}"), args, env).await
    }

    async fn start_gateway(&self, tokenizer: &Process, groups: &[Vec<Process>]) -> Result<Process> {
        let leaders: Vec<&str> = groups.iter().map(|ranks| ranks[0].grpc.as_str()).collect();
        let mut args = vec!["--tokenizers".into(), tokenizer.grpc.clone(), "--groups".into(), leaders.join(",")];
        args.extend(["--http-listen", "127.0.0.1:0"].map(str::to_owned));
        args.extend(self.gateway_args.iter().cloned());
        Process::start("lockstep-gateway", "gateway", args).await
    }
}

impl Process {
    /// Starts a program and waits until it says where it listens.
    ///
    /// # Errors
    /// A program that ends first; the error holds its log.
    pub async fn start(program: &str, name: &str, args: Vec<String>) -> Result<Self> {
        Self::start_in(program, name, args, std::iter::empty()).await
    }

    /// The same with further environment variables.
    async fn start_in<'a>(
        program: &str,
        name: &str,
        mut args: Vec<String>,
        env: impl Iterator<Item = (&'static str, &'a OsString)>,
    ) -> Result<Self> {
        args.extend(["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"].map(str::to_owned));
        let path = binary(program)?;
        let mut child = Command::new(&path)
            .args(args)
            .envs(env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", path.display()))?;
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let stderr = child.stderr.take().context("no stderr")?;
        let reader = tokio::spawn(keep_log(BufReader::new(stderr), Arc::clone(&log)));
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut process =
            Self { name: name.to_owned(), child, grpc: String::new(), http: None, metrics: None, log, reader };
        let mut lines = stdout.lines();
        loop {
            let line = tokio::time::timeout(PATIENCE, lines.next_line()).await??;
            let Some(line) = line else {
                process.finish_log().await;
                bail!("{name} ended before it listened: {}", process.log())
            };
            if let Some(rest) = line.strip_prefix(&format!("{program} listening ")) {
                for part in rest.split_whitespace() {
                    match part.split_once('=') {
                        Some(("grpc", address)) => process.grpc = address.to_owned(),
                        Some(("http", address)) => process.http = Some(address.to_owned()),
                        Some(("metrics", address)) => process.metrics = Some(address.to_owned()),
                        _ => {}
                    }
                }
                break;
            }
        }
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(process)
    }

    /// `host:port` of its gRPC server.
    pub fn grpc(&self) -> &str {
        &self.grpc
    }

    /// `host:port` of its HTTP server, if it has one.
    pub fn http(&self) -> Option<&str> {
        self.http.as_deref()
    }

    /// What one of its metrics is now, by the name that Prometheus sees.
    ///
    /// # Errors
    /// If it does not answer, or has no such metric.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let address = self.metrics.as_deref().context("no metrics")?;
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await??;
        let line = answer.lines().find(|line| line.starts_with(name)).with_context(|| format!("{name} in {answer}"))?;
        Ok(line.rsplit(' ').next().context("a value")?.parse()?)
    }

    /// Its process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        let lines = self.log.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        lines.iter().fold(String::new(), |text, line| text + "\n" + line)
    }

    /// A connection to its gRPC server.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn channel(&self) -> Result<Channel> {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.grpc))?;
        endpoint.connect_timeout(PATIENCE).connect().await.with_context(|| format!("{} is gone", self.name))
    }

    /// Waits until its health service says that `service` is served.
    ///
    /// # Errors
    /// If it never does; the error holds its log.
    pub async fn wait_ready(&self, service: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.health(service).await != Some(ServingStatus::Serving) {
            ensure!(Instant::now() < deadline, "{} did not become ready: {}", self.name, self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// What its health service says now; `None` if it does not answer.
    pub async fn health(&self, service: &str) -> Option<ServingStatus> {
        let mut client = HealthClient::new(self.channel().await.ok()?);
        let response = client.check(HealthCheckRequest { service: service.to_owned() }).await.ok()?;
        Some(response.into_inner().status())
    }

    /// Kills it, as a machine that dies would.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub async fn kill(&mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Asks it to end (SIGTERM) and waits until it has, with status 0.
    ///
    /// # Errors
    /// If it does not end, or with another status; the error holds its log.
    pub async fn terminate(&mut self) -> Result<()> {
        self.ask_to_end().await?;
        self.ended().await
    }

    /// Waits until it has ended, in whatever way.
    ///
    /// # Errors
    /// If it does not end; the error holds its log.
    pub async fn exit_status(&mut self) -> Result<ExitStatus> {
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        let status = ended.with_context(|| format!("{} did not end: {}", self.name, self.log()))??;
        self.finish_log().await;
        Ok(status)
    }

    /// Waits for what a program that has ended has left in its log.
    async fn finish_log(&mut self) {
        if !self.reader.is_finished() {
            // Where something holds the log open the end of it is missing, no more.
            let _ = tokio::time::timeout(PATIENCE, &mut self.reader).await;
        }
    }

    /// Asks it to end (SIGTERM).
    ///
    /// # Errors
    /// If it has ended already.
    pub async fn ask_to_end(&self) -> Result<()> {
        let Some(id) = self.child.id() else { bail!("{} has ended already: {}", self.name, self.log()) };
        let killed = Command::new("kill").args(["-TERM", &id.to_string()]).status().await?;
        ensure!(killed.success(), "cannot signal {}", self.name);
        Ok(())
    }

    /// Waits until it has ended, with status 0.
    ///
    /// # Errors
    /// If it does not end, or with another status; the error holds its log.
    pub async fn ended(&mut self) -> Result<()> {
        let status = self.exit_status().await?;
        ensure!(status.success(), "{} ended with {status}: {}", self.name, self.log());
        Ok(())
    }
}

/// A program of this workspace, built beside this test.
///
/// # Errors
/// If it was not built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let directory = test.ancestors().nth(2).context("a test lies in target/<profile>/deps")?;
    let path = directory.join(name);
    ensure!(path.is_file(), "{} is not built: run `cargo build --release` first", path.display());
    Ok(path)
}

async fn keep_log(reader: BufReader<tokio::process::ChildStderr>, log: Arc<Mutex<VecDeque<String>>>) {
    let mut lines = reader.lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let mut log = log.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if log.len() == LOG_LINES {
            log.pop_front();
        }
        log.push_back(line);
    }
}

//! What the way through a gateway adds: `cargo bench --workspace --bench latency -- [rounds]`.
//!
//! A worker without a model answers at once; the gateway and the tokenizer service are the real programs. One client asks
//! it directly, with token ids, then the gateway, with a chat of as many tokens, by gRPC and by server-sent events, request
//! by request in turn. The difference is what templates, tokenizer and routing add to the time to the first token. Then a
//! token leaves every few milliseconds, and what is measured is the time until it is here. Last, many clients ask at a time
//! for one token each, and what counts is the processor time of the programs. The Shepherd Model Gateway, if `make fetch` has
//! brought it, stands in front of the same worker as a yardstick: it has its tokenizer in its own process.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lockstep_proto::{
    client::{ClientLimits, connect_lazy},
    v1::{
        ContentPart, Conversation, CountTokensRequest, Message, Role, SamplingParams, StreamChatRequest,
        content_part::Part, count_tokens_request, inference_service_client::InferenceServiceClient,
        stream_chat_response,
    },
    worker::v1::{
        GenerateRequest, ResolvedSampling, generate_response::Event, worker_service_client::WorkerServiceClient,
    },
};
use lockstep_tests::{
    cluster::{PATIENCE, Process, demo_model},
    smg::{Smg, write_tokenizer},
    timed_stub::TimedStub,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    task::JoinSet,
};
use tonic::transport::Channel;

/// Tokens of the prompt, its template's among them.
const N_PROMPT_TOKENS: usize = 200;

/// Requests of one round for each way, and how many rounds there are if nobody says.
const N_REQUESTS: usize = 500;
const N_ROUNDS: usize = 5;

/// A stream whose tokens are timed, and the pause between two of them.
const N_TOKENS: u32 = 400;
const PAUSE: Duration = Duration::from_millis(4);

/// Clients at a time, and requests of each.
const N_CLIENTS: usize = 8;
const N_REQUESTS_EACH: usize = 250;

/// Every way to the stub.
struct Ways {
    direct: WorkerServiceClient<Channel>,
    grpc: InferenceServiceClient<Channel>,
    sse: BufReader<TcpStream>,
    smg: Option<BufReader<TcpStream>>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Direct,
    Grpc,
    Sse,
    Smg,
}

/// The programs.
struct Programs {
    worker: String,
    gateway: Process,
    tokenizer: Process,
    smg: Option<Smg>,
    _folder: TempDir,
}

fn main() -> Result<()> {
    // The client and the stub each have a thread; the programs that are measured have theirs.
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(measure())
}

async fn measure() -> Result<()> {
    let n_rounds = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(N_ROUNDS);
    let stub = TimedStub::default();
    let programs = Programs::start(stub.serve().await?.to_string()).await?;
    let mut ways = programs.ways().await?;
    let filler = ways.filler().await?;
    let mut all = vec![Way::Direct, Way::Grpc, Way::Sse];
    all.extend(programs.smg.is_some().then_some(Way::Smg));
    println!("p50 / p99 in us: {all:?}");
    for round in 0..=n_rounds {
        let mut first = vec![Vec::new(); all.len()];
        for request in 0..N_REQUESTS {
            for (way, times) in all.iter().zip(&mut first) {
                let begun = Instant::now();
                let arrived = ways.ask(*way, &text(request, &filler), 1).await?;
                times.push(arrived[0] - begun);
            }
        }
        report(round, "first token", first);
        stub.pause(PAUSE);
        let mut later = vec![Vec::new(); all.len()];
        for (way, times) in all.iter().zip(&mut later) {
            stub.take_sent();
            let arrived = ways.ask(*way, &text(round, &filler), N_TOKENS).await?;
            let sent = stub.take_sent();
            ensure!(sent.len() == arrived.len(), "{} tokens of {} arrived", arrived.len(), sent.len());
            times.extend(arrived.iter().zip(sent).skip(1).map(|(arrived, sent)| *arrived - sent));
        }
        report(round, "each token", later);
        stub.pause(Duration::ZERO);
    }
    println!("requests/s for each second of processor time");
    for round in 0..=n_rounds {
        for way in &all[1..] {
            let rates = programs.rates(*way, &filler).await?;
            if round > 0 {
                println!("{way:?}: {rates}");
            }
        }
    }
    Ok(())
}

// === impl Programs ===

impl Programs {
    async fn start(worker: String) -> Result<Self> {
        let models = vec!["--models".into(), format!("demo={}", demo_model().display())];
        let tokenizer = Process::start("lockstep-tokenizer-svc", "tokenizer", models).await?;
        let args = ["--tokenizers", tokenizer.grpc(), "--groups", &worker, "--http-listen", "127.0.0.1:0"];
        let gateway = Process::start("lockstep-gateway", "gateway", args.map(str::to_owned).to_vec()).await?;
        gateway.wait_ready("lockstep.v1.InferenceService").await?;
        let folder = tempfile::tempdir()?;
        write_tokenizer(folder.path())?;
        let path = folder.path().display().to_string();
        let args = ["--tokenizer-path", &path, "--log-level", "warn"];
        let smg = Smg::start(&[&worker], folder.path(), "round_robin", &args).ok();
        let programs = Self { worker, gateway, tokenizer, smg, _folder: folder };
        programs.wait_for_smg().await?;
        Ok(programs)
    }

    async fn wait_for_smg(&self) -> Result<()> {
        let Some(smg) = &self.smg else { return Ok(()) };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = async {
                let mut stream = BufReader::new(TcpStream::connect(&smg.http).await?);
                ask_by_sse(&mut stream, &" the".repeat(N_PROMPT_TOKENS), 1).await
            };
            match answer.await {
                Ok(_) => return Ok(()),
                Err(error) => ensure!(Instant::now() < deadline, "{error}: {}", smg.log()),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn ways(&self) -> Result<Ways> {
        let http = self.gateway.http().context("no HTTP")?;
        Ok(Ways {
            direct: WorkerServiceClient::new(connect_lazy(&self.worker, &ClientLimits::default())?),
            grpc: InferenceServiceClient::new(self.gateway.channel().await?),
            sse: connect(http).await?,
            smg: match &self.smg {
                Some(smg) => Some(connect(&smg.http).await?),
                None => None,
            },
        })
    }

    /// Many clients at a time; what a core does of it.
    async fn rates(&self, way: Way, filler: &str) -> Result<String> {
        let ids = match (way, &self.smg) {
            (Way::Smg, Some(smg)) => vec![("smg", smg.id())],
            _ => vec![("gateway", self.gateway.id()), ("tokenizer", self.tokenizer.id())],
        };
        let before = ids.iter().map(|(_, id)| cpu_time(*id)).collect::<Result<Vec<_>>>()?;
        let mut clients = JoinSet::new();
        for client in 0..N_CLIENTS {
            let (mut ways, filler) = (self.ways().await?, filler.to_owned());
            clients.spawn(async move {
                for request in 0..N_REQUESTS_EACH {
                    ways.ask(way, &text(client * N_REQUESTS_EACH + request, &filler), 1).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = clients.join_next().await {
            ended??;
        }
        let mut rates = String::new();
        for ((name, id), before) in ids.iter().zip(before) {
            let spent = (cpu_time(*id)? - before).as_secs_f64();
            rates += &format!(" {name} {:.0}", (N_CLIENTS * N_REQUESTS_EACH) as f64 / spent);
        }
        Ok(rates)
    }
}

/// Processor time that a program has used.
fn cpu_time(id: Option<u32>) -> Result<Duration> {
    let mut total = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", id.context("it has ended")?))? {
        let stat = std::fs::read_to_string(task?.path().join("schedstat"))?;
        total += stat.split_whitespace().next().context("no time")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}

async fn connect(address: &str) -> Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

/// Prints the median and the 99th percentile of each way. The first round warms up.
fn report(round: usize, what: &str, times: Vec<Vec<Duration>>) {
    let columns = times.into_iter().map(|mut times| {
        times.sort_unstable();
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_micros();
        format!("{:>14}", format!("{} / {}", at(0.5), at(0.99)))
    });
    if round > 0 {
        println!("{what:<12}{}", columns.collect::<String>());
    }
}

/// A message of the wanted length that nothing has cached as a whole.
fn text(request: usize, filler: &str) -> String {
    format!("{:03}{filler}", request % 1000)
}

fn conversation(text: &str) -> Conversation {
    let part = Part::Text(text.to_owned());
    let content = vec![ContentPart { part: Some(part) }];
    let message = Message { role: Role::User.into(), content, ..Message::default() };
    Conversation { messages: vec![message], ..Conversation::default() }
}

// === impl Ways ===

impl Ways {
    /// Words that fill a message to the wanted number of tokens.
    async fn filler(&mut self) -> Result<String> {
        let mut filler = String::new();
        loop {
            let input = count_tokens_request::Input::Conversation(conversation(&text(0, &filler)));
            let request = CountTokensRequest { model: String::new(), input: Some(input) };
            let n_tokens = self.grpc.count_tokens(request).await?.into_inner().token_count as usize;
            if n_tokens >= N_PROMPT_TOKENS {
                return Ok(filler);
            }
            filler.push_str(" the");
        }
    }

    /// When each token of an answer was here.
    async fn ask(&mut self, way: Way, text: &str, n_tokens: u32) -> Result<Vec<Instant>> {
        match way {
            Way::Direct => self.ask_directly(n_tokens).await,
            Way::Grpc => self.ask_by_grpc(text, n_tokens).await,
            Way::Sse => ask_by_sse(&mut self.sse, text, n_tokens).await,
            Way::Smg => ask_by_sse(self.smg.as_mut().context("no smg")?, text, n_tokens).await,
        }
    }

    async fn ask_directly(&mut self, n_tokens: u32) -> Result<Vec<Instant>> {
        let sampling = ResolvedSampling { max_new_tokens: n_tokens, ..ResolvedSampling::default() };
        let request = GenerateRequest {
            request_id: "direct".into(),
            prompt_token_ids: vec![260; N_PROMPT_TOKENS],
            sampling: Some(sampling),
            n: 1,
            ..GenerateRequest::default()
        };
        let mut stream = self.direct.generate(request).await?.into_inner();
        let mut arrived = Vec::new();
        while let Some(response) = stream.message().await? {
            if let Some(Event::Tokens(_)) = response.event {
                arrived.push(Instant::now());
            }
        }
        Ok(arrived)
    }

    async fn ask_by_grpc(&mut self, text: &str, n_tokens: u32) -> Result<Vec<Instant>> {
        let sampling = SamplingParams { max_new_tokens: Some(n_tokens), ..SamplingParams::default() };
        let request = StreamChatRequest {
            conversation: Some(conversation(text)),
            sampling: Some(sampling),
            ..StreamChatRequest::default()
        };
        let mut stream = self.grpc.stream_chat(request).await?.into_inner();
        let mut arrived = Vec::new();
        while let Some(response) = stream.message().await? {
            if let Some(stream_chat_response::Event::Chunk(_)) = response.event {
                arrived.push(Instant::now());
            }
        }
        Ok(arrived)
    }
}

/// The same over HTTP/1.1.
async fn ask_by_sse(stream: &mut BufReader<TcpStream>, text: &str, n_tokens: u32) -> Result<Vec<Instant>> {
    let body = serde_json::json!({
        "model": "demo", "messages": [{"role": "user", "content": text}], "stream": true, "max_tokens": n_tokens,
    });
    let body = body.to_string();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    stream.get_mut().write_all(request.as_bytes()).await?;
    let mut arrived = Vec::new();
    let mut line = String::new();
    // The last chunk of the body is empty.
    while line.trim_end() != "0" {
        line.clear();
        ensure!(stream.read_line(&mut line).await? > 0, "the connection was closed");
        if line.contains(r#""content":" the""#) {
            arrived.push(Instant::now());
        }
        ensure!(!line.contains("error"), "{line}");
    }
    stream.read_line(&mut line).await?;
    ensure!(arrived.len() == n_tokens as usize, "{} tokens of {n_tokens}", arrived.len());
    Ok(arrived)
}

//! Memory of streams that wait for their next token: `cargo bench --workspace --bench idle -- [streams]`.
//!
//! A worker without a model sends one token of each and then none. The gateway is the real program; what it holds more than
//! before, divided by the streams, is what a stream costs it. (A tokenizer service has nothing to do with a stream that
//! runs.) By gRPC the streams share connections, 250 each; of server-sent events each has a connection of its own.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lockstep_proto::v1::{
    RawPrompt, SamplingParams, StreamGenerateRequest, TokenIds, inference_service_client::InferenceServiceClient,
    raw_prompt::Prompt, stream_generate_response::Event,
};
use lockstep_tests::{
    cluster::{Process, demo_model},
    timed_stub::TimedStub,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

const N_STREAMS: usize = 10_000;
const PER_CONNECTION: usize = 250;

/// Tokens of each prompt.
const N_PROMPT_TOKENS: u32 = 200;

/// Longer than any of this takes.
const NEVER: Duration = Duration::from_secs(3_600);

/// Time for buffers that are in use for a moment to be given back.
const SETTLE: Duration = Duration::from_secs(3);

fn main() -> Result<()> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(measure())
}

async fn measure() -> Result<()> {
    let n_streams = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(N_STREAMS);
    println!("{:<8} {:>10} {:>28}", "front", "streams", "gateway, KiB a stream");
    hold(n_streams, "gRPC", async |gateway| grpc(gateway, n_streams).await).await?;
    hold(n_streams, "SSE", async |gateway| sse(gateway, n_streams).await).await
}

/// Starts the programs, has streams opened, and prints what they cost.
async fn hold<T>(n_streams: usize, front: &str, open: impl AsyncFnOnce(&Process) -> Result<T>) -> Result<()> {
    let stub = TimedStub::default();
    stub.pause(NEVER);
    let worker = stub.serve().await?.to_string();
    let many = (n_streams + 1_000).to_string();
    let limits = ["--limits.max-connections", &many, "--limits.max-concurrent-streams", &many];
    let model = format!("demo={}", demo_model().display());
    let args = ["--models", &model].into_iter().chain(limits);
    let tokenizer = Process::start("lockstep-tokenizer-svc", "tokenizer", args.map(str::to_owned).collect()).await?;
    let args = ["--tokenizers", tokenizer.grpc(), "--groups", &worker, "--http-listen", "127.0.0.1:0"];
    let args = args.into_iter().chain(["--requests.max-in-flight", &many, "--log.filter", "warn"]).chain(limits);
    let gateway = Process::start("lockstep-gateway", "gateway", args.map(str::to_owned).collect()).await?;
    gateway.wait_ready("lockstep.v1.InferenceService").await?;
    let before = resident_kib(&gateway)?;
    let _streams = open(&gateway).await.with_context(|| gateway.log())?;
    tokio::time::sleep(SETTLE).await;
    let each = (resident_kib(&gateway)? - before) / n_streams as f64;
    println!("{front:<8} {n_streams:>10} {each:>28.1}");
    Ok(())
}

/// What a process has in memory.
fn resident_kib(process: &Process) -> Result<f64> {
    let id = process.id().context("it has ended")?;
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("no size")?.parse()?)
}

/// Streams by gRPC, each after its first token.
async fn grpc(gateway: &Process, n_streams: usize) -> Result<Vec<impl Sized + use<>>> {
    let mut streams = Vec::new();
    while streams.len() < n_streams {
        let mut client = InferenceServiceClient::new(gateway.channel().await?);
        for _ in 0..PER_CONNECTION.min(n_streams - streams.len()) {
            let ids = vec![260; N_PROMPT_TOKENS as usize];
            let request = StreamGenerateRequest {
                prompt: Some(RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids })) }),
                sampling: Some(SamplingParams { max_new_tokens: Some(100), ..SamplingParams::default() }),
                ..StreamGenerateRequest::default()
            };
            let mut stream = client.stream_generate(request).await?.into_inner();
            loop {
                let response = stream.message().await?.context("a stream ended")?;
                if matches!(response.event, Some(Event::Chunk(_))) {
                    break;
                }
            }
            streams.push((client.clone(), stream));
        }
    }
    Ok(streams)
}

/// Streams of server-sent events, each after its first token.
async fn sse(gateway: &Process, n_streams: usize) -> Result<Vec<impl Sized + use<>>> {
    let prompt = vec![260; N_PROMPT_TOKENS as usize];
    let body = serde_json::json!({ "prompt": prompt, "stream": true, "max_tokens": 100 }).to_string();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    let request = format!("{head}{body}");
    let mut streams = Vec::new();
    while streams.len() < n_streams {
        let stream = TcpStream::connect(gateway.http().context("no HTTP")?).await?;
        let mut stream = BufReader::with_capacity(1 << 10, stream);
        stream.get_mut().write_all(request.as_bytes()).await?;
        let mut line = String::new();
        while !line.contains(r#""text":" the""#) {
            line.clear();
            ensure!(stream.read_line(&mut line).await? > 0, "a stream ended");
        }
        streams.push(stream);
    }
    Ok(streams)
}

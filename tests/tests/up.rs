//! `lockstep up` with the real services: whichever is killed comes back, and nothing outlives the command.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::TcpStream,
    path::Path,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lockstep_proto::v1::{
    ChatRequest, ContentPart, Conversation, Message, RawPrompt, Role, SamplingParams, StreamGenerateRequest,
    StreamGenerateResponse, content_part::Part, inference_service_client::InferenceServiceClient, raw_prompt::Prompt,
};
use lockstep_tests::{
    cluster::{PATIENCE, binary, demo_model},
    tiny_model::TinyModel,
};
use tempfile::NamedTempFile;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::{sleep, timeout},
};
use tonic::{
    Code, Request, Status, Streaming,
    transport::{Channel, Endpoint},
};

/// The deadline of every call. One that is answered with its passing has hung.
const DEADLINE: Duration = Duration::from_secs(20);

/// So many tokens after a service's end nobody can have sent before it.
const STREAMED: u32 = 100;

/// Lines of the log that are shown when a test fails.
const LOG_LINES: usize = 200;

/// Where shared memory would stay behind.
const SEGMENTS: &str = "/dev/shm";

/// A running `lockstep up`.
struct Up {
    process: Child,
    /// gRPC and metrics, by service.
    addresses: BTreeMap<String, [String; 2]>,
    /// All that it has said on stderr.
    log: NamedTempFile,
}

impl Up {
    /// Two ranks on a model; returns when it says that it serves.
    async fn start(model: &Path, further: &[&str]) -> Result<Self> {
        let log = NamedTempFile::new()?;
        let mut process = Command::new(binary("lockstep")?)
            .arg("up")
            .arg(model)
            .args(["--world-size", "2", "--threads", "1"])
            .args(["--gateway-listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"])
            .args(further)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.reopen()?)
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().context("no stdout")?).lines();
        let mut up = Self { process, addresses: BTreeMap::new(), log };
        loop {
            let line = timeout(PATIENCE, lines.next_line()).await??;
            let Some(line) = line else { bail!("it ended before it served:\n{}", up.log()) };
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                [name, "grpc", grpc, .., metrics] => {
                    let metrics = metrics.trim_start_matches("http://").trim_end_matches("/metrics");
                    up.addresses.insert(name.to_owned(), [grpc.to_owned(), metrics.to_owned()]);
                }
                ["Ctrl-C", ..] => return Ok(up),
                _ => {}
            }
        }
    }

    /// The end of its log.
    fn log(&self) -> String {
        let log = fs::read_to_string(self.log.path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// The services that run now, with their process ids.
    fn services(&self) -> Result<BTreeMap<String, u32>> {
        let parent = self.process.id().context("it has ended")?;
        let ids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        Ok(ids.filter_map(|id: u32| Some((service(id, parent)?, id))).collect())
    }

    fn client(&self) -> Result<InferenceServiceClient<Channel>> {
        let [grpc, _] = self.addresses.get("gateway").context("no gateway")?;
        let endpoint = Endpoint::from_shared(format!("http://{grpc}"))?.connect_timeout(DEADLINE);
        Ok(InferenceServiceClient::new(endpoint.connect_lazy()))
    }

    /// A conversation of one short turn. The outer result is an error if it hangs.
    async fn chat(&self) -> Result<Result<(), Status>> {
        let part = ContentPart { part: Some(Part::Text("Hello".into())) };
        let message = Message { role: Role::User.into(), content: vec![part], ..Message::default() };
        let request = ChatRequest {
            conversation: Some(Conversation { messages: vec![message], ..Conversation::default() }),
            sampling: Some(SamplingParams { max_new_tokens: Some(2), ..SamplingParams::default() }),
            ..ChatRequest::default()
        };
        let mut client = self.client()?;
        let answer = timeout(DEADLINE, client.chat(with_deadline(request))).await;
        Ok(answer.with_context(|| format!("a chat hangs:\n{}", self.log()))?.map(drop))
    }

    /// A stream that has begun and goes on for longer than the test.
    async fn endless(&self) -> Result<Streaming<StreamGenerateResponse>> {
        let sampling =
            SamplingParams { max_new_tokens: Some(4_000), ignore_eos: Some(true), ..SamplingParams::default() };
        let request = StreamGenerateRequest {
            prompt: Some(RawPrompt { prompt: Some(Prompt::Text("Once upon a time".into())) }),
            sampling: Some(sampling),
            ..StreamGenerateRequest::default()
        };
        let mut stream = self.client()?.stream_generate(with_deadline(request)).await?.into_inner();
        stream.message().await?.context("a start")?;
        Ok(stream)
    }

    /// Kills a service as a machine that fails would, and sees it come back. A stream that runs needs no tokenizer.
    async fn survives_the_loss_of(&self, name: &str) -> Result<()> {
        let mut stream = self.endless().await?;
        let id = *self.services()?.get(name).with_context(|| format!("no {name}"))?;
        signal("-KILL", id).await?;
        let ended = async {
            let mut n_messages = 0;
            while n_messages < STREAMED && stream.message().await?.is_some() {
                n_messages += 1;
            }
            Ok::<_, Status>(n_messages)
        };
        let ended = timeout(DEADLINE, ended).await.with_context(|| format!("a stream hangs without {name}"))?;
        match ended {
            Ok(STREAMED) if name == "tokenizer" => {}
            Ok(n_messages) => bail!("a stream goes on or ends well without {name}, after {n_messages} messages"),
            Err(status) => self.check_away(name, &status)?,
        }
        let deadline = Instant::now() + PATIENCE;
        while let Err(status) = self.chat().await? {
            self.check_away(name, &status)?;
            ensure!(Instant::now() < deadline, "no chat since {name} was killed: {status:?}\n{}", self.log());
            sleep(Duration::from_millis(10)).await;
        }
        let now = self.services()?.get(name).copied();
        ensure!(now.is_some_and(|now| now != id), "chats without {name}: {now:?}");
        Ok(())
    }

    /// What a client may be told while a service is away. Of a gateway that dies tonic itself tells, by `Unknown`.
    fn check_away(&self, name: &str, status: &Status) -> Result<()> {
        let expected = status.code() == Code::Unavailable || name == "gateway" && status.code() == Code::Unknown;
        ensure!(expected, "without {name}: {status:?}\n{}", self.log());
        Ok(())
    }

    async fn terminate(&mut self) -> Result<ExitStatus> {
        signal("-TERM", self.process.id().context("it has ended")?).await?;
        let ended = timeout(PATIENCE, self.process.wait()).await;
        Ok(ended.with_context(|| format!("it does not end:\n{}", self.log()))??)
    }
}

fn with_deadline<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

/// Which service a process is, if `parent` has started it and it runs.
fn service(id: u32, parent: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // `id (name) state parent …`, and the name may hold anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if fields.next()? == "Z" || fields.next()?.parse() != Ok(parent) {
        return None;
    }
    let command = fs::read_to_string(format!("/proc/{id}/cmdline")).ok()?;
    let mut words = command.split('\0');
    match Path::new(words.next()?).file_name()?.to_str()? {
        "lockstep-gateway" => Some("gateway".into()),
        "lockstep-tokenizer-svc" => Some("tokenizer".into()),
        "lockstep-worker" => Some(format!("worker-0.{}", words.skip_while(|word| *word != "--group.rank").nth(1)?)),
        _ => None,
    }
}

async fn signal(signal: &str, id: u32) -> Result<()> {
    let sent = Command::new("kill").args([signal, &id.to_string()]).status().await?;
    ensure!(sent.success(), "cannot send {signal} to {id}");
    Ok(())
}

fn segments() -> Result<BTreeSet<std::ffi::OsString>> {
    Ok(fs::read_dir(SEGMENTS)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?)
}

#[tokio::test]
async fn a_killed_service_comes_back_and_nothing_is_left_at_the_end() -> Result<()> {
    let segments_before = segments()?;
    let mut up = Up::start(&demo_model(), &[]).await?;
    let names: Vec<_> = up.services()?.into_keys().collect();
    assert_eq!(names, ["gateway", "tokenizer", "worker-0.0", "worker-0.1"]);
    up.chat().await??;
    let mut ids: BTreeSet<u32> = up.services()?.into_values().collect();
    for name in ["tokenizer", "gateway", "worker-0.1", "worker-0.0"] {
        up.survives_the_loss_of(name).await?;
        ids.extend(up.services()?.into_values());
    }
    assert_eq!(ids.len(), 8);

    let status = up.terminate().await?;
    assert!(status.success(), "{status}: {}", up.log());
    for id in ids {
        assert!(!Path::new(&format!("/proc/{id}")).exists(), "process {id} is left:\n{}", up.log());
    }
    for address in up.addresses.values().flatten() {
        assert!(TcpStream::connect(address).is_err(), "{address} still listens");
    }
    // Other clusters on this machine make segments, too, and remove them as soon as their ranks have met.
    let deadline = Instant::now() + PATIENCE;
    while !segments()?.is_subset(&segments_before) {
        assert!(Instant::now() < deadline, "left in {SEGMENTS}: {:?}", segments()?);
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

#[tokio::test]
async fn a_draft_model_is_given_to_rank_0_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let [model, draft_model] = ["model.gguf", "draft.gguf"].map(|name| folder.path().join(name));
    TinyModel::default().write(&model)?;
    TinyModel { n_layers: 1, ..TinyModel::default() }.write(&draft_model)?;
    let draft_model = draft_model.to_str().context("a path")?;
    let mut up = Up::start(&model, &["--draft-model", draft_model]).await?;
    up.chat().await??;
    for (name, id) in up.services()? {
        let command = fs::read_to_string(format!("/proc/{id}/cmdline"))?;
        assert_eq!(command.contains("draft.gguf"), name == "worker-0.0", "{name}: {command}");
    }
    let status = up.terminate().await?;
    assert!(status.success(), "{status}: {}", up.log());
    Ok(())
}

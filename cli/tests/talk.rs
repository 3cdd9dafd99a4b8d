//! `chat`, `generate`, `embed`, `status` and `bench serve` against a stand-in for the gateway.
#![allow(clippy::unwrap_used, reason = "a test's helpers panic as tests do")]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    pin::Pin,
    process::{Command, Output, Stdio},
    sync::Arc,
};

use lockstep_proto::{
    error::{Error, Reason},
    server::{Limits, Readiness, Server, ServerSettings, Shutdown},
    telemetry,
    v1::{
        self as pb, content_part,
        inference_service_server::{InferenceService, InferenceServiceServer},
        model_service_server::{ModelService, ModelServiceServer},
        raw_prompt, stream_chat_response, stream_generate_response,
    },
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::runtime::Runtime;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, service::Routes};

/// A gateway that answers with what it was asked.
#[derive(Debug)]
struct Echo;

/// The stand-in, for as long as a test runs.
struct Gateway {
    address: String,
    readiness: Readiness,
    _runtime: Runtime,
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Gateway {
    fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let _entered = runtime.enter();
        let settings = ServerSettings {
            service: "gateway",
            listen: "127.0.0.1:0".parse().unwrap(),
            metrics_listen: None,
            limits: Limits::default(),
        };
        let server = Server::bind(settings, Arc::new(telemetry::registry("gateway"))).unwrap();
        let server = server.health_names(&["lockstep.v1.InferenceService"]);
        let address = server.grpc_address().to_string();
        let readiness = Readiness::new();
        let routes = Routes::new(InferenceServiceServer::new(Echo)).add_service(ModelServiceServer::new(Echo));
        let ready = readiness.clone();
        runtime.spawn(async move { server.serve(routes, &ready, &Shutdown::new()).await });
        drop(_entered);
        Self { address, readiness, _runtime: runtime }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
        command.args(args).args(["--target", &self.address]).env_remove("LOCKSTEP_API_KEY");
        command
    }

    /// Runs a command to its end with this on its standard input.
    fn run(&self, args: &[&str], input: impl AsRef<[u8]>) -> Output {
        let mut command = self.command(args);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A command that fails early does not read on.
        let _ = process.stdin.take().unwrap().write_all(input.as_ref());
        process.wait_with_output().unwrap()
    }
}

/// What was said, one mark for each turn: `s` system, `u` user, `a` assistant.
fn echo(conversation: &pb::Conversation, sampling: &pb::SamplingParams) -> String {
    let text = |message: &pb::Message| match message.content.first().and_then(|part| part.part.clone()) {
        Some(content_part::Part::Text(text)) => text,
        None => String::new(),
    };
    let turns: String = conversation.messages.iter().map(|m| ["?", "s", "u", "a", "t"][m.role as usize]).collect();
    let last = conversation.messages.last().map(text).unwrap_or_default();
    format!("[{turns}] {last} t={:?}", sampling.temperature)
}

fn chunk(seq: u64, text: &str, tokens: usize) -> pb::Chunk {
    pb::Chunk { seq, text: text.into(), token_ids: vec![7; tokens], ..pb::Chunk::default() }
}

fn refuse(text: &str) -> Result<(), Status> {
    if text.contains("refused") {
        let error = Error::new(Reason::OverPolicy, "over the policy").violation("sampling.n", "9 is over 4");
        return Err(error.into());
    }
    Ok(())
}

#[tonic::async_trait]
impl InferenceService for Echo {
    type StreamChatStream = Events<pb::StreamChatResponse>;
    type StreamGenerateStream = Events<pb::StreamGenerateResponse>;

    async fn stream_chat(
        &self,
        request: Request<pb::StreamChatRequest>,
    ) -> Result<Response<Self::StreamChatStream>, Status> {
        let request = request.into_inner();
        let text = echo(&request.conversation.unwrap_or_default(), &request.sampling.unwrap_or_default());
        refuse(&text)?;
        let endless = text.contains("forever");
        let event = |event| Ok(pb::StreamChatResponse { event: Some(event) });
        let chunk = event(stream_chat_response::Event::Chunk(chunk(0, &text, 1)));
        let finish = event(stream_chat_response::Event::Finish(pb::Finish::default()));
        let events = tokio_stream::once(chunk);
        Ok(Response::new(if endless {
            Box::pin(events.chain(tokio_stream::pending()))
        } else {
            Box::pin(events.chain(tokio_stream::once(finish)))
        }))
    }

    async fn stream_generate(
        &self,
        request: Request<pb::StreamGenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let (metadata, _, request) = request.into_parts();
        let event = |event| Ok(pb::StreamGenerateResponse { event: Some(event) });
        let text = match request.prompt.and_then(|prompt| prompt.prompt) {
            Some(raw_prompt::Prompt::Text(text)) => text,
            Some(raw_prompt::Prompt::TokenIds(ids)) if ids.ids.len() == 5 => "ids".into(),
            _ => return Err(Status::internal("no prompt")),
        };
        refuse(&text)?;
        let key = metadata.get("authorization").map(|key| key.to_str().unwrap().to_owned()).unwrap_or_default();
        let max = request.sampling.and_then(|sampling| sampling.max_new_tokens);
        let mut events = vec![
            event(stream_generate_response::Event::Chunk(chunk(0, &format!("{text} {max:?}"), 1))),
            event(stream_generate_response::Event::Chunk(chunk(1, &key, 3))),
        ];
        if !text.contains("cut") {
            events.push(event(stream_generate_response::Event::Finish(pb::Finish::default())));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    /// Each text's length, and what is asked of it.
    async fn embed(&self, request: Request<pb::EmbedRequest>) -> Result<Response<pb::EmbedResponse>, Status> {
        let pb::EmbedRequest { inputs, pooling, normalize, dimensions, .. } = request.into_inner();
        let embed = |input: pb::RawPrompt| {
            let Some(raw_prompt::Prompt::Text(text)) = input.prompt else { return Err(Status::internal("no text")) };
            refuse(&text)?;
            let asked = [pooling as f32, f32::from(u8::from(normalize == Some(true))), dimensions.unwrap_or(0) as f32];
            Ok(pb::Embedding { values: asked.to_vec(), prompt_tokens: text.len() as u32 })
        };
        let embeddings = inputs.into_iter().map(embed).collect::<Result<_, _>>()?;
        Ok(Response::new(pb::EmbedResponse { embeddings, ..pb::EmbedResponse::default() }))
    }

    async fn chat(&self, _: Request<pb::ChatRequest>) -> Result<Response<pb::ChatResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn generate(&self, _: Request<pb::GenerateRequest>) -> Result<Response<pb::GenerateResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn count_tokens(
        &self,
        _: Request<pb::CountTokensRequest>,
    ) -> Result<Response<pb::CountTokensResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }

    async fn render_chat(&self, _: Request<pb::RenderChatRequest>) -> Result<Response<pb::RenderChatResponse>, Status> {
        Err(Status::unimplemented("not asked for here"))
    }
}

fn model() -> pb::Model {
    pb::Model { name: "echo".into(), vocab_size: 100, replicas: 1, ..pb::Model::default() }
}

#[tonic::async_trait]
impl ModelService for Echo {
    async fn list_models(&self, _: Request<pb::ListModelsRequest>) -> Result<Response<pb::ListModelsResponse>, Status> {
        Ok(Response::new(pb::ListModelsResponse { models: vec![model()] }))
    }

    async fn get_model(&self, _: Request<pb::GetModelRequest>) -> Result<Response<pb::GetModelResponse>, Status> {
        Ok(Response::new(pb::GetModelResponse { model: Some(model()) }))
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn piped_chat_prints_answers_alone_and_keeps_the_conversation() {
    let gateway = Gateway::start();
    let input = "Hi\n/set temperature 0.5\nAnd?\n/reset\n/system Be brief.\n\nAgain\n/quit\nnot read\n";
    let output = gateway.run(&["chat"], input);
    assert_eq!(stdout(&output), "[u] Hi t=None\n[uau] And? t=Some(0.5)\n[su] Again t=Some(0.5)\n");
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn piped_chat_fails_with_the_first_wrong_line() {
    let gateway = Gateway::start();
    let output = gateway.run(&["chat"], "please be refused\nHi\n");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stderr(&output), "lockstep: OVER_POLICY: over the policy; sampling.n: 9 is over 4\n");
    assert_eq!(stdout(&output), "");
    let output = gateway.run(&["chat"], "/sett x\n");
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn input_that_is_not_text_is_wrong_usage_and_is_located() {
    let gateway = Gateway::start();
    let output = gateway.run(&["chat"], b"Hi\n\xff\n");
    assert_eq!(output.status.code(), Some(64));
    assert_eq!(stderr(&output), "lockstep: stdin: line 2 is not UTF-8\n");
    let output = gateway.run(&["generate", "-"], b"ab\xff");
    assert_eq!(output.status.code(), Some(64));
    assert_eq!(stderr(&output), "lockstep: the prompt on stdin is not UTF-8 from byte 2 on\n");
}

#[test]
fn interrupt_stops_the_answer_and_not_the_chat() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let gateway = Gateway::start();
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let side = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let mut command = gateway.command(&["chat"]);
    let mut process = command.stdin(side).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut keyboard = File::from(terminal);
    let mut screen = process.stdout.take().unwrap();
    let mut wait_for = |text: &str| {
        let (mut seen, mut byte) = (String::new(), [0]);
        while !seen.contains(text) {
            assert_eq!(screen.read(&mut byte).unwrap(), 1, "no {text:?} in {seen:?}");
            seen.push(byte[0].into());
        }
    };
    keyboard.write_all(b"go on forever\r").unwrap();
    wait_for("[u] go on forever");
    kill_process(Pid::from_child(&process), Signal::INT).unwrap();
    keyboard.write_all(b"again\r").unwrap();
    wait_for("[uau] again");
    keyboard.write_all(b"/quit\r").unwrap();
    assert!(process.wait().unwrap().success());
}

#[test]
fn generate_streams_a_prompt_from_the_line_or_from_stdin() {
    let gateway = Gateway::start();
    let output = gateway.run(&["generate", "Once", "-n", "7", "--api-key", "k"], "");
    assert_eq!(stdout(&output), "Once Some(7)Bearer k\n", "{}", stderr(&output));
    let output = gateway.run(&["generate", "-"], "upon a time");
    assert_eq!(stdout(&output), "upon a time None\n", "{}", stderr(&output));
}

#[test]
fn embed_prints_a_line_of_json_for_each_text() {
    let gateway = Gateway::start();
    let output = gateway.run(&["embed", "ab", "abc"], "");
    let expected = "{\"index\":0,\"prompt_tokens\":2,\"values\":[1.0,1.0,0.0]}\n\
                    {\"index\":1,\"prompt_tokens\":3,\"values\":[1.0,1.0,0.0]}\n";
    assert_eq!(stdout(&output), expected, "{}", stderr(&output));
    let output = gateway.run(&["embed", "a", "--pooling", "last", "--dimensions", "8", "--raw"], "");
    assert!(stdout(&output).contains("[2.0,0.0,8.0]"), "{}", stderr(&output));
    let output = gateway.run(&["embed", "refused"], "");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("over the policy"), "{}", stderr(&output));
}

#[test]
fn stream_that_is_cut_off_is_a_failure() {
    let gateway = Gateway::start();
    let output = gateway.run(&["generate", "cut"], "");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cut off"), "{}", stderr(&output));
}

#[test]
fn wrong_settings_are_wrong_usage() {
    let gateway = Gateway::start();
    for args in [&["generate", "x", "--set", "temprature=1"][..], &["generate"], &["chat", "--nope"], &["nope"]] {
        let output = gateway.run(args, "");
        assert_eq!(output.status.code(), Some(64), "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn status_says_whether_the_cluster_takes_work() {
    let gateway = Gateway::start();
    let output = gateway.run(&["status"], "");
    assert_eq!(output.status.code(), Some(69));
    assert!(stdout(&output).contains("not ready") && stdout(&output).contains("echo"), "{}", stdout(&output));
    gateway.readiness.set_ready(true);
    let output = gateway.run(&["status"], "");
    assert!(output.status.success() && !stdout(&output).contains("not ready"), "{}", stdout(&output));
}

#[test]
fn bench_counts_every_request_and_token() {
    let gateway = Gateway::start();
    let args = ["bench", "serve", "--requests", "20", "--concurrency", "4", "--prompt-tokens", "5"];
    let output = gateway.run(&[&args[..], &["--json", "--rate", "1000"]].concat(), "");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((json["succeeded"].as_u64(), json["output_tokens"].as_u64()), (Some(20), Some(80)), "{json}");
    assert!(json["ttft_ms"]["p99"].is_number() && json["itl_ms"]["p50"].is_number(), "{json}");
    assert_eq!(json["errors"], serde_json::json!({}));
    let output = gateway.run(&["bench", "serve", "--requests", "3", "--prompt-tokens", "6"], "");
    assert_eq!(output.status.code(), Some(1), "no request can succeed");
    assert!(stdout(&output).contains("3   INTERNAL"), "{}", stdout(&output));
    assert!(stderr(&output).starts_with("lockstep: the first request that failed: INTERNAL: "), "{}", stderr(&output));
}

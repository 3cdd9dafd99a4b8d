//! OpenAI's API on the HTTP port: what goes wrong, in its own words, and what a stream looks like when it is cut.

use lockstep_gateway::admission::ApiKey;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::cluster::{Cluster, Setup, in_time};

/// Status, head and body of the answer to one request.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn error(&self) -> Value {
        let body: Value = serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.body));
        body["error"].clone()
    }
}

async fn call(cluster: &Cluster, head: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(cluster.http_address).await.unwrap();
    let head = format!("{head}\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    // A server that refuses a body early may close before all of it is sent.
    let _ = stream.write_all(body).await;
    let mut bytes = Vec::new();
    let _ = in_time(stream.read_to_end(&mut bytes)).await;
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_owned(), body: body.to_owned() }
}

async fn chat(cluster: &Cluster, body: &str) -> Answer {
    call(cluster, "POST /v1/chat/completions HTTP/1.1", body.as_bytes()).await
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_said_by_name() {
    let cluster = Cluster::start().await;
    let with = |more: &str| format!(r#"{{"messages": [{{"role": "user", "content": "x"}}]{more}}}"#);
    let deep = format!(r#"{{"messages": {}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let mut wrong = Vec::new();
    for (body, param) in [
        (String::new(), ""),
        ("{".into(), ""),
        ("[]".into(), ""),
        ("\u{0}".into(), ""),
        (deep, "messages[0]"),
        ("{}".into(), ""),
        (r#"{"messages": "hello"}"#.into(), "messages"),
        (r#"{"messages": []}"#.into(), "messages"),
        (r#"{"messages": [{}]}"#.into(), "messages[0]"),
        (r#"{"messages": [["user", "x"]]}"#.into(), "messages[0]"),
        (r#"{"messages": [{"role": "oracle", "content": "x"}]}"#.into(), "messages[0].role"),
        (r#"{"messages": [{"role": "user", "content": 7}]}"#.into(), "messages[0].content"),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#.into(),
            "messages[0].content[0].type",
        ),
        (
            r#"{"messages": [{"role": "user", "tool_calls": [{"function": {"name": "f"}}]}]}"#.into(),
            "messages[0].tool_calls",
        ),
        (with(r#", "temperature": "hot""#), "temperature"),
        (with(r#", "temperature": 1e400"#), "temperature"),
        (with(r#", "top_p": 0"#), "top_p"),
        (with(r#", "n": 129"#), "n"),
        (with(r#", "n": -1"#), "n"),
        (with(r#", "stop": {}"#), "stop"),
        (with(r#", "stop": [""]"#), "stop[0]"),
        (with(r#", "logit_bias": {"x": 1}"#), "logit_bias.x"),
        (with(r#", "logit_bias": {"100000000": 1}"#), "logit_bias[100000000]"),
        (with(r#", "top_logprobs": 2"#), "top_logprobs"),
        (with(r#", "logprobs": true, "top_logprobs": 21"#), "top_logprobs"),
        (with(r#", "max_tokens": 3, "max_completion_tokens": 4"#), "max_tokens"),
        (with(r#", "stream_options": {"include_usage": true}"#), "stream_options"),
        (with(r#", "tool_choice": "required""#), "tool_choice"),
        (with(r#", "tools": [{"type": "code"}]"#), "tools[0].type"),
        (with(r#", "tools": [{"type": "function", "function": {"name": ""}}]"#), "tools[0].name"),
        (with(r#", "response_format": {"type": "yaml"}"#), "response_format.type"),
        (
            with(r#", "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}"#),
            "structured_outputs",
        ),
        (with(r#", "audio": {"voice": "x"}"#), "audio"),
        (with(r#", "store": true"#), "store"),
        (with(r#", "chat_template_kwargs": {"messages": 1}"#), "chat_template_kwargs"),
        (with(r#", "no_such_option": 1"#), "no_such_option"),
    ] {
        let answer = chat(&cluster, &body).await;
        let error = answer.error();
        let one_line = error["message"].as_str().is_some_and(|message| !message.contains('\n'));
        let as_expected = answer.status == 400 && error["type"] == "invalid_request_error" && error["param"] == param;
        if !(as_expected && one_line) {
            wrong.push(format!("{}: {} {error}", &body[..body.len().min(120)], answer.status));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let invalid_utf8 = call(&cluster, "POST /v1/chat/completions HTTP/1.1", b"{\"messages\": \"\xff\"}").await;
    assert_eq!(invalid_utf8.status, 400);
    let large = call(&cluster, "POST /v1/completions HTTP/1.1", &vec![b' '; 10 << 20]).await;
    assert_eq!((large.status, large.error()["code"].as_str()), (413, Some("MESSAGE_TOO_LARGE")));
}

#[tokio::test]
async fn unknown_paths_methods_models_and_keys_have_their_status() {
    let settings = |settings: &mut lockstep_gateway::config::GatewaySettings| {
        settings.api_keys = vec![ApiKey::new("secret").unwrap()];
    };
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    for (head, status, code) in [
        ("GET /v1/models HTTP/1.1", 401, "invalid_api_key"),
        ("GET /v1/models HTTP/1.1\r\nauthorization: Bearer other", 401, "invalid_api_key"),
        ("GET /v1/models/other HTTP/1.1\r\nauthorization: Bearer secret", 404, "model_not_found"),
        ("GET /v1/nothing HTTP/1.1", 404, "NOT_FOUND"),
        ("PUT /v1/chat/completions HTTP/1.1", 405, "NOT_FOUND"),
    ] {
        let answer = call(&cluster, head, b"").await;
        assert_eq!((answer.status, answer.error()["code"].as_str()), (status, Some(code)), "{head}");
    }
    let listed = call(&cluster, "GET /v1/models HTTP/1.1\r\nauthorization: Bearer secret", b"").await;
    assert_eq!(listed.status, 200, "{}", listed.body);
}

#[tokio::test]
async fn a_stream_that_is_cut_says_so_and_is_not_done() {
    let mut cluster = Cluster::start().await;
    let body = r#"{"messages": [{"role": "user", "content": "x"}], "stream": true}"#;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close";
    let mut stream = TcpStream::connect(cluster.http_address).await.unwrap();
    stream.write_all(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    let mut session = cluster.session().await;
    session.text(0, "a").await;
    let mut bytes = Vec::new();
    while !String::from_utf8_lossy(&bytes).contains(r#""content":"a""#) {
        assert_ne!(in_time(stream.read_buf(&mut bytes)).await.unwrap(), 0);
    }
    session.fail(tonic::Status::unavailable("gone")).await;
    in_time(stream.read_to_end(&mut bytes)).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.contains("text/event-stream"), "{text}");
    assert!(text.contains(r#"data: {"error":{"message":"#) && !text.contains("[DONE]"), "{text}");
}

#[tokio::test]
async fn a_drain_refuses_in_the_protocols_shape() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let running = tokio::spawn(async move { client.generate(super::life::generate("x")).await });
    let mut session = cluster.session().await;
    cluster.shutdown.start();
    cluster.wait_for_health(false).await;
    let answer = chat(&cluster, r#"{"messages": [{"role": "user", "content": "x"}]}"#).await;
    assert_eq!((answer.status, answer.error()["code"].as_str()), (503, Some("DRAINING")));
    assert!(answer.head.contains("retry-after: 1"), "{}", answer.head);
    session.finish(0, lockstep_proto::worker::v1::FinishReason::Length, None).await;
    let _ = in_time(running).await;
}

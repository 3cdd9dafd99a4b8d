//! The fronts for HTTP: each path speaks its front's language, even where no handler sees the request.

use std::net::SocketAddr;

use lockstep_gateway::admission::ApiKey;
use lockstep_proto::worker::v1::{FinishReason as WorkerReason, Logprob, TokenLogprobs};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::Status;

use super::{
    cluster::{Cluster, Setup, in_time},
    fake_worker::FakeWorker,
};

/// Sends a request.
async fn send(address: SocketAddr, line: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all((head + body).as_bytes()).await.unwrap();
    stream
}

/// Asks and reads to the end: the head, and the body.
async fn ask_all(address: SocketAddr, line: &str, body: &str) -> (String, String) {
    let mut stream = send(address, line, body).await;
    let mut text = String::new();
    in_time(stream.read_to_string(&mut text)).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// The same: the status, and the body.
async fn ask(address: SocketAddr, line: &str, body: &str) -> (u16, String) {
    let (head, body) = ask_all(address, line, body).await;
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body)
}

const GENERATE: &str = r#"{"inputs": "x", "parameters": {"max_new_tokens": 9}}"#;

#[tokio::test]
async fn what_is_not_there_is_refused_in_the_language_of_its_path() {
    let cluster = Cluster::start().await;
    for (line, status, beginning) in [
        ("GET /v1/nothing", 404, r#"{"error":{"message":"there is no /v1/nothing here""#),
        ("GET /v1/completions", 405, r#"{"error":{"message":"there is no GET /v1/completions here""#),
        ("GET /v1/models/%ff", 404, "{\"error\":{\"message\":\"no model `\u{fffd}` is served\""),
        ("GET /nothing", 404, r#"{"error":"there is no /nothing here","error_type":"request"}"#),
        ("GET /generate", 405, r#"{"error":"there is no GET /generate here","error_type":"request"}"#),
    ] {
        let (found, body) = ask(cluster.http_address, line, "").await;
        assert!(found == status && body.starts_with(beginning), "{line}: {found} {body}");
    }
}

#[tokio::test]
async fn health_follows_the_groups_and_a_drain_refuses_in_the_language_of_the_path() {
    let groups = |_: usize, worker: &FakeWorker| worker.status.send_modify(|status| status.ready = false);
    let mut cluster = Cluster::with_unready(Setup { groups, ..Setup::default() }).await;
    let unhealthy = (503, r#"{"error":"unhealthy","error_type":"healthcheck"}"#.to_owned());
    assert_eq!(ask(cluster.http_address, "GET /health", "").await, unhealthy);
    let (status, body) = ask(cluster.http_address, "POST /generate", GENERATE).await;
    assert!(status == 424 && body.contains(r#""error_type":"generation""#), "{status} {body}");
    cluster.groups[0].worker.status.send_modify(|status| status.ready = true);
    cluster.wait_for_health(true).await;
    assert_eq!(ask(cluster.http_address, "GET /health", "").await, (200, String::new()));

    let running = tokio::spawn(ask(cluster.http_address, "POST /generate", GENERATE));
    let mut session = cluster.session().await;
    cluster.shutdown.start();
    let (status, body) = ask(cluster.http_address, "POST /generate", GENERATE).await;
    assert!(status == 503 && body.contains(r#""error_type":"overloaded""#), "{status} {body}");
    let (status, body) = ask(cluster.http_address, "POST /v1/completions", "{}").await;
    assert!(status == 503 && body.contains(r#""code":"DRAINING""#), "{status} {body}");
    session.text(0, "a").await;
    session.finish(0, WorkerReason::Length, None).await;
    assert_eq!(running.await.unwrap().0, 200, "what runs may end");
}

#[tokio::test]
async fn the_document_needs_no_key_and_says_where_one_is_needed() {
    let settings = |settings: &mut lockstep_gateway::config::GatewaySettings| {
        settings.api_keys = vec![ApiKey::new("sesame").unwrap()];
    };
    for (setup, keyed) in [(Setup::default(), false), (Setup { settings, ..Setup::default() }, true)] {
        let cluster = Cluster::with(setup).await;
        let (head, body) = ask_all(cluster.http_address, "GET /openapi.json", "").await;
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("content-type: application/json"), "{head}");
        assert!(body.starts_with(r#"{"openapi":"3.1.0""#) && body.contains(r#""bearer""#) == keyed, "{body}");
        let (head, _) = ask_all(cluster.http_address, "POST /openapi.json", "").await;
        assert!(head.starts_with("HTTP/1.1 405") && head.contains("allow: GET,HEAD"), "{head}");
        let (head, _) = ask_all(cluster.http_address, "GET /v1/models", "").await;
        assert_eq!(head.contains("www-authenticate: Bearer"), keyed, "{head}");
    }
}

#[tokio::test]
async fn health_needs_no_key_and_the_model_does() {
    let settings = |settings: &mut lockstep_gateway::config::GatewaySettings| {
        settings.api_keys = vec![ApiKey::new("sesame").unwrap()];
    };
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    assert_eq!(ask(cluster.http_address, "GET /health", "").await.0, 200);
    for (line, body) in [("GET /info", ""), ("POST /generate", GENERATE)] {
        assert_eq!(ask(cluster.http_address, line, body).await.0, 401, "{line}");
    }
}

#[tokio::test]
async fn a_stream_of_tokens_that_is_cut_ends_with_an_error() {
    let mut cluster = Cluster::start().await;
    let mut stream = send(cluster.http_address, "POST /generate_stream", GENERATE).await;
    let mut session = cluster.session().await;
    assert_eq!(session.request.logprobs, Some(0), "each token has its log-probability");
    let logprobs = |token_id| TokenLogprobs { token: Some(Logprob { token_id, logprob: -0.5 }), top: Vec::new() };
    session.ids_with(0, &[97, 98], vec![logprobs(97), logprobs(98)]).await;
    let mut body = String::new();
    in_time(async {
        while !body.contains("\"index\":1") {
            let mut bytes = [0; 1024];
            let n_bytes = stream.read(&mut bytes).await.unwrap();
            assert!(n_bytes > 0, "{body}");
            body.push_str(std::str::from_utf8(&bytes[..n_bytes]).unwrap());
        }
    })
    .await;
    session.fail(Status::internal("broken")).await;
    in_time(stream.read_to_string(&mut body)).await.unwrap();
    let token = |index, id, text| {
        let token = format!(r#"{{"id":{id},"text":"{text}","logprob":-0.5,"special":false}}"#);
        format!(r#"data: {{"index":{index},"token":{token},"generated_text":null,"details":null}}"#)
    };
    assert!(body.starts_with("HTTP/1.1 200") && body.contains(&token(1, 97, "a")), "{body}");
    assert!(body.contains(&token(2, 98, "b")), "{body}");
    let last = body.split("data: ").last().unwrap();
    assert!(last.contains("broken") && last.contains(r#""error_type":"incomplete_generation""#), "{last}");
}

#[tokio::test]
async fn a_whole_answer_is_wrapped_at_the_root_alone() {
    let mut cluster = Cluster::start().await;
    for (line, expected) in
        [("POST /", r#"[{"generated_text":"xab"}]"#), ("POST /generate", r#"{"generated_text":"ab"}"#)]
    {
        let call = tokio::spawn(ask(cluster.http_address, line, GENERATE));
        let mut session = cluster.session().await;
        assert_eq!(session.request.logprobs, None, "nothing shows them");
        session.text(0, "ab").await;
        session.finish(0, WorkerReason::Length, None).await;
        assert_eq!(call.await.unwrap(), (200, expected.to_owned()));
    }
}

//! Logs: one request is found by its id in every service, and nobody's text in any.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lockstep_proto::v1::{ChatRequest, ContentPart, Conversation, Message, Role, SamplingParams, content_part::Part};
use lockstep_tests::cluster::{Cluster, PATIENCE};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Text that nothing but a prompt would put into a log.
const PROMPT: &str = "Marmalade xylophones";

#[tokio::test]
async fn a_request_is_logged_by_its_id_and_without_its_text() -> Result<()> {
    // Followers name requests at level debug.
    let cluster =
        Cluster::builder().world_size(2).worker_arg("--log.filter=info,lockstep_worker=debug").start().await?;
    let mut probe = TcpStream::connect(cluster.gateway.http().context("no HTTP")?).await?;
    probe.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    probe.read_to_string(&mut answer).await?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let part = ContentPart { part: Some(Part::Text(PROMPT.into())) };
    let message = Message { role: Role::User.into(), content: vec![part], ..Message::default() };
    let request = ChatRequest {
        conversation: Some(Conversation { messages: vec![message], ..Conversation::default() }),
        sampling: Some(SamplingParams { max_new_tokens: Some(16), ..SamplingParams::default() }),
        ..ChatRequest::default()
    };
    let response = cluster.inference().await?.chat(request).await?.into_inner();
    let id = response.start.context("a start")?.request_id;
    let answer = response.choices.into_iter().next().and_then(|choice| choice.message).context("an answer")?;
    let Some(Part::Text(answer)) = answer.content.into_iter().find_map(|part| part.part) else {
        anyhow::bail!("no text");
    };

    let services = [&cluster.gateway, &cluster.tokenizer, &cluster.groups[0][0], &cluster.groups[0][1]];
    let deadline = Instant::now() + PATIENCE;
    while !services.iter().all(|service| service.log().contains(&id)) {
        let logs: String = services.iter().map(|service| service.log()).collect();
        assert!(Instant::now() < deadline, "{id} is not in all of:{logs}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for service in services {
        let log = service.log();
        assert!(!log.contains(PROMPT) && !log.contains(&answer), "text in:{log}");
    }
    // The gateway has asked for the tokenizer's facts before it was ready, and does so every few seconds.
    let log = cluster.tokenizer.log();
    assert!(!log.contains("GetTokenizer"), "a probe in:{log}");
    let log = cluster.gateway.log();
    assert!(!log.contains("/health"), "a probe in:{log}");
    cluster.stop().await
}

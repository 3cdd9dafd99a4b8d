//! The page's files and the state of the cluster, as HTTP carries them.

use lockstep_gateway::admission::ApiKey;
use lockstep_proto::worker::v1::{RankState, RankStatus};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{
    cluster::{Cluster, Setup, in_time},
    fake_worker::FakeWorker,
};

/// Status, head and body of the answer to a request of this head.
async fn call(cluster: &Cluster, head: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(cluster.http_address).await.unwrap();
    stream.write_all(format!("{head}\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    in_time(stream.read_to_string(&mut text)).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_owned(), body.to_owned())
}

/// What `/cluster` says, to a caller with the key `sesame`.
async fn state(cluster: &Cluster) -> Value {
    let (status, _, body) = call(cluster, "GET /cluster HTTP/1.1\r\nauthorization: Bearer sesame").await;
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

fn with_key() -> Setup {
    Setup { settings: |settings| settings.api_keys = vec![ApiKey::new("sesame").unwrap()], ..Setup::default() }
}

#[tokio::test]
async fn files_need_no_key_and_run_nothing_but_themselves() {
    let cluster = Cluster::with(with_key()).await;
    for (path, content_type, part) in [
        ("/", "text/html; charset=utf-8", "<title>Lockstep</title>"),
        ("/page/style.css", "text/css; charset=utf-8", ":root"),
        ("/page/app.js", "text/javascript; charset=utf-8", "watchCluster"),
        ("/page/cluster.js", "text/javascript; charset=utf-8", "watchCluster"),
        ("/page/icon.svg", "image/svg+xml", "<svg"),
    ] {
        let (status, head, body) = call(&cluster, &format!("GET {path} HTTP/1.1")).await;
        assert!(status == 200 && body.contains(part), "{path}: {status} {body}");
        for line in [
            &format!("content-type: {content_type}"),
            "cache-control: no-cache",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
        ] {
            assert!(head.contains(line), "{path}: {line} in {head}");
        }
        let policy = head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
        assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");

        let tag = head.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap();
        let (status, _, body) = call(&cluster, &format!("GET {path} HTTP/1.1\r\nif-none-match: {tag}")).await;
        assert_eq!((status, body.as_str()), (304, ""), "{path}");
        let (status, _, _) = call(&cluster, &format!("GET {path} HTTP/1.1\r\nif-none-match: \"other\"")).await;
        assert_eq!(status, 200, "{path}");
    }
    assert_eq!(call(&cluster, "GET /page/other HTTP/1.1").await.0, 404);
    assert_eq!(call(&cluster, "POST /page/app.js HTTP/1.1").await.0, 405);
}

#[tokio::test]
async fn the_state_needs_a_key() {
    let cluster = Cluster::with(with_key()).await;
    for head in ["GET /cluster HTTP/1.1", "GET /cluster HTTP/1.1\r\nauthorization: Bearer other"] {
        let (status, _, body) = call(&cluster, head).await;
        assert!(status == 401 && body.contains(r#""code":"invalid_api_key""#), "{status} {body}");
    }
}

#[tokio::test]
async fn the_state_is_what_groups_report() {
    let groups = |_: usize, worker: &FakeWorker| {
        worker.status.send_modify(|status| {
            let rank = |rank, state: RankState, silent_s| RankStatus { rank, state: state.into(), silent_s };
            status.device = "cpu".into();
            status.world_size = 3;
            status.ranks = vec![
                rank(0, RankState::Joined, Some(0)),
                rank(1, RankState::Waiting, Some(0)),
                rank(2, RankState::Missing, None),
            ];
            (status.running_sequences, status.waiting_sequences, status.outstanding_tokens) = (2, 1, 300);
            (status.total_blocks, status.free_blocks, status.cached_blocks, status.block_size) = (64, 50, 4, 16);
            (status.decode_step_ms, status.generated_tokens) = (Some(12.5), 77);
        });
    };
    let mut cluster = Cluster::with(Setup { groups, ..with_key() }).await;
    let found = state(&cluster).await;
    assert_eq!(found["version"], env!("CARGO_PKG_VERSION"));
    let group = &found["groups"][0];
    assert!(group["address"].as_str().unwrap().starts_with("127.0.0.1:"), "{group}");
    assert_eq!(
        [&group["state"], &group["breaker"], &group["own_tokens"]],
        [&json!("ready"), &json!("closed"), &json!(0)]
    );
    let expected = json!({
        "model": "m", "model_digest": "d1", "engine_version": "v1", "device": "cpu", "epoch": 1, "world_size": 3,
        "waiting_sequences": 1, "running_sequences": 2, "outstanding_tokens": 300,
        "decode_step_ms": 12.5, "generated_tokens": 77,
        "kv_blocks": { "total": 64, "free": 50, "cached": 4, "size": 16 },
        "ranks": [
            { "rank": 0, "state": "joined", "silent_s": 0 },
            { "rank": 1, "state": "waiting", "silent_s": 0 },
            { "rank": 2, "state": "missing", "silent_s": null },
        ],
    });
    assert_eq!(group["report"], expected);

    let body = r#"{"inputs": "x", "parameters": {"max_new_tokens": 9}}"#;
    let head = format!("POST /generate HTTP/1.1\r\nauthorization: Bearer sesame\r\ncontent-length: {}", body.len());
    let mut stream = TcpStream::connect(cluster.http_address).await.unwrap();
    stream.write_all(format!("{head}\r\nhost: x\r\n\r\n{body}").as_bytes()).await.unwrap();
    let _session = cluster.session().await;
    assert_eq!(state(&cluster).await["groups"][0]["own_tokens"], 11, "the prompt's two and nine more");
}

#[tokio::test]
async fn what_is_wrong_with_a_group_is_a_word() {
    let cluster = Cluster::with(with_key()).await;
    let worker = &cluster.groups[0].worker;
    let comes_to = async |wanted: &str| {
        in_time(async {
            while state(&cluster).await["groups"][0]["state"] != wanted {
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    worker.status.send_modify(|status| status.ready = false);
    comes_to("forming").await;
    worker.status.send_modify(|status| status.draining = true);
    comes_to("draining").await;
    cluster.groups[0].kill();
    comes_to("lost").await;
    assert_eq!(state(&cluster).await["groups"][0]["report"]["model"], "m", "what it was is still known");
}

#[tokio::test]
async fn a_group_that_never_reported_is_unknown() {
    let settings = |settings: &mut lockstep_gateway::config::GatewaySettings| {
        settings.groups.push("127.0.0.1:1".into());
    };
    let cluster = Cluster::with(Setup { settings, ..Setup::default() }).await;
    let group = &state(&cluster).await["groups"][1];
    assert_eq!(
        [&group["address"], &group["state"], &group["report"]],
        [&json!("127.0.0.1:1"), &json!("unknown"), &Value::Null]
    );
}

//! The service over a real socket: what it answers, and how it refuses.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::{path::Path, sync::Arc};

use lockstep_proto::{
    client::{ClientLimits, connect_lazy},
    error::{Error, Reason},
    server::{Limits, Readiness, Server, ServerSettings, Shutdown},
    telemetry,
    tokenizer::v1::{
        DecodeRequest, EncodeInput, EncodeRequest, GetTokenizerRequest, GetVocabularyRequest, TokenIds,
        tokenizer_service_client::TokenizerServiceClient, tokenizer_service_server::TokenizerServiceServer,
    },
};
use lockstep_tokenizer_svc::{
    catalog::Catalog,
    config::{ModelEntry, WorkLimits},
    metrics::Metrics,
    service::TokenizerServer,
};
use tokio::task::JoinHandle;
use tonic::{Status, service::Routes, transport::Channel};

/// A running service with the demo model, called `a` and `b`.
struct Running {
    client: TokenizerServiceClient<Channel>,
    shutdown: Shutdown,
    server: JoinHandle<()>,
}

impl Running {
    async fn start(names: &[&str]) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/SmolLM2-135M-Instruct.Q4_1.gguf");
        let path = path.to_str().unwrap();
        let entries: Vec<_> = names.iter().map(|name| ModelEntry { name: (*name).into(), path: path.into() }).collect();
        let mut registry = telemetry::registry("tokenizer-svc");
        let metrics = Metrics::register(&mut registry);
        let service = TokenizerServer::new(Catalog::open(&entries).unwrap(), WorkLimits::default(), metrics);
        let settings = ServerSettings {
            service: "tokenizer-svc",
            listen: "127.0.0.1:0".parse().unwrap(),
            metrics_listen: None,
            limits: Limits::default(),
        };
        let server = Server::bind(settings, Arc::new(registry)).unwrap();
        let address = format!("http://{}", server.grpc_address());
        let client = TokenizerServiceClient::new(connect_lazy(&address, &ClientLimits::default()).unwrap())
            .max_decoding_message_size(ClientLimits::default().max_message_bytes());
        let max_bytes = Limits::default().max_message_bytes();
        let routes = Routes::new(TokenizerServiceServer::new(service).max_decoding_message_size(max_bytes));
        let shutdown = Shutdown::new();
        let stop = shutdown.clone();
        let server = tokio::spawn(async move { server.serve(routes, &Readiness::new(), &stop).await.unwrap() });
        Self { client, shutdown, server }
    }

    async fn stop(self) {
        drop(self.client);
        self.shutdown.start();
        self.server.await.unwrap();
    }

    async fn encode(&mut self, inputs: Vec<EncodeInput>) -> Result<Vec<Vec<u32>>, Status> {
        let request = EncodeRequest { model: String::new(), inputs };
        let answer = self.client.encode(request).await?.into_inner();
        Ok(answer.outputs.into_iter().map(|output| output.ids).collect())
    }
}

fn text(text: &str) -> EncodeInput {
    EncodeInput { text: text.into(), ..EncodeInput::default() }
}

/// The reason and the field path of a refusal.
fn check<T: std::fmt::Debug>(answer: Result<T, Status>, reason: Reason, path: &str) {
    let error = Error::from_status(&answer.unwrap_err());
    assert_eq!(error.reason(), reason, "{error}");
    let paths: Vec<_> = error.field_violations().iter().map(|violation| violation.path.as_str()).collect();
    assert_eq!(paths, if path.is_empty() { vec![] } else { vec![path] }, "{error}");
}

#[tokio::test]
async fn a_conversation_is_encoded_with_its_content_as_text() {
    let mut service = Running::start(&["a"]).await;
    let described = service.client.get_tokenizer(GetTokenizerRequest::default()).await.unwrap().into_inner();
    assert_eq!((described.model.as_str(), described.vocab_size, described.eos_token_id), ("a", 49152, Some(2)));
    assert_eq!((described.fingerprint.len(), described.special_tokens.len()), (64, 17));

    let prompt = "<|im_start|>user\n<|im_end|><|im_end|>\n";
    let content = EncodeInput { break_offsets: vec![18], ..text(prompt) };
    let outputs = service.encode(vec![text(prompt), content]).await.unwrap();
    let count = |ids: &[u32]| ids.iter().filter(|&&id| id == 2).count();
    assert_eq!((count(&outputs[0]), count(&outputs[1])), (2, 1));

    let inputs = outputs.into_iter().map(|ids| TokenIds { ids }).collect();
    let request = DecodeRequest { inputs, ..DecodeRequest::default() };
    let decoded = service.client.decode(request).await.unwrap().into_inner().outputs;
    assert!(decoded.iter().all(|each| each.text == prompt && each.raw == prompt.as_bytes()));
    service.stop().await;
}

#[tokio::test]
async fn a_vocabulary_says_what_each_id_stands_for() {
    let mut service = Running::start(&["a"]).await;
    let described = service.client.get_tokenizer(GetTokenizerRequest::default()).await.unwrap().into_inner();
    let vocabulary = service.client.get_vocabulary(GetVocabularyRequest::default()).await.unwrap().into_inner();
    assert_eq!(vocabulary.fingerprint, described.fingerprint);
    assert_eq!(vocabulary.ends.len(), described.vocab_size as usize);
    assert!(!vocabulary.strips_leading_space);

    let text_of = "a rocket 🚀 of naïve 中文";
    let ids = service.encode(vec![text(text_of)]).await.unwrap().remove(0);
    let bytes_of = |id: u32| {
        let end = |id: usize| vocabulary.ends[id] as usize;
        let from = (id as usize).checked_sub(1).map_or(0, end);
        &vocabulary.raw[from..end(id as usize)]
    };
    let raw: Vec<u8> = ids.iter().flat_map(|&id| bytes_of(id)).copied().collect();
    assert_eq!(raw, text_of.as_bytes());
    let marker = &described.special_tokens[0];
    assert_eq!(bytes_of(marker.id), marker.text.as_bytes());
    service.stop().await;
}

#[tokio::test]
async fn requests_that_break_the_contract_are_refused_by_field() {
    let mut service = Running::start(&["a"]).await;
    let invalid = Reason::InvalidArgument;
    check(service.encode(vec![]).await, invalid, "inputs");
    check(service.encode(vec![text(""); 1025]).await, invalid, "inputs");
    check(service.encode(vec![text("a"), text(&"x".repeat((4 << 20) + 1))]).await, invalid, "inputs[1].text");
    check(service.encode(vec![text(&" ".repeat(1 << 20))]).await, invalid, "inputs[0].text");
    let offsets = |break_offsets| EncodeInput { break_offsets, ..text("abc") };
    check(service.encode(vec![offsets(vec![4])]).await, invalid, "inputs[0].break_offsets[0]");
    check(service.encode(vec![offsets(vec![2, 1])]).await, invalid, "inputs[0].break_offsets[1]");
    let decode = |inputs| DecodeRequest { inputs, ..DecodeRequest::default() };
    check(service.client.decode(decode(vec![])).await, invalid, "inputs");
    let list = TokenIds { ids: vec![1, 49152] };
    check(service.client.decode(decode(vec![list])).await, invalid, "inputs[0].ids[1]");
    service.stop().await;
}

#[tokio::test]
async fn an_empty_name_means_the_only_model() {
    let mut service = Running::start(&["a", "b"]).await;
    check(service.encode(vec![text("x")]).await, Reason::ModelNotFound, "");
    let named = |model: &str| GetTokenizerRequest { model: model.into() };
    check(service.client.get_tokenizer(named("c")).await, Reason::ModelNotFound, "");
    assert_eq!(service.client.get_tokenizer(named("b")).await.unwrap().into_inner().model, "b");
    service.stop().await;
}

#[tokio::test]
async fn a_text_as_long_as_allowed_is_encoded() {
    let mut service = Running::start(&["a"]).await;
    let ids = service.encode(vec![text(&"a".repeat(4 << 20))]).await.unwrap().remove(0);
    assert_eq!(ids.len(), 1 << 20, "`aaaa` is one token");
    service.stop().await;
}

#[tokio::test]
async fn ids_may_stand_for_so_many_bytes_and_no_more() {
    const MAX_DECODED_BYTES: usize = 32 << 20;
    let mut service = Running::start(&["a"]).await;
    // The bytes, and text of as many.
    service.client = service.client.clone().max_decoding_message_size(2 * MAX_DECODED_BYTES + (1 << 20));
    let decode = |inputs: Vec<Vec<u32>>| {
        let inputs = inputs.into_iter().map(|ids| TokenIds { ids }).collect();
        DecodeRequest { inputs, ..DecodeRequest::default() }
    };
    let singles = (0..4096).map(|id| vec![id]).collect();
    let singles = service.client.decode(decode(singles)).await.unwrap().into_inner().outputs;
    let (longest, n_bytes) = (0..).zip(singles.iter().map(|each| each.raw.len())).max_by_key(|each| each.1).unwrap();
    let one_byte = (0..).zip(&singles).find(|(_, each)| each.raw.len() == 1).unwrap().0;
    let mut ids = vec![longest; MAX_DECODED_BYTES / n_bytes];
    ids.extend(vec![one_byte; MAX_DECODED_BYTES % n_bytes]);
    let outputs = service.client.decode(decode(vec![ids.clone()])).await.unwrap().into_inner().outputs;
    assert_eq!(outputs[0].raw.len(), MAX_DECODED_BYTES);
    check(service.client.decode(decode(vec![ids, vec![one_byte]])).await, Reason::InvalidArgument, "inputs");
    service.stop().await;
}

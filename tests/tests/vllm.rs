//! The interface for routers that speak to vLLM, on the real worker: by the client that the contract generates.

use std::{
    collections::HashMap,
    io::Read as _,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::Encoding;
use lockstep_proto::{
    client::with_deadline,
    error::{Error, Reason},
    smg::grpc::common::{
        FlushCacheRequest, GetTokenizerRequest, KvEventBatch, StartProfileRequest, StopProfileRequest,
        SubscribeKvEventsRequest, kv_cache_event::Data,
    },
    vllm::grpc::engine::{
        AbortRequest, ChoiceConstraint, EmbedRequest, GenerateComplete, GenerateRequest, GenerateStreamChunk,
        GetLoadsRequest, GetModelInfoRequest, GetServerInfoRequest, HealthCheckRequest, SamplingParams, TokenizedInput,
        generate_complete::MatchedStop, generate_request::Input, generate_response::Response,
        sampling_params::Constraint, vllm_engine_client::VllmEngineClient,
    },
    worker::v1::{self as worker, Pooling, ResolvedSampling, generate_response::Event},
};
use lockstep_tests::{
    cluster::{Cluster, PATIENCE},
    tiny_model::{Container, TinyModel},
};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming, transport::Channel};

type Client = VllmEngineClient<Channel>;

/// What came of a request, choice by choice.
#[derive(Debug, Default)]
struct Answer {
    chunks: Vec<GenerateStreamChunk>,
    completes: Vec<GenerateComplete>,
}

/// "The capital of France is", as SmolLM2 has it.
const FRANCE: [u32; 5] = [504, 3575, 282, 4649, 314];
const BLOCK_SIZE: usize = 16;

async fn tiny_cluster(world_size: usize) -> Result<(tempfile::TempDir, Cluster)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tiny.gguf");
    TinyModel::default().write(&path)?;
    let cluster = Cluster::builder().model(path).world_size(world_size).worker_arg("--engine.kv-cache-tokens=256");
    Ok((folder, cluster.start().await?))
}

async fn client(cluster: &Cluster, group: usize) -> Result<Client> {
    Ok(VllmEngineClient::new(cluster.groups[group][0].channel().await?))
}

fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams { temperature: Some(0.0), max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

fn endless() -> SamplingParams {
    SamplingParams { max_tokens: None, ignore_eos: true, ..greedy(0) }
}

fn request(id: &str, prompt: &[u32], params: SamplingParams) -> GenerateRequest {
    let tokenized = TokenizedInput { input_ids: prompt.to_vec(), ..TokenizedInput::default() };
    let input = Some(Input::Tokenized(tokenized));
    GenerateRequest { request_id: id.into(), input, sampling_params: Some(params), ..GenerateRequest::default() }
}

fn streamed(request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { stream: true, ..request }
}

async fn ask(client: &mut Client, request: GenerateRequest) -> Result<Answer, Status> {
    let mut responses = client.generate(request).await?.into_inner();
    let mut answer = Answer::default();
    while let Some(response) = responses.next().await {
        match response?.response {
            Some(Response::Chunk(chunk)) => answer.chunks.push(chunk),
            Some(Response::Complete(complete)) => answer.completes.push(complete),
            None => panic!("an empty message"),
        }
    }
    answer.completes.sort_by_key(|complete| complete.index);
    Ok(answer)
}

/// The one choice of a request that does not stream.
async fn complete(client: &mut Client, prompt: &[u32], params: SamplingParams) -> Result<GenerateComplete> {
    let mut answer = ask(client, request("one", prompt, params)).await?;
    ensure!(answer.chunks.is_empty() && answer.completes.len() == 1, "{answer:?}");
    answer.completes.pop().context("one")
}

/// The same by our own interface, by the most likely tokens: the ids, and those of the prompt that were cached.
async fn by_our_own(cluster: &Cluster, prompt: &[u32], max_new_tokens: u32) -> Result<(Vec<u32>, u32)> {
    let sampling = ResolvedSampling {
        max_new_tokens,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..ResolvedSampling::default()
    };
    let request = worker::GenerateRequest {
        request_id: "own".into(),
        prompt_token_ids: prompt.to_vec(),
        sampling: Some(sampling),
        n: 1,
        ..worker::GenerateRequest::default()
    };
    let mut events = cluster.leader(0).await?.generate(request).await?.into_inner();
    let (mut ids, mut cached) = (Vec::new(), 0);
    while let Some(event) = events.next().await {
        match event?.event {
            Some(Event::Started(started)) => cached = started.cached_tokens,
            Some(Event::Tokens(tokens)) => ids.extend(tokens.token_ids),
            _ => {}
        }
    }
    Ok((ids, cached))
}

/// Waits until a group computes nothing, and all of its blocks can be had.
async fn wait_idle(cluster: &Cluster, group: usize) -> Result<()> {
    let idle = |status: &worker::Status| {
        let available = status.free_blocks + status.cached_blocks;
        status.running_sequences + status.waiting_sequences == 0 && available == status.total_blocks
    };
    cluster.wait_for_status(group, idle).await.map(drop)
}

#[tokio::test]
async fn a_generation_is_that_of_our_own_interface() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = client(&cluster, 0).await?;
    let (ids, _) = by_our_own(&cluster, &FRANCE, 12).await?;
    let whole = complete(&mut client, &FRANCE, greedy(12)).await?;
    assert_eq!(whole.output_ids, ids);
    assert_eq!((whole.finish_reason.as_str(), whole.matched_stop), ("length", None));
    assert_eq!((whole.prompt_tokens, whole.completion_tokens, whole.cached_tokens), (5, 12, 0));

    let mut answer = ask(&mut client, streamed(request("s", &FRANCE, greedy(12)))).await?;
    let chunked: Vec<u32> = answer.chunks.iter().flat_map(|chunk| chunk.token_ids.clone()).collect();
    assert_eq!(chunked, ids);
    assert!(answer.chunks.iter().all(|chunk| chunk.prompt_tokens == 5 && chunk.completion_tokens == 1));
    let end = answer.completes.pop().context("an end")?;
    assert_eq!((end.output_ids, end.finish_reason.as_str()), (ids.clone(), "length"));

    // An id of the request's own that ends it; the model's own, which does so unless it is told not to.
    let stop = SamplingParams { stop_token_ids: vec![ids[3]], ..greedy(12) };
    let stopped = complete(&mut client, &FRANCE, stop.clone()).await?;
    let n_tokens = ids.iter().position(|id| *id == ids[3]).context("it is there")? + 1;
    assert_eq!(stopped.output_ids, ids[..n_tokens]);
    assert_eq!(stopped.matched_stop, Some(MatchedStop::MatchedTokenId(ids[3])));
    let later = complete(&mut client, &FRANCE, SamplingParams { min_tokens: 8, ..stop }).await?;
    assert!(later.output_ids.len() >= 8, "{later:?}");
    let turn = [1, 4093, 198, 19556, 2, 198, 1, 520, 9531, 198];
    let ended = complete(&mut client, &turn, greedy(200)).await?;
    assert_eq!((ended.finish_reason.as_str(), ended.matched_stop), ("stop", None));
    assert_eq!(ended.output_ids.last(), Some(&2), "<|im_end|>");
    let n_tokens = ended.output_ids.len() as u32 + 3;
    let on = complete(&mut client, &turn, SamplingParams { ignore_eos: true, ..greedy(n_tokens) }).await?;
    assert_eq!((on.finish_reason.as_str(), on.completion_tokens), ("length", n_tokens));
    cluster.stop().await
}

#[tokio::test]
async fn choices_stop_strings_and_log_probabilities() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = client(&cluster, 0).await?;
    // " Paris." comes first.
    let params = SamplingParams { stop: vec!["aris".into(), "never".into()], ..greedy(40) };
    let stopped = complete(&mut client, &FRANCE, params).await?;
    assert_eq!((stopped.output_ids.len(), stopped.finish_reason.as_str()), (1, "stop"));
    assert_eq!(stopped.matched_stop, Some(MatchedStop::MatchedStopStr("aris".into())));

    let params = SamplingParams { n: 3, temperature: Some(1.0), seed: Some(7), stop: vec!["e".into()], ..greedy(30) };
    let answer = ask(&mut client, streamed(request("n", &FRANCE, params.clone()))).await?;
    assert_eq!(answer.completes.iter().map(|complete| complete.index).collect::<Vec<_>>(), [0, 1, 2]);
    for end in &answer.completes {
        let chunks = answer.chunks.iter().filter(|chunk| chunk.index == end.index);
        assert_eq!(chunks.flat_map(|chunk| chunk.token_ids.clone()).collect::<Vec<_>>(), end.output_ids);
    }
    let again = ask(&mut client, request("n", &FRANCE, params)).await?;
    let ids = |answer: &Answer| answer.completes.iter().map(|end| end.output_ids.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&again), ids(&answer), "a seed gives the same tokens");
    wait_idle(&cluster, 0).await?;

    let params = SamplingParams { logprobs: Some(2), prompt_logprobs: Some(1), ..greedy(4) };
    let whole = complete(&mut client, &FRANCE, params.clone()).await?;
    let output = whole.output_logprobs.context("asked for")?;
    assert_eq!(output.token_ids, whole.output_ids);
    assert!(output.top_logprobs.iter().zip(&output.token_ids).all(|(top, id)| top.token_ids[0] == *id), "{output:?}");
    assert!(output.token_logprobs.iter().all(|logprob| *logprob <= 0.0) && output.top_logprobs[0].values.len() == 2);
    let input = whole.input_logprobs.context("asked for")?;
    assert_eq!(input.token_ids, FRANCE);
    let is_known: Vec<bool> = input.token_logprobs.iter().map(|logprob| logprob.value.is_some()).collect();
    assert_eq!(is_known, [false, true, true, true, true]);
    assert_eq!(input.top_logprobs.iter().map(|top| top.values.len()).collect::<Vec<_>>(), [0, 1, 1, 1, 1]);
    let answer = ask(&mut client, streamed(request("l", &FRANCE, params))).await?;
    assert_eq!(answer.chunks[0].input_logprobs, Some(input));
    assert!(answer.chunks[1..].iter().all(|chunk| chunk.input_logprobs.is_none()));
    let chunked =
        answer.chunks.iter().flat_map(|chunk| chunk.output_logprobs.clone().unwrap_or_default().token_logprobs);
    assert_eq!(chunked.collect::<Vec<_>>(), output.token_logprobs);
    cluster.stop().await
}

#[tokio::test]
async fn constraints_are_held() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = client(&cluster, 0).await?;
    let constrained = |constraint| SamplingParams { constraint: Some(constraint), ..greedy(60) };
    // " yes" and "yes" are tokens of their own: whichever it is, the answer is one of the texts and ends there.
    let choices = vec!["yes".to_owned(), "no".to_owned()];
    let params = constrained(Constraint::Choice(ChoiceConstraint { choices }));
    let chosen = complete(&mut client, &FRANCE, params).await?;
    assert_eq!(chosen.finish_reason, "stop");
    assert!(chosen.output_ids.len() <= 3, "{chosen:?}");
    let digits = complete(&mut client, &FRANCE, constrained(Constraint::Regex("[0-9]{3}".into()))).await?;
    // Digits are single tokens.
    assert_eq!((digits.finish_reason.as_str(), digits.output_ids.len()), ("stop", 3));
    let broken = complete(&mut client, &FRANCE, constrained(Constraint::Grammar("start: (".into()))).await;
    let error = broken.expect_err("no grammar");
    let error = Error::from_status(error.downcast_ref().context("a status")?);
    assert_eq!(error.reason(), Reason::InvalidArgument);
    assert_eq!(error.field_violations()[0].path, "sampling_params.grammar");
    cluster.stop().await
}

#[tokio::test]
async fn what_is_refused_is_refused_by_its_own_name() -> Result<()> {
    let (_folder, cluster) = tiny_cluster(1).await?;
    let mut client = client(&cluster, 0).await?;
    let mut refused = async |request: GenerateRequest| -> Result<(Vec<String>, String)> {
        let error = Error::from_status(&ask(&mut client, request).await.err().context("refused")?);
        ensure!(error.code() == tonic::Code::InvalidArgument, "{error:?}");
        let paths = error.field_violations().iter().map(|violation| violation.path.clone()).collect();
        Ok((paths, error.message().to_owned()))
    };
    let text = GenerateRequest { input: Some(Input::Text("Hi".into())), ..request("r", &[], greedy(1)) };
    assert_eq!(refused(text).await?.0, ["text"]);
    let (paths, message) = refused(request("r", &[], greedy(0))).await?;
    assert_eq!(paths, ["tokenized.input_ids", "sampling_params.max_tokens"]);
    assert_eq!(message, "tokenized.input_ids: is empty; sampling_params.max_tokens: must be at least 1");
    assert_eq!(refused(request("r", &[999], greedy(1))).await?.0, ["tokenized.input_ids[0]"]);
    assert_eq!(refused(request("", &[1], greedy(1))).await?.0, ["request_id"]);
    let many = SamplingParams { n: 129, top_p: 1.5, ..greedy(1) };
    assert_eq!(refused(request("r", &[1], many)).await?.0, ["sampling_params.n"]);
    let many = SamplingParams { top_p: 1.5, logprobs: Some(21), ..greedy(1) };
    let expected = ["sampling_params.logprobs", "sampling_params.top_p"];
    assert_eq!(refused(request("r", &[1], many)).await?.0, expected);
    let tag = SamplingParams { constraint: Some(Constraint::StructuralTag("{}".into())), ..greedy(1) };
    assert_eq!(refused(request("r", &[1], tag)).await?.0, ["sampling_params.structural_tag"]);
    // The engine's own refusals, too: the cache has 16 blocks.
    assert_eq!(refused(request("r", &[1; 300], greedy(1))).await?.0, ["tokenized.input_ids"]);

    let unimplemented = |status: Status| Error::from_status(&status).reason() == Reason::Unimplemented;
    assert!(client.flush_cache(FlushCacheRequest::default()).await.is_err_and(unimplemented));
    assert!(client.start_profile(StartProfileRequest::default()).await.is_err_and(unimplemented));
    assert!(client.stop_profile(StopProfileRequest {}).await.is_err_and(unimplemented));
    assert!(client.get_tokenizer(GetTokenizerRequest {}).await.is_err_and(unimplemented), "a GGUF file has none");
    let late = SubscribeKvEventsRequest { start_sequence_number: 9, ..SubscribeKvEventsRequest::default() };
    let error = Error::from_status(&client.subscribe_kv_events(late).await.err().context("refused")?);
    assert_eq!((error.reason(), error.code()), (Reason::NoHistory, tonic::Code::OutOfRange));
    cluster.stop().await
}

#[tokio::test]
async fn whatever_ends_a_request_frees_its_blocks() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = client(&cluster, 0).await?;
    let running = async |client: &mut Client, id: &str, n: u32| -> Result<Streaming<_>> {
        let params = SamplingParams { n, ..endless() };
        let mut responses = client.generate(streamed(request(id, &FRANCE, params))).await?.into_inner();
        responses.next().await.context("a token")??;
        Ok(responses)
    };
    // By its name; another one goes on.
    let mut other = running(&mut client, "other", 1).await?;
    let mut aborted = running(&mut client, "a", 2).await?;
    client.abort(AbortRequest { request_ids: vec!["a".into(), "never was".into()] }).await?;
    let mut ends = Vec::new();
    while let Some(response) = aborted.next().await {
        if let Some(Response::Complete(end)) = response?.response {
            ends.push((end.index, end.finish_reason));
        }
    }
    assert_eq!(ends, [(0, "abort".to_owned()), (1, "abort".to_owned())]);
    cluster.wait_for_status(0, |status| status.running_sequences == 1).await?;
    other.next().await.context("it goes on")??;
    // By going away.
    drop(other);
    wait_idle(&cluster, 0).await?;
    // By its deadline.
    let start = Instant::now();
    let late = with_deadline(streamed(request("late", &FRANCE, endless())), Duration::from_millis(1500));
    let mut responses = client.generate(late).await?.into_inner();
    let mut reason = String::new();
    while let Some(response) = responses.next().await {
        match response {
            Ok(response) => {
                if let Some(Response::Complete(end)) = response.response {
                    reason = end.finish_reason;
                }
            }
            // The client's own clock may be first.
            Err(status) => reason = format!("{:?}", status.code()),
        }
    }
    assert!(["abort", "DeadlineExceeded", "Cancelled"].contains(&reason.as_str()), "{reason}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    wait_idle(&cluster, 0).await?;
    cluster.stop().await
}

#[tokio::test]
async fn a_worker_says_what_it_is_and_how_busy() -> Result<()> {
    let (_folder, cluster) = tiny_cluster(1).await?;
    let mut client = client(&cluster, 0).await?;
    let health = client.health_check(HealthCheckRequest {}).await?.into_inner();
    assert!(health.healthy && health.message.is_empty(), "{health:?}");
    let model = client.get_model_info(GetModelInfoRequest {}).await?.into_inner();
    assert_eq!((model.served_model_name.as_str(), model.max_context_length, model.vocab_size), ("demo", 256, 384));
    assert_eq!((model.eos_token_ids, model.tokenizer_path.as_str()), (vec![2], ""));
    assert_eq!((model.architectures, model.max_req_input_len), (vec!["LlamaForCausalLM".to_owned()], 255));
    // A request that sets no limit gets as far as the cache does, which is not all of the context.
    let end = complete(&mut client, &[5; 200], endless()).await?;
    assert_eq!((end.finish_reason.as_str(), end.completion_tokens), ("length", 56));
    let server = client.get_server_info(GetServerInfoRequest {}).await?.into_inner();
    assert_eq!((server.block_size, server.max_num_seqs, server.data_parallel_size), (16, 64, 1));
    assert_eq!((server.kv_cache_dtype.as_str(), server.is_paused), ("f16", false));
    let loads = client.get_loads(GetLoadsRequest::default()).await?.into_inner();
    assert!(loads.timestamp.ends_with('Z') && loads.loads.len() == 1, "{loads:?}");
    assert_eq!((loads.loads[0].max_total_num_tokens, loads.loads[0].num_total_reqs), (256, 0));
    let other = GetLoadsRequest { dp_rank: Some(1), ..GetLoadsRequest::default() };
    assert!(client.get_loads(other).await?.into_inner().loads.is_empty());

    let embed = |prompt: &[u32]| {
        let tokenized = Some(TokenizedInput { input_ids: prompt.to_vec(), ..TokenizedInput::default() });
        EmbedRequest { request_id: "e".into(), tokenized }
    };
    let embedded = client.embed(embed(&[5, 6, 7])).await?.into_inner();
    let own = worker::EmbedRequest {
        request_id: "e".into(),
        prompt_token_ids: vec![5, 6, 7],
        pooling: Pooling::Mean.into(),
        budget_ms: None,
    };
    let values = cluster.leader(0).await?.embed(own).await?.into_inner().values;
    let length = values.iter().map(|value| value * value).sum::<f32>().sqrt();
    assert_eq!((embedded.prompt_tokens, embedded.embedding_dim as usize), (3, values.len()));
    let differences = embedded.embedding.iter().zip(&values).map(|(scaled, value)| (scaled - value / length).abs());
    assert!(differences.fold(0.0, f32::max) < 1e-5);
    let error = client.embed(embed(&[])).await.err().context("refused")?;
    assert_eq!(Error::from_status(&error).field_violations()[0].path, "tokenized.input_ids");
    cluster.stop().await
}

#[tokio::test]
async fn metrics_say_what_other_routers_want_to_know() -> Result<()> {
    let cluster = Cluster::builder().worker_arg("--engine.kv-cache-tokens=1024").start().await?;
    let mut client = client(&cluster, 0).await?;
    let worker = &cluster.groups[0][0];
    let metric = async |name: &str| worker.metric(&format!("lockstep_worker_{name} ")).await;
    assert_eq!((metric("kv_block_size").await?, metric("kv_blocks").await?), (16.0, 64.0));
    wait_idle(&cluster, 0).await?;
    assert_eq!((metric("running_sequences").await?, metric("kv_cache_usage").await?), (0.0, 0.0));
    let params = SamplingParams { n: 2, ..endless() };
    let mut responses = client.generate(streamed(request("m", &FRANCE, params))).await?.into_inner();
    responses.next().await.context("a token")??;
    let deadline = Instant::now() + PATIENCE;
    while metric("running_sequences").await? != 2.0 {
        ensure!(Instant::now() < deadline, "two never ran");
    }
    assert_eq!(metric("waiting_sequences").await?, 0.0);
    let usage = metric("kv_cache_usage").await?;
    assert!((2.0 / 64.0..=1.0).contains(&usage), "{usage}");
    let loads = client.get_loads(GetLoadsRequest::default()).await?.into_inner();
    assert_eq!((loads.loads[0].num_running_reqs, loads.loads[0].max_total_num_tokens), (2, 1024));
    assert!(loads.loads[0].token_usage > 0.0 && loads.loads[0].num_used_tokens > 0, "{loads:?}");
    drop(responses);
    wait_idle(&cluster, 0).await?;
    cluster.stop().await
}

#[tokio::test]
async fn the_tokenizer_is_that_of_the_folder() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tiny");
    let float = Encoding::F16;
    let model =
        TinyModel { container: Container::Folder, encoding: float, embedding_encoding: float, ..TinyModel::default() };
    model.write(&path)?;
    let cluster = Cluster::builder().model(&path).start().await?;
    let mut client = client(&cluster, 0).await?;
    let mut chunks = client.get_tokenizer(GetTokenizerRequest {}).await?.into_inner();
    let (mut bytes, mut digests) = (Vec::new(), Vec::new());
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        bytes.extend(chunk.data);
        digests.push(chunk.sha256);
    }
    let digest = digests.pop().context("a chunk")?;
    assert!(digest.len() == 64 && digests.iter().all(String::is_empty), "{digest}");
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes))?;
    let names = archive.file_names().map(|name| Ok(name?.into_owned()));
    let mut names: Vec<String> = names.collect::<zip::result::ZipResult<_>>()?;
    names.sort_unstable();
    assert_eq!(names, ["config.json", "tokenizer.json", "tokenizer_config.json"]);
    for name in names {
        let mut content = Vec::new();
        archive.by_name(&name)?.read_to_end(&mut content)?;
        assert_eq!(content, std::fs::read(path.join(&name))?, "{name}");
    }
    let info = client.get_model_info(GetModelInfoRequest {}).await?.into_inner();
    assert_eq!((info.tokenizer_path, info.eos_token_ids), (path.display().to_string(), vec![2]));
    cluster.stop().await
}

// === events of the prefix cache ===

/// What a router knows of a worker's prefix cache.
struct Router {
    batches: Streaming<KvEventBatch>,
    next: u64,
    /// By the block before, and the tokens.
    blocks: HashMap<(Option<i64>, Vec<u32>), i64>,
    n_removed: usize,
    n_cleared: usize,
}

impl Router {
    async fn subscribe(client: &mut Client) -> Result<Self> {
        let batches = client.subscribe_kv_events(SubscribeKvEventsRequest::default()).await?.into_inner();
        let mut router = Self { batches, next: 1, blocks: HashMap::new(), n_removed: 0, n_cleared: 0 };
        loop {
            let snapshot = router.learn().await?.context("a snapshot comes first")?;
            if snapshot.index + 1 == snapshot.count {
                ensure!(router.blocks.len() as u64 == snapshot.blocks && router.n_cleared == 1);
                return Ok(router);
            }
        }
    }

    /// Takes one batch in.
    async fn learn(&mut self) -> Result<Option<lockstep_proto::smg::grpc::common::KvSnapshotChunk>> {
        let batch = tokio::time::timeout(PATIENCE, self.batches.next()).await?.context("a batch")??;
        ensure!(batch.sequence_number == self.next && batch.dp_rank == Some(0), "{batch:?}");
        self.next += 1;
        for event in batch.events {
            match event.data.context("an event")? {
                Data::Stored(stored) => {
                    let mut parent = stored.parent_block_hash;
                    for block in stored.blocks {
                        ensure!(block.token_ids.len() == BLOCK_SIZE && block.block_size as usize == BLOCK_SIZE);
                        ensure!(self.blocks.insert((parent, block.token_ids), block.block_hash).is_none());
                        parent = Some(block.block_hash);
                    }
                }
                Data::Removed(removed) => {
                    let n_before = self.blocks.len();
                    self.blocks.retain(|_, hash| !removed.block_hashes.contains(hash));
                    ensure!(self.blocks.len() + removed.block_hashes.len() == n_before, "what was not there is gone");
                    self.n_removed += removed.block_hashes.len();
                }
                Data::Cleared(_) => {
                    self.blocks.clear();
                    self.n_cleared += 1;
                }
            }
        }
        Ok(batch.snapshot)
    }

    /// How many blocks of these tokens are held, from the first on.
    fn n_held(&self, tokens: &[u32]) -> usize {
        let mut parent = None;
        let held = tokens.chunks_exact(BLOCK_SIZE).take_while(|block| {
            parent = self.blocks.get(&(parent, block.to_vec())).copied();
            parent.is_some()
        });
        held.count()
    }

    /// Learns until all full blocks of these tokens are held.
    async fn learn_until_held(&mut self, tokens: &[u32]) -> Result<()> {
        while self.n_held(tokens) < tokens.len() / BLOCK_SIZE {
            self.learn().await?;
        }
        Ok(())
    }
}

/// Three texts with a common beginning; several of them do not fit into the cache together.
fn prompts() -> Vec<Vec<u32>> {
    let text = |document: u32, n_tokens: u32| {
        (0..n_tokens).map(|i| if i < 40 { 10 + i } else { 60 + (i * 7 + document * 31) % 300 }).collect()
    };
    [(0, 90), (1, 70), (0, 130), (2, 120), (1, 110), (0, 64), (2, 65), (1, 100), (2, 16), (0, 140)]
        .map(|(document, n_tokens)| text(document, n_tokens))
        .to_vec()
}

#[tokio::test]
async fn what_is_said_to_be_stored_is_a_cache_hit_and_nothing_else() -> Result<()> {
    let (_folder, cluster) = tiny_cluster(1).await?;
    let mut client = client(&cluster, 0).await?;
    let mut router = Router::subscribe(&mut client).await?;
    let mut n_hits = 0;
    for prompt in prompts() {
        // At least one token is computed.
        let predicted = router.n_held(&prompt[..prompt.len() - 1]) * BLOCK_SIZE;
        let end = complete(&mut client, &prompt, SamplingParams { ignore_eos: true, ..greedy(9) }).await?;
        assert_eq!(end.cached_tokens as usize, predicted, "of {} tokens", prompt.len());
        n_hits += usize::from(predicted > 0);
        // Whoever comes later learns the same.
        let later = Router::subscribe(&mut client).await?;
        while router.blocks != later.blocks {
            router.learn().await?;
        }
    }
    assert!(n_hits >= 4 && router.n_removed >= 8, "{n_hits} hits, {} removed", router.n_removed);
    cluster.stop().await
}

#[tokio::test]
async fn a_group_that_forms_anew_says_that_its_cache_is_empty() -> Result<()> {
    let (_folder, mut cluster) = tiny_cluster(2).await?;
    let mut client = client(&cluster, 0).await?;
    complete(&mut client, &prompts()[0], greedy(1)).await?;
    let mut router = Router::subscribe(&mut client).await?;
    assert_eq!(router.n_held(&prompts()[0]), 5);
    cluster.groups[0][1].kill().await?;
    while router.n_cleared < 2 {
        router.learn().await?;
    }
    assert!(router.blocks.is_empty());
    let health = client.health_check(HealthCheckRequest {}).await?.into_inner();
    assert_eq!((health.healthy, health.message.as_str()), (false, "the group is not together"));
    cluster.restart_follower(0, 1).await?;
    cluster.wait_for_status(0, |status| status.ready).await?;
    let end = complete(&mut client, &prompts()[0], greedy(1)).await?;
    assert_eq!(end.cached_tokens, 0);
    router.learn_until_held(&prompts()[0]).await?;
    cluster.stop().await
}

#[tokio::test]
async fn a_drain_takes_nothing_new_and_does_not_wait_for_those_who_listen() -> Result<()> {
    let (_folder, mut cluster) = tiny_cluster(1).await?;
    let mut client = client(&cluster, 0).await?;
    let mut router = Router::subscribe(&mut client).await?;
    cluster.groups[0][0].ask_to_end().await?;
    while router.learn().await.is_ok() {}
    cluster.groups[0][0].ended().await
}

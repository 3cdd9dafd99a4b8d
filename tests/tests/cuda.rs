//! The `cuda` device: the lockstep rule bit for bit, how far it is from other devices, and what a failing GPU does.
//!
//! The real host code and kernels run on an emulator of CUDA, or on the GPU that `LOCKSTEP_TEST_GPU` names (0 is the
//! first; `tests/gpu/check.sh` does that). Tests that are ignored need a GPU, or take an emulator too long.
//!
//! Tolerances. Kernels round the inputs of products to bf16, which has 8 bits: by 1/512 of a value at most, without a
//! direction. Over two layers that moves log-probabilities, whose logits have a deviation of 3, by 0.02 to 0.03 on average
//! on the emulator; keys and values in 8 bits make 0.04 to 0.05 of it. A wrong kernel is off by far more.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::Encoding;
use lockstep_kernels::{KvEncoding, cuda};
use lockstep_proto::v1::{
    GenerateRequest, OutputOptions, RawPrompt, SamplingParams, StreamGenerateRequest, TokenIds, TokenLogprob,
    raw_prompt::Prompt, stream_generate_response::Event,
};
use lockstep_tests::{
    cluster::{Cluster, ClusterBuilder, binary, demo_model},
    lockstep::{Condition, PLAIN, WHOLE, check, check_embedding, check_text, prompt},
    ranks::{Ranks, argmax},
    tiny_model::{Container, TinyModel},
};
use lockstep_worker::{
    device::Device,
    scheduler::{Pooling, speculation::Speculation},
};
use tempfile::TempDir;
use tokio_stream::StreamExt;
use tonic::Code;

/// Positions of a prompt: some blocks of the cache, and a part of one.
const N_PROMPT: usize = 40;

/// The GPU to test on; without one, an emulator is.
fn gpu() -> Option<String> {
    env::var("LOCKSTEP_TEST_GPU").ok()
}

/// Shared by all tests, so that each kernel is compiled once. An emulator loads what its own compiler has made.
fn kernel_cache() -> PathBuf {
    match gpu() {
        Some(_) => env::temp_dir().join("lockstep-test-kernels"),
        None => lockstep_cuda_emulator::build().expect("the emulator builds").join("kernels"),
    }
}

/// The device that is tested, in this process.
fn device() -> Device {
    let ordinal = match gpu() {
        Some(ordinal) => ordinal.parse().expect("LOCKSTEP_TEST_GPU is a device's number"),
        None => {
            lockstep_cuda_emulator::load_into_this_process().expect("the emulator builds");
            0
        }
    };
    let cache = cuda::KernelCache::new(Some(kernel_cache()));
    Device::Cuda(cuda::Device::open(ordinal, cache).expect("a device"))
}

/// A cluster whose workers compute on it.
fn cluster(model: &Path) -> Result<ClusterBuilder> {
    let cache = kernel_cache().display().to_string();
    let builder = Cluster::builder().model(model).device("cuda").worker_arg("--engine.kernel-cache").worker_arg(cache);
    // Left to itself a rank takes nearly all of the GPU's memory, and ranks share it, as they do an emulator's host.
    let builder = builder.worker_env("LOCKSTEP_WORKER__ENGINE__KV_CACHE_TOKENS", "4096");
    Ok(match gpu() {
        Some(ordinal) => builder.worker_arg("--engine.gpu").worker_arg(ordinal),
        None => builder.worker_env("LD_LIBRARY_PATH", lockstep_cuda_emulator::build()?),
    })
}

/// A model on disk for as long as a test lasts.
struct Model {
    name: String,
    path: PathBuf,
    _folder: TempDir,
}

impl Model {
    fn write(name: &str, model: &TinyModel) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("model");
        model.write(&path).expect("the model is written");
        Self { name: name.to_owned(), path, _folder: folder }
    }

    /// As `lockstep-worker make-model` makes it.
    fn make(arguments: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("made.gguf");
        let made = Command::new(binary("lockstep-worker")?).arg("make-model").args(arguments).arg(&path).status()?;
        ensure!(made.success(), "make-model {arguments:?} failed");
        Ok(Self { name: arguments.join(" "), path, _folder: folder })
    }
}

/// Two query heads of 32 for each of eight KV heads.
fn narrow_heads() -> TinyModel {
    TinyModel { encoding: Encoding::Q4_0, ..TinyModel::default() }
}

/// Four query heads of 64 for each of three KV heads, tied embeddings, and rows of whole super-blocks on three ranks.
fn shared_heads() -> TinyModel {
    TinyModel {
        n_heads: 12,
        n_kv_heads: 3,
        head_dim: 64,
        rope_dim: 64,
        ffn_dim: 768,
        vocab_size: 389,
        tied: true,
        encoding: Encoding::Q4K,
        ..TinyModel::default()
    }
}

/// Each form of weights that kernels multiply by, in both shapes.
fn models() -> [Model; 4] {
    let folder = TinyModel {
        container: Container::Folder,
        encoding: Encoding::NF4,
        embedding_encoding: Encoding::BF16,
        ..narrow_heads()
    };
    [
        Model::write("Q4_0", &narrow_heads()),
        Model::write("Q4_K", &shared_heads()),
        Model::write("Q8_0", &TinyModel { encoding: Encoding::Q8_0, ..shared_heads() }),
        Model::write("NF4 in a folder", &folder),
    ]
}

#[test]
fn batch_chunks_cache_and_ranks_do_not_change_a_bit() {
    let conditions = [
        Condition { chunk: 1, ..PLAIN },
        Condition { chunk: 7, cached: true, ..PLAIN },
        Condition { others: 7, ..PLAIN },
        Condition { world_size: 2, others: 3, chunk: 16, ..PLAIN },
        Condition { world_size: 3, others: 3, chunk: 7, cached: true, ..PLAIN },
    ];
    for model in models() {
        println!("{}", model.name);
        check(&model.path, &device(), N_PROMPT, &conditions);
    }
}

/// Attention adds up 256 positions by themselves and then merges: shorter prompts never see that.
#[test]
fn nothing_changes_a_bit_of_a_prompt_of_two_splits() {
    let conditions = [Condition { chunk: 50, others: 3, cached: true, ..PLAIN }, Condition { world_size: 3, ..PLAIN }];
    let model = Model::write("Q4_0", &narrow_heads());
    check(&model.path, &device(), 300, &conditions);
}

#[test]
fn nothing_changes_a_bit_of_keys_and_values_in_8_bits() {
    let int8 = Condition { kv_encoding: KvEncoding::Int8, ..PLAIN };
    let conditions = [
        Condition { chunk: 7, others: 3, ..int8 },
        Condition { world_size: 2, cached: true, chunk: 16, ..int8 },
        Condition { world_size: 3, ..int8 },
    ];
    for model in [Model::write("Q4_0", &narrow_heads()), Model::write("Q4_K", &shared_heads())] {
        println!("{}", model.name);
        check(&model.path, &device(), N_PROMPT, &conditions);
    }
}

#[test]
fn nothing_changes_a_bit_of_an_embedding_or_of_those_beside_it() {
    let conditions = [
        Condition { chunk: 7, cached: true, ..PLAIN },
        Condition { world_size: 2, others: 5, chunk: 16, ..PLAIN },
        Condition { world_size: 3, others: 3, cached: true, ..PLAIN },
    ];
    let model = Model::write("Q4_K", &shared_heads());
    for pooling in [Pooling::Mean, Pooling::Last] {
        check_embedding(&model.path, &device(), N_PROMPT, pooling, &conditions);
    }
    let beside = Condition { others: 2, embedded: 3, chunk: 16, ..PLAIN };
    check(&model.path, &device(), N_PROMPT, &[beside, Condition { world_size: 2, ..beside }]);
    check(&model.path, &device(), 10, &[Condition { embedded: 1, chunk: 7, ..PLAIN }]);
    let mut gpu = Ranks::load(&model.path, &device(), KvEncoding::F16, 1, 1, N_PROMPT).expect("the model loads");
    let mut reference =
        Ranks::load(&model.path, &Device::Reference, KvEncoding::F16, 1, 1, N_PROMPT).expect("the model loads");
    let ids = prompt(N_PROMPT, gpu.vocab_size as u32, 1);
    let (got, wanted) = (gpu.hidden(&ids, 16).expect("it runs"), reference.hidden(&ids, 16).expect("it runs"));
    let squares = got.iter().zip(&wanted).map(|(got, wanted)| f64::from(got - wanted).powi(2));
    let off = (squares.sum::<f64>() / wanted.len() as f64).sqrt();
    println!("off by {off:.4}");
    assert!(got.len() == wanted.len() && off <= 0.02, "{off}");
}

#[test]
fn speculation_does_not_change_a_bit() {
    let ngram = Condition { speculation: Speculation::Ngram, ..PLAIN };
    let conditions = [ngram, Condition { world_size: 2, others: 2, others_generate: 40, cached: true, ..ngram }];
    let model = Model::write("Q4_0", &narrow_heads());
    // Random models repeat themselves now and then.
    let all = check_text(&model.path, &device(), |vocab_size| prompt(N_PROMPT, vocab_size, 3), 160, &conditions);
    for (condition, found) in conditions.iter().zip(&all) {
        println!("{} drafts accepted: {condition:?}", found.n_accepted);
        assert!(found.n_accepted >= 1, "{} drafts were accepted under {condition:?}", found.n_accepted);
    }
}

/// By how much the log-probabilities of a prompt's tokens differ from another device's: on average, and at most.
fn difference(model: &Path, other: &Device, kv_encoding: KvEncoding, n_prompt: usize) -> (f64, f64) {
    let logprobs = |device: &Device| {
        let mut ranks = Ranks::load(model, device, kv_encoding, 1, 2, n_prompt).expect("the model loads");
        let ids = prompt(n_prompt, ranks.vocab_size as u32, 1);
        ranks.logprobs(std::iter::once(ids.as_slice())).expect("the model runs")
    };
    let (wanted, got) = (logprobs(other), logprobs(&device()));
    let differences = wanted.iter().zip(&got).map(|(wanted, got)| (wanted - got).abs());
    assert!(got.iter().all(|logprob| logprob.is_finite()));
    (differences.clone().sum::<f64>() / wanted.len() as f64, differences.fold(0.0, f64::max))
}

#[test]
fn log_probabilities_are_those_of_the_reference_device_within_the_rounding_of_bf16() {
    for model in models() {
        for (kv_encoding, limit) in [(KvEncoding::F16, 0.04), (KvEncoding::Int8, 0.07)] {
            let (mean, max) = difference(&model.path, &Device::Reference, kv_encoding, 100);
            println!("{}, {kv_encoding:?}: off by {mean:.4} on average, by {max:.4} at most", model.name);
            assert!(mean <= limit && max <= 6.0 * limit, "{}, {kv_encoding:?}: {mean}, {max}", model.name);
        }
    }
}

/// Needs the demo model.
#[test]
fn the_demo_model_says_what_it_says_on_the_cpu() {
    // "The capital of France is" of the tokenizer's ids.
    let ids = [504, 3575, 282, 4649, 314];
    let load = |device| Ranks::load(&demo_model(), device, KvEncoding::F16, 1, 2, 32).expect("run `make fetch` first");
    let mut cpu = load(&Device::Cpu);
    let mut text = ids.to_vec();
    for _ in 0..8 {
        let logits = cpu.logits(&text, WHOLE).expect("the model runs");
        text.push(argmax(&logits[logits.len() - cpu.vocab_size..]));
    }
    // By the lockstep rule it says after a text what it would say if it had written the text itself.
    let logits = load(&device()).logits(&text, WHOLE).expect("the model runs");
    let likeliest: Vec<u32> = logits.chunks_exact(cpu.vocab_size).map(argmax).collect();
    assert_eq!(likeliest[ids.len() - 1..text.len() - 1], text[ids.len()..]);
}

#[test]
#[ignore = "takes an emulator minutes; run on a GPU"]
fn a_model_in_the_shape_of_llama_3_is_that_of_the_cpu_within_its_rounding() -> Result<()> {
    let model = Model::make(&["--shape", "llama-3-8b", "--layers", "2"])?;
    let (mean, max) = difference(&model.path, &Device::Cpu, KvEncoding::F16, 300);
    println!("off by {mean:.4} on average, by {max:.4} at most");
    // The CPU rounds activations to 8 bits in blocks of 32; that decides.
    ensure!(mean <= 0.06 && max <= 0.6, "off by {mean} on average, by {max} at most");
    Ok(())
}

#[test]
#[ignore = "takes an emulator minutes; run on a GPU"]
fn batch_chunks_and_cache_do_not_change_a_bit_of_a_model_in_the_shape_of_llama_3() -> Result<()> {
    let model = Model::make(&["--shape", "llama-3-8b", "--layers", "2"])?;
    let conditions = [
        Condition { chunk: 64, cached: true, ..PLAIN },
        Condition { others: 15, others_generate: 20, ..PLAIN },
        Condition { world_size: 2, others: 3, chunk: 100, ..PLAIN },
    ];
    check(&model.path, &device(), 300, &conditions);
    Ok(())
}

fn token_ids() -> RawPrompt {
    RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids: (100..140).collect() })) }
}

/// The likeliest 12 tokens after a prompt, with their log-probabilities.
async fn generate(cluster: &Cluster) -> Result<Vec<TokenLogprob>> {
    let sampling = SamplingParams { max_new_tokens: Some(12), ignore_eos: Some(true), ..SamplingParams::default() };
    let request = GenerateRequest {
        prompt: Some(token_ids()),
        sampling: Some(sampling),
        output: Some(OutputOptions { logprobs: Some(2), ..OutputOptions::default() }),
        ..GenerateRequest::default()
    };
    let response = cluster.inference().await?.generate(request).await?.into_inner();
    let choice = response.choices.into_iter().next().context("a choice")?;
    ensure!(choice.logprobs.len() == 12, "{} tokens", choice.logprobs.len());
    Ok(choice.logprobs)
}

/// A request that runs for longer than a test waits.
fn endless() -> StreamGenerateRequest {
    let sampling = SamplingParams { max_new_tokens: Some(400), ignore_eos: Some(true), ..SamplingParams::default() };
    StreamGenerateRequest { prompt: Some(token_ids()), sampling: Some(sampling), ..StreamGenerateRequest::default() }
}

/// Streams an endless request until it fails. The rank that is named is killed when the first token has come.
async fn fail_in_mid_stream(cluster: &mut Cluster, mut to_kill: Option<usize>) -> Result<tonic::Status> {
    let mut stream = cluster.inference().await?.stream_generate(endless()).await?.into_inner();
    loop {
        match stream.next().await.context("an error, not an end")? {
            Ok(response) if matches!(response.event, Some(Event::Chunk(_))) => {
                if let Some(rank) = to_kill.take() {
                    cluster.groups[0][rank].kill().await?;
                }
            }
            Ok(_) => {}
            Err(status) => return Ok(status),
        }
    }
}

#[tokio::test]
async fn a_cluster_says_the_same_at_every_world_size_and_transport() -> Result<()> {
    let model = Model::write("Q4_K", &shared_heads());
    let mut texts = Vec::new();
    for (world_size, transport) in [(1, "shm"), (2, "tcp"), (3, "shm")] {
        let cluster = cluster(&model.path)?.world_size(world_size).transport(transport).start().await?;
        texts.push(generate(&cluster).await?);
        cluster.stop().await?;
    }
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    Ok(())
}

/// Two ranks on one GPU.
async fn two_ranks_over_nccl(model: &Model) -> Result<Cluster> {
    // NCCL 2.30 and newer have a switch for ranks that share a GPU; older ones must take them for two machines'.
    cluster(&model.path)?
        .world_size(2)
        .transport("nccl")
        .worker_env("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        .rank_env(0, "NCCL_HOSTID", "lockstep-test-0")
        .rank_env(1, "NCCL_HOSTID", "lockstep-test-1")
        .start()
        .await
}

#[tokio::test]
async fn two_ranks_on_one_gpu_say_over_nccl_what_one_rank_says() -> Result<()> {
    let model = Model::write("Q4_K", &shared_heads());
    let alone = cluster(&model.path)?.start().await?;
    let wanted = generate(&alone).await?;
    alone.stop().await?;
    let mut both = two_ranks_over_nccl(&model).await?;
    assert_eq!(generate(&both).await?, wanted);

    let status = fail_in_mid_stream(&mut both, Some(1)).await?;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    both.restart_follower(0, 1).await?;
    both.wait_for_status(0, |status| status.ready).await?;
    both.gateway.wait_ready("lockstep.v1.InferenceService").await?;
    assert_eq!(generate(&both).await?, wanted);
    both.stop().await
}

/// Ways to choose tokens, of which a GPU can all.
fn ways_to_choose() -> Vec<SamplingParams> {
    let default = || SamplingParams { max_new_tokens: Some(24), ignore_eos: Some(true), ..SamplingParams::default() };
    let sampled = || SamplingParams { do_sample: Some(true), temperature: Some(1.3), seed: Some(7), ..default() };
    vec![
        default(),
        sampled(),
        SamplingParams { top_k: Some(5), ..sampled() },
        SamplingParams { top_p: Some(0.6), n: Some(3), ..sampled() },
        SamplingParams { min_p: Some(0.05), temperature: Some(0.7), ..sampled() },
        SamplingParams { top_k: Some(50), top_p: Some(0.95), min_p: Some(0.01), seed: Some(1 << 40), ..sampled() },
    ]
}

/// The tokens of all choices, asked for together. With log-probabilities, logits come to the host, and it chooses.
async fn token_ids_of(cluster: &Cluster, logprobs: Option<u32>) -> Result<Vec<Vec<u32>>> {
    let requests = ways_to_choose().into_iter().map(|sampling| async {
        let request = GenerateRequest {
            prompt: Some(token_ids()),
            sampling: Some(sampling),
            output: Some(OutputOptions { logprobs, ..OutputOptions::default() }),
            ..GenerateRequest::default()
        };
        let choices = cluster.inference().await?.generate(request).await?.into_inner().choices;
        Ok::<_, anyhow::Error>(choices.into_iter().map(|choice| choice.token_ids).collect::<Vec<_>>())
    });
    Ok(futures_util::future::try_join_all(requests).await?.concat())
}

/// Steps that were started while the one before them ran.
async fn steps_ahead(cluster: &Cluster) -> Result<f64> {
    cluster.groups[0][0].metric("lockstep_worker_steps_ahead_total").await
}

#[tokio::test]
async fn a_gpu_chooses_the_tokens_that_the_host_would() -> Result<()> {
    let model = Model::write("Q4_K", &shared_heads());
    let alone = cluster(&model.path)?.start().await?;
    let by_host = token_ids_of(&alone, Some(0)).await?;
    assert_eq!(steps_ahead(&alone).await?, 0.0, "the host must see the logits first");
    assert_eq!(token_ids_of(&alone, None).await?, by_host);
    assert!(steps_ahead(&alone).await? >= 5.0, "{} steps", steps_ahead(&alone).await?);
    alone.stop().await?;
    let both = two_ranks_over_nccl(&model).await?;
    assert_eq!(token_ids_of(&both, None).await?, by_host);
    assert!(steps_ahead(&both).await? >= 5.0, "{} steps", steps_ahead(&both).await?);
    assert_eq!(token_ids_of(&both, Some(0)).await?, by_host);
    both.stop().await
}

#[tokio::test]
async fn ranks_that_give_up_the_order_of_their_sums_say_what_one_rank_says_up_to_rounding() -> Result<()> {
    let model = Model::write("Q4_K", &shared_heads());
    let alone = cluster(&model.path)?.start().await?;
    let wanted = generate(&alone).await?;
    alone.stop().await?;
    let three = cluster(&model.path)?
        .world_size(3)
        .transport("nccl")
        .worker_arg("--engine.deterministic=false")
        .worker_env("NCCL_MULTI_RANK_GPU_ENABLE", "1");
    let three = (0..3).fold(three, |three, rank| three.rank_env(rank, "NCCL_HOSTID", format!("lockstep-test-{rank}")));
    let three = three.start().await?;
    let found = generate(&three).await?;
    // Later ones are of other tokens if two of them are as likely.
    let first = |said: &[TokenLogprob]| said[0].token.as_ref().map_or(f32::NAN, |token| token.logprob);
    assert!((first(&found) - first(&wanted)).abs() < 0.01, "{found:?} for {wanted:?}");
    three.stop().await
}

#[tokio::test]
async fn a_driver_that_makes_no_graphs_or_is_old_is_no_harm() -> Result<()> {
    if gpu().is_some() {
        println!("a real driver cannot be told to fail");
        return Ok(());
    }
    let model = Model::write("Q4_0", &narrow_heads());
    let mut texts = Vec::new();
    // One that works, one that makes no graphs, and an old one.
    const NO_GRAPHS: &str = "LOCKSTEP_EMULATOR_FAIL_GRAPHS";
    for (name, value) in [(NO_GRAPHS, "0"), (NO_GRAPHS, "1"), ("LOCKSTEP_EMULATOR_DRIVER", "12000")] {
        let cluster = cluster(&model.path)?.worker_env(name, value).start().await?;
        texts.push(generate(&cluster).await?);
        let log = cluster.groups[0][0].log();
        // First without kernels that overlap, then not at all.
        for line in ["from now on kernels do not overlap", "this GPU's driver records no steps"] {
            assert_eq!(log.matches(line).count(), usize::from(value == "1"), "{log}");
        }
        cluster.stop().await?;
    }
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    Ok(())
}

#[tokio::test]
async fn a_killed_rank_fails_its_requests_and_the_group_forms_anew() -> Result<()> {
    let model = Model::write("Q4_0", &narrow_heads());
    let mut cluster = cluster(&model.path)?.world_size(2).start().await?;
    let before = generate(&cluster).await?;
    let epoch = cluster.status(0).await?.epoch;
    let status = fail_in_mid_stream(&mut cluster, Some(1)).await?;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    cluster.restart_follower(0, 1).await?;
    cluster.wait_for_status(0, |status| status.ready && status.epoch > epoch).await?;
    cluster.gateway.wait_ready("lockstep.v1.InferenceService").await?;
    assert_eq!(generate(&cluster).await?, before);
    cluster.stop().await
}

/// A launch of the middle of an endless request; the first steps of a worker take far fewer.
const FAILING_LAUNCH: &str = "2000";

/// How a worker whose GPU has failed ends: a GPU's errors stay with the process.
async fn check_ended_by_gpu(cluster: &mut Cluster, rank: usize) -> Result<()> {
    let worker = &mut cluster.groups[0][rank];
    let status = worker.exit_status().await?;
    let log = worker.log();
    assert_eq!(status.code(), Some(1), "{log}");
    let last = log.lines().last().context("a log")?;
    let why = "lockstep-worker: the GPU has failed and can be used by a new process only: ";
    assert!(last.starts_with(why) && last.contains("CUDA_ERROR_LAUNCH_FAILED"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_gpu_that_fails_fails_its_requests_and_ends_its_worker() -> Result<()> {
    if gpu().is_some() {
        println!("a real GPU cannot be told to fail");
        return Ok(());
    }
    let model = Model::write("Q4_0", &narrow_heads());
    let builder = cluster(&model.path)?.rank_env(0, "LOCKSTEP_EMULATOR_FAIL_LAUNCH", FAILING_LAUNCH);
    let mut cluster = builder.start().await?;
    let status = fail_in_mid_stream(&mut cluster, None).await?;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains("CUDA_ERROR_LAUNCH_FAILED"), "{status:?}");
    assert_eq!(status.message().lines().count(), 1, "{status:?}");
    check_ended_by_gpu(&mut cluster, 0).await
}

#[tokio::test]
async fn a_group_outlives_the_gpu_of_one_of_its_ranks() -> Result<()> {
    if gpu().is_some() {
        println!("a real GPU cannot be told to fail");
        return Ok(());
    }
    let model = Model::write("Q4_0", &narrow_heads());
    let builder = cluster(&model.path)?.world_size(2).rank_env(1, "LOCKSTEP_EMULATOR_FAIL_LAUNCH", FAILING_LAUNCH);
    let mut cluster = builder.start().await?;
    let before = generate(&cluster).await?;
    let status = fail_in_mid_stream(&mut cluster, None).await?;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    check_ended_by_gpu(&mut cluster, 1).await?;
    // Its supervisor starts it anew.
    cluster.restart_follower(0, 1).await?;
    cluster.wait_for_status(0, |status| status.ready).await?;
    cluster.gateway.wait_ready("lockstep.v1.InferenceService").await?;
    assert_eq!(generate(&cluster).await?, before);
    cluster.stop().await
}

#[tokio::test]
async fn a_cache_that_does_not_fit_into_the_gpu_is_refused_at_start() -> Result<()> {
    let model = Model::write("Q4_0", &narrow_heads());
    // Two TiB.
    let builder = cluster(&model.path)?.worker_arg("--engine.kv-cache-tokens").worker_arg((1 << 30).to_string());
    let error = format!("{:#}", builder.start().await.err().context("refused")?);
    let why = error.lines().last().context("a log")?;
    for part in ["lockstep-worker: ", "key and value cache: ", "bytes of device memory are not to be had"] {
        assert!(why.contains(part), "{part} is not in: {error}");
    }
    Ok(())
}

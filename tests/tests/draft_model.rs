//! A draft model changes nothing but the number of steps, and is refused where it speaks of other tokens.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use lockstep_proto::v1::{
    GenerateChoice, GenerateRequest, OutputOptions, RawPrompt, SamplingParams, TokenIds, raw_prompt::Prompt,
};
use lockstep_tests::{
    cluster::{Cluster, binary},
    tiny_model::TinyModel,
};
use tempfile::TempDir;

/// What one cluster says, and how it comes to it.
struct Told {
    choices: Vec<Vec<GenerateChoice>>,
    drafted: f64,
    accepted: f64,
}

/// The model that is served: most of its layers add nothing, so that a model without them says the same in less time.
fn target() -> TinyModel {
    TinyModel { n_idle_layers: 22, ..drafter() }
}

fn drafter() -> TinyModel {
    TinyModel { seed: 11, ..TinyModel::default() }
}

fn sampling() -> Vec<SamplingParams> {
    let greedy = SamplingParams { max_new_tokens: Some(80), ignore_eos: Some(true), ..SamplingParams::default() };
    let sampled = SamplingParams { temperature: Some(0.8), top_p: Some(0.95), seed: Some(5), ..greedy.clone() };
    vec![
        SamplingParams { do_sample: Some(false), ..greedy.clone() },
        SamplingParams { do_sample: Some(false), repetition_penalty: Some(1.1), ..greedy.clone() },
        sampled.clone(),
        SamplingParams { n: Some(2), seed: Some(6), ..sampled.clone() },
        SamplingParams { temperature: Some(0.4), frequency_penalty: Some(0.3), ..sampled },
        // Its text ends by itself, perhaps amid drafts.
        SamplingParams { ignore_eos: None, ..greedy },
    ]
}

async fn ask(model: &Path, draft_model: Option<&Path>, world_size: usize) -> Result<Told> {
    let mut cluster = Cluster::builder().model(model).world_size(world_size);
    if let Some(path) = draft_model {
        cluster = cluster.worker_arg("--model.draft-path").worker_arg(path.display().to_string());
    }
    let cluster = cluster.start().await?;
    let mut client = cluster.inference().await?;
    let mut choices = Vec::new();
    for (i, sampling) in sampling().into_iter().enumerate() {
        let ids = (0..100).map(|position| 3 + (position * position + 7 * i as u32) % 380).collect();
        let request = GenerateRequest {
            prompt: Some(RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids })) }),
            sampling: Some(sampling),
            output: Some(OutputOptions { logprobs: Some(1), ..OutputOptions::default() }),
            ..GenerateRequest::default()
        };
        choices.push(client.generate(request).await?.into_inner().choices);
    }
    let leader = &cluster.groups[0][0];
    let drafted = leader.metric("lockstep_worker_drafted_tokens_total").await?;
    let accepted = leader.metric("lockstep_worker_accepted_tokens_total").await?;
    cluster.stop().await?;
    Ok(Told { choices, drafted, accepted })
}

#[tokio::test]
async fn a_draft_model_changes_nothing_that_a_client_sees() -> Result<()> {
    let folder = TempDir::new()?;
    let [model, same, other] = ["model", "same", "other"].map(|name| folder.path().join(format!("{name}.gguf")));
    target().write(&model)?;
    // Llama 3.1 has other names than Llama 3 for some control tokens. The model is none the worse for it.
    std::fs::write(&same, renamed(&drafter(), "<|im_start|>", "<|im_begin|>")?)?;
    TinyModel { seed: 12, ..drafter() }.write(&other)?;
    let plain = ask(&model, None, 1).await?;
    for world_size in [1, 2] {
        let told = ask(&model, Some(&same), world_size).await?;
        assert_eq!(told.choices, plain.choices);
        let Told { drafted, accepted, .. } = told;
        println!("{accepted} of {drafted} drafts were right, {} of {} without a model", plain.accepted, plain.drafted);
        assert!(accepted >= plain.accepted + 20.0 && accepted >= 0.9 * drafted, "{accepted} of {drafted}");

        let told = ask(&model, Some(&other), world_size).await?;
        assert_eq!(told.choices, plain.choices);
        println!("{} of {} drafts of another model were right", told.accepted, told.drafted);
        assert!(told.drafted > plain.drafted && told.accepted < accepted, "{} of {}", told.accepted, told.drafted);
    }
    Ok(())
}

/// A model's file with another text, of the same length, for a token.
fn renamed(model: &TinyModel, token: &str, name: &str) -> Result<Vec<u8>> {
    let in_file = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let (old, new) = (in_file(token), in_file(name));
    ensure!(old.len() == new.len(), "{token} and {name} have different lengths");
    let mut bytes = model.bytes()?;
    let position = bytes.windows(old.len()).position(|text| text == old).context("the token is spelled out")?;
    bytes[position..position + old.len()].copy_from_slice(&new);
    Ok(bytes)
}

/// Starts a worker that is to refuse its draft model in one line.
fn check_refused(model: &Path, draft_model: &Path, parts: &[&str]) -> Result<()> {
    let mut worker = Command::new(binary("lockstep-worker")?);
    worker.args(["--listen", "127.0.0.1:0", "--engine.threads", "1", "--model.path"]).arg(model);
    let output = worker.arg("--model.draft-path").arg(draft_model).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let line = text.lines().find(|line| line.starts_with("lockstep-worker: model.draft_path: "));
    let line = line.with_context(|| format!("no line names the setting: {text}"))?;
    for part in parts {
        assert!(line.contains(part), "{part} is not in: {line}");
    }
    Ok(())
}

#[test]
fn a_draft_model_with_another_vocabulary_is_refused() -> Result<()> {
    let folder = TempDir::new()?;
    let [model, larger, other] = ["model", "larger", "other"].map(|name| folder.path().join(format!("{name}.gguf")));
    let tiny = TinyModel::default();
    tiny.write(&model)?;
    TinyModel { vocab_size: tiny.vocab_size + 1, ..tiny.clone() }.write(&larger)?;
    std::fs::write(&other, renamed(&tiny, "ab", "zz")?)?;
    check_refused(&model, &larger, &["larger.gguf", "model.gguf", "385 tokens and 384"])?;
    check_refused(&model, &other, &["other.gguf", "model.gguf", "\"zz\" and \"ab\""])?;
    check_refused(&model, &folder.path().join("none.gguf"), &["none.gguf"])
}

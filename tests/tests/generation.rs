//! Generation through the whole cluster: the real programs, started and called as users do.

use anyhow::{Context, Result, bail};
use lockstep_proto::{
    v1::{
        ChatRequest, ContentPart, Conversation, Finish, FinishReason, GenerateRequest, Message, OutputOptions,
        RawPrompt, Role, SamplingParams, StreamGenerateRequest, TokenIds, content_part::Part, raw_prompt::Prompt,
        stream_generate_response::Event,
    },
    worker::v1::{self as worker, generate_response::Event as WorkerEvent},
};
use lockstep_tests::cluster::{Cluster, repository};
use serde::Deserialize;
use tokio_stream::StreamExt;
use tonic::Streaming;

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<ReferencePrompt>,
}

#[derive(Deserialize)]
struct ReferencePrompt {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    gaps: Vec<f64>,
}

fn prompt(ids: &[u32]) -> RawPrompt {
    RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids: ids.to_vec() })) }
}

fn text(text: &str) -> RawPrompt {
    RawPrompt { prompt: Some(Prompt::Text(text.to_owned())) }
}

fn user(text: &str) -> Message {
    let part = ContentPart { part: Some(Part::Text(text.to_owned())) };
    Message { role: Role::User.into(), content: vec![part], ..Message::default() }
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams {
        max_new_tokens: Some(24),
        temperature: Some(0.9),
        top_p: Some(0.95),
        seed: Some(seed),
        ..SamplingParams::default()
    }
}

#[tokio::test]
async fn greedy_ids_follow_the_reference_wherever_it_is_sure() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = cluster.inference().await?;
    let file = std::fs::read_to_string(repository().join("tests/data/smollm2_reference.json"))?;
    let reference: Reference = serde_json::from_str(&file)?;
    for wanted in reference.prompts.iter().take(20) {
        let sampling = SamplingParams { max_new_tokens: Some(8), ignore_eos: Some(true), ..SamplingParams::default() };
        let request = GenerateRequest {
            prompt: Some(prompt(&wanted.prompt_ids)),
            sampling: Some(sampling),
            ..Default::default()
        };
        let response = client.generate(request).await?.into_inner();
        let got = &response.choices[0].token_ids;
        // Rounding may turn a choice whose gap is small; from there on the texts are different ones.
        let sure = wanted.gaps.iter().take_while(|gap| **gap > 0.5).count().min(got.len());
        assert_eq!(got[..sure], wanted.ids[..sure]);
        assert_eq!(got.len(), 8);
    }
    cluster.stop().await
}

#[tokio::test]
async fn a_seed_gives_the_same_text_at_every_world_size_and_transport() -> Result<()> {
    let mut texts = Vec::new();
    for (world_size, transport) in [(1, "shm"), (2, "shm"), (2, "tcp"), (3, "shm")] {
        let cluster = Cluster::builder().world_size(world_size).transport(transport).start().await?;
        let mut client = cluster.inference().await?;
        let conversation = Conversation { messages: vec![user("Name three colours.")], ..Conversation::default() };
        let request = ChatRequest {
            conversation: Some(conversation),
            sampling: Some(SamplingParams { n: Some(2), ..sampled(7) }),
            ..ChatRequest::default()
        };
        let response = client.chat(request).await?.into_inner();
        assert_eq!(response.choices.len(), 2);
        let ids: Vec<Vec<u32>> = response.choices.into_iter().map(|choice| choice.token_ids).collect();
        assert_ne!(ids[0], ids[1], "two choices of one seed differ");
        texts.push(ids);
        cluster.stop().await?;
    }
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    Ok(())
}

#[tokio::test]
async fn a_stream_counts_its_chunks_and_ends_with_one_finish() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = cluster.inference().await?;
    let request = StreamGenerateRequest {
        prompt: Some(text("The capital of France is")),
        sampling: Some(SamplingParams { max_new_tokens: Some(12), ..SamplingParams::default() }),
        output: Some(OutputOptions { logprobs: Some(2), prompt_logprobs: Some(1), ..OutputOptions::default() }),
        ..StreamGenerateRequest::default()
    };
    let mut stream = client.stream_generate(request).await?.into_inner();
    let mut finish: Option<Finish> = None;
    let (mut n_chunks, mut whole, mut n_tokens) = (0, String::new(), 0);
    while let Some(response) = stream.next().await {
        assert!(finish.is_none(), "nothing follows the finish");
        match response?.event.context("an event")? {
            Event::Start(start) => {
                assert_eq!(start.prompt_tokens, 5);
                assert_eq!(start.prompt_logprobs.len(), 5);
            }
            Event::Chunk(chunk) => {
                assert_eq!(chunk.seq, n_chunks);
                n_chunks += 1;
                n_tokens += chunk.token_ids.len();
                assert_eq!(chunk.logprobs.len(), chunk.token_ids.len());
                assert!(chunk.logprobs.iter().all(|logprob| logprob.top.len() == 2));
                whole += &chunk.text;
            }
            Event::Finish(last) => finish = Some(last),
        }
    }
    let finish = finish.context("a finish")?;
    assert!(whole.starts_with(" Paris."), "{whole}");
    assert_eq!(finish.choices[0].reason(), FinishReason::Length);
    assert_eq!((n_tokens, finish.usage.context("usage")?.completion_tokens), (12, 12));
    assert_eq!(finish.repro.context("repro")?.model_digest.len(), 64);
    cluster.stop().await
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = cluster.inference().await?;
    let sampling = SamplingParams { max_new_tokens: Some(20), stop: vec!["ris.".into()], ..SamplingParams::default() };
    let request = GenerateRequest {
        prompt: Some(text("The capital of France is")),
        sampling: Some(sampling),
        output: Some(OutputOptions { return_full_text: Some(true), ..OutputOptions::default() }),
        ..GenerateRequest::default()
    };
    let response = client.generate(request).await?.into_inner();
    assert_eq!(response.choices[0].text, "The capital of France is Pa");
    assert_eq!(response.choices[0].finish.as_ref().context("a finish")?.reason(), FinishReason::Stop);
    cluster.stop().await
}

#[tokio::test]
async fn speculation_changes_nothing_that_a_client_sees() -> Result<()> {
    let off = SamplingParams { max_new_tokens: Some(48), do_sample: Some(false), ..SamplingParams::default() };
    let penalised = SamplingParams { repetition_penalty: Some(1.05), frequency_penalty: Some(0.05), ..off.clone() };
    let all = [
        off.clone(),
        penalised.clone(),
        SamplingParams { do_sample: Some(true), n: Some(2), ..sampled(3) },
        SamplingParams { do_sample: None, temperature: Some(0.4), seed: Some(5), ..penalised },
        SamplingParams { stop: vec!["masons from".into()], ..off },
    ];
    let sentence = "The lighthouse was built in 1874 by a company of masons from the next town. ";
    let mut told = Vec::new();
    for speculation in ["off", "ngram"] {
        let cluster = Cluster::builder().world_size(2).worker_arg("--engine.speculation").worker_arg(speculation);
        let cluster = cluster.worker_arg("--engine.max-prefill-chunk").worker_arg("24").start().await?;
        let mut client = cluster.inference().await?;
        let mut choices = Vec::new();
        for sampling in &all {
            let request = GenerateRequest {
                prompt: Some(text(&sentence.repeat(4))),
                sampling: Some(sampling.clone()),
                output: Some(OutputOptions { logprobs: Some(1), ..OutputOptions::default() }),
                ..GenerateRequest::default()
            };
            choices.push(client.generate(request).await?.into_inner().choices);
        }
        let accepted = cluster.groups[0][0].metric("lockstep_worker_accepted_tokens_total").await?;
        assert_eq!(accepted >= 50.0, speculation == "ngram", "{accepted} drafts were accepted");
        // A follower has steps, and nothing of what the leader alone decides.
        let follower = &cluster.groups[0][1];
        assert!(follower.metric("lockstep_worker_step_seconds_count").await? > 0.0);
        assert!(follower.metric("lockstep_worker_kv_blocks_free").await.is_err());
        told.push(choices);
        cluster.stop().await?;
    }
    assert_eq!(told[0], told[1]);
    Ok(())
}

/// Asks a worker for two choices that go on for much longer than a test.
fn two_choices() -> worker::GenerateRequest {
    let sampling = worker::ResolvedSampling {
        max_new_tokens: 4_000,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..worker::ResolvedSampling::default()
    };
    worker::GenerateRequest {
        request_id: "any".into(),
        prompt_token_ids: (100..140).collect(),
        sampling: Some(sampling),
        n: 2,
        ..worker::GenerateRequest::default()
    }
}

async fn next(events: &mut Streaming<worker::GenerateResponse>) -> Result<WorkerEvent> {
    events.next().await.context("an event")??.event.context("an event")
}

async fn generation_id(events: &mut Streaming<worker::GenerateResponse>) -> Result<Vec<u8>> {
    match next(events).await? {
        WorkerEvent::Started(started) => Ok(started.generation_id),
        other => bail!("{other:?} comes first"),
    }
}

#[tokio::test]
async fn a_choice_ends_in_the_worker_alone_when_it_is_told_to() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut leader = cluster.leader(0).await?;
    let mut events = leader.generate(two_choices()).await?.into_inner();
    let generation_id = generation_id(&mut events).await?;
    let busy = cluster.wait_for_status(0, |status| status.running_sequences == 2).await?;
    let ending = worker::EndChoiceRequest { generation_id, choice: 0 };
    leader.end_choice(ending.clone()).await?;
    let half = cluster.wait_for_status(0, |status| status.running_sequences == 1).await?;
    assert!(half.free_blocks + half.cached_blocks > busy.free_blocks + busy.cached_blocks);
    let mut finish = None;
    let mut n_after = 0;
    while n_after < 3 {
        match next(&mut events).await? {
            WorkerEvent::Finish(ended) => finish = Some((ended.choice, ended.reason())),
            WorkerEvent::Tokens(tokens) if finish.is_some() => {
                assert_eq!(tokens.choice, 1, "nothing comes after the end");
                n_after += 1;
            }
            _ => {}
        }
    }
    assert_eq!(finish, Some((0, worker::FinishReason::Ended)));
    leader.end_choice(ending).await?;
    drop(events);
    cluster.wait_for_status(0, |status| status.running_sequences == 0).await?;
    cluster.stop().await
}

#[tokio::test]
async fn a_worker_that_drains_still_lets_choices_be_ended() -> Result<()> {
    let mut cluster = Cluster::builder().start().await?;
    let mut leader = cluster.leader(0).await?;
    let mut events = leader.generate(two_choices()).await?.into_inner();
    let generation_id = generation_id(&mut events).await?;
    let end_all = async {
        let mut draining = false;
        while !draining {
            let status = leader.get_status(worker::GetStatusRequest {}).await?.into_inner().status;
            draining = status.context("a status")?.draining;
        }
        for choice in [0, 1] {
            leader.end_choice(worker::EndChoiceRequest { generation_id: generation_id.clone(), choice }).await?;
        }
        while events.next().await.transpose()?.is_some() {}
        Ok(())
    };
    tokio::try_join!(cluster.groups[0][0].terminate(), end_all)?;
    Ok(())
}

#[tokio::test]
async fn a_stub_repeats_the_prompt_and_says_that_it_is_one() -> Result<()> {
    let cluster = Cluster::builder().worker_arg("--stub").start().await?;
    let mut client = cluster.inference().await?;
    let request = GenerateRequest {
        prompt: Some(prompt(&[1000, 1001, 1002])),
        sampling: Some(SamplingParams { max_new_tokens: Some(5), ..SamplingParams::default() }),
        ..GenerateRequest::default()
    };
    let answer = client.generate(request).await?.into_inner();
    assert_eq!(answer.choices[0].token_ids, [1000, 1001, 1002, 1000, 1001]);
    assert_eq!(answer.choices[0].finish.as_ref().map(|finish| finish.reason()), Some(FinishReason::Length));
    let repro = answer.repro.context("no repro")?;
    assert_eq!((repro.model_digest.as_str(), repro.engine_version.as_str()), ("stub", "stub"));
    cluster.stop().await
}

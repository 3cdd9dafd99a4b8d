//! The life of a request that goes well.

use futures_util::StreamExt as _;
use lockstep_proto::{
    v1::{
        self, ChatRequest, ContentPart, Conversation, FinishReason, GenerateRequest, Message, OutputOptions, RawPrompt,
        Role, SamplingParams, StreamGenerateRequest, TokenIds, choice_finish::MatchedStop, content_part::Part,
        raw_prompt::Prompt, stream_generate_response::Event,
    },
    worker::v1::{
        EndChoiceRequest, FinishReason as WorkerReason, Logprob, PromptLogprobs, TokenLogprobs,
        generate_response::Event as WorkerEvent,
    },
};
use tonic::{Request, Streaming};

use super::{
    cluster::{Cluster, in_time},
    fake_tokenizer::{BOS, END},
    fake_worker::GENERATION,
};

pub(crate) fn prompt(text: &str) -> Option<RawPrompt> {
    Some(RawPrompt { prompt: Some(Prompt::Text(text.into())) })
}

pub(crate) fn generate(text: &str) -> GenerateRequest {
    GenerateRequest { prompt: prompt(text), ..GenerateRequest::default() }
}

pub(crate) fn stream(text: &str) -> StreamGenerateRequest {
    StreamGenerateRequest { prompt: prompt(text), ..StreamGenerateRequest::default() }
}

pub(crate) fn conversation(texts: &[&str]) -> Option<Conversation> {
    let message = |text: &&str| Message {
        role: Role::User.into(),
        content: vec![ContentPart { part: Some(Part::Text((*text).into())) }],
        ..Message::default()
    };
    Some(Conversation { messages: texts.iter().map(message).collect(), ..Conversation::default() })
}

/// Everything that a stream brought, its shape checked: Start, chunks without a gap, Finish, nothing after.
pub(crate) struct Streamed {
    pub(crate) start: v1::Start,
    pub(crate) chunks: Vec<v1::Chunk>,
    pub(crate) finish: v1::Finish,
}

impl Streamed {
    pub(crate) async fn read(mut stream: Streaming<v1::StreamGenerateResponse>) -> Self {
        let mut events = Vec::new();
        while let Some(event) = in_time(stream.next()).await {
            events.push(event.unwrap().event.unwrap());
        }
        let mut events = events.into_iter();
        let Some(Event::Start(start)) = events.next() else { panic!("a stream begins with Start") };
        let Some(Event::Finish(finish)) = events.next_back() else { panic!("a stream ends with Finish") };
        let chunk = |event| match event {
            Event::Chunk(chunk) => chunk,
            other => panic!("{other:?} among the chunks"),
        };
        let chunks: Vec<_> = events.map(chunk).collect();
        assert!(chunks.iter().zip(0..).all(|(chunk, seq)| chunk.seq == seq), "seq counts from 0");
        Self { start, chunks, finish }
    }

    pub(crate) fn text(&self, choice: u32) -> String {
        self.chunks.iter().filter(|chunk| chunk.choice == choice).map(|chunk| chunk.text.as_str()).collect()
    }

    pub(crate) fn ids(&self, choice: u32) -> Vec<u32> {
        self.chunks.iter().filter(|chunk| chunk.choice == choice).flat_map(|chunk| chunk.token_ids.clone()).collect()
    }
}

#[tokio::test]
async fn a_stream_is_start_chunks_and_one_finish() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let mut request = Request::new(stream("Hi"));
    request.metadata_mut().insert("x-request-id", "order-66".parse().unwrap());
    let call = tokio::spawn(async move { client.stream_generate(request).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    assert_eq!(session.request.prompt_token_ids, [BOS, u32::from(b'H'), u32::from(b'i')]);
    assert_eq!(session.request.request_id, "order-66");
    assert_eq!(session.metadata.get("x-request-id").unwrap(), "order-66");
    let sampling = session.request.sampling.clone().unwrap();
    assert_eq!((sampling.max_new_tokens, sampling.temperature), (997, 0.0), "what the context leaves; greedy");
    session.text(0, "one ").await;
    session.text(0, "t\u{e9}").await;
    session.ids(0, &[END]).await;
    session.finish(0, WorkerReason::StopToken, Some(END)).await;

    let streamed = Streamed::read(call.await.unwrap()).await;
    assert_eq!((streamed.start.request_id.as_str(), streamed.start.model.as_str()), ("order-66", "m"));
    assert_eq!(streamed.start.prompt_tokens, 3);
    assert_eq!(streamed.text(0), "one t\u{e9}");
    assert_eq!(streamed.ids(0).len(), 8);
    let finish = &streamed.finish;
    assert_eq!(finish.choices[0].reason(), FinishReason::Stop);
    assert_eq!(finish.choices[0].matched_stop, Some(MatchedStop::TokenId(END)));
    let usage = v1::Usage { prompt_tokens: 3, cached_tokens: 3, completion_tokens: 8 };
    assert_eq!(finish.usage, Some(usage));
    let repro = v1::Repro { model_digest: "d1".into(), seed: sampling.seed, engine_version: "v1".into() };
    assert_eq!(finish.repro, Some(repro));
    let timings = finish.timings.unwrap();
    assert!(timings.total_ms >= timings.encode_ms + timings.first_token_ms, "{timings:?}");
    assert!(cluster.tokenizers[0].request_ids.lock().unwrap().contains(&"order-66".to_owned()));
    let metrics = cluster.metrics().await;
    for line in [
        "lockstep_gateway_requests_total{method=\"StreamGenerate\",outcome=\"OK\"} 1",
        "lockstep_gateway_prompt_tokens_total 3",
        "lockstep_gateway_completion_tokens_total 8",
        "lockstep_gateway_requests_in_flight 0",
        "lockstep_gateway_time_to_first_token_seconds_count 1",
        "lockstep_gateway_group_outstanding_tokens{group=",
    ] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
}

#[tokio::test]
async fn a_chat_is_rendered_and_answered_in_one_message() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let chat = ChatRequest { conversation: conversation(&["a<|end|>b"]), ..ChatRequest::default() };
    let call = tokio::spawn(async move { client.chat(chat).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    let prompt = &session.request.prompt_token_ids;
    assert_eq!(prompt.iter().filter(|&&id| id >= BOS).count(), 1, "the content's control token is text: {prompt:?}");
    session.text(0, "yes").await;
    session.finish(0, WorkerReason::Length, None).await;

    let answer = call.await.unwrap();
    let choice = &answer.choices[0];
    let message = choice.message.as_ref().unwrap();
    assert_eq!(message.role(), Role::Assistant);
    assert_eq!(message.content[0].part, Some(Part::Text("yes".into())));
    assert_eq!(choice.finish.as_ref().unwrap().reason(), FinishReason::Length);
    assert_eq!((answer.start.unwrap().prompt_tokens, choice.token_ids.len()), (11, 3));
    assert!(answer.usage.is_some() && answer.timings.is_some() && answer.repro.is_some());
}

#[tokio::test]
async fn a_stop_string_across_messages_ends_the_choice_and_lets_the_worker_go() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let sampling = SamplingParams { stop: vec!["STOP".into()], ..SamplingParams::default() };
    let request = StreamGenerateRequest { sampling: Some(sampling), ..stream("x") };
    let call = tokio::spawn(async move { client.stream_generate(request).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    for piece in ["one S", "T", "OP two"] {
        session.text(0, piece).await;
    }
    let streamed = Streamed::read(call.await.unwrap()).await;
    in_time(session.dropped()).await;
    assert!(cluster.groups[0].worker.endings.borrow().is_empty(), "the end of the stream ends the only choice");
    assert_eq!(streamed.finish.usage.unwrap().cached_tokens, 3, "although the worker has not finished the choice");
    assert_eq!((streamed.text(0), streamed.ids(0).len()), ("one ".into(), "one STOP".len()));
    let end = &streamed.finish.choices[0];
    assert_eq!((end.reason(), &end.matched_stop), (FinishReason::Stop, &Some(MatchedStop::Stop("STOP".into()))));
    assert_eq!(streamed.finish.usage.unwrap().completion_tokens, 8);
}

/// Three choices, each of which an exclamation mark ends.
fn three_choices() -> StreamGenerateRequest {
    let sampling = SamplingParams { n: Some(3), stop: vec!["!".into()], ..SamplingParams::default() };
    StreamGenerateRequest { sampling: Some(sampling), ..stream("x") }
}

#[tokio::test]
async fn choices_interleave_and_each_ends_by_itself() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.stream_generate(three_choices()).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    assert_eq!(session.request.n, 3);
    session.text(0, "a").await;
    session.text(2, "c!").await;
    session.text(1, "b").await;
    session.text(2, "dropped").await;
    session.text(0, "A").await;
    session.finish(0, WorkerReason::Length, None).await;
    session.finish(2, WorkerReason::Length, None).await;
    session.text(1, "B").await;
    session.finish(1, WorkerReason::Length, None).await;
    let streamed = Streamed::read(call.await.unwrap()).await;
    assert_eq!([0, 1, 2].map(|choice| streamed.text(choice)), ["aA", "bB", "c"]);
    let ends: Vec<_> = streamed.finish.choices.iter().map(|end| (end.choice, end.reason())).collect();
    assert_eq!(ends, [(0, FinishReason::Length), (1, FinishReason::Length), (2, FinishReason::Stop)]);
    assert_eq!(streamed.finish.usage.unwrap().completion_tokens, 6);
}

#[tokio::test]
async fn a_choice_that_a_stop_string_ended_is_ended_in_the_worker_and_nothing_waits_for_it() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let call = tokio::spawn(async move { client.stream_generate(three_choices()).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    session.text(1, "b!").await;
    let mut endings = cluster.groups[0].worker.endings.subscribe();
    let asked = in_time(endings.wait_for(|endings| !endings.is_empty())).await.unwrap().clone();
    assert_eq!(asked, [EndChoiceRequest { generation_id: GENERATION.to_vec(), choice: 1 }]);
    session.text(1, "too late!").await;
    session.finish(1, WorkerReason::Ended, None).await;
    session.text(0, "a!").await;
    in_time(endings.wait_for(|endings| endings.len() == 2)).await.unwrap();
    // The calls have no answer, and the stream goes on.
    session.text(2, "c").await;
    session.finish(2, WorkerReason::Length, None).await;
    let streamed = Streamed::read(call.await.unwrap()).await;
    assert_eq!([0, 1, 2].map(|choice| streamed.text(choice)), ["a", "b", "c"]);
    let ends: Vec<_> = streamed.finish.choices.iter().map(v1::ChoiceFinish::reason).collect();
    assert_eq!(ends, [FinishReason::Stop, FinishReason::Stop, FinishReason::Length]);
    assert_eq!(endings.borrow().len(), 2, "each is asked for once, and none that ended by itself");
}

#[tokio::test]
async fn the_full_text_begins_with_the_prompt_of_either_kind() {
    let mut cluster = Cluster::start().await;
    let ids = RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![BOS, 72, 105] })) };
    for given in [prompt("Hi"), Some(ids)] {
        let mut client = cluster.client();
        let output = OutputOptions { return_full_text: Some(true), ..OutputOptions::default() };
        let request = GenerateRequest { prompt: given, output: Some(output), ..GenerateRequest::default() };
        let call = tokio::spawn(async move { client.generate(request).await.unwrap().into_inner() });
        let mut session = cluster.session().await;
        session.text(0, "!").await;
        session.finish(0, WorkerReason::Length, None).await;
        let answer = call.await.unwrap();
        assert_eq!((answer.choices[0].text.as_str(), answer.choices[0].token_ids.len()), ("Hi!", 1));
    }
}

#[tokio::test]
async fn answers_of_the_tokenizer_may_be_larger_than_what_clients_may_send() {
    const MIB: usize = 1 << 20;
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client().max_decoding_message_size(64 * MIB);
    // As much text as is allowed. An id of two bytes for each byte, and framing, make 8 MiB and a little.
    let count = v1::CountTokensRequest {
        input: Some(v1::count_tokens_request::Input::Prompt(prompt(&"\u{e9}".repeat(2 * MIB)).unwrap())),
        ..v1::CountTokensRequest::default()
    };
    assert_eq!(client.count_tokens(count).await.unwrap().into_inner().token_count as usize, 4 * MIB + 1);
    // As many bytes as `Decode` may answer with, and their text.
    let text = "x".repeat(32 * MIB);
    *cluster.tokenizers[0].stands_for.lock().unwrap() = Some((b'x', text.clone()));
    let request = GenerateRequest {
        prompt: Some(RawPrompt { prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![u32::from(b'x')] })) }),
        output: Some(OutputOptions { return_full_text: Some(true), ..OutputOptions::default() }),
        ..GenerateRequest::default()
    };
    let call = tokio::spawn(async move { client.generate(request).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    session.text(0, "!").await;
    session.finish(0, WorkerReason::Length, None).await;
    assert!(call.await.unwrap().choices[0].text == text + "!");
}

#[tokio::test]
async fn control_tokens_show_only_if_asked_for() {
    let mut cluster = Cluster::start().await;
    for (skip, expected) in [(true, "a"), (false, "a<|user|><|end|>")] {
        let mut client = cluster.client();
        let output = OutputOptions { skip_special_tokens: Some(skip), ..OutputOptions::default() };
        let request = GenerateRequest { output: Some(output), ..generate("x") };
        let call = tokio::spawn(async move { client.generate(request).await.unwrap().into_inner() });
        let mut session = cluster.session().await;
        session.ids(0, &[u32::from(b'a'), 258, END]).await;
        session.finish(0, WorkerReason::StopToken, Some(END)).await;
        let choice = call.await.unwrap().choices.remove(0);
        assert_eq!((choice.text.as_str(), choice.token_ids.len()), (expected, 3));
    }
}

fn logprobs(token_id: u32) -> TokenLogprobs {
    let logprob = |token_id| Logprob { token_id, logprob: -0.5 };
    TokenLogprobs { token: Some(logprob(token_id)), top: vec![logprob(token_id), logprob(0xc3)] }
}

#[tokio::test]
async fn log_probabilities_carry_texts() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let output = OutputOptions { logprobs: Some(2), prompt_logprobs: Some(2), ..OutputOptions::default() };
    let request = GenerateRequest { output: Some(output), ..generate("p") };
    let call = tokio::spawn(async move { client.generate(request).await.unwrap().into_inner() });
    let mut session = cluster.session().await;
    assert_eq!((session.request.logprobs, session.request.prompt_logprobs), (Some(2), Some(2)));
    let of_prompt = PromptLogprobs { tokens: vec![logprobs(u32::from(b'p'))] };
    session.send(WorkerEvent::PromptLogprobs(of_prompt)).await;
    session.ids_with(0, &[97], vec![logprobs(97)]).await;
    session.finish(0, WorkerReason::Length, None).await;

    let answer = call.await.unwrap();
    let of_prompt: Vec<_> = answer.start.unwrap().prompt_logprobs;
    let texts: Vec<_> = of_prompt.iter().map(|entry| entry.token.clone().unwrap()).collect();
    assert_eq!((texts[0].text.as_str(), texts[0].logprob), ("<|bos|>", 0.0));
    assert_eq!((texts[1].text.as_str(), texts[1].logprob), ("p", -0.5));
    let of_output = &answer.choices[0].logprobs;
    assert_eq!(of_output.len(), 1);
    assert_eq!(of_output[0].top[1].text, "\u{fffd}");
    assert_eq!(of_output[0].top[1].raw, [0xc3]);
}

#[tokio::test]
async fn counting_and_rendering_need_no_group() {
    let cluster = Cluster::start().await;
    let mut client = cluster.client();
    let count = v1::CountTokensRequest {
        input: Some(v1::count_tokens_request::Input::Prompt(prompt("four").unwrap())),
        ..v1::CountTokensRequest::default()
    };
    assert_eq!(client.count_tokens(count).await.unwrap().into_inner().token_count, 5);
    let render = v1::RenderChatRequest { conversation: conversation(&["hi"]), ..v1::RenderChatRequest::default() };
    let rendered = client.render_chat(render).await.unwrap().into_inner();
    assert_eq!((rendered.prompt.as_str(), rendered.token_ids.len()), ("<|user|>hi>", 4));
}

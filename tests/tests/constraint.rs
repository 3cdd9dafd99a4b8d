//! Constraints through the whole cluster: the real programs, started and called as users do.

use anyhow::{Context, Result, ensure};
use lockstep_checkpoint::Encoding;
use lockstep_proto::{
    error::{Error, FieldViolation, Reason},
    v1::{
        ChatRequest, ChoiceList, Constraint, ContentPart, Conversation, FinishReason, Message, Role, SamplingParams,
        StreamChatRequest, choice_finish::MatchedStop, constraint::Kind, content_part::Part,
        inference_service_client::InferenceServiceClient, stream_chat_response::Event,
    },
    worker::v1 as worker,
};
use lockstep_tests::{
    cluster::{Cluster, Process},
    tiny_model::TinyModel,
};
use serde_json::Value;
use tokio_stream::StreamExt;
use tonic::{Status, transport::Channel};

/// One of several choices, as a test looks at it.
#[derive(Debug, PartialEq)]
struct Answer {
    text: String,
    token_ids: Vec<u32>,
    reason: FinishReason,
    matched_stop: Option<MatchedStop>,
}

fn conversation(text: &str) -> Option<Conversation> {
    let part = ContentPart { part: Some(Part::Text(text.to_owned())) };
    let message = Message { role: Role::User.into(), content: vec![part], ..Message::default() };
    Some(Conversation { messages: vec![message], ..Conversation::default() })
}

fn constrained(kind: Kind, sampling: SamplingParams) -> SamplingParams {
    SamplingParams { constraint: Some(Constraint { kind: Some(kind) }), ..sampling }
}

fn greedy() -> SamplingParams {
    SamplingParams { max_new_tokens: Some(160), ..SamplingParams::default() }
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { temperature: Some(0.9), seed: Some(seed), ..greedy() }
}

fn schema(schema: &str) -> Kind {
    Kind::JsonSchema(schema.to_owned())
}

async fn ask(
    client: &mut InferenceServiceClient<Channel>,
    text: &str,
    sampling: SamplingParams,
) -> Result<Vec<Answer>, Status> {
    let request = ChatRequest { conversation: conversation(text), sampling: Some(sampling), ..ChatRequest::default() };
    let response = client.chat(request).await?.into_inner();
    let answers = response.choices.into_iter().map(|choice| {
        let finish = choice.finish.unwrap_or_default();
        let reason = finish.reason();
        Answer { text: text_of(choice.message), token_ids: choice.token_ids, reason, matched_stop: finish.matched_stop }
    });
    Ok(answers.collect())
}

fn text_of(message: Option<Message>) -> String {
    let parts = message.unwrap_or_default().content.into_iter().filter_map(|part| part.part);
    parts.map(|Part::Text(text)| text).collect()
}

/// What the whole cluster refuses a constraint for.
async fn refused(client: &mut InferenceServiceClient<Channel>, kind: Kind) -> Result<(Reason, Vec<FieldViolation>)> {
    let answer = ask(client, "Say something.", constrained(kind, greedy())).await;
    let error = Error::from_status(&answer.err().context("it was to be refused")?);
    Ok((error.reason(), error.field_violations().to_vec()))
}

// === what texts are ===

fn is_json(text: &str, holds: impl Fn(&Value) -> bool) -> bool {
    serde_json::from_str(text).is_ok_and(|value| holds(&value))
}

fn is_person(text: &str) -> bool {
    is_json(text, |value| {
        let name = value["name"].as_str().is_some_and(|name| (1..=12).contains(&name.chars().count()));
        let age = value["age"].as_u64().is_some_and(|age| age <= 120);
        let mood = value["mood"].as_str().is_some_and(|mood| ["happy", "sad"].contains(&mood));
        let is_alone = value.as_object().is_some_and(|object| object.len() == 3);
        name && age && mood && is_alone
    })
}

const PERSON: &str = r#"{ "type": "object", "additionalProperties": false, "required": ["name", "age", "mood"],
    "properties": { "name": { "type": "string", "minLength": 1, "maxLength": 12 },
                    "age": { "type": "integer", "minimum": 0, "maximum": 120 },
                    "mood": { "enum": ["happy", "sad"] } } }"#;

fn is_route(text: &str) -> bool {
    is_json(text, |value| {
        let stops = value["stops"].as_array().map(Vec::as_slice).unwrap_or_default();
        let is_stop = |stop: &Value| {
            let code = stop["code"].as_str().unwrap_or_default();
            let letters = code.chars().take(2).all(|letter| letter.is_ascii_uppercase());
            let digits = code.chars().skip(2).all(|digit| digit.is_ascii_digit());
            code.len() == 5 && letters && digits && stop["km"].as_f64().is_some_and(|km| (0.0..=99.0).contains(&km))
        };
        (1..=3).contains(&stops.len()) && stops.iter().all(is_stop)
    })
}

const ROUTE: &str = r##"{ "type": "object", "additionalProperties": false, "required": ["stops"],
    "properties": { "stops": { "type": "array", "minItems": 1, "maxItems": 3, "items": { "$ref": "#/$defs/stop" } } },
    "$defs": { "stop": { "type": "object", "additionalProperties": false, "required": ["code", "km"],
        "properties": { "code": { "type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$" },
                        "km": { "type": "number", "minimum": 0, "maximum": 99 } } } } }"##;

/// `1 + (2 * 34)`, at most so deep.
fn is_sum(text: &str) -> bool {
    let depth = text.chars().try_fold(0_i32, |depth, character| match character {
        '(' => Some(depth + 1),
        ')' => (depth > 0).then(|| depth - 1),
        '0'..='9' | ' ' | '+' | '*' => Some(depth),
        _ => None,
    });
    depth == Some(0) && text.ends_with([')', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'])
}

const SUM_GBNF: &str = "root ::= term (op term){1,2}\nterm ::= number | \"(\" number op number \")\"\n\
                        number ::= [0-9]{1,2}\nop ::= \" + \" | \" * \"\n";
const SUM_LARK: &str = "start: term (OP term){1,2}\nterm: NUMBER | \"(\" NUMBER OP NUMBER \")\"\n\
                        NUMBER: /[0-9]{1,2}/\nOP: \" + \" | \" * \"\n";

#[tokio::test]
async fn every_answer_is_what_the_constraint_says_however_it_is_sampled() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = cluster.inference().await?;
    let colours = ["red", "redder", "\"blue\"\n", "grün"];
    let choices = Kind::Choices(ChoiceList { choices: colours.map(str::to_owned).to_vec() });
    let is_date = |text: &str| text.len() == 10 && text.is_ascii() && text.as_bytes()[4] == b'-';
    type Holds<'a> = &'a dyn Fn(&str) -> bool;
    let cases: [(&str, Kind, Holds<'_>); 7] = [
        ("Describe a person.", schema(PERSON), &is_person),
        ("Plan a route.", schema(ROUTE), &is_route),
        ("Is water wet?", schema(r#"{ "enum": [true, false, "maybe"] }"#), &|text| {
            ["true", "false", "\"maybe\""].contains(&text)
        }),
        ("When was the moon landing?", Kind::Regex("(19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]".into()), &is_date),
        ("What is the colour of the sky?", choices, &|text| colours.contains(&text)),
        ("Add some numbers.", Kind::Gbnf(SUM_GBNF.into()), &is_sum),
        ("Add some numbers.", Kind::Lark(SUM_LARK.into()), &is_sum),
    ];
    for (text, kind, holds) in cases {
        let mut all = ask(&mut client, text, constrained(kind.clone(), greedy())).await?;
        for seed in 0..3 {
            let sampling = SamplingParams { n: Some(3), ..sampled(seed) };
            all.extend(ask(&mut client, text, constrained(kind.clone(), sampling)).await?);
        }
        assert_eq!(all.len(), 10);
        for answer in &all {
            assert!(holds(&answer.text), "{kind:?}: {answer:?}");
            assert_eq!(answer.reason, FinishReason::Stop, "{kind:?}: {answer:?}");
        }
    }
    // Tokens may be named by id, whatever they are.
    let named = Kind::Lark("start: \"ok\" <[40000]>".into());
    let [answer] = &ask(&mut client, "Say it.", constrained(named, greedy())).await?[..] else { panic!("one") };
    assert_eq!((answer.token_ids.last(), answer.reason), (Some(&40_000), FinishReason::Stop), "{answer:?}");
    let steps_that_waited = cluster.groups[0][0].metric("lockstep_worker_mask_wait_seconds_count").await?;
    let compiled = cluster.groups[0][0].metric("lockstep_worker_constraint_compile_seconds_count").await?;
    assert!(steps_that_waited > 100.0 && compiled == 29.0, "{steps_that_waited} {compiled}");
    cluster.stop().await
}

#[tokio::test]
async fn a_seed_gives_the_same_constrained_tokens_at_every_world_size() -> Result<()> {
    let mut all = Vec::new();
    for world_size in [1, 2, 3] {
        let cluster = Cluster::builder().world_size(world_size).start().await?;
        let mut client = cluster.inference().await?;
        let mut answers = ask(&mut client, "Describe a person.", constrained(schema(PERSON), greedy())).await?;
        let sampling = SamplingParams { n: Some(2), ..sampled(5) };
        answers.extend(ask(&mut client, "Plan a route.", constrained(schema(ROUTE), sampling)).await?);
        assert!(is_person(&answers[0].text) && is_route(&answers[1].text) && is_route(&answers[2].text));
        assert_ne!(answers[1].token_ids, answers[2].token_ids, "two choices of one seed differ");
        all.push(answers);
        cluster.stop().await?;
    }
    assert_eq!(all[0], all[1]);
    assert_eq!(all[0], all[2]);
    Ok(())
}

#[tokio::test]
async fn who_runs_beside_a_constraint_says_what_it_says_alone() -> Result<()> {
    // Not all of them fit: some are preempted and go on later.
    let cluster = Cluster::builder().worker_arg("--engine.kv-cache-tokens").worker_arg("768").start().await?;
    let mut client = cluster.inference().await?;
    let story = |seed| SamplingParams { ignore_eos: Some(true), n: Some(2), ..sampled(seed) };
    let person = |seed| constrained(schema(PERSON), sampled(seed));
    let mut alone = Vec::new();
    for seed in 0..3 {
        alone.push((
            ask(&mut client, "Tell me a story.", story(seed)).await?,
            ask(&mut client, "Who?", person(seed)).await?,
        ));
    }
    let beside = (0..3).map(|seed| {
        let mut clients = (client.clone(), client.clone());
        async move {
            tokio::try_join!(
                ask(&mut clients.0, "Tell me a story.", story(seed)),
                ask(&mut clients.1, "Who?", person(seed))
            )
        }
    });
    let beside = futures_util::future::try_join_all(beside).await?;
    assert_eq!(alone, beside);
    cluster.stop().await
}

#[tokio::test]
async fn what_ends_an_answer_otherwise_still_does() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = cluster.inference().await?;
    let digits = || Kind::Regex("[0-9]{12}".into());
    let short = SamplingParams { max_new_tokens: Some(3), ..greedy() };
    let [cut] = &ask(&mut client, "Count.", constrained(digits(), short)).await?[..] else { panic!("one") };
    assert_eq!((cut.token_ids.len(), cut.reason), (3, FinishReason::Length), "{cut:?}");

    let [whole] = &ask(&mut client, "Count.", constrained(digits(), greedy())).await?[..] else { panic!("one") };
    assert_eq!((whole.text.len(), whole.reason, &whole.matched_stop), (12, FinishReason::Stop, &None), "{whole:?}");
    let n_tokens = u32::try_from(whole.token_ids.len())?;
    let just_enough = SamplingParams { max_new_tokens: Some(n_tokens), ..greedy() };
    let [exact] = &ask(&mut client, "Count.", constrained(digits(), just_enough)).await?[..] else { panic!("one") };
    assert_eq!(exact, whole, "complete, not cut, with its last token");

    let stop = whole.text[4..6].to_owned();
    let stopping = SamplingParams { stop: vec![stop.clone()], ..greedy() };
    let [stopped] = &ask(&mut client, "Count.", constrained(digits(), stopping)).await?[..] else { panic!("one") };
    assert_eq!(stopped.matched_stop, Some(MatchedStop::Stop(stop)));
    assert!(whole.text.starts_with(&stopped.text) && stopped.text.len() <= 4, "{stopped:?}");

    // An end-of-turn token may come where the text may end, and nothing ends it before it must without one.
    let open = || Kind::Regex("[a-z ]+".into());
    let [ended] = &ask(&mut client, "Say hello.", constrained(open(), greedy())).await?[..] else { panic!("one") };
    assert!(matches!(ended.matched_stop, Some(MatchedStop::TokenId(_))), "{ended:?}");
    let ignoring = SamplingParams { max_new_tokens: Some(64), ignore_eos: Some(true), ..greedy() };
    let [on] = &ask(&mut client, "Say hello.", constrained(open(), ignoring.clone())).await?[..] else { panic!("one") };
    assert_eq!((on.token_ids.len(), on.reason), (64, FinishReason::Length), "{on:?}");
    let [full] = &ask(&mut client, "Count.", constrained(digits(), ignoring)).await?[..] else { panic!("one") };
    assert_eq!(full, whole);
    cluster.stop().await
}

/// A stream that goes on while others are served.
async fn story(client: &mut InferenceServiceClient<Channel>, sampling: SamplingParams) -> Result<Vec<u32>> {
    let request = StreamChatRequest {
        conversation: conversation("Tell me a story."),
        sampling: Some(sampling),
        ..StreamChatRequest::default()
    };
    let mut stream = client.stream_chat(request).await?.into_inner();
    let mut ids = Vec::new();
    while let Some(response) = stream.next().await {
        if let Some(Event::Chunk(chunk)) = response?.event {
            ids.extend(chunk.token_ids);
        }
    }
    Ok(ids)
}

#[tokio::test]
async fn hostile_constraints_are_refused_by_name_and_nobody_else_is_held_up() -> Result<()> {
    let cluster = Cluster::builder().start().await?;
    let mut client = cluster.inference().await?;
    let long = SamplingParams { max_new_tokens: Some(300), ignore_eos: Some(true), ..greedy() };
    let alone = story(&mut client, long.clone()).await?;
    assert_eq!(alone.len(), 300);

    let mut teller = client.clone();
    let told = tokio::spawn(async move { story(&mut teller, long).await });
    let optional: String = (0..5_000).map(|i| format!("\"{i:x}\":{{}},")).collect();
    let deep = format!("{}{}", r#"{"items":"#.repeat(6_000), "}".repeat(6_000));
    let patterns = (0..3_000).map(|i| format!("\"^{i:x}z$\":{{}}")).collect::<Vec<_>>().join(",");
    let repeats: String = (900..3_900).map(|n| format!("(\"a\"|\"b\"){{{n}}} ")).collect();
    let hostile = [
        (schema("false"), "json_schema", "Unsatisfiable schema"),
        (schema(r##"{ "$ref": "#" }"##), "json_schema", "allows no text"),
        (schema(&deep), "json_schema", "recursion limit"),
        (schema(&format!(r#"{{ "properties": {{ {} "x": {{}} }} }}"#, optional)), "json_schema", "to compile"),
        // By itself that takes six minutes, and the next 100 MiB.
        (schema(&format!(r#"{{ "patternProperties": {{ {patterns} }} }}"#)), "json_schema", "to compile"),
        (Kind::Lark(format!("start: {repeats}")), "lark", "to compile"),
        (Kind::Gbnf("root ::= <|nobody|>".into()), "gbnf", "unknown special token"),
        (Kind::Regex("(".repeat(20_000)), "regex", "regex"),
        (Kind::Regex("x".repeat(70_000)), "regex", "70000 bytes are over 65536"),
    ];
    for (kind, field, says) in hostile {
        let (reason, violations) = refused(&mut client, kind).await?;
        assert_eq!(reason, Reason::InvalidArgument, "{field}, {says}: {violations:?}");
        let [violation] = &violations[..] else { panic!("{violations:?}") };
        assert_eq!(violation.path, format!("sampling.constraint.{field}"));
        assert!(violation.message.contains(says) && !violation.message.contains('\n'), "{field}: {violation:?}");
    }
    // These compile. One is merely long; the masks of the other take longer and longer.
    let huge = SamplingParams { max_new_tokens: Some(20), ..greedy() };
    let [cut] = &ask(&mut client, "Go.", constrained(Kind::Regex("((a|b|c){1000}){1000}".into()), huge)).await?[..]
    else {
        panic!("one")
    };
    assert!(cut.text.chars().all(|letter| "abc".contains(letter)) && cut.reason == FinishReason::Length, "{cut:?}");
    let ambiguous = Kind::Lark("start: e\ne: e e | e e e | \"a\"\n".into());
    let endless = SamplingParams { max_new_tokens: Some(4_000), ..greedy() };
    let failed =
        ask(&mut client, "Go.", constrained(ambiguous, endless)).await.expect_err("it gets slower without end");
    let error = Error::from_status(&failed);
    let [violation] = error.field_violations() else { panic!("{error:?}") };
    assert_eq!((error.reason(), violation.path.as_str()), (Reason::InvalidArgument, "sampling.constraint.lark"));

    assert_eq!(told.await??, alone);
    cluster.stop().await
}

#[tokio::test]
async fn a_model_without_a_vocabulary_takes_no_constraints() -> Result<()> {
    let folder = tempfile::tempdir()?;
    TinyModel { encoding: Encoding::NF4, ..TinyModel::default() }.in_fitting_container().write(folder.path())?;
    std::fs::remove_file(folder.path().join("tokenizer.json"))?;
    let args = ["--model.path".to_owned(), folder.path().display().to_string()];
    let mut leader = Process::start("lockstep-worker", "leader", args.to_vec()).await?;
    leader.wait_ready("lockstep.worker.v1.WorkerService").await?;
    let mut client = worker::worker_service_client::WorkerServiceClient::new(leader.channel().await?);
    let constraint = worker::Constraint { kind: Some(worker::constraint::Kind::Regex("a".into())) };
    let sampling = worker::ResolvedSampling {
        max_new_tokens: 4,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        constraint: Some(constraint),
        ..worker::ResolvedSampling::default()
    };
    let request = worker::GenerateRequest {
        request_id: "any".into(),
        prompt_token_ids: vec![5, 6],
        sampling: Some(sampling),
        n: 1,
        ..worker::GenerateRequest::default()
    };
    let error = Error::from_status(&client.generate(request).await.expect_err("nobody knows its tokens"));
    assert_eq!(error.reason(), Reason::Unimplemented, "{error}");
    ensure!(error.message().contains("its files have no vocabulary"), "{error}");
    leader.terminate().await
}

//! Strict tools through the whole cluster, with models that write calls each in its own way and would never by themselves
//! write one that is right: their weights are random, and a bias makes them begin.

use std::{collections::HashMap, path::Path};

use anyhow::{Context, Result};
use lockstep_checkpoint::Encoding;
use lockstep_proto::{
    error::{Error, Reason},
    v1::{
        ChatChoice, ChatRequest, ContentPart, Conversation, FinishReason, Message, Role, SamplingParams, Tool,
        content_part::Part, inference_service_client::InferenceServiceClient,
    },
};
use lockstep_tests::{
    cluster::Cluster,
    tiny_model::{CHATML, TinyModel},
};
use serde_json::{Value, json};
use tonic::{Status, transport::Channel};

/// The token that begins calls. It takes the place of the last one of the tiny model's vocabulary.
const OPENING: u32 = 383;
/// The token of a byte, less the byte.
const BYTES: u32 = 3;
const BRACE: u32 = BYTES + b'{' as u32;

/// Writes a model whose template shows tools and names what begins calls, which is a token.
fn write_model(folder: &Path, opening: &str, is_control: bool) -> Result<()> {
    let chat_template = Some(format!("{CHATML}{{% if tools %}}{{{{ '{opening}' }}}}{{% endif %}}"));
    let tiny = TinyModel { chat_template, encoding: Encoding::NF4, ..TinyModel::default() };
    tiny.in_fitting_container().write(folder)?;
    let path = folder.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let model = &mut tokenizer["model"];
    model["vocab"].as_object_mut().context("ids by text")?.retain(|_, id| *id != json!(OPENING));
    model["merges"].as_array_mut().context("merges")?.pop();
    tokenizer["added_tokens"].as_array_mut().context("added tokens")?.push(json!({
        "id": OPENING, "content": opening, "special": is_control, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false
    }));
    Ok(std::fs::write(path, tokenizer.to_string())?)
}

fn tool(strict: bool, schema: &Value) -> Tool {
    Tool { name: "set".into(), description: String::new(), parameters_json: schema.to_string(), strict }
}

/// Eight answers of at most 150 tokens, with this bias of the tokens.
async fn ask(
    client: &mut InferenceServiceClient<Channel>,
    tool: Tool,
    logit_bias: &[(u32, f32)],
) -> Result<Vec<ChatChoice>, Status> {
    let content = vec![ContentPart { part: Some(Part::Text("Set it.".into())) }];
    let message = Message { role: Role::User.into(), content, ..Message::default() };
    let conversation = Conversation { messages: vec![message], tools: vec![tool], ..Conversation::default() };
    let sampling = SamplingParams {
        max_new_tokens: Some(150),
        temperature: Some(1.0),
        seed: Some(3),
        n: Some(8),
        logit_bias: HashMap::from_iter(logit_bias.iter().copied()),
        ..SamplingParams::default()
    };
    let (conversation, sampling) = (Some(conversation), Some(sampling));
    let request = ChatRequest { conversation, sampling, ..ChatRequest::default() };
    Ok(client.chat(request).await?.into_inner().choices)
}

fn text_of(choice: &ChatChoice) -> String {
    let parts = choice.message.iter().flat_map(|message| &message.content).filter_map(|part| part.part.as_ref());
    parts.map(|Part::Text(text)| text.as_str()).collect()
}

/// How many calls the answers make, all of which must be right.
fn count_calls(choices: &[ChatChoice]) -> usize {
    let mut n_calls = 0;
    for choice in choices {
        let calls = choice.message.as_ref().map_or(&[][..], |message| &message.tool_calls);
        let cut = choice.finish.as_ref().is_some_and(|finish| finish.reason() == FinishReason::Length);
        for call in &calls[..calls.len() - usize::from(cut && !calls.is_empty())] {
            let arguments: Value = serde_json::from_str(&call.arguments_json).expect("JSON");
            let fits = arguments.as_object().is_some_and(|object| object.len() == 2)
                && arguments["to"].as_u64().is_some_and(|to| to <= 99)
                && ["day", "night"].contains(&arguments["when"].as_str().unwrap_or_default());
            assert!(fits && call.name == "set", "{call:?}");
            n_calls += 1;
        }
    }
    n_calls
}

async fn check(opening: &str, is_control: bool, begin: u32) -> Result<()> {
    let folder = tempfile::tempdir()?;
    write_model(folder.path(), opening, is_control)?;
    let cluster = Cluster::builder().model(folder.path()).start().await?;
    let mut client = cluster.inference().await?;
    let schema = json!({
        "type": "object", "required": ["to", "when"],
        "properties": { "to": { "type": "integer", "minimum": 0, "maximum": 99 }, "when": { "enum": ["day", "night"] } }
    });

    let biased = [(begin, 12.0)];
    let loose = ask(&mut client, tool(false, &schema), &biased).await?;
    assert_eq!(count_calls(&loose), 0, "a model of random weights knows no call");
    let strict = ask(&mut client, tool(true, &schema), &biased).await?;
    let n_calls = count_calls(&strict);
    assert!(n_calls >= 4, "{opening}: {n_calls} calls: {strict:?}");

    // Where none begins and text is text, the model says what it would have said.
    let no_text = [OPENING, BRACE, 0, 1].into_iter().chain(BYTES + 0x80..=BYTES + 0xFF);
    let free: Vec<_> = no_text.map(|id| (id, -100.0)).collect();
    let loose = ask(&mut client, tool(false, &schema), &free).await?;
    let strict = ask(&mut client, tool(true, &schema), &free).await?;
    assert!(strict.iter().all(|choice| !text_of(choice).is_empty()));
    assert_eq!(strict, loose, "{opening}");

    let impossible = json!({ "properties": { "to": { "not": { "type": "string" } } } });
    ask(&mut client, tool(false, &impossible), &[]).await?;
    let refused = ask(&mut client, tool(true, &impossible), &[]).await.expect_err("it cannot be held");
    let error = Error::from_status(&refused);
    let [violation] = error.field_violations() else { panic!("{error:?}") };
    assert_eq!((error.reason(), violation.path.as_str()), (Reason::InvalidArgument, "conversation.tools"));
    cluster.stop().await
}

#[tokio::test]
async fn strict_calls_of_hermes_fit_their_schema() -> Result<()> {
    check("<tool_call>", false, OPENING).await
}

#[tokio::test]
async fn strict_calls_of_mistral_fit_their_schema() -> Result<()> {
    check("[TOOL_CALLS]", true, OPENING).await
}

#[tokio::test]
async fn strict_calls_of_llama_fit_their_schema() -> Result<()> {
    check("<|python_tag|>", true, OPENING).await?;
    check("<|python_tag|>", true, BRACE).await
}

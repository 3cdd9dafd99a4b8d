//! Tools: shown to the model, called by it, and held to.

use lockstep_proto::{
    v1::{self, ChatRequest, FinishReason, StreamChatRequest, Tool, ToolChoice, ToolChoiceMode},
    worker::v1::{FinishReason as WorkerReason, constraint::Kind},
};

use super::{
    cluster::{Cluster, in_time},
    fake_tokenizer::END,
    life::conversation,
};

const CALL: &str = r#"{"name": "get_weather", "arguments": {"city": "Köln"}}"#;

fn with_tool(choice: Option<ToolChoice>) -> ChatRequest {
    let mut talk = conversation(&["Hot?"]).unwrap();
    let parameters_json = r#"{"type":"object","properties":{"city":{"type":"string"}}}"#.into();
    let description = "Says it.".into();
    talk.tools = vec![Tool { name: "get_weather".into(), description, parameters_json, ..Tool::default() }];
    talk.tool_choice = choice;
    ChatRequest { conversation: Some(talk), ..ChatRequest::default() }
}

fn choose(mode: ToolChoiceMode, parallel: Option<bool>) -> Option<ToolChoice> {
    Some(ToolChoice { mode: mode.into(), name: String::new(), parallel })
}

#[tokio::test]
async fn a_call_is_no_text_and_ends_the_answer_as_one() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let answer = tokio::spawn(async move { client.chat(with_tool(None)).await });
    let mut session = cluster.session().await;
    let prompt: Vec<u8> = session.request.prompt_token_ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
    let prompt = String::from_utf8(prompt).unwrap();
    assert!(prompt.contains(r#""name":"get_weather","description":"Says it.""#), "the tool is shown: {prompt}");
    session.text(0, CALL).await;
    session.ids(0, &[END]).await;
    session.finish(0, WorkerReason::StopToken, Some(END)).await;
    let choice = in_time(answer).await.unwrap().unwrap().into_inner().choices.remove(0);
    let message = choice.message.unwrap();
    assert_eq!((message.content.len(), message.tool_calls.len()), (1, 1));
    let call = &message.tool_calls[0];
    assert_eq!((call.name.as_str(), call.arguments_json.as_str()), ("get_weather", r#"{"city": "Köln"}"#));
    assert_eq!(call.id.len(), 9);
    assert_eq!(choice.finish.unwrap().reason(), FinishReason::ToolCalls);
}

#[tokio::test]
async fn arguments_are_streamed_as_they_come() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let ChatRequest { conversation, .. } = with_tool(None);
    let request = StreamChatRequest { conversation, ..StreamChatRequest::default() };
    let answer = tokio::spawn(async move { client.stream_chat(request).await });
    let mut session = cluster.session().await;
    let (begun, rest) = CALL.split_at(40);
    session.text(0, begun).await;
    let mut stream = in_time(answer).await.unwrap().unwrap().into_inner();
    let mut next = async || in_time(stream.message()).await.unwrap().unwrap().event.unwrap();
    assert!(matches!(next().await, v1::stream_chat_response::Event::Start(_)));
    let mut arguments = String::new();
    while arguments.is_empty() {
        let v1::stream_chat_response::Event::Chunk(chunk) = next().await else { panic!("a chunk follows") };
        assert_eq!(chunk.text, "");
        arguments.extend(chunk.tool_calls.into_iter().map(|delta| delta.arguments_json));
    }
    assert!(r#"{"city": "Köln"}"#.starts_with(&arguments), "before the call has ended: {arguments}");
    session.text(0, rest).await;
    session.finish(0, WorkerReason::Length, None).await;
    let finish = loop {
        match next().await {
            v1::stream_chat_response::Event::Chunk(chunk) => {
                arguments.extend(chunk.tool_calls.into_iter().map(|delta| delta.arguments_json));
            }
            v1::stream_chat_response::Event::Finish(finish) => break finish,
            v1::stream_chat_response::Event::Start(_) => panic!("one start"),
        }
    };
    assert_eq!(arguments, r#"{"city": "Köln"}"#);
    assert_eq!(finish.choices[0].reason(), FinishReason::Length);
}

#[tokio::test]
async fn where_one_call_is_allowed_it_is_the_end() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let request = with_tool(choose(ToolChoiceMode::Auto, Some(false)));
    let answer = tokio::spawn(async move { client.chat(request).await });
    let mut session = cluster.session().await;
    session.text(0, &format!("[{CALL}, {CALL}]")).await;
    let choice = in_time(answer).await.unwrap().unwrap().into_inner().choices.remove(0);
    assert_eq!(choice.message.unwrap().tool_calls.len(), 1);
    assert_eq!(choice.finish.unwrap().reason(), FinishReason::ToolCalls);
    in_time(session.dropped()).await;
}

#[tokio::test]
async fn a_call_that_must_be_made_is_held_to_its_schema() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.client();
    let request = with_tool(choose(ToolChoiceMode::Required, None));
    let answer = tokio::spawn(async move { client.chat(request).await });
    let mut session = cluster.session().await;
    let constraint = session.request.sampling.take().unwrap().constraint.unwrap();
    let Some(Kind::Lark(lark)) = constraint.kind else { panic!("a grammar: {constraint:?}") };
    assert!(lark.contains(r#"object_0: "{\"name\": \"get_weather\", \"arguments\": " arguments_0 "}""#), "{lark}");
    assert!(lark.contains(r#"arguments_0: %json {"type":"object","properties":{"city":{"type":"string"}}"#), "{lark}");
    session.text(0, CALL).await;
    session.finish(0, WorkerReason::Complete, None).await;
    let choice = in_time(answer).await.unwrap().unwrap().into_inner().choices.remove(0);
    assert_eq!(choice.finish.unwrap().reason(), FinishReason::ToolCalls);
}

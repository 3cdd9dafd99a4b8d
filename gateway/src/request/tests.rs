//! Every rule of the contract is broken once here, and each violation must be named with its path and values.

use lockstep_proto::{
    tokenizer::v1::GetTokenizerResponse,
    v1::{
        ChatRequest, ContentPart, Conversation, CountTokensRequest, Document, GenerateRequest, Message, OutputOptions,
        RawPrompt, Role, SamplingParams, TokenIds, Tool, ToolCall, ToolChoice, ToolChoiceMode, content_part::Part,
        count_tokens_request::Input, raw_prompt::Prompt,
    },
};

use super::prompt::MAX_TEXT_BYTES;
use super::*;
use crate::sampling::Policy;

fn facts() -> ModelFacts {
    let tokenizer =
        GetTokenizerResponse { vocab_size: 100, chat_template: "x".into(), ..GetTokenizerResponse::default() };
    ModelFacts::new(&tokenizer, 64).unwrap()
}

fn user(text: &str) -> Message {
    let content = vec![ContentPart { part: Some(Part::Text(text.into())) }];
    Message { role: Role::User.into(), content, ..Message::default() }
}

fn hello() -> Conversation {
    Conversation { messages: vec![user("hello")], ..Conversation::default() }
}

fn chat(request: ChatRequest) -> Result<ValidChat, String> {
    let (facts, policy) = (facts(), Policy::default());
    let rules = Rules { facts: &facts, policy: policy.for_model("any") };
    ValidChat::new(request, rules).map_err(|error| error.to_string())
}

fn generate(request: GenerateRequest) -> Result<ValidGenerate, String> {
    let (facts, policy) = (facts(), Policy::default());
    let rules = Rules { facts: &facts, policy: policy.for_model("any") };
    ValidGenerate::new(request, rules).map_err(|error| error.to_string())
}

/// Changes a sound conversation and expects these violations, and no others.
#[track_caller]
fn check(change: impl FnOnce(&mut Conversation), expected: &str) {
    let mut conversation = hello();
    change(&mut conversation);
    let answer = chat(ChatRequest { conversation: Some(conversation), ..ChatRequest::default() });
    assert_eq!(answer.map(|_| ()).unwrap_err(), expected);
}

#[track_caller]
fn check_sampling(sampling: SamplingParams, expected: &str) {
    let request = ChatRequest { conversation: Some(hello()), sampling: Some(sampling), ..ChatRequest::default() };
    assert_eq!(chat(request).map(|_| ()).unwrap_err(), expected);
}

#[test]
fn a_plain_request_is_valid_and_takes_the_contract_s_defaults() {
    let valid = chat(ChatRequest { conversation: Some(hello()), ..ChatRequest::default() }).unwrap();
    assert_eq!(valid.conversation().ending(), Ending::GenerationPrompt);
    assert_eq!((valid.sampling().n(), valid.sampling().stop().len()), (1, 0));
    assert_eq!((valid.output().logprobs(), valid.output().prompt_logprobs()), (None, None));
    assert!(valid.output().skip_special_tokens() && !valid.output().return_full_text());
}

#[test]
fn all_violations_of_a_request_are_reported_at_once() {
    let mut conversation = hello();
    conversation.messages[0].role = 9;
    let request = ChatRequest {
        conversation: Some(conversation),
        sampling: Some(SamplingParams { top_p: Some(1.5), n: Some(0), ..SamplingParams::default() }),
        output: Some(OutputOptions { logprobs: Some(21), ..OutputOptions::default() }),
        ..ChatRequest::default()
    };
    let expected = "conversation.messages[0].role: 9 is no role; sampling.top_p: 1.5 is not in (0, 1]; \
                    sampling.n: 0 is not in [1, 128]; output.logprobs: 21 is over 20";
    assert_eq!(chat(request).map(|_| ()).unwrap_err(), expected);
}

#[test]
fn a_conversation_needs_messages_with_roles_and_parts() {
    check(|talk| talk.messages.clear(), "conversation.messages: there is no message");
    check(|talk| talk.messages[0].role = 0, "conversation.messages[0].role: 0 is no role");
    check(
        |talk| talk.messages[0].content.push(ContentPart { part: None }),
        "conversation.messages[0].content[1]: the part is not set",
    );
    check(|talk| talk.messages = vec![user(""); 4_097], "conversation.messages: 4097 messages are over 4096");
    check(
        |talk| talk.messages[0] = user(&"x".repeat(MAX_TEXT_BYTES + 1)),
        "conversation: 4194305 bytes of text are over 4194304",
    );
}

#[test]
fn every_string_of_a_conversation_counts_against_its_size() {
    let half = "x".repeat(MAX_TEXT_BYTES / 2);
    check(
        |talk| {
            talk.messages[0] = user("");
            talk.documents = vec![Document { title: half.clone(), text: half.clone() + "x" }];
        },
        "conversation: 4194305 bytes of text are over 4194304",
    );
}

#[test]
fn parts_of_a_message_are_joined() {
    let mut conversation = hello();
    conversation.messages[0].content.push(ContentPart { part: Some(Part::Text(", you".into())) });
    let valid = chat(ChatRequest { conversation: Some(conversation), ..ChatRequest::default() }).unwrap();
    assert_eq!(valid.conversation().messages()[0].content, "hello, you");
}

#[test]
fn tool_fields_go_with_their_roles() {
    let call = ToolCall { name: "f".into(), ..ToolCall::default() };
    check(
        |talk| talk.messages[0].tool_calls = vec![call.clone()],
        "conversation.messages[0].tool_calls: only a ROLE_ASSISTANT message calls tools",
    );
    check(
        |talk| talk.messages[0].tool_call_id = "1".into(),
        "conversation.messages[0].tool_call_id: only a ROLE_TOOL message answers a call",
    );
    check(
        |talk| {
            talk.messages[0].role = Role::Assistant.into();
            talk.messages[0].tool_calls = vec![
                ToolCall { arguments_json: "[1]".into(), ..call.clone() },
                ToolCall { arguments_json: "{".into(), ..ToolCall::default() },
            ];
        },
        "conversation.messages[0].tool_calls[0].arguments_json: not a JSON object: invalid type: sequence, expected a \
         map at line 1 column 0; conversation.messages[0].tool_calls[1].name: the name is empty; \
         conversation.messages[0].tool_calls[1].arguments_json: not a JSON object: EOF while parsing an object at \
         line 1 column 1",
    );
    check(
        |talk| {
            talk.messages[0].role = Role::Assistant.into();
            talk.messages[0].tool_calls = vec![call.clone(); 129];
        },
        "conversation.messages[0].tool_calls: 129 entries are over 128",
    );
}

#[test]
fn tools_and_the_choice_among_them_are_checked() {
    check(
        |talk| talk.tools = vec![Tool { name: "x".repeat(257), ..Tool::default() }],
        "conversation.tools[0].name: 257 bytes are over 256",
    );
    check(|talk| talk.documents = vec![Document::default(); 129], "conversation.documents: 129 entries are over 128");
    check(
        |talk| talk.tool_choice = Some(ToolChoice { mode: 7, ..ToolChoice::default() }),
        "conversation.tool_choice.mode: 7 is no mode",
    );
    check(
        |talk| talk.tool_choice = Some(ToolChoice { name: "f".into(), ..ToolChoice::default() }),
        "conversation.tool_choice.name: a name goes with TOOL_CHOICE_MODE_NAMED alone",
    );
    let choice = |mode: ToolChoiceMode, name: &str| ToolChoice { mode: mode.into(), name: name.into(), parallel: None };
    check(
        |talk| talk.tool_choice = Some(choice(ToolChoiceMode::Required, "")),
        "conversation.tool_choice.mode: there are no tools to call",
    );
    check(
        |talk| talk.tool_choice = Some(choice(ToolChoiceMode::Named, "f")),
        "conversation.tool_choice.name: no tool has this name",
    );
    let tool = Tool { name: "f".into(), ..Tool::default() };
    check(|talk| talk.tools = vec![tool.clone(); 2], "conversation.tools[1].name: another tool has this name");
}

#[test]
fn a_call_that_must_be_made_is_a_constraint_and_the_only_one() {
    let mut conversation = hello();
    conversation.tools = vec![Tool { name: "f".into(), ..Tool::default() }];
    let mode = ToolChoiceMode::Named.into();
    conversation.tool_choice = Some(ToolChoice { mode, name: "f".into(), parallel: None });
    let mut request = ChatRequest { conversation: Some(conversation), ..ChatRequest::default() };
    let valid = chat(request.clone()).unwrap();
    assert_eq!(valid.sampling().constraint_path(), Some("conversation.tools"));
    assert!(!valid.tools().unwrap().single);
    let kind = Some(lockstep_proto::v1::constraint::Kind::Regex("x".into()));
    let constraint = Some(lockstep_proto::v1::Constraint { kind });
    request.sampling = Some(SamplingParams { constraint, ..SamplingParams::default() });
    let refused = chat(request).unwrap_err().to_string();
    assert!(refused.starts_with("conversation.tools: the answer's constraint"), "{refused}");
}

#[test]
fn a_call_that_may_be_made_is_a_constraint_if_a_tool_is_strict() {
    let chat_template = "{{ tools }} <tool_call>".into();
    let tokenizer = GetTokenizerResponse { vocab_size: 9, chat_template, ..GetTokenizerResponse::default() };
    let (facts, policy) = (ModelFacts::new(&tokenizer, 64).unwrap(), Policy::default());
    let rules = Rules { facts: &facts, policy: policy.for_model("any") };
    for (strict, path) in [([false, false], None), ([false, true], Some("conversation.tools"))] {
        let tool = |(name, strict): (&str, bool)| Tool { name: name.into(), strict, ..Tool::default() };
        let tools = ["f", "g"].into_iter().zip(strict).map(tool).collect();
        let conversation = Some(Conversation { tools, ..hello() });
        let valid = ValidChat::new(ChatRequest { conversation, ..ChatRequest::default() }, rules).unwrap();
        assert_eq!(valid.sampling().constraint_path(), path);
        assert!(!valid.tools().unwrap().forced);
    }
}

#[test]
fn tools_that_may_not_be_called_are_not_shown() {
    let mut conversation = hello();
    conversation.tools = vec![Tool { name: "f".into(), ..Tool::default() }];
    conversation.tool_choice = Some(ToolChoice { mode: ToolChoiceMode::None.into(), ..ToolChoice::default() });
    let valid = chat(ChatRequest { conversation: Some(conversation), ..ChatRequest::default() }).unwrap();
    assert!(valid.conversation().tools().is_empty());
}

#[test]
fn template_variables_are_a_small_object_that_replaces_nothing() {
    let path = "conversation.template_variables_json";
    check(
        |talk| talk.template_variables_json = r#"{"bos_token": "", "x": 1, "messages": []}"#.into(),
        &format!(
            "{path}: the template variable `bos_token` cannot be replaced; \
             {path}: the template variable `messages` cannot be replaced"
        ),
    );
    check(|talk| talk.template_variables_json = " ".repeat(65_537), &format!("{path}: 65537 bytes are over 65536"));
    check(
        |talk| talk.template_variables_json = r#"{"x": "#.to_owned() + &"[".repeat(1_000),
        &format!("{path}: not a JSON object: recursion limit exceeded at line 1 column 133"),
    );
}

#[test]
fn a_prompt_cannot_both_end_the_last_turn_and_leave_it_open() {
    check(
        |talk| (talk.add_generation_prompt, talk.continue_final_message) = (Some(true), Some(true)),
        "conversation.continue_final_message: cannot be true together with add_generation_prompt",
    );
    let endings = [
        (None, None, Ending::GenerationPrompt),
        (Some(false), None, Ending::LastTurn),
        (None, Some(true), Ending::OpenFinalMessage),
        (Some(false), Some(true), Ending::OpenFinalMessage),
    ];
    for (add_generation_prompt, continue_final_message, ending) in endings {
        let conversation = Conversation { add_generation_prompt, continue_final_message, ..hello() };
        let valid = chat(ChatRequest { conversation: Some(conversation), ..ChatRequest::default() }).unwrap();
        assert_eq!(valid.conversation().ending(), ending);
    }
}

#[test]
fn a_model_without_a_template_takes_no_conversation() {
    let facts = ModelFacts::new(&GetTokenizerResponse { vocab_size: 9, ..GetTokenizerResponse::default() }, 9).unwrap();
    let input = Some(Input::Conversation(hello()));
    let error = ValidCount::new(CountTokensRequest { input, ..CountTokensRequest::default() }, &facts).unwrap_err();
    assert_eq!(error.to_string(), "model: the model has no chat template; send it a raw prompt");
}

#[test]
fn a_raw_prompt_is_text_or_ids_of_the_vocabulary_within_the_context() {
    let check = |prompt: Option<Prompt>, expected: Result<(), &str>| {
        let request = GenerateRequest { prompt: Some(RawPrompt { prompt }), ..GenerateRequest::default() };
        assert_eq!(generate(request).map(|_| ()), expected.map_err(str::to_owned));
    };
    let ids = |ids: Vec<u32>| Some(Prompt::TokenIds(TokenIds { ids }));
    check(Some(Prompt::Text(String::new())), Ok(()));
    check(ids(vec![99; 64]), Ok(()));
    check(None, Err("prompt: neither text nor token ids are set"));
    check(ids(vec![]), Err("prompt.token_ids.ids: no token ids are given"));
    check(ids(vec![0; 65]), Err("prompt.token_ids.ids: 65 token ids are over the context of 64"));
    check(ids(vec![0, 100]), Err("prompt.token_ids.ids[1]: 100 is not below the vocabulary's size of 100"));
    check(Some(Prompt::Text("x".repeat(MAX_TEXT_BYTES + 1))), Err("prompt.text: 4194305 bytes are over 4194304"));
}

#[test]
fn sampling_values_out_of_range_are_named_with_their_range() {
    let none = SamplingParams::default;
    check_sampling(
        SamplingParams { temperature: Some(f32::NAN), min_p: Some(-0.1), typical_p: Some(0.0), ..none() },
        "sampling.temperature: NaN is not in [0, 100]; sampling.min_p: -0.1 is not in [0, 1]; \
         sampling.typical_p: 0 is not in (0, 1]",
    );
    check_sampling(
        SamplingParams {
            repetition_penalty: Some(f32::INFINITY),
            presence_penalty: Some(2.5),
            frequency_penalty: Some(-3.0),
            ..none()
        },
        "sampling.repetition_penalty: inf is not in (0, 100]; sampling.presence_penalty: 2.5 is not in [-2, 2]; \
         sampling.frequency_penalty: -3 is not in [-2, 2]",
    );
    check_sampling(
        SamplingParams { max_new_tokens: Some(0), top_k: Some(101), n: Some(129), ..none() },
        "sampling.max_new_tokens: 0 is not in [1, 64]; sampling.top_k: 101 is not in [0, 100]; \
         sampling.n: 129 is not in [1, 128]",
    );
}

#[test]
fn sampling_lists_are_checked_entry_by_entry() {
    let none = SamplingParams::default;
    check_sampling(
        SamplingParams { stop: vec![String::new(), "x".repeat(1_025)], ..none() },
        "sampling.stop[0]: the stop string is empty; sampling.stop[1]: 1025 bytes are over 1024",
    );
    check_sampling(
        SamplingParams { stop: vec!["x".into(); 17], stop_token_ids: vec![0; 65], ..none() },
        "sampling.stop: 17 stop strings are over 16; sampling.stop_token_ids: 65 token ids are over 64",
    );
    check_sampling(
        SamplingParams {
            stop_token_ids: vec![1, 100],
            logit_bias: [(100, 0.0), (5, f32::NAN), (7, -101.0)].into(),
            ..none()
        },
        "sampling.stop_token_ids[1]: 100 is not below the vocabulary's size of 100; \
         sampling.logit_bias[5]: NaN is not in [-100, 100]; sampling.logit_bias[7]: -101 is not in [-100, 100]; \
         sampling.logit_bias[100]: 100 is not below the vocabulary's size of 100",
    );
    check_sampling(
        SamplingParams { logit_bias: (0..301).map(|id| (id, 0.0)).collect(), ..none() },
        "sampling.logit_bias: 301 entries are over 300",
    );
}

#[test]
fn contradictory_lengths_are_refused() {
    let none = SamplingParams::default;
    check_sampling(
        SamplingParams { max_new_tokens: Some(4), min_new_tokens: Some(5), ..none() },
        "sampling.min_new_tokens: 5 is over max_new_tokens of 4",
    );
    check_sampling(
        SamplingParams { min_new_tokens: Some(65), ..none() },
        "sampling.min_new_tokens: 65 is over the context of 64",
    );
}

#[test]
fn the_streamed_calls_are_read_alike() {
    let (facts, policy) = (facts(), Policy::default());
    let rules = Rules { facts: &facts, policy: policy.for_model("any") };
    let request = v1::StreamChatRequest { conversation: Some(hello()), ..v1::StreamChatRequest::default() };
    assert_eq!(ValidChat::from_stream(request, rules).unwrap().conversation().messages().len(), 1);
    let error = ValidGenerate::from_stream(v1::StreamGenerateRequest::default(), rules).unwrap_err();
    assert_eq!(error.to_string(), "prompt: neither text nor token ids are set");
}

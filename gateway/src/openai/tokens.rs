//! `/tokenize` and `/detokenize`, as vLLM has them.

use axum::extract::Request;
use http::StatusCode;
use lockstep_proto::v1::{self, count_tokens_request::Input, raw_prompt::Prompt};
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    Answer, Front,
    messages::{Message, Template, Tool, Tools, conversation, one_ending},
};
use crate::{
    http::json_response,
    json::Object,
    openapi::{
        OF_CHATS, OF_MODELS, OF_PROMPTS, Operation,
        rules::{either, off, unset, where_set},
    },
    pipeline::Tokenized,
    request::{MAX_LISTED, MAX_MESSAGES, RequestError},
};

/// A raw prompt or a conversation.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(transform = either_prompt_or_messages)]
struct TokenizeRequest {
    /// Whose tokens. Default: those of the only model that is served.
    model: Option<String>,
    /// A raw prompt.
    prompt: Option<String>,
    /// A conversation.
    #[schemars(length(min = 1, max = MAX_MESSAGES))]
    messages: Option<Vec<Object<Message>>>,
    /// Functions that the conversation's model may call.
    #[schemars(length(max = MAX_LISTED))]
    tools: Option<Vec<Object<Tool>>>,
    /// Whether the conversation ends with the beginning of an answer. Default: true.
    add_generation_prompt: Option<bool>,
    /// Whether the last message is left open.
    continue_final_message: Option<bool>,
    /// What the chat template sees besides.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// What comes before a raw prompt. A template writes its own.
    add_special_tokens: Option<bool>,
    /// Whether the text of each token is wanted, too.
    return_token_strs: Option<bool>,
}

/// The tokens of a prompt.
#[derive(Debug, Serialize, JsonSchema)]
struct TokenizeResponse {
    count: usize,
    /// What the model's context holds. Unit: tokens.
    max_model_len: u32,
    tokens: Vec<u32>,
    /// Each token's text by itself, in which bytes that are no whole character appear as U+FFFD.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

/// Tokens whose text is asked for.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct DetokenizeRequest {
    /// Whose tokens. Default: those of the only model that is served.
    model: Option<String>,
    /// Their ids, no more than the model's context holds.
    #[schemars(length(min = 1))]
    tokens: Vec<u32>,
}

/// The text of tokens.
#[derive(Debug, Serialize, JsonSchema)]
struct DetokenizeResponse {
    prompt: String,
}

pub(super) fn tokenize_operation() -> Operation {
    Operation::call("Shows the tokens that a raw prompt or a conversation becomes.")
        .takes::<TokenizeRequest>()
        .answers::<TokenizeResponse>()
        .fails(OF_MODELS)
        .fails(OF_PROMPTS)
        .fails(OF_CHATS)
}

/// The rule that there is a raw prompt or a conversation, and what goes with each.
fn either_prompt_or_messages(request: &mut Schema) {
    let mut raw = where_set([
        ("messages", unset()),
        ("tools", unset()),
        ("add_generation_prompt", unset()),
        ("continue_final_message", unset()),
        ("chat_template_kwargs", unset()),
        ("add_special_tokens", json!({ "enum": [true, null] })),
    ]);
    raw["required"] = json!(["prompt"]);
    raw["properties"]["prompt"] = json!({ "type": "string" });
    let mut conversation = where_set([("prompt", unset()), ("add_special_tokens", off())]);
    conversation["required"] = json!(["messages"]);
    conversation["properties"]["messages"] = json!({ "type": "array" });
    either(request, [raw, conversation]);
    one_ending(request);
}

pub(super) fn detokenize_operation() -> Operation {
    Operation::call("Shows the text of tokens, control tokens included.")
        .takes::<DetokenizeRequest>()
        .answers::<DetokenizeResponse>()
        .fails(OF_MODELS)
}

pub(super) async fn tokenize(front: &Front, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let (mut call, request) = front.enter::<TokenizeRequest>(&inbound, "tokenize")?;
    let model = request.model.clone().unwrap_or_default();
    let with_texts = request.return_token_strs.unwrap_or(false);
    let request = v1::CountTokensRequest { model, input: Some(call.note(request.into_input())?) };
    let Tokenized { ids, texts, context_length } = front.pipeline.tokenize(call, request, with_texts).await?;
    let count = ids.len();
    let body = TokenizeResponse { count, max_model_len: context_length, tokens: ids, token_strs: texts };
    Ok(json_response(StatusCode::OK, &body))
}

pub(super) async fn detokenize(front: &Front, request: Request) -> Answer {
    let inbound = front.read(request).await?;
    let (call, DetokenizeRequest { model, tokens }) = front.enter(&inbound, "detokenize")?;
    let prompt = front.pipeline.detokenize(call, &model.unwrap_or_default(), tokens).await?;
    Ok(json_response(StatusCode::OK, &DetokenizeResponse { prompt }))
}

// === impl TokenizeRequest ===

impl TokenizeRequest {
    fn into_input(self) -> Result<Input, RequestError> {
        match (self.prompt, self.messages) {
            (Some(_), Some(_)) => Err(RequestError::invalid("messages", "there is a `prompt` already")),
            (None, None) => Err(RequestError::invalid("prompt", "neither `prompt` nor `messages` are set")),
            (Some(text), None) => {
                let of_chats = [
                    ("tools", self.tools.is_some()),
                    ("add_generation_prompt", self.add_generation_prompt.is_some()),
                    ("continue_final_message", self.continue_final_message.is_some()),
                    ("chat_template_kwargs", self.chat_template_kwargs.is_some()),
                ];
                if let Some((name, _)) = of_chats.iter().find(|(_, is_set)| *is_set) {
                    return Err(RequestError::invalid(name, "it goes with `messages` alone"));
                }
                if self.add_special_tokens == Some(false) {
                    let message = "false is not supported: a prompt is encoded as it would be to be continued";
                    return Err(RequestError::invalid("add_special_tokens", message));
                }
                Ok(Input::Prompt(v1::RawPrompt { prompt: Some(Prompt::Text(text)) }))
            }
            (None, Some(messages)) => {
                if self.add_special_tokens == Some(true) {
                    return Err(RequestError::invalid("add_special_tokens", "the template writes its own"));
                }
                let template = Template {
                    add_generation_prompt: self.add_generation_prompt,
                    continue_final_message: self.continue_final_message,
                    variables: self.chat_template_kwargs,
                };
                let tools = Tools { tools: self.tools, ..Tools::default() };
                Ok(Input::Conversation(conversation(messages, tools, template)?))
            }
        }
    }
}

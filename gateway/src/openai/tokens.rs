//! `/tokenize` and `/detokenize`, as vLLM has them.

use axum::extract::Request;
use http::StatusCode;
use lockstep_proto::v1::{self, count_tokens_request::Input, raw_prompt::Prompt};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Answer, Front,
    messages::{Message, Template, Tool, Tools, conversation},
};
use crate::{http::json_response, pipeline::Tokenized, request::RequestError};

/// A raw prompt or a conversation.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    tools: Option<Vec<Tool>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    /// What comes before a raw prompt. A template writes its own.
    add_special_tokens: Option<bool>,
    /// Whether the text of each token is wanted, too.
    return_token_strs: Option<bool>,
}

#[derive(Debug, Serialize)]
struct TokenizeResponse {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    /// Each token's text by itself, in which bytes that are no whole character appear as U+FFFD.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

#[derive(Debug, Serialize)]
struct DetokenizeResponse {
    prompt: String,
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

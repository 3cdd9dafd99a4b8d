//! Whole answers.

use lockstep_proto::v1;
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    request::View,
    token::{FinishReason, Token, end},
};
use crate::{generation::collect, tokenizer::Facts};

/// What a client gets.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Generated {
    generated_text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

/// How an answer came about, token by token.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "GenerationDetails")]
struct Details {
    finish_reason: FinishReason,
    generated_tokens: u32,
    seed: Option<u64>,
    prefill: Vec<PromptToken>,
    tokens: Vec<Token>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Vec<Token>>,
}

/// One token of a prompt. Nothing predicts the first.
#[derive(Debug, Serialize, JsonSchema)]
struct PromptToken {
    id: u32,
    text: String,
    logprob: Option<f32>,
}

// === impl Generated ===

impl Generated {
    /// What of an answer is to be shown.
    pub(super) fn new(answer: collect::Answer, view: View, facts: &Facts) -> Self {
        let collect::Answer { start, choices, finish } = answer;
        let choice = choices.into_iter().next().unwrap_or_default();
        let (finish_reason, stop) = end(choice.finish);
        let generated_text = view.prefix + &choice.text + &stop;
        let details = view.details.then(|| {
            let (tokens, top_tokens) = choice.logprobs.into_iter().map(|entry| Token::with_top(entry, facts)).unzip();
            Details {
                finish_reason,
                generated_tokens: finish.usage.unwrap_or_default().completion_tokens,
                seed: finish.repro.map(|repro| repro.seed),
                prefill: prefill(start.prompt_logprobs),
                tokens,
                top_tokens: if view.top_tokens { top_tokens } else { Vec::new() },
            }
        });
        Self { generated_text, details }
    }
}

fn prefill(logprobs: Vec<v1::TokenLogprob>) -> Vec<PromptToken> {
    let token = |(n_th, entry): (usize, v1::TokenLogprob)| {
        let v1::LogprobEntry { token_id: id, text, logprob, .. } = entry.token.unwrap_or_default();
        PromptToken { id, text, logprob: (n_th > 0).then_some(logprob) }
    };
    logprobs.into_iter().enumerate().map(token).collect()
}

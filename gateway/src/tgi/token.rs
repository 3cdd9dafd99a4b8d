//! Tokens, as the API shows them, and why they end.

use lockstep_proto::v1::{self, choice_finish::MatchedStop};
use schemars::JsonSchema;
use serde::Serialize;

use crate::tokenizer::Facts;

/// One token of an answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
#[schemars(rename = "GeneratedToken")]
pub(super) struct Token {
    pub(super) id: u32,
    pub(super) text: String,
    pub(super) logprob: f32,
    /// Whether it stands for structure, not for text.
    pub(super) special: bool,
}

/// Why an answer ended. A deadline is a bound on length in the only words that the API has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "GenerationEnd")]
pub(super) enum FinishReason {
    Length,
    EosToken,
    StopSequence,
}

// === impl Token ===

impl Token {
    pub(super) fn new(entry: v1::LogprobEntry, facts: &Facts) -> Self {
        let special = facts.is_control_token(entry.token_id);
        Self { id: entry.token_id, text: entry.text, logprob: entry.logprob, special }
    }

    /// A token and its alternatives.
    pub(super) fn with_top(entry: v1::TokenLogprob, facts: &Facts) -> (Self, Vec<Self>) {
        let top = entry.top.into_iter().map(|token| Self::new(token, facts)).collect();
        (Self::new(entry.token.unwrap_or_default(), facts), top)
    }
}

/// Why a choice ended, and the stop string that did it, with which the API ends the text.
pub(super) fn end(finish: Option<v1::ChoiceFinish>) -> (FinishReason, String) {
    let finish = finish.unwrap_or_default();
    match (finish.reason(), finish.matched_stop) {
        (_, Some(MatchedStop::Stop(stop))) => (FinishReason::StopSequence, stop),
        (v1::FinishReason::Length | v1::FinishReason::Deadline, _) => (FinishReason::Length, String::new()),
        _ => (FinishReason::EosToken, String::new()),
    }
}

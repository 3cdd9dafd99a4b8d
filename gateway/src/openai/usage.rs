//! Counts and identity, as OpenAI's answers carry them.

use chrono::Utc;
use lockstep_proto::v1;
use schemars::JsonSchema;
use serde::Serialize;

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, Serialize, JsonSchema)]
pub(super) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
}

/// Tokens of the prompt that had been computed before.
#[derive(Debug, Clone, Copy, Default, Serialize, JsonSchema)]
struct PromptDetails {
    cached_tokens: u32,
}

/// Why a choice ended. A deadline is a bound on length in the only words that the protocol has.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum FinishReason {
    Stop,
    ToolCalls,
    Length,
}

// === impl Usage ===

impl Usage {
    /// Adds the counts of another prompt of the same request.
    pub(super) fn add(&mut self, usage: v1::Usage) {
        self.prompt_tokens = self.prompt_tokens.saturating_add(usage.prompt_tokens);
        self.completion_tokens = self.completion_tokens.saturating_add(usage.completion_tokens);
        self.total_tokens = self.prompt_tokens.saturating_add(self.completion_tokens);
        let cached = &mut self.prompt_tokens_details.cached_tokens;
        *cached = cached.saturating_add(usage.cached_tokens);
    }
}

impl From<v1::Usage> for Usage {
    fn from(usage: v1::Usage) -> Self {
        let mut sum = Self::default();
        sum.add(usage);
        sum
    }
}

/// Now. Unit: seconds since 1970.
pub(super) fn now() -> i64 {
    Utc::now().timestamp()
}

impl From<v1::FinishReason> for FinishReason {
    fn from(reason: v1::FinishReason) -> Self {
        match reason {
            v1::FinishReason::Stop | v1::FinishReason::Unspecified => Self::Stop,
            v1::FinishReason::ToolCalls => Self::ToolCalls,
            v1::FinishReason::Length | v1::FinishReason::Deadline => Self::Length,
        }
    }
}

/// What the answer was computed with: equal fingerprints, seeds and requests give equal answers.
pub(super) fn fingerprint(repro: Option<&v1::Repro>) -> Option<String> {
    let repro = repro?;
    let digest = repro.model_digest.get(..12).unwrap_or(&repro.model_digest);
    Some(format!("fp_{digest}_{}", repro.engine_version))
}

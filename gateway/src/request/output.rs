//! The output options of a request: what comes back beside the generated text.

use lockstep_proto::v1::OutputOptions;

use super::{Rules, Violations};

/// Most alternatives that come with a log-probability, as the contract states it.
pub(crate) const MAX_LOGPROBS: u32 = 20;

/// What comes back beside the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidOutput {
    return_full_text: bool,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    skip_special_tokens: bool,
}

// === impl ValidOutput ===

impl ValidOutput {
    pub(super) fn read(wire: Option<OutputOptions>, rules: Rules<'_>, violations: &mut Violations) -> Self {
        let wire = wire.unwrap_or_default();
        let counts = [("logprobs", wire.logprobs), ("prompt_logprobs", wire.prompt_logprobs)];
        for (name, asked) in counts {
            let Some(asked) = asked else { continue };
            let path = format!("output.{name}");
            if asked > MAX_LOGPROBS {
                violations.invalid(&path, format!("{asked} is over {MAX_LOGPROBS}"));
            } else {
                rules.policy.check_output(name, asked, violations);
            }
        }
        Self {
            return_full_text: wire.return_full_text.unwrap_or(false),
            logprobs: wire.logprobs,
            prompt_logprobs: wire.prompt_logprobs,
            skip_special_tokens: wire.skip_special_tokens.unwrap_or(true),
        }
    }

    /// Whether the prompt's text comes before the generated text.
    pub fn return_full_text(&self) -> bool {
        self.return_full_text
    }

    /// Alternatives to each generated token, 0 to 20; none: no log-probabilities.
    pub fn logprobs(&self) -> Option<u32> {
        self.logprobs
    }

    /// Alternatives to each prompt token, 0 to 20; none: no log-probabilities.
    pub fn prompt_logprobs(&self) -> Option<u32> {
        self.prompt_logprobs
    }

    /// Whether control tokens are left out of the text.
    pub fn skip_special_tokens(&self) -> bool {
        self.skip_special_tokens
    }
}

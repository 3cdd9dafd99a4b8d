//! A raw prompt is text or token ids that no template touches.

use lockstep_proto::v1::{RawPrompt, raw_prompt::Prompt};

use super::{ModelFacts, RequestError, Violations};

/// Longest text of a request, raw or in a conversation. The tokenizer service takes no longer one.
pub(super) const MAX_TEXT_BYTES: usize = 4 * 1024 * 1024;

/// What a `Generate` call continues, or an `Embed` call embeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValidPrompt {
    /// Text; control tokens in it are control tokens.
    Text(String),
    /// Token ids, at least one, each below the vocabulary's size, no more than the context holds.
    TokenIds(Vec<u32>),
}

// === impl ValidPrompt ===

impl ValidPrompt {
    /// Checks a prompt by itself.
    ///
    /// # Errors
    ///
    /// Every violation.
    pub fn new(wire: Option<RawPrompt>, facts: &ModelFacts) -> Result<Self, RequestError> {
        let mut violations = Violations::default();
        let valid = Self::read(wire, facts, &mut violations);
        violations.into_result()?;
        Ok(valid)
    }

    /// Reads a prompt, noting what is wrong with it under `prompt`.
    pub(super) fn read(wire: Option<RawPrompt>, facts: &ModelFacts, violations: &mut Violations) -> Self {
        Self::read_at("prompt", wire, facts, violations)
    }

    /// As [`ValidPrompt::read`], under another path.
    pub(super) fn read_at(
        path: &str,
        wire: Option<RawPrompt>,
        facts: &ModelFacts,
        violations: &mut Violations,
    ) -> Self {
        match wire.and_then(|wire| wire.prompt) {
            Some(Prompt::Text(text)) => {
                if text.len() > MAX_TEXT_BYTES {
                    violations.invalid(
                        format_args!("{path}.text"),
                        format!("{} bytes are over {MAX_TEXT_BYTES}", text.len()),
                    );
                }
                Self::Text(text)
            }
            Some(Prompt::TokenIds(token_ids)) => {
                check_ids(&format!("{path}.token_ids.ids"), &token_ids.ids, facts, violations);
                Self::TokenIds(token_ids.ids)
            }
            None => {
                violations.invalid(path, "neither text nor token ids are set");
                Self::Text(String::new())
            }
        }
    }
}

fn check_ids(path: &str, ids: &[u32], facts: &ModelFacts, violations: &mut Violations) {
    let (context_length, vocab_size) = (facts.context_length(), facts.vocab_size());
    if ids.is_empty() {
        violations.invalid(path, "no token ids are given");
    } else if u32::try_from(ids.len()).is_ok_and(|n_ids| n_ids > context_length) || u32::try_from(ids.len()).is_err() {
        violations.invalid(path, format!("{} token ids are over the context of {context_length}", ids.len()));
    } else if let Some((index, id)) = ids.iter().enumerate().find(|&(_, &id)| id >= vocab_size) {
        violations.invalid(
            format_args!("{path}[{index}]"),
            format!("{id} is not below the vocabulary's size of {vocab_size}"),
        );
    }
}

//! Sampling parameters decide how the next token is chosen and when a choice ends.
//!
//! Each parameter has one value, from the first of these that sets it:
//!
//! 1. the request; a value outside the contract's range or over the operator's caps is refused by name, with both
//!    values, and never changed silently;
//! 2. the operator's policy ([`ModelPolicy`]);
//! 3. the model's `generation_config.json`; the policy's caps bound it, since nobody asked for it;
//! 4. the default that `sampling.proto` states.
//!
//! The length of the output also depends on the prompt's, so it is settled last, by [`ValidSampling::resolve`].
//!
//! Sampling is greedy if `do_sample` comes out false or the temperature as 0; a request that sets a temperature *and*
//! `do_sample = false` is greedy too, as in Hugging Face's `generate`, which only warns. Greedy decoding still applies
//! penalties and biases.

pub(crate) mod constraint;
mod gbnf;
mod policy;
pub(crate) mod range;
pub(crate) mod read;

use lockstep_proto::worker::v1::{Constraint, ResolvedSampling, constraint as constraint_kind};

pub(crate) use constraint::{closed, lark_string};
pub use policy::{ModelPolicy, Policy, PolicyError};
pub(crate) use read::defaults;

use crate::request::RequestError;

/// The parameters of one request, checked, with everything settled but the length of the output.
#[derive(Clone, Debug)]
pub struct ValidSampling {
    /// All that the worker is told; `max_new_tokens` is settled by `resolve`, and so is a seed that is not chosen.
    shape: ResolvedSampling,
    /// The request's field that constrains the text.
    constraint_path: Option<&'static str>,
    seed: Option<u64>,
    length: LengthRule,
    stop: Vec<String>,
    n: u32,
}

/// What bounds the output, before the prompt's length is known. Unit: tokens.
#[derive(Clone, Copy, Debug)]
struct LengthRule {
    /// What the request asks for.
    asked: Option<u32>,
    /// What the policy or the model sets for a request that does not ask.
    default: Option<u32>,
    /// The policy's cap on the prompt.
    prompt_cap: Option<u32>,
    context_length: u32,
}

/// A prompt with which the parameters cannot be met.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The context leaves no place for even one token.
    #[error("the prompt's {prompt_tokens} tokens leave no place in the context of {context_length}")]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt_tokens: u32,
        /// Longest prompt and output together.
        context_length: u32,
    },
    /// A parameter does not fit what the prompt leaves, or the prompt is over the policy's cap.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The operating system gave no random bits for a seed.
    #[error("no random seed: {0}")]
    Entropy(#[from] getrandom::Error),
}

// === impl ValidSampling ===

impl ValidSampling {
    /// Settles the length of the output for a prompt of `prompt_tokens`, and draws a seed if none was asked for.
    ///
    /// Call it once a request: two calls may draw two seeds.
    ///
    /// # Errors
    ///
    /// A prompt that is too long for the context or the policy; `max_new_tokens` or `min_new_tokens` over what the
    /// prompt leaves of the context.
    pub fn resolve(&self, prompt_tokens: u32) -> Result<ResolvedSampling, ResolveError> {
        let max_new_tokens = self.length.settle(prompt_tokens)?;
        let min_new_tokens = self.shape.min_new_tokens;
        if min_new_tokens > max_new_tokens {
            let message = format!("{min_new_tokens} is over the {max_new_tokens} tokens that can be generated");
            return Err(RequestError::invalid("sampling.min_new_tokens", message).into());
        }
        let seed = self.seed.map_or_else(getrandom::u64, Ok)?;
        Ok(ResolvedSampling { max_new_tokens, seed, ..self.shape.clone() })
    }

    /// Texts that end a choice, each of 1 to 1,024 bytes.
    pub fn stop(&self) -> &[String] {
        &self.stop
    }

    /// Constrains the text by a Lark grammar that was made from another field of the request.
    pub(crate) fn constrain(&mut self, lark: String, path: &'static str) {
        self.shape.constraint = Some(Constraint { kind: Some(constraint_kind::Kind::Lark(lark)) });
        self.constraint_path = Some(path);
    }

    /// The field that constrains the text, if one does.
    pub fn constraint_path(&self) -> Option<&'static str> {
        self.constraint_path
    }

    /// Independent choices, 1 to 128.
    pub fn n(&self) -> u32 {
        self.n
    }
}

// === impl LengthRule ===

impl LengthRule {
    fn settle(&self, prompt_tokens: u32) -> Result<u32, ResolveError> {
        let context_length = self.context_length;
        if let Some(cap) = self.prompt_cap.filter(|&cap| prompt_tokens > cap) {
            let message = format!("{prompt_tokens} tokens are over the policy's cap of {cap}");
            return Err(RequestError::over_policy("prompt", message).into());
        }
        let room = context_length.saturating_sub(prompt_tokens);
        if room == 0 {
            return Err(ResolveError::PromptTooLong { prompt_tokens, context_length });
        }
        if let Some(asked) = self.asked.filter(|&asked| asked > room) {
            let message = format!(
                "{asked} is over the {room} tokens that a prompt of {prompt_tokens} leaves of the context of \
                 {context_length}"
            );
            return Err(RequestError::invalid("sampling.max_new_tokens", message).into());
        }
        Ok(self.asked.unwrap_or_else(|| self.default.map_or(room, |default| default.min(room))))
    }
}

#[cfg(test)]
mod tests;

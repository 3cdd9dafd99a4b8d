//! A profile: what a model's files say about its prompts and its sampling, beyond how text becomes ids.

use lockstep_checkpoint::END_OF_TURN;
use lockstep_proto::tokenizer::v1::GenerationDefaults;

use crate::tokenizer::Tokenizer;

/// What a model's files say about its prompts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Profile {
    /// Longest prompt and output together. Unit: tokens. 0: the files do not say.
    pub context_length: u32,
    /// Beginning-of-text token.
    pub bos_token_id: Option<u32>,
    /// The token that templates know as `eos_token`.
    pub eos_token_id: Option<u32>,
    /// Every token that ends a turn or a text, ascending.
    pub eos_token_ids: Vec<u32>,
    /// The Jinja chat template; empty if there is none.
    pub chat_template: String,
    /// Sampling defaults.
    pub generation: GenerationDefaults,
}

/// The ending tokens that files name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending {
    /// The end-of-text token.
    pub(crate) text: Option<u32>,
    /// Further ones.
    pub(crate) others: Vec<u32>,
}

// === impl Ending ===

impl Ending {
    /// The named tokens and the vocabulary's well-known control tokens that end a turn, ascending.
    pub(crate) fn all(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let named = self.text.iter().chain(&self.others).copied().filter(|&id| id < tokenizer.vocab_size());
        let known = tokenizer.special_tokens().iter().filter(|token| END_OF_TURN.contains(&token.text.as_str()));
        let mut ids: Vec<u32> = named.chain(known.map(|token| token.id)).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

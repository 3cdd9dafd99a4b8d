//! Special tokens: those that begin and end texts, as a model's files name them.

use crate::error::CheckpointError;
use crate::metadata::Metadata;
use crate::vocabulary::Vocabulary;

/// Tokens that end a turn in the chat formats of well-known models. Files often name only one of a model's: Llama 3's
/// say `<|end_of_text|>` while its turns end with `<|eot_id|>`.
pub const END_OF_TURN: [&str; 5] = ["<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"];

/// See the module's documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub begin: Option<u32>,
    /// End a turn or a text, ascending.
    pub end: Vec<u32>,
}

/// What a model's files name.
#[derive(Default)]
pub(crate) struct Named {
    pub(crate) begin: Option<u32>,
    pub(crate) end: Vec<u32>,
}

// === impl SpecialTokens ===

impl SpecialTokens {
    /// The named tokens, and the vocabulary's well-known control tokens that end a turn.
    pub(crate) fn new(named: Named, vocabulary: &Vocabulary) -> Self {
        let n_tokens = vocabulary.tokens.len();
        let is_token = |id: &u32| (*id as usize) < n_tokens;
        let known = (0..).zip(&vocabulary.tokens);
        let known = known.filter(|(_, token)| token.is_reserved && END_OF_TURN.contains(&token.text.as_str()));
        // Some converters write -1, which reads as 2^32 - 1, for a token that the model does not have.
        let named_ends = named.end.into_iter().filter(is_token);
        let mut end: Vec<u32> = named_ends.chain(known.map(|(id, _)| id)).collect();
        end.sort_unstable();
        end.dedup();
        Self { begin: named.begin.filter(is_token), end }
    }
}

/// Those that a GGUF file names.
pub(crate) fn of_gguf(metadata: &Metadata) -> Result<Named, CheckpointError> {
    let id = |name: &str| metadata.opt_u32(&format!("tokenizer.ggml.{name}_token_id"));
    let end = [id("eos")?, id("eot")?, id("eom")?];
    Ok(Named { begin: id("bos")?, end: end.into_iter().flatten().collect() })
}

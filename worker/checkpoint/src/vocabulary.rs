//! A vocabulary: the texts that token ids stand for, as far as a model's own files spell them out.

use crate::error::CheckpointError;
use crate::metadata::Metadata;

/// What `tokenizer.ggml.token_type` says of control tokens, and of unused ones.
const RESERVED: [i32; 2] = [3, 5];

/// An entry of a vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its text, in the tokenizer's own spelling of bytes and spaces.
    pub text: String,
    /// Control or unused: no text is made of it.
    pub is_reserved: bool,
}

/// The vocabulary of a GGUF file, by id.
pub(crate) fn of_gguf(metadata: &Metadata) -> Result<Vec<Token>, CheckpointError> {
    let texts = metadata.opt_strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    let types = metadata.opt_i32s("tokenizer.ggml.token_type")?.unwrap_or_default();
    let is_reserved = |id: usize| types.get(id).is_some_and(|kind| RESERVED.contains(kind));
    Ok((0..).zip(texts).map(|(id, text)| Token { text: text.clone(), is_reserved: is_reserved(id) }).collect())
}

//! A detokenizer: the text of ids.
//!
//! It is their bytes, one after the other; bytes that are no UTF-8 become U+FFFD as `String::from_utf8_lossy` has it, one for
//! each maximal broken part. Tokenizers that put a blank before a text take it off again when they decode.

use crate::{error::TokenizeError, tokenizer::Tokenizer};

/// The text of a list of ids, and its exact bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The text; bytes that are no UTF-8 appear as U+FFFD.
    pub text: String,
    /// The exact bytes.
    pub raw: Vec<u8>,
}

/// Decodes a whole list of ids.
///
/// # Errors
/// [`TokenizeError::TokenId`] if an id is none of the vocabulary.
pub fn decode(tokenizer: &Tokenizer, ids: &[u32], skip_special_tokens: bool) -> Result<Decoded, TokenizeError> {
    let mut raw = Vec::new();
    for (idx, &id) in ids.iter().enumerate() {
        let bytes = tokenizer.token_bytes(idx, id)?;
        if !(skip_special_tokens && tokenizer.is_special(id)) {
            raw.extend_from_slice(bytes);
        }
    }
    if tokenizer.strips_leading_space() && raw.first() == Some(&b' ') {
        raw.remove(0);
    }
    Ok(Decoded { text: String::from_utf8_lossy(&raw).into_owned(), raw })
}

#[cfg(test)]
mod tests;

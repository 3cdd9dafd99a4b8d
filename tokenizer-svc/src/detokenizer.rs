//! A detokenizer: one stream of ids turned into text as it comes.
//!
//! It holds back at most the three bytes of an unfinished UTF-8 character. What it has emitted, with what
//! [`Detokenizer::finish`] returns, is the text of all its ids decoded at once: bytes that are no UTF-8 become U+FFFD
//! as `String::from_utf8_lossy` has it, one for each maximal broken part.
//!
//! Tokenizers that put a blank before a text take it off again when they decode. That concerns the first byte that
//! the stream decodes to, so a stream which goes on from earlier ids is first shown those ([`Detokenizer::resume`]).

use std::mem;

use crate::{error::TokenizeError, tokenizer::Tokenizer};

/// The state of one stream. It does not hold its tokenizer, and must always be given the same one.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    skip_special_tokens: bool,
    /// Whether the next byte, if it is a blank, is the one that encoding had put there.
    at_start: bool,
    /// The start of a character whose end has not come yet.
    held_back: Vec<u8>,
}

/// The text of a list of ids, and its exact bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The text; bytes that are no UTF-8 appear as U+FFFD.
    pub text: String,
    /// The exact bytes.
    pub raw: Vec<u8>,
}

// === impl Detokenizer ===

impl Detokenizer {
    /// A stream that starts a text.
    #[must_use]
    pub fn new(tokenizer: &Tokenizer, skip_special_tokens: bool) -> Self {
        Self { skip_special_tokens, at_start: tokenizer.strips_leading_space(), held_back: Vec::new() }
    }

    /// A stream that goes on after `context`, the last ids before it. Their text is not emitted; a character that
    /// they leave unfinished is, by the id that completes it.
    ///
    /// # Errors
    /// [`TokenizeError::TokenId`] if an id of the context is none of the vocabulary.
    pub fn resume(tokenizer: &Tokenizer, skip_special_tokens: bool, context: &[u32]) -> Result<Self, TokenizeError> {
        let mut stream = Self::new(tokenizer, skip_special_tokens);
        let mut emitted_before = String::new();
        for (idx, &id) in context.iter().enumerate() {
            stream.push(tokenizer, idx, id, &mut emitted_before)?;
        }
        Ok(stream)
    }

    /// Appends to `text` what the stream's next id completes. `idx` is the id's place in the caller's list, for errors.
    ///
    /// # Errors
    /// [`TokenizeError::TokenId`] if the id is none of the vocabulary; the stream is as it was before.
    pub fn push(&mut self, tokenizer: &Tokenizer, idx: usize, id: u32, text: &mut String) -> Result<(), TokenizeError> {
        let bytes = self.next_bytes(tokenizer, idx, id)?;
        if self.held_back.is_empty() {
            self.held_back = emit(bytes, text).to_vec();
        } else {
            let mut joined = mem::take(&mut self.held_back);
            joined.extend_from_slice(bytes);
            self.held_back = emit(&joined, text).to_vec();
        }
        Ok(())
    }

    /// Appends what is held back: the stream has ended.
    pub fn finish(self, text: &mut String) {
        text.push_str(&String::from_utf8_lossy(&self.held_back));
    }

    /// The bytes that an id adds to the stream, without the blank that starts a text.
    fn next_bytes<'a>(&mut self, tokenizer: &'a Tokenizer, idx: usize, id: u32) -> Result<&'a [u8], TokenizeError> {
        let bytes = tokenizer.token_bytes(idx, id)?;
        if bytes.is_empty() || self.skip_special_tokens && tokenizer.is_special(id) {
            return Ok(&[]);
        }
        let at_start = mem::replace(&mut self.at_start, false);
        Ok(bytes.strip_prefix(b" ").filter(|_| at_start).unwrap_or(bytes))
    }
}

/// Decodes a whole list of ids.
///
/// # Errors
/// [`TokenizeError::TokenId`] if an id is none of the vocabulary.
pub fn decode(tokenizer: &Tokenizer, ids: &[u32], skip_special_tokens: bool) -> Result<Decoded, TokenizeError> {
    let mut stream = Detokenizer::new(tokenizer, skip_special_tokens);
    let mut raw = Vec::new();
    for (idx, &id) in ids.iter().enumerate() {
        raw.extend_from_slice(stream.next_bytes(tokenizer, idx, id)?);
    }
    Ok(Decoded { text: String::from_utf8_lossy(&raw).into_owned(), raw })
}

/// Appends the text of `bytes`, and returns what may be the start of a character that is yet to end.
fn emit<'a>(bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    let mut done = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        let broken = chunk.invalid();
        done += chunk.valid().len() + broken.len();
        // A broken part that reaches the end and lacks only further bytes is unfinished, not wrong.
        if done == bytes.len() && std::str::from_utf8(broken).is_err_and(|e| e.error_len().is_none()) {
            return broken;
        }
        if !broken.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
    &[]
}

#[cfg(test)]
mod tests;

//! A detokenizer: one stream of ids turned into text as it comes.
//!
//! It holds back at most the three bytes of an unfinished UTF-8 character. What it has emitted, with what
//! [`Detokenizer::finish`] returns, is the text of all its ids decoded at once: bytes that are no UTF-8 become U+FFFD
//! as `String::from_utf8_lossy` has it, one for each maximal broken part.
//!
//! Tokenizers that put a blank before a text take it off again when they decode. That concerns the first byte that
//! the stream decodes to, so a stream which goes on from earlier ids is first shown those ([`Detokenizer::resume`]).

use std::mem;

use super::{Facts, UnknownToken};

/// The state of one stream. It does not hold its model's facts, and must always be given the same ones.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    skip_special_tokens: bool,
    /// Whether the next byte, if it is a blank, is the one that encoding had put there.
    at_start: bool,
    /// The start of a character whose end has not come yet.
    held_back: Vec<u8>,
}

// === impl Detokenizer ===

impl Detokenizer {
    /// A stream that starts a text.
    pub fn new(facts: &Facts, skip_special_tokens: bool) -> Self {
        let at_start = facts.vocabulary().strips_leading_space();
        Self { skip_special_tokens, at_start, held_back: Vec::new() }
    }

    /// A stream that goes on after `context`, the last ids before it. Their text is not emitted; a character that
    /// they leave unfinished is, by the id that completes it.
    ///
    /// # Errors
    /// When an id of the context is none of the vocabulary.
    pub fn resume(facts: &Facts, skip_special_tokens: bool, context: &[u32]) -> Result<Self, UnknownToken> {
        let mut stream = Self::new(facts, skip_special_tokens);
        let mut emitted_before = String::new();
        for &id in context {
            stream.push(facts, id, &mut emitted_before)?;
        }
        Ok(stream)
    }

    /// Appends to `text` what the stream's next id completes.
    ///
    /// # Errors
    /// When the id is none of the vocabulary; the stream is as it was before.
    pub fn push(&mut self, facts: &Facts, id: u32, text: &mut String) -> Result<(), UnknownToken> {
        let bytes = self.next_bytes(facts, id)?;
        if self.held_back.is_empty() {
            self.held_back = emit(bytes, text).to_vec();
        } else {
            let mut joined = mem::take(&mut self.held_back);
            joined.extend_from_slice(bytes);
            self.held_back = emit(&joined, text).to_vec();
        }
        Ok(())
    }

    /// What is held back: the stream has ended.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&mem::take(&mut self.held_back)).into_owned()
    }

    /// The bytes that an id adds to the stream, without the blank that starts a text.
    fn next_bytes<'a>(&mut self, facts: &'a Facts, id: u32) -> Result<&'a [u8], UnknownToken> {
        let bytes = facts.vocabulary().bytes(id)?;
        if bytes.is_empty() || self.skip_special_tokens && facts.is_control_token(id) {
            return Ok(&[]);
        }
        let at_start = mem::replace(&mut self.at_start, false);
        Ok(bytes.strip_prefix(b" ").filter(|_| at_start).unwrap_or(bytes))
    }
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

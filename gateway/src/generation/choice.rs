//! A choice: one of the `n` texts of a request, from the worker's ids to chunks of text. Pure.
//!
//! ```text
//! worker: ids ──read──► to the tokenizer ──answer (text, where it ends after each id)──► stop strings ──► Chunk
//!         finish ─────► end of ids ───────answer (what was held back)────────────────► stop strings ──► ended
//! ```
//!
//! Ids count when their text is known, so that what is reported ends at the same id wherever the worker cut its
//! messages: at the id that completed a stop string, and nothing after it.

use std::collections::HashSet;

use lockstep_proto::{
    tokenizer::v1::{DecodeIds, StreamDecodeResponse},
    v1::{self, choice_finish::MatchedStop},
    worker::v1::{self as worker, TokenLogprobs, Tokens},
};

use crate::{
    stop::{StopMatcher, StopStrings},
    tools::reader::{self, Read, Reader},
};

/// What a peer sent that its contract does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// `Started` is not the first event of the stream, or not the only one.
    #[error("a stream that does not begin with Started, or has another one")]
    Start,
    /// Tokens or an end for a choice that does not exist or has ended.
    #[error("an event for choice {0}, which is not open")]
    NoSuchChoice(u32),
    /// Some of the choice's tokens were lost, or came twice.
    #[error("choice {choice} goes on at token {got} instead of {expected}")]
    Gap {
        /// The choice.
        choice: u32,
        /// Tokens that have come.
        expected: u32,
        /// Tokens that should have come, by the worker's count.
        got: u32,
    },
    /// Log-probabilities do not fit the tokens.
    #[error("{got} log-probabilities for {expected} tokens")]
    Logprobs {
        /// Tokens.
        expected: usize,
        /// Log-probabilities.
        got: usize,
    },
    /// A finish without a reason, or because of an `EndChoice` that nobody sent.
    #[error("choice {0} ended without a reason")]
    NoReason(u32),
    /// An embedding is not as wide as the model's are.
    #[error("an embedding of {got} values instead of {expected}")]
    Embedding {
        /// What the group says of its model.
        expected: usize,
        /// What it sent.
        got: usize,
    },
    /// The tokenizer's answer does not fit what it was asked.
    #[error("the decoded text of choice {0} does not fit its ids")]
    Decoded(u32),
}

/// What decides how a request's ids become text.
#[derive(Debug)]
pub struct TextRules {
    /// Ids that end a choice.
    pub stop_token_ids: HashSet<u32>,
    /// Texts that end a choice.
    pub stop: StopStrings,
    /// Leaves control tokens, and the stop token whatever it is, out of the text.
    pub skip_special_tokens: bool,
    /// Whether each id comes with its log-probabilities.
    pub logprobs: bool,
    /// Which calls of tools are read from the text.
    pub tools: Option<reader::Rules>,
}

/// One of the texts of a request.
#[derive(Debug)]
pub struct Choice {
    index: u32,
    matcher: StopMatcher,
    reader: Option<Reader>,
    /// Ids that the worker has sent.
    received: u32,
    /// Ids that count.
    generated: u32,
    worker_end: Option<End>,
    end: Option<End>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct End {
    reason: v1::FinishReason,
    matched_stop: Option<MatchedStop>,
}

/// Ids whose text the tokenizer has been asked for.
#[derive(Debug)]
pub struct Pending {
    /// Their choice.
    pub choice: u32,
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    /// How many of the ids the tokenizer was sent: not a stop token that is left out of the text.
    sent: usize,
    last: bool,
}

/// A piece of a choice, as it becomes known.
#[derive(Debug, Default, PartialEq)]
pub struct Piece {
    /// Ids that count.
    pub ids: Vec<u32>,
    /// Text that can no longer become part of a stop string.
    pub text: String,
    /// One for each id, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Calls of tools, which are not in the text.
    pub tool_calls: Vec<v1::ToolCallDelta>,
}

// === impl Choice ===

impl Choice {
    /// The choice of this index, with nothing in it.
    pub fn new(index: u32, rules: &TextRules) -> Self {
        let reader = rules.tools.clone().map(Reader::new);
        Self { index, matcher: rules.stop.matcher(), reader, received: 0, generated: 0, worker_end: None, end: None }
    }

    /// Whether nothing more will be added to it.
    pub fn ended(&self) -> bool {
        self.end.is_some()
    }

    /// Whether the worker has nothing more to say about it.
    pub fn worker_ended(&self) -> bool {
        self.worker_end.is_some()
    }

    /// Tokens that count.
    pub fn generated(&self) -> u32 {
        self.generated
    }

    /// How it ended, if it has.
    pub fn finish(&self) -> Option<v1::ChoiceFinish> {
        let End { mut reason, matched_stop } = self.end.clone()?;
        if reason == v1::FinishReason::Stop && self.reader.as_ref().is_some_and(Reader::has_called) {
            reason = v1::FinishReason::ToolCalls;
        }
        Some(v1::ChoiceFinish { choice: self.index, reason: reason.into(), matched_stop })
    }

    /// Takes ids from the worker; answers what to ask the tokenizer, if their text still matters.
    ///
    /// # Errors
    /// When the worker breaks its contract.
    pub fn read(&mut self, tokens: Tokens, rules: &TextRules) -> Result<Option<(Pending, DecodeIds)>, Breach> {
        if self.worker_end.is_some() {
            return Err(Breach::NoSuchChoice(self.index));
        }
        if tokens.position != self.received {
            return Err(Breach::Gap { choice: self.index, expected: self.received, got: tokens.position });
        }
        let expected = if rules.logprobs { tokens.token_ids.len() } else { 0 };
        if tokens.logprobs.len() != expected {
            return Err(Breach::Logprobs { expected, got: tokens.logprobs.len() });
        }
        let n_ids = u32::try_from(tokens.token_ids.len()).unwrap_or(u32::MAX);
        self.received = self.received.saturating_add(n_ids);
        if self.ended() {
            return Ok(None);
        }
        let mut shown = tokens.token_ids.clone();
        if rules.skip_special_tokens && shown.last().is_some_and(|id| rules.stop_token_ids.contains(id)) {
            shown.pop();
        }
        let pending = Pending {
            choice: self.index,
            ids: tokens.token_ids,
            logprobs: tokens.logprobs,
            sent: shown.len(),
            last: false,
        };
        Ok(Some((pending, DecodeIds { choice: self.index, token_ids: shown, end: false })))
    }

    /// Takes the worker's word that the choice has ended.
    ///
    /// # Errors
    /// When the worker breaks its contract.
    pub fn finish_reading(&mut self, finish: &worker::ChoiceFinish) -> Result<Option<(Pending, DecodeIds)>, Breach> {
        if self.worker_end.is_some() {
            return Err(Breach::NoSuchChoice(self.index));
        }
        let (reason, matched_stop) = match finish.reason() {
            worker::FinishReason::StopToken => (v1::FinishReason::Stop, finish.stop_token_id.map(MatchedStop::TokenId)),
            worker::FinishReason::Complete => (v1::FinishReason::Stop, None),
            worker::FinishReason::Length => (v1::FinishReason::Length, None),
            worker::FinishReason::Deadline => (v1::FinishReason::Deadline, None),
            // It was ended by a stop string, which keeps its word as the end.
            worker::FinishReason::Ended if self.ended() => (v1::FinishReason::Stop, None),
            worker::FinishReason::Ended | worker::FinishReason::Unspecified => {
                return Err(Breach::NoReason(self.index));
            }
        };
        Ok(self.end_reading(End { reason, matched_stop }))
    }

    /// The deadline has come: no further ids count. Nothing to ask if the worker had ended the choice already.
    pub fn expire(&mut self) -> Option<(Pending, DecodeIds)> {
        if self.worker_end.is_some() {
            return None;
        }
        self.end_reading(End { reason: v1::FinishReason::Deadline, matched_stop: None })
    }

    fn end_reading(&mut self, end: End) -> Option<(Pending, DecodeIds)> {
        self.worker_end = Some(end);
        if self.ended() {
            return None;
        }
        let pending = Pending { choice: self.index, ids: Vec::new(), logprobs: Vec::new(), sent: 0, last: true };
        Some((pending, DecodeIds { choice: self.index, token_ids: Vec::new(), end: true }))
    }

    /// Takes the text of ids that were asked for.
    ///
    /// # Errors
    /// When the tokenizer breaks its contract.
    pub fn decoded(&mut self, mut pending: Pending, answer: &StreamDecodeResponse) -> Result<Piece, Breach> {
        let breach = Breach::Decoded(self.index);
        if answer.choice != self.index || answer.ends.len() != pending.sent {
            return Err(breach);
        }
        if self.ended() {
            return Ok(Piece::default());
        }
        let mut piece = Piece::default();
        let mut from = 0;
        for (n_ids, &end) in (1..).zip(&answer.ends) {
            let to = usize::try_from(end).map_err(|_| breach)?;
            let text = answer.text.get(from..to).ok_or(breach)?;
            match pending.ids.get(n_ids - 1) {
                Some(&id) if self.reader.as_ref().is_some_and(|reader| reader.is_mark(id)) => self.mark(&mut piece),
                _ => self.scan(text, &mut piece),
            }
            if self.ended() {
                pending.ids.truncate(n_ids);
                pending.logprobs.truncate(n_ids);
                break;
            }
            from = to;
        }
        if !self.ended() {
            self.scan(answer.text.get(from..).ok_or(breach)?, &mut piece);
        }
        self.generated = self.generated.saturating_add(u32::try_from(pending.ids.len()).unwrap_or(u32::MAX));
        if pending.last {
            piece.append(self.close());
        }
        (piece.ids, piece.logprobs) = (pending.ids, pending.logprobs);
        Ok(piece)
    }

    /// Ends the choice as the worker said, or by the deadline if it said nothing; answers what was held back.
    pub fn close(&mut self) -> Piece {
        let mut piece = Piece::default();
        if !self.ended() {
            let end = self.worker_end.clone();
            let held = self.matcher.flush();
            self.give(&held, &mut piece);
            self.end_with(end.unwrap_or(End { reason: v1::FinishReason::Deadline, matched_stop: None }), &mut piece);
        }
        piece
    }

    fn scan(&mut self, text: &str, piece: &mut Piece) {
        let released = self.matcher.push(text);
        self.give(&released.text, piece);
        if let Some(stop) = released.stop {
            let matched_stop = Some(MatchedStop::Stop(stop.text));
            self.end_with(End { reason: v1::FinishReason::Stop, matched_stop }, piece);
        }
    }

    /// The control token that begins calls: no stop string goes across it.
    fn mark(&mut self, piece: &mut Piece) {
        let held = self.matcher.flush();
        self.give(&held, piece);
        if let Some(reader) = &mut self.reader {
            piece.read(reader.mark());
        }
    }

    /// Adds text in which there is no stop string.
    fn give(&mut self, text: &str, piece: &mut Piece) {
        let Some(reader) = &mut self.reader else { return piece.text.push_str(text) };
        piece.read(reader.push(text));
        if reader.ended() {
            self.end_with(End { reason: v1::FinishReason::Stop, matched_stop: None }, piece);
        }
    }

    /// The first end counts.
    fn end_with(&mut self, end: End, piece: &mut Piece) {
        if self.end.is_none() {
            self.end = Some(end);
            if let Some(reader) = &mut self.reader {
                piece.read(reader.end());
            }
        }
    }
}

// === impl Piece ===

impl Piece {
    fn read(&mut self, read: Read) {
        self.text.push_str(&read.text);
        self.tool_calls.extend(read.calls);
    }

    fn append(&mut self, next: Self) {
        self.text.push_str(&next.text);
        self.tool_calls.extend(next.tool_calls);
    }
}

#[cfg(test)]
mod tests;

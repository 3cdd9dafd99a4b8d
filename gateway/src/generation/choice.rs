//! A choice: one of the `n` texts of a request, from the worker's ids to chunks of text. Pure.
//!
//! ```text
//! worker: ids ──► text of each id ──────────────► stop strings ──► Piece
//!         finish ─► what was held back of it ───► stop strings ──► Piece, ended
//! ```
//!
//! An id counts with its text, so that what is reported ends at the same id wherever the worker cut its messages: at the
//! id that completed a stop string, and nothing after it.

use std::{collections::HashSet, sync::Arc};

use lockstep_proto::{
    v1::{self, choice_finish::MatchedStop},
    worker::v1::{self as worker, TokenLogprobs, Tokens},
};

use crate::{
    stop::{StopMatcher, StopStrings},
    tokenizer::{Detokenizer, Facts, UnknownToken},
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
    /// An id that the tokenizer does not have.
    #[error(transparent)]
    UnknownToken(#[from] UnknownToken),
}

/// What decides how a request's ids become text.
#[derive(Debug)]
pub struct TextRules {
    /// What ids stand for.
    pub facts: Arc<Facts>,
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
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    reader: Option<Reader>,
    /// Ids that the worker has sent.
    received: u32,
    /// Ids that count.
    generated: u32,
    /// Whether the worker has nothing more to say about it.
    worker_ended: bool,
    end: Option<End>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct End {
    reason: v1::FinishReason,
    matched_stop: Option<MatchedStop>,
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
    /// The choice of this index, with nothing in it. Its text goes on where the detokenizer is.
    pub fn new(index: u32, detokenizer: Detokenizer, rules: &TextRules) -> Self {
        Self {
            index,
            detokenizer,
            matcher: rules.stop.matcher(),
            reader: rules.tools.clone().map(Reader::new),
            received: 0,
            generated: 0,
            worker_ended: false,
            end: None,
        }
    }

    /// Whether nothing more will be added to it.
    pub fn ended(&self) -> bool {
        self.end.is_some()
    }

    /// Whether the worker has nothing more to say about it.
    pub fn worker_ended(&self) -> bool {
        self.worker_ended
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

    /// Takes ids from the worker.
    ///
    /// # Errors
    /// When the worker breaks its contract.
    pub fn read(&mut self, tokens: Tokens, rules: &TextRules) -> Result<Piece, Breach> {
        if self.worker_ended {
            return Err(Breach::NoSuchChoice(self.index));
        }
        let Tokens { choice: _, position, token_ids: ids, logprobs } = tokens;
        if position != self.received {
            return Err(Breach::Gap { choice: self.index, expected: self.received, got: position });
        }
        let expected = if rules.logprobs { ids.len() } else { 0 };
        if logprobs.len() != expected {
            return Err(Breach::Logprobs { expected, got: logprobs.len() });
        }
        self.received = self.received.saturating_add(count(&ids));
        if self.ended() {
            return Ok(Piece::default());
        }
        let mut piece = Piece { ids, logprobs, ..Piece::default() };
        self.give_text(&mut piece, rules)?;
        self.generated = self.generated.saturating_add(count(&piece.ids));
        Ok(piece)
    }

    /// Adds the text of a piece's ids, and ends both at the id with which the choice ends.
    fn give_text(&mut self, piece: &mut Piece, rules: &TextRules) -> Result<(), Breach> {
        let is_stop = |id: &u32| rules.skip_special_tokens && rules.stop_token_ids.contains(id);
        let n_shown = piece.ids.len() - usize::from(piece.ids.last().is_some_and(is_stop));
        let mut text = String::new();
        for n_ids in 1..=n_shown {
            let id = piece.ids[n_ids - 1];
            text.clear();
            self.detokenizer.push(&rules.facts, id, &mut text)?;
            if self.reader.as_ref().is_some_and(|reader| reader.is_mark(id)) {
                self.mark(piece);
            } else {
                self.scan(&text, piece);
            }
            if self.ended() {
                piece.ids.truncate(n_ids);
                piece.logprobs.truncate(n_ids);
                break;
            }
        }
        Ok(())
    }

    /// Takes the worker's word that the choice has ended.
    ///
    /// # Errors
    /// When the worker breaks its contract.
    pub fn finish_reading(&mut self, finish: &worker::ChoiceFinish) -> Result<Piece, Breach> {
        if self.worker_ended {
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
        Ok(self.close(End { reason, matched_stop }))
    }

    /// The deadline has come: no further ids count.
    pub fn expire(&mut self) -> Piece {
        self.close(End { reason: v1::FinishReason::Deadline, matched_stop: None })
    }

    /// Ends the choice, unless a stop string in what was held back ends it otherwise; answers that.
    fn close(&mut self, end: End) -> Piece {
        self.worker_ended = true;
        let mut piece = Piece::default();
        if !self.ended() {
            let held_back = self.detokenizer.finish();
            self.scan(&held_back, &mut piece);
        }
        if !self.ended() {
            let held_back = self.matcher.flush();
            self.give(&held_back, &mut piece);
            self.end_with(end, &mut piece);
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
}

fn count(ids: &[u32]) -> u32 {
    u32::try_from(ids.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;

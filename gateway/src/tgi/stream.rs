//! Streams: one event for each token. The event of the last one has the whole text, so that each token waits for the next.

use std::sync::Arc;

use axum::response::{Response, sse::Event as Sse};
use lockstep_proto::v1;
use schemars::JsonSchema;
use serde::Serialize;

use super::{
    error::ErrorBody,
    request::View,
    token::{FinishReason, Token, end},
};
use crate::{
    generation::{Event, Events},
    http::sse::{self, data},
    status::Failure,
    tokenizer::Facts,
};

/// A token. The last one comes with the whole text.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "GenerationPiece")]
pub(super) struct Piece {
    index: u32,
    token: Token,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top_tokens: Vec<Token>,
    generated_text: Option<String>,
    details: Option<Details>,
}

/// How an answer came about.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "GenerationSummary")]
struct Details {
    finish_reason: FinishReason,
    generated_tokens: u32,
    seed: Option<u64>,
    input_length: u32,
}

/// What makes the events of a stream.
struct Pieces {
    view: View,
    facts: Arc<Facts>,
    input_length: u32,
    /// Tokens so far.
    index: u32,
    /// The last of them, which is not sent yet, and its alternatives.
    held: Option<(Token, Vec<Token>)>,
    text: String,
}

/// Streams an answer.
pub(super) fn response(events: Events, view: View, facts: Arc<Facts>) -> Response {
    let mut pieces = Pieces::new(view, facts);
    sse::response(events, move |event| pieces.of(event))
}

// === impl Pieces ===

impl Pieces {
    fn new(mut view: View, facts: Arc<Facts>) -> Self {
        let text = std::mem::take(&mut view.prefix);
        Self { view, facts, input_length: 0, index: 0, held: None, text }
    }

    fn of(&mut self, event: Result<Event, Failure>) -> Vec<Sse> {
        match event {
            Ok(Event::Start(start)) => {
                self.input_length = start.prompt_tokens;
                Vec::new()
            }
            Ok(Event::Chunk(chunk)) => self.chunk(chunk).iter().map(data).collect(),
            Ok(Event::Finish(finish)) => vec![data(&self.finish(finish))],
            Err(failure) => {
                let held = self.release().map(|piece| data(&piece));
                held.into_iter().chain([data(&ErrorBody::from(&failure.to_error()))]).collect()
            }
        }
    }

    /// The events of the tokens that another one follows.
    fn chunk(&mut self, chunk: v1::Chunk) -> Vec<Piece> {
        self.text.push_str(&chunk.text);
        let tokens = chunk.logprobs.into_iter().map(|entry| Token::with_top(entry, &self.facts)).collect();
        let tokens: Vec<_> = shared(tokens, &chunk.text);
        if let ([], Some((last, _))) = (&tokens[..], &mut self.held) {
            // Text that a stop string might have begun with, and did not.
            last.text.push_str(&chunk.text);
        }
        let mut pieces = Vec::new();
        for token in tokens {
            pieces.extend(self.release());
            self.held = Some(token);
        }
        pieces
    }

    fn finish(&mut self, mut finish: v1::Finish) -> Piece {
        let (finish_reason, stop) = end(finish.choices.pop());
        // There is no answer without a token.
        let (mut token, top_tokens) = self.held.take().unwrap_or_default();
        token.text.push_str(&stop);
        self.text.push_str(&stop);
        let details = self.view.details.then(|| Details {
            finish_reason,
            generated_tokens: finish.usage.unwrap_or_default().completion_tokens,
            seed: finish.repro.map(|repro| repro.seed),
            input_length: self.input_length,
        });
        let generated_text = Some(std::mem::take(&mut self.text));
        self.piece(token, top_tokens, generated_text, details)
    }

    /// The event of the token that is held, if there is one.
    fn release(&mut self) -> Option<Piece> {
        let (token, top_tokens) = self.held.take()?;
        Some(self.piece(token, top_tokens, None, None))
    }

    fn piece(
        &mut self,
        token: Token,
        top_tokens: Vec<Token>,
        generated_text: Option<String>,
        details: Option<Details>,
    ) -> Piece {
        self.index = self.index.saturating_add(1);
        let top_tokens = if self.view.top_tokens { top_tokens } else { Vec::new() };
        Piece { index: self.index, token, top_tokens, generated_text, details }
    }
}

/// Tokens with their shares of a chunk's text, so that the texts of all tokens that are not special add up to the answer.
/// Where their own texts do not (half a character, text that is held back), the last of them has all of it.
fn shared(mut tokens: Vec<(Token, Vec<Token>)>, text: &str) -> Vec<(Token, Vec<Token>)> {
    let own: String = tokens.iter().map(|(token, _)| token).filter(|token| !token.special).map(|t| &*t.text).collect();
    if own == text {
        return tokens;
    }
    tokens.iter_mut().filter(|(token, _)| !token.special).for_each(|(token, _)| token.text.clear());
    // A token that ends the answer may bring text that was held back, and be alone.
    let bearer = tokens.iter().rposition(|(token, _)| !token.special).or(tokens.len().checked_sub(1));
    if let Some((token, _)) = bearer.and_then(|bearer| tokens.get_mut(bearer)) {
        token.text.insert_str(0, text);
    }
    tokens
}

#[cfg(test)]
mod tests {
    use lockstep_proto::{
        tokenizer::v1::{GetTokenizerResponse, SpecialToken},
        v1::{ChoiceFinish, Chunk, FinishReason as Reason, LogprobEntry, TokenLogprob, choice_finish::MatchedStop},
    };
    use serde_json::{Value, json};

    use super::*;
    use crate::tokenizer::Vocabulary;

    const END: u32 = 9;

    fn pieces(view: View) -> Pieces {
        let special_tokens = vec![SpecialToken { id: END, text: "<end>".into() }];
        let description = GetTokenizerResponse { special_tokens, ..GetTokenizerResponse::default() };
        Pieces::new(view, Arc::new(Facts::new("m", description, Vocabulary::default())))
    }

    fn chunk(text: &str, tokens: &[(u32, &str)]) -> Chunk {
        let entry = |&(token_id, text): &(u32, &str)| TokenLogprob {
            token: Some(LogprobEntry { token_id, text: text.into(), logprob: -0.5, ..LogprobEntry::default() }),
            top: Vec::new(),
        };
        Chunk { text: text.into(), logprobs: tokens.iter().map(entry).collect(), ..Chunk::default() }
    }

    fn finish(reason: Reason, matched_stop: Option<MatchedStop>) -> v1::Finish {
        let choices = vec![ChoiceFinish { choice: 0, reason: reason.into(), matched_stop }];
        let usage = Some(v1::Usage { completion_tokens: 3, ..v1::Usage::default() });
        let repro = Some(v1::Repro { seed: 7, ..v1::Repro::default() });
        v1::Finish { choices, usage, repro, ..v1::Finish::default() }
    }

    /// The texts of the tokens of all events, and the last event.
    fn read(view: View, chunks: Vec<Chunk>, end: v1::Finish) -> (Vec<String>, Value) {
        let mut pieces = pieces(view);
        let mut events: Vec<_> = chunks.into_iter().flat_map(|chunk| pieces.chunk(chunk)).collect();
        assert!(events.iter().all(|event| event.generated_text.is_none() && event.details.is_none()));
        events.push(pieces.finish(end));
        assert!((1..).zip(&events).all(|(index, event)| event.index == index));
        let texts = events.iter().map(|event| event.token.text.clone()).collect();
        (texts, serde_json::to_value(events.last()).unwrap())
    }

    #[test]
    fn the_last_token_brings_the_whole_text_and_the_details() {
        let view = View { prefix: "> ".into(), details: true, top_tokens: false };
        let chunks = vec![chunk("a", &[(1, "a")]), chunk("bc", &[(2, "b"), (3, "c")]), chunk("", &[(END, "<end>")])];
        let (texts, last) = read(view, chunks, finish(Reason::Stop, Some(MatchedStop::TokenId(END))));
        assert_eq!(texts, ["a", "b", "c", "<end>"]);
        let expected = json!({
            "index": 4,
            "token": { "id": 9, "text": "<end>", "logprob": -0.5, "special": true },
            "generated_text": "> abc",
            "details": { "finish_reason": "eos_token", "generated_tokens": 3, "seed": 7, "input_length": 0 },
        });
        assert_eq!(last, expected);
    }

    #[test]
    fn a_stop_string_ends_the_text() {
        let chunks = vec![chunk("a ", &[(1, "a "), (2, "S")]), chunk("", &[(3, "TOP")])];
        let end = finish(Reason::Stop, Some(MatchedStop::Stop("STOP".into())));
        let (texts, last) = read(View { details: true, ..View::default() }, chunks, end);
        assert_eq!(texts.concat(), "a STOP");
        assert_eq!(last["generated_text"], "a STOP");
        assert_eq!(last["details"]["finish_reason"], "stop_sequence");
    }

    #[test]
    fn texts_add_up_whatever_is_held_back() {
        for chunks in [
            vec![chunk("", &[(1, "\u{fffd}")]), chunk("\u{e9}", &[(2, "\u{fffd}")])],
            vec![chunk("", &[(1, "S")]), chunk("Sx", &[(2, "x")])],
            vec![chunk("", &[(1, "S")]), chunk("S", &[])],
            vec![chunk("", &[(1, "S")]), chunk("S", &[(END, "<end>")])],
            vec![chunk(" the", &[(1, "the")])],
        ] {
            let whole: String = chunks.iter().map(|chunk| chunk.text.as_str()).collect();
            let (texts, last) = read(View::default(), chunks, finish(Reason::Length, None));
            assert_eq!(texts.concat().replace("<end>", ""), whole);
            assert_eq!(last["generated_text"], whole);
        }
    }

    #[test]
    fn an_answer_that_is_cut_still_brings_the_token_before() {
        let mut pieces = pieces(View::default());
        assert!(pieces.chunk(chunk("a", &[(1, "a")])).is_empty());
        assert_eq!(pieces.of(Err(Failure::ClientGone)).len(), 2);
    }
}

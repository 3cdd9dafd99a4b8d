//! A collected answer: the events of a stream in one message, so that a unary call is its streamed twin read to the end.

use futures_util::{Stream, StreamExt as _};
use lockstep_proto::v1;

use super::Event;
use crate::status::Failure;

/// A whole answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// The beginning.
    pub start: v1::Start,
    /// The choices, by index.
    pub choices: Vec<AnswerChoice>,
    /// The end, its choices moved into `choices`.
    pub finish: v1::Finish,
}

/// One choice of an answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AnswerChoice {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// One for each token, if asked for.
    pub logprobs: Vec<v1::TokenLogprob>,
    /// Its calls of tools.
    pub tool_calls: Vec<v1::ToolCall>,
    /// How it ended.
    pub finish: Option<v1::ChoiceFinish>,
}

/// Reads an answer of `n` choices to its end.
///
/// # Errors
/// When the answer is cut.
pub async fn collect(
    mut events: impl Stream<Item = Result<Event, Failure>> + Unpin,
    n: u32,
) -> Result<Answer, Failure> {
    let n = usize::try_from(n).unwrap_or(usize::MAX);
    let mut answer = Answer { choices: vec![AnswerChoice::default(); n], ..Answer::default() };
    while let Some(event) = events.next().await {
        match event? {
            Event::Start(start) => answer.start = start,
            Event::Chunk(chunk) => answer.append(chunk),
            Event::Finish(finish) => answer.end(finish),
        }
    }
    Ok(answer)
}

// === impl Answer ===

impl Answer {
    fn append(&mut self, chunk: v1::Chunk) {
        let Some(choice) = self.choice(chunk.choice) else { return };
        choice.text.push_str(&chunk.text);
        choice.token_ids.extend(chunk.token_ids);
        choice.logprobs.extend(chunk.logprobs);
        for delta in chunk.tool_calls {
            choice.append_call(delta);
        }
    }

    fn end(&mut self, mut finish: v1::Finish) {
        for end in std::mem::take(&mut finish.choices) {
            if let Some(choice) = self.choice(end.choice) {
                choice.finish = Some(end);
            }
        }
        self.finish = finish;
    }

    fn choice(&mut self, index: u32) -> Option<&mut AnswerChoice> {
        self.choices.get_mut(usize::try_from(index).ok()?)
    }
}

// === impl AnswerChoice ===

impl AnswerChoice {
    fn append_call(&mut self, delta: v1::ToolCallDelta) {
        let v1::ToolCallDelta { index, id, name, arguments_json } = delta;
        match usize::try_from(index).ok().and_then(|index| self.tool_calls.get_mut(index)) {
            Some(call) => call.arguments_json.push_str(&arguments_json),
            None => self.tool_calls.push(v1::ToolCall { id, name, arguments_json }),
        }
    }
}

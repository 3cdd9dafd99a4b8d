//! What comes of a generation, in the interface's own messages: chunks, if they were asked for, and one end for each
//! choice.

use std::collections::VecDeque;

use lockstep_proto::vllm::grpc::engine::{
    GenerateComplete, GenerateResponse, GenerateStreamChunk, InputLogProbs, InputTokenLogProb, OutputLogProbs,
    TopLogProbs, generate_complete::MatchedStop, generate_response::Response as Wire,
};
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::{aborts::Running, request::Asked, stop::StopSearch};
use crate::{
    engine::{
        Event, FinishReason, GenerationId,
        handle::{EngineHandle, EventStream},
    },
    sampler::{Logprob, TokenLogprobs},
    status,
};

/// The answer to one request.
#[derive(Debug)]
pub(super) struct Answer {
    asked: Asked,
    /// None: it was aborted.
    events: Option<EventStream>,
    running: Running,
    engine: EngineHandle,
    choices: Vec<Choice>,
    generation: Option<GenerationId>,
    cached_tokens: u32,
    prompt_logprobs: Option<InputLogProbs>,
    /// Made and not sent.
    ready: VecDeque<Wire>,
}

/// A choice so far.
#[derive(Debug, Default)]
struct Choice {
    token_ids: Vec<u32>,
    logprobs: Option<OutputLogProbs>,
    stop: Option<StopSearch>,
    has_ended: bool,
}

// === impl Answer ===

impl Answer {
    /// `events` is none if the request was aborted before it had any.
    pub(super) fn new(asked: Asked, events: Option<EventStream>, running: Running, engine: EngineHandle) -> Self {
        let search = || asked.stop.as_ref().map(|stop| stop.search.clone());
        Self {
            choices: (0..asked.n).map(|_| Choice { stop: search(), ..Choice::default() }).collect(),
            asked,
            events,
            running,
            engine,
            generation: None,
            cached_tokens: 0,
            prompt_logprobs: None,
            ready: VecDeque::new(),
        }
    }

    /// The next message; none after the last.
    pub(super) async fn next(&mut self) -> Option<Result<GenerateResponse, Status>> {
        loop {
            if let Some(response) = self.ready.pop_front() {
                return Some(Ok(GenerateResponse { response: Some(response) }));
            }
            if self.choices.iter().all(|choice| choice.has_ended) {
                return None;
            }
            let event = match &mut self.events {
                Some(events) => self.running.unless_aborted(events.next()).await,
                None => None,
            };
            match event {
                Some(Some(Ok(event))) => self.take(event),
                Some(Some(Err(error))) => {
                    self.choices.clear();
                    let names = self.asked.names;
                    return Some(Err(status::renamed(&status::engine(&error), |path| names.name(path))));
                }
                // The stream ends after the last choice, which was looked for above.
                Some(None) => return None,
                None => self.abort(),
            }
        }
    }

    /// Ends all that has not ended. What was computed for it is free within one step.
    fn abort(&mut self) {
        self.events = None;
        for index in 0..self.asked.n {
            self.end(index, "abort", None);
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Started { generation, cached_tokens } => {
                self.generation = Some(generation);
                self.cached_tokens = cached_tokens;
            }
            Event::PromptLogprobs(tokens) => {
                self.prompt_logprobs = Some(input_logprobs(&self.asked.prompt, tokens, self.asked.n_prompt_top));
            }
            Event::Token { choice, token_id, logprobs, .. } => self.token(choice, token_id, logprobs),
            Event::Finish { choice, reason } => {
                let (reason, matched) = match reason {
                    FinishReason::StopToken(id) => {
                        let is_asked = self.asked.stop_token_ids.contains(&id);
                        ("stop", is_asked.then_some(MatchedStop::MatchedTokenId(id)))
                    }
                    FinishReason::Complete => ("stop", None),
                    FinishReason::Length => ("length", None),
                    FinishReason::Deadline | FinishReason::Ended => ("abort", None),
                };
                self.end(choice, reason, matched);
            }
        }
    }

    fn token(&mut self, index: u32, token_id: u32, logprobs: Option<TokenLogprobs>) {
        let Some(choice) = self.choices.get_mut(index as usize).filter(|choice| !choice.has_ended) else { return };
        let is_first = choice.token_ids.is_empty();
        choice.token_ids.push(token_id);
        let logprobs = logprobs.map(|logprobs| output_logprobs(logprobs, self.asked.n_top));
        if self.asked.streams {
            self.ready.push_back(Wire::Chunk(GenerateStreamChunk {
                token_ids: vec![token_id],
                prompt_tokens: self.asked.prompt.len() as u32,
                completion_tokens: 1,
                cached_tokens: self.cached_tokens,
                output_logprobs: logprobs,
                input_logprobs: if is_first { self.prompt_logprobs.clone() } else { None },
                index,
            }));
        } else if let Some(logprobs) = logprobs {
            let all = choice.logprobs.get_or_insert_default();
            all.token_logprobs.extend(logprobs.token_logprobs);
            all.token_ids.extend(logprobs.token_ids);
            all.top_logprobs.extend(logprobs.top_logprobs);
        }
        self.look_for_stop(index, token_id);
    }

    /// Ends a choice whose output has a stop string.
    fn look_for_stop(&mut self, index: u32, token_id: u32) {
        let Some(stop) = &self.asked.stop else { return };
        let choice = &mut self.choices[index as usize];
        if choice.token_ids.len() as u32 <= stop.min_tokens {
            return;
        }
        let bytes = stop.facts.token_bytes.as_ref().and_then(|bytes| bytes.get(token_id)).unwrap_or_default();
        let Some(matched) = choice.stop.as_mut().and_then(|search| search.advance(bytes)) else { return };
        if let Some(generation) = self.generation {
            // An engine that does not hear of it computes what nobody reads, up to the choice's own end.
            let _ = self.engine.end_choice(generation, index);
        }
        self.end(index, "stop", Some(MatchedStop::MatchedStopStr(matched)));
    }

    fn end(&mut self, index: u32, reason: &str, matched_stop: Option<MatchedStop>) {
        let Some(choice) = self.choices.get_mut(index as usize).filter(|choice| !choice.has_ended) else { return };
        choice.has_ended = true;
        let output_ids = std::mem::take(&mut choice.token_ids);
        let is_whole = !self.asked.streams;
        self.ready.push_back(Wire::Complete(GenerateComplete {
            completion_tokens: output_ids.len() as u32,
            output_ids,
            finish_reason: reason.to_owned(),
            prompt_tokens: self.asked.prompt.len() as u32,
            cached_tokens: self.cached_tokens,
            output_logprobs: choice.logprobs.take(),
            input_logprobs: if is_whole { self.prompt_logprobs.clone() } else { None },
            index,
            matched_stop,
            ..GenerateComplete::default()
        }));
    }
}

fn output_logprobs(logprobs: TokenLogprobs, n_top: u32) -> OutputLogProbs {
    OutputLogProbs {
        token_logprobs: vec![logprobs.token.logprob],
        token_ids: vec![logprobs.token.id],
        top_logprobs: (n_top > 0).then(|| top_logprobs(&logprobs.top)).into_iter().collect(),
    }
}

/// `tokens` are those of the prompt but the first, which nothing predicts.
fn input_logprobs(prompt: &[u32], tokens: Vec<TokenLogprobs>, n_top: u32) -> InputLogProbs {
    let values = tokens.iter().map(|token| InputTokenLogProb { value: Some(token.token.logprob) });
    let tops = tokens.iter().map(|token| top_logprobs(&token.top));
    InputLogProbs {
        token_logprobs: std::iter::once(InputTokenLogProb { value: None }).chain(values).collect(),
        token_ids: prompt.to_vec(),
        top_logprobs: match n_top {
            0 => Vec::new(),
            _ => std::iter::once(TopLogProbs::default()).chain(tops).collect(),
        },
    }
}

fn top_logprobs(top: &[Logprob]) -> TopLogProbs {
    TopLogProbs {
        values: top.iter().map(|entry| entry.logprob).collect(),
        token_ids: top.iter().map(|entry| entry.id).collect(),
    }
}

/// A vector of length 1 in the same direction. One of length 0 has none, and stays.
pub(super) fn scaled(mut values: Vec<f32>) -> Vec<f32> {
    let length = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    values
}

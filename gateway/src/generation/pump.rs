//! A pump: moves a request's ids from the worker to the tokenizer and their text to the client, until every choice has
//! ended.
//!
//! Ids are read while the text of earlier ones is still on its way, up to a bound. A client that does not read stops
//! the pump, and with it, through HTTP/2's flow control, the worker's stream of this request and no other.

use std::{collections::VecDeque, time::Instant};

use lockstep_proto::{
    error::{Error, Reason},
    tokenizer::v1::{DecodeIds, StreamDecodeResponse},
    v1,
    worker::v1::{
        ChoiceFinish, EndChoiceRequest, GenerateResponse, PromptLogprobs, Started, TokenLogprobs, Tokens,
        generate_response::Event as WorkerEvent,
    },
};
use tokio::{task::JoinSet, time::sleep_until};
use tonic::{Status, Streaming};
use tracing::Instrument as _;

use super::{
    Plan, Prompt,
    choice::{Breach, Choice, Pending, Piece, TextRules},
    dispatch::{Running, judge},
    emitter::Emitter,
    logprobs,
};
use crate::{
    groups::Placement,
    status::Failure,
    tokenizer::{Caller, DecodeStream, decode_stream::MAX_UNANSWERED},
};

/// How ids become text.
#[derive(Debug)]
pub(super) struct Decoding<'a> {
    pub(super) plan: &'a Plan<'a>,
    pub(super) rules: &'a TextRules,
    pub(super) decoder: DecodeStream,
}

#[derive(Debug)]
pub(super) struct Pump<'a> {
    decoding: Decoding<'a>,
    emitter: Emitter<'a>,
    prompt: &'a Prompt,
    placement: Placement,
    worker: Streaming<GenerateResponse>,
    started: Started,
    /// Whether the worker has said all that it will say.
    worker_ended: bool,
    choices: Vec<Choice>,
    /// Ids that the tokenizer was asked about, in order.
    pending: VecDeque<Pending>,
    prompt_logprobs_due: bool,
    /// Calls that end choices in the worker, at most one for each. Dropping them ends them.
    endings: JoinSet<()>,
}

/// How all choices ended.
#[derive(Debug)]
pub(super) struct End {
    pub(super) choices: Vec<v1::ChoiceFinish>,
    pub(super) completion_tokens: u32,
    pub(super) cached_tokens: u32,
    /// To be closed.
    pub(super) decoder: DecodeStream,
}

/// What happens next.
enum Turn {
    Deadline,
    Text(StreamDecodeResponse),
    Ids(Box<GenerateResponse>),
    WorkerEnded,
    WorkerFailed(Status),
}

// === impl Pump ===

impl<'a> Pump<'a> {
    pub(super) fn new(decoding: Decoding<'a>, emitter: Emitter<'a>, running: Running, prompt: &'a Prompt) -> Self {
        let Running { placement, started, events } = running;
        let choices = (0..decoding.plan.sampling.n()).map(|index| Choice::new(index, decoding.rules)).collect();
        let prompt_logprobs_due = decoding.plan.output.prompt_logprobs().is_some();
        Self {
            decoding,
            emitter,
            prompt,
            placement,
            worker: events,
            started,
            worker_ended: false,
            choices,
            pending: VecDeque::new(),
            prompt_logprobs_due,
            endings: JoinSet::new(),
        }
    }

    /// Runs until every choice has ended. Dropping what is left of the worker's stream then cancels it.
    pub(super) async fn run(mut self) -> Result<(Emitter<'a>, End), Failure> {
        while !self.choices.iter().all(Choice::ended) {
            match self.turn().await? {
                Turn::Text(answer) => self.answered(&answer).await?,
                Turn::Ids(event) => self.take(*event).await?,
                Turn::WorkerEnded => self.worker_ended()?,
                Turn::WorkerFailed(status) if !self.expired_there(&status) => return Err(self.worker_failed(&status)),
                Turn::Deadline | Turn::WorkerFailed(_) => self.expire().await?,
            }
        }
        let choices: Vec<_> = self.choices.iter().filter_map(Choice::finish).collect();
        let completion_tokens = self.choices.iter().fold(0, |sum: u32, choice| sum.saturating_add(choice.generated()));
        let expired = choices.iter().all(|choice| choice.reason() == v1::FinishReason::Deadline);
        if completion_tokens == 0 && expired {
            return Err(Failure::Deadline);
        }
        let decoder = self.decoding.decoder;
        Ok((self.emitter, End { choices, completion_tokens, cached_tokens: self.started.cached_tokens, decoder }))
    }

    /// Waits for what happens next. Text goes first: it empties the line.
    async fn turn(&mut self) -> Result<Turn, Failure> {
        let may_read = !self.worker_ended && self.pending.len() < MAX_UNANSWERED;
        Ok(tokio::select! {
            biased;
            () = sleep_until(self.decoding.plan.deadline.tokens().into()) => Turn::Deadline,
            answer = self.decoding.decoder.answer(), if !self.pending.is_empty() => Turn::Text(answer?),
            event = self.worker.message(), if may_read => match event {
                Ok(Some(event)) => Turn::Ids(Box::new(event)),
                Ok(None) => Turn::WorkerEnded,
                Err(status) => Turn::WorkerFailed(status),
            },
        })
    }

    async fn take(&mut self, event: GenerateResponse) -> Result<(), Failure> {
        match event.event {
            Some(WorkerEvent::Tokens(tokens)) => self.take_tokens(tokens),
            Some(WorkerEvent::Finish(finish)) => self.take_finish(&finish),
            Some(WorkerEvent::PromptLogprobs(logprobs)) => self.take_prompt_logprobs(logprobs).await,
            Some(WorkerEvent::Started(_)) => Err(self.breach(Breach::Start)),
            // A later version may say more than this one understands.
            None => Ok(()),
        }
    }

    fn take_tokens(&mut self, tokens: Tokens) -> Result<(), Failure> {
        if self.prompt_logprobs_due {
            return Err(self.breach(Breach::Logprobs { expected: self.prompt.ids.len(), got: 0 }));
        }
        self.emitter.tokens_came();
        let rules = self.decoding.rules;
        let asked = match self.choice(tokens.choice) {
            Some(choice) => choice.read(tokens, rules),
            None => Err(Breach::NoSuchChoice(tokens.choice)),
        };
        let asked = asked.map_err(|breach| self.breach(breach))?;
        self.ask(asked)
    }

    fn take_finish(&mut self, finish: &ChoiceFinish) -> Result<(), Failure> {
        let asked = match self.choice(finish.choice) {
            Some(choice) => choice.finish_reading(finish),
            None => Err(Breach::NoSuchChoice(finish.choice)),
        };
        let asked = asked.map_err(|breach| self.breach(breach))?;
        self.ask(asked)
    }

    async fn take_prompt_logprobs(&mut self, logprobs: PromptLogprobs) -> Result<(), Failure> {
        let (got, expected) = (logprobs.tokens.len().saturating_add(1), self.prompt.ids.len());
        if !self.prompt_logprobs_due || got != expected {
            return Err(self.breach(Breach::Logprobs { expected, got }));
        }
        self.prompt_logprobs_due = false;
        let first = self.prompt.ids.first().copied().unwrap_or_default();
        let all = logprobs::of_prompt(first, logprobs.tokens);
        self.emitter.set_prompt_logprobs(self.with_texts(&all).await?);
        Ok(())
    }

    fn ask(&mut self, asked: Option<(Pending, DecodeIds)>) -> Result<(), Failure> {
        if let Some((pending, ids)) = asked {
            self.decoding.decoder.ask(ids)?;
            self.pending.push_back(pending);
        }
        Ok(())
    }

    async fn answered(&mut self, answer: &StreamDecodeResponse) -> Result<(), Failure> {
        let Some(pending) = self.pending.pop_front() else { return Ok(()) };
        let index = pending.choice;
        let Some(choice) = self.choice(index) else { return Ok(()) };
        let was_open = !choice.ended();
        let decoded = choice.decoded(pending, answer);
        let stopped = was_open && choice.ended() && !choice.worker_ended();
        let piece = decoded.map_err(|breach| {
            let peer = format!("tokenizer {}", self.decoding.decoder.address());
            Failure::Breach { peer, breach }
        })?;
        if stopped && !self.choices.iter().all(Choice::ended) {
            self.end_in_worker(index);
        }
        self.emit(index, piece).await
    }

    /// Has the worker end a choice that a stop string has ended here, while others go on. Nothing waits for the call,
    /// and nothing depends on it: if it fails, the choice ends with the stream.
    fn end_in_worker(&mut self, choice: u32) {
        let plan = self.decoding.plan;
        let request = EndChoiceRequest { generation_id: self.started.generation_id.clone(), choice };
        let left = plan.deadline.client().saturating_duration_since(Instant::now());
        let request = plan.caller().request(request, left);
        let mut client = self.placement.client();
        let ending = async move {
            if let Err(status) = client.end_choice(request).await {
                tracing::debug!(choice, cause = status.message(), "a choice goes on in its worker");
            }
        };
        self.endings.spawn(ending.in_current_span());
    }

    async fn emit(&mut self, choice: u32, piece: Piece) -> Result<(), Failure> {
        let Piece { ids, text, logprobs, tool_calls } = piece;
        let logprobs = if logprobs.is_empty() { Vec::new() } else { self.with_texts(&logprobs).await? };
        self.emitter.chunk(v1::Chunk { seq: 0, choice, token_ids: ids, text, logprobs, tool_calls }).await
    }

    async fn with_texts(&self, logprobs: &[TokenLogprobs]) -> Result<Vec<v1::TokenLogprob>, Failure> {
        let plan = self.decoding.plan;
        let caller = Caller { trace: plan.trace, until: plan.deadline.text() };
        Ok(logprobs::with_texts(logprobs, &plan.backends.tokenizers, plan.facts, caller).await?)
    }

    /// The deadline has come: what was generated so far gets its text, as far as it comes in time, and ends.
    async fn expire(&mut self) -> Result<(), Failure> {
        self.worker_ended = true;
        for index in 0..self.choices.len() {
            let asked = self.choices.get_mut(index).and_then(Choice::expire);
            self.ask(asked)?;
        }
        let until = self.decoding.plan.deadline.text();
        while !self.pending.is_empty() && Instant::now() < until {
            match tokio::time::timeout_at(until.into(), self.decoding.decoder.answer()).await {
                Ok(Ok(answer)) => self.answered(&answer).await?,
                Ok(Err(_)) | Err(_) => break,
            }
        }
        for (index, choice) in (0..).zip(0..self.choices.len()) {
            let piece = self.choices.get_mut(choice).map(Choice::close).unwrap_or_default();
            self.emit(index, piece).await?;
        }
        Ok(())
    }

    /// The worker's stream may end only once it has ended every choice.
    fn worker_ended(&mut self) -> Result<(), Failure> {
        self.worker_ended = true;
        if self.choices.iter().all(Choice::worker_ended) {
            return Ok(());
        }
        self.placement.failed();
        Err(self.group_failure(Error::new(Reason::Unavailable, "it ended the stream before its choices")))
    }

    /// Whether the worker gave up because of the request's own deadline.
    fn expired_there(&self, status: &Status) -> bool {
        status.code() == tonic::Code::DeadlineExceeded
    }

    fn worker_failed(&mut self, status: &Status) -> Failure {
        let error = judge(&mut self.placement, status);
        self.group_failure(error)
    }

    fn group_failure(&self, error: Error) -> Failure {
        Failure::Group { address: self.placement.address().to_owned(), error: Box::new(error) }
    }

    fn breach(&mut self, breach: Breach) -> Failure {
        self.placement.failed();
        Failure::Breach { peer: format!("group {}", self.placement.address()), breach }
    }

    fn choice(&mut self, index: u32) -> Option<&mut Choice> {
        self.choices.get_mut(usize::try_from(index).ok()?)
    }
}

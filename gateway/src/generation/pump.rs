//! A pump: moves the text of a request's ids from the worker to the client, until every choice has ended.
//!
//! A client that does not read stops the pump, and with it, through HTTP/2's flow control, the worker's stream of this
//! request and no other.

use std::time::Instant;

use lockstep_proto::{
    error::{Error, Reason},
    v1,
    worker::v1::{
        ChoiceFinish, EndChoiceRequest, GenerateResponse, PromptLogprobs, Started, Tokens,
        generate_response::Event as WorkerEvent,
    },
};
use tokio::{task::JoinSet, time::sleep_until};
use tonic::{Status, Streaming};
use tracing::Instrument as _;

use super::{
    Plan, Prompt,
    choice::{Breach, Choice, Piece, TextRules},
    dispatch::{Running, judge},
    emitter::Emitter,
    logprobs,
};
use crate::{groups::Placement, status::Failure, tokenizer::Detokenizer};

/// Ids of the prompt that a detokenizer is shown before the first one that it decodes: a character is at most four of
/// them, and spacing depends on the last one alone.
const CONTEXT_TOKENS: usize = 8;

#[derive(Debug)]
pub(super) struct Pump<'a> {
    plan: &'a Plan<'a>,
    rules: &'a TextRules,
    emitter: Emitter<'a>,
    prompt: &'a Prompt,
    placement: Placement,
    worker: Streaming<GenerateResponse>,
    started: Started,
    /// Whether the worker has said all that it will say.
    worker_ended: bool,
    choices: Vec<Choice>,
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
}

/// What happens next.
enum Turn {
    Deadline,
    Ids(Box<GenerateResponse>),
    WorkerEnded,
    WorkerFailed(Status),
}

// === impl Pump ===

impl<'a> Pump<'a> {
    /// # Errors
    /// When the prompt has an id that its tokenizer does not.
    pub(super) fn new(
        plan: &'a Plan<'a>,
        rules: &'a TextRules,
        emitter: Emitter<'a>,
        running: Running,
        prompt: &'a Prompt,
    ) -> Result<Self, Failure> {
        let Running { placement, started, events } = running;
        let context_from = prompt.ids.len().saturating_sub(CONTEXT_TOKENS);
        let context = prompt.ids.get(context_from..).unwrap_or_default();
        let detokenizer = Detokenizer::resume(&rules.facts, rules.skip_special_tokens, context)?;
        let choice = |index| Choice::new(index, detokenizer.clone(), rules);
        Ok(Self {
            plan,
            rules,
            emitter,
            prompt,
            placement,
            worker: events,
            started,
            worker_ended: false,
            choices: (0..plan.sampling.n()).map(choice).collect(),
            prompt_logprobs_due: plan.output.prompt_logprobs().is_some(),
            endings: JoinSet::new(),
        })
    }

    /// Runs until every choice has ended.
    pub(super) async fn run(&mut self) -> Result<End, Failure> {
        while !self.choices.iter().all(Choice::ended) {
            match self.turn().await {
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
        Ok(End { choices, completion_tokens, cached_tokens: self.started.cached_tokens })
    }

    /// What tells the client the end. All else goes: what is left of the worker's stream is cancelled with that, however long
    /// the client takes to read.
    pub(super) fn into_emitter(self) -> Emitter<'a> {
        self.emitter
    }

    /// Waits for what happens next.
    async fn turn(&mut self) -> Turn {
        tokio::select! {
            biased;
            () = sleep_until(self.plan.deadline.tokens().into()) => Turn::Deadline,
            event = self.worker.message(), if !self.worker_ended => match event {
                Ok(Some(event)) => Turn::Ids(Box::new(event)),
                Ok(None) => Turn::WorkerEnded,
                Err(status) => Turn::WorkerFailed(status),
            },
        }
    }

    async fn take(&mut self, event: GenerateResponse) -> Result<(), Failure> {
        match event.event {
            Some(WorkerEvent::Tokens(tokens)) => self.take_tokens(tokens).await,
            Some(WorkerEvent::Finish(finish)) => self.take_finish(&finish).await,
            Some(WorkerEvent::PromptLogprobs(logprobs)) => self.take_prompt_logprobs(logprobs).await,
            Some(WorkerEvent::Started(_)) => Err(self.breach(Breach::Start)),
            // A later version may say more than this one understands.
            None => Ok(()),
        }
    }

    async fn take_tokens(&mut self, tokens: Tokens) -> Result<(), Failure> {
        if self.prompt_logprobs_due {
            return Err(self.breach(Breach::Logprobs { expected: self.prompt.ids.len(), got: 0 }));
        }
        self.emitter.tokens_came();
        let (index, rules) = (tokens.choice, self.rules);
        let read = |choice: &mut Choice| {
            let was_open = !choice.ended();
            let piece = choice.read(tokens, rules)?;
            Ok((piece, was_open && choice.ended()))
        };
        let read = self.choice(index).map_or(Err(Breach::NoSuchChoice(index)), read);
        let (piece, stopped) = read.map_err(|breach| self.breach(breach))?;
        if stopped && !self.choices.iter().all(Choice::ended) {
            self.end_in_worker(index);
        }
        self.emit(index, piece).await
    }

    async fn take_finish(&mut self, finish: &ChoiceFinish) -> Result<(), Failure> {
        let choice = self.choice(finish.choice).ok_or(Breach::NoSuchChoice(finish.choice));
        let piece = choice.and_then(|choice| choice.finish_reading(finish));
        let piece = piece.map_err(|breach| self.breach(breach))?;
        self.emit(finish.choice, piece).await
    }

    async fn take_prompt_logprobs(&mut self, logprobs: PromptLogprobs) -> Result<(), Failure> {
        let (got, expected) = (logprobs.tokens.len().saturating_add(1), self.prompt.ids.len());
        if !self.prompt_logprobs_due || got != expected {
            return Err(self.breach(Breach::Logprobs { expected, got }));
        }
        self.prompt_logprobs_due = false;
        let first = self.prompt.ids.first().copied().unwrap_or_default();
        let all = logprobs::of_prompt(first, logprobs.tokens);
        self.emitter.set_prompt_logprobs(logprobs::with_texts(&all, self.rules.facts.vocabulary())?);
        Ok(())
    }

    /// Has the worker end a choice that a stop string has ended here, while others go on. Nothing waits for the call,
    /// and nothing depends on it: if it fails, the choice ends with the stream.
    fn end_in_worker(&mut self, choice: u32) {
        let plan = self.plan;
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
        let logprobs = logprobs::with_texts(&logprobs, self.rules.facts.vocabulary())?;
        self.emitter.chunk(v1::Chunk { seq: 0, choice, token_ids: ids, text, logprobs, tool_calls }).await
    }

    /// The deadline has come: every choice ends with what it has.
    async fn expire(&mut self) -> Result<(), Failure> {
        self.worker_ended = true;
        for (index, choice) in (0..).zip(0..self.choices.len()) {
            let piece = self.choices.get_mut(choice).map(Choice::expire).unwrap_or_default();
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

//! A generation: one request's life, from a valid request to its last event. All calls share it: a unary call is a
//! stream that is collected.
//!
//! 1. [`prompt`]: render the conversation, encode the text.
//! 2. Settle what depends on the prompt's length.
//! 3. [`dispatch`]: find a group, wait for its first event.
//! 4. [`pump`]: ids from the worker become text in each [`choice`], which looks for stop strings; chunks go to the
//!    [`outbox`].
//! 5. Exactly one `Finish`.
//!
//! The [`deadline`] bounds every step. Whatever a generation holds (its place at the gate, the worker's stream) lives in
//! one task and is dropped with it, so that a client that goes away ends all of it at once.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::{
    trace::Trace,
    v1,
    worker::v1::{GenerateRequest, ResolvedSampling},
};

pub mod choice;
pub mod collect;
pub mod deadline;
pub(crate) mod dispatch;
mod emitter;
mod logprobs;
pub mod outbox;
pub mod prompt;
mod pump;

pub use choice::Breach;
pub use deadline::Deadline;
pub use outbox::{Event, Events};
pub use prompt::{Prompt, Source};

use choice::TextRules;
use dispatch::{Order, begin, dispatch};
use emitter::Emitter;
use outbox::{Outbox, Patience};
use pump::Pump;

use crate::{
    admission::Permit,
    backends::Backends,
    metrics::Meter,
    request::ValidOutput,
    sampling::ValidSampling,
    status::Failure,
    stop::StopStrings,
    tokenizer::{Caller, Facts},
    tools::reader,
};

/// A valid request with its place in the gateway.
#[derive(Debug)]
pub struct Job {
    /// Names the client call.
    pub trace: Trace,
    /// When it must have had its last word.
    pub deadline: Deadline,
    /// Counts it.
    pub meter: Meter,
    /// Its place at the gate.
    pub permit: Permit,
    /// The model's facts.
    pub facts: Arc<Facts>,
    /// Where its prompt comes from.
    pub source: Source,
    /// Which calls of tools are read from the answer.
    pub tools: Option<reader::Rules>,
    /// How tokens are chosen.
    pub sampling: ValidSampling,
    /// What comes back beside the text.
    pub output: ValidOutput,
}

/// What every step of a generation needs to know.
#[derive(Debug)]
struct Plan<'a> {
    backends: &'a Backends,
    trace: &'a Trace,
    deadline: Deadline,
    facts: &'a Arc<Facts>,
    tools: &'a Option<reader::Rules>,
    sampling: &'a ValidSampling,
    output: &'a ValidOutput,
}

/// Starts a generation in a task that ends with the events.
pub fn start(backends: Arc<Backends>, job: Job) -> Events {
    let patience = Patience { event: backends.patience, until: job.deadline.client() };
    outbox::run(patience, |outbox| async move {
        let Job { trace, deadline, mut meter, permit: _permit, facts, source, tools, sampling, output } = job;
        let (backends, trace, facts, sampling) = (&backends, &trace, &facts, &sampling);
        let plan = Plan { backends, trace, deadline, facts, tools: &tools, sampling, output: &output };
        let outcome = plan.run(source, &outbox, &meter).await;
        let outcome = outcome.map_err(|failure| failure.of_constraint(sampling.constraint_path()));
        if let Err(failure) = &outcome {
            tracing::info!(reason = %failure.reason(), "the request failed");
            // What went wrong may quote the request, which logs must not by default.
            tracing::debug!(%failure, "why it failed");
        }
        meter.settle(outcome)
    })
}

// === impl Plan ===

impl Plan<'_> {
    async fn run(&self, source: Source, outbox: &Outbox, meter: &Meter) -> Result<(), Failure> {
        // What a step needs in memory is given back with its box; the answer may take long.
        let prompt = Box::pin(source.prompt(&self.backends.tokenizers, self.facts, self.caller())).await?;
        let encoded_at = Instant::now();
        let sampling = self.sampling.resolve(prompt.n_tokens())?;
        let (seed, rules) = (sampling.seed, self.text_rules(&sampling));
        let order = self.order(&prompt, &sampling);
        let message = self.message(&prompt, sampling);

        let prepared = async {
            let running = dispatch(&self.backends.groups, order, |placement| begin(placement, order, message.clone()));
            tokio::try_join!(running, self.prompt_text(&prompt))
        };
        let (running, prompt_text) = Box::pin(self.in_time(prepared)).await?;
        let (model_digest, engine_version) = running.placement.identity();

        let emitter = Emitter::new(outbox, meter, self.start_event(&prompt), prompt_text, self.sampling.n());
        let mut pump = Pump::new(self, &rules, emitter, running, &prompt)?;
        let end = pump.run().await?;
        let mut emitter = pump.into_emitter();

        let completion_tokens = end.completion_tokens;
        meter.tokens(prompt.n_tokens(), completion_tokens);
        let first_token_at = emitter.first_token_at().unwrap_or_else(Instant::now);
        let finish = v1::Finish {
            choices: end.choices,
            usage: Some(v1::Usage {
                prompt_tokens: prompt.n_tokens(),
                cached_tokens: end.cached_tokens,
                completion_tokens,
            }),
            timings: Some(v1::Timings {
                encode_ms: millis(encoded_at - meter.arrived()),
                first_token_ms: millis(first_token_at.saturating_duration_since(encoded_at)),
                total_ms: millis(meter.arrived().elapsed()),
            }),
            repro: Some(v1::Repro { model_digest, seed, engine_version }),
        };
        emitter.finish(finish).await
    }

    fn caller(&self) -> Caller<'_> {
        Caller { trace: self.trace, until: self.deadline.tokens() }
    }

    async fn in_time<T>(&self, step: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let until = tokio::time::Instant::from_std(self.deadline.tokens());
        tokio::time::timeout_at(until, step).await.map_err(|_| Failure::Deadline)?
    }

    fn order<'a>(&'a self, prompt: &'a Prompt, sampling: &ResolvedSampling) -> Order<'a> {
        let output = u64::from(sampling.max_new_tokens).saturating_mul(self.sampling.n().into());
        Order {
            model: self.facts.model(),
            prompt_token_ids: &prompt.ids,
            cost: u64::from(prompt.n_tokens()).saturating_add(output),
            deadline: self.deadline,
            caller: self.caller(),
        }
    }

    fn message(&self, prompt: &Prompt, sampling: ResolvedSampling) -> GenerateRequest {
        GenerateRequest {
            request_id: self.trace.request_id().to_owned(),
            prompt_token_ids: prompt.ids.clone(),
            sampling: Some(sampling),
            n: self.sampling.n(),
            logprobs: self.output.logprobs(),
            prompt_logprobs: self.output.prompt_logprobs(),
            budget_ms: None,
        }
    }

    fn text_rules(&self, sampling: &ResolvedSampling) -> TextRules {
        TextRules {
            facts: Arc::clone(self.facts),
            stop_token_ids: sampling.stop_token_ids.iter().copied().collect(),
            stop: StopStrings::new(self.sampling.stop()),
            skip_special_tokens: self.output.skip_special_tokens(),
            logprobs: self.output.logprobs().is_some(),
            tools: self.tools.clone(),
        }
    }

    /// The prompt's text, if it is to come before the generated one.
    async fn prompt_text(&self, prompt: &Prompt) -> Result<Option<String>, Failure> {
        if !self.output.return_full_text() {
            return Ok(None);
        }
        if let Some(text) = &prompt.text {
            return Ok(Some(text.clone()));
        }
        let skip = self.output.skip_special_tokens();
        Ok(Some(self.backends.tokenizers.decode(self.facts, &prompt.ids, skip, self.caller()).await?))
    }

    fn start_event(&self, prompt: &Prompt) -> v1::Start {
        v1::Start {
            request_id: self.trace.request_id().to_owned(),
            model: self.facts.model().to_owned(),
            prompt_tokens: prompt.n_tokens(),
            prompt_logprobs: Vec::new(),
        }
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

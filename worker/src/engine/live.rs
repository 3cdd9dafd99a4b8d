//! Live jobs: what the leader keeps of every job that it has admitted, and which sequence belongs to which choice.

use std::{collections::HashMap, time::Instant};

use tokio::sync::mpsc::error::TrySendError;

use super::{EngineError, Event, FinishReason, Job, handle::Outlet};
use crate::{
    sampler::{Sampler, TokenLogprobs},
    scheduler::{
        NewSequence, Refusal, Sampled, Scheduler,
        plan::{SeqId, SequenceStep},
    },
};

/// A job and how far it has come.
#[derive(Debug)]
struct LiveJob {
    job: Job,
    outlet: Outlet,
    sequences: Vec<SeqId>,
    prompt_logprobs: Vec<TokenLogprobs>,
}

/// A choice of a job.
#[derive(Debug)]
struct LiveSequence {
    job: u64,
    choice: u32,
    emitted: Vec<u32>,
    cached_tokens: u32,
}

/// All jobs that run or wait in the scheduler.
#[derive(Debug, Default)]
pub(super) struct LiveJobs {
    next_job: u64,
    jobs: HashMap<u64, LiveJob>,
    sequences: HashMap<SeqId, LiveSequence>,
}

/// What one sequence got out of a step.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) sampled: Sampled,
    /// The reader is gone or too slow: the job is to be dropped.
    pub(super) cut_off: bool,
}

impl LiveJobs {
    /// Hands a job's choices to the scheduler, all or none.
    pub(super) fn admit(
        &mut self,
        scheduler: &mut Scheduler,
        job: Job,
        outlet: Outlet,
        now: Instant,
    ) -> Result<(), Refusal> {
        let mut sequences = Vec::with_capacity(job.n as usize);
        for choice in 0..job.n {
            let sequence = NewSequence {
                prompt: job.prompt.clone(),
                max_new_tokens: job.max_new_tokens,
                deadline: job.deadline,
                // The prompt is the same for every choice, so one of them is enough.
                prompt_logprobs: choice == 0 && job.prompt_logprobs.is_some(),
            };
            match scheduler.add(sequence, now) {
                Ok(id) => sequences.push(id),
                Err(refusal) => {
                    sequences.into_iter().for_each(|id| scheduler.abort(id));
                    return Err(refusal);
                }
            }
        }
        let key = self.next_job;
        self.next_job += 1;
        for (choice, &id) in (0..).zip(&sequences) {
            self.sequences.insert(id, LiveSequence { job: key, choice, emitted: Vec::new(), cached_tokens: 0 });
        }
        self.jobs.insert(key, LiveJob { job, outlet, sequences, prompt_logprobs: Vec::new() });
        Ok(())
    }

    /// Whether nothing runs or waits.
    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Drops the jobs whose readers have gone. Returns how many.
    pub(super) fn drop_abandoned(&mut self, scheduler: &mut Scheduler) -> usize {
        let abandoned: Vec<u64> =
            self.jobs.iter().filter(|(_, live)| live.outlet.events.is_closed()).map(|(key, _)| *key).collect();
        for &key in &abandoned {
            self.drop_job(scheduler, key);
        }
        abandoned.len()
    }

    /// Keeps the log-probabilities of the prompt's tokens that a chunk's logits, `[n, vocab_size]`, predict.
    pub(super) fn keep_prompt_logprobs(&mut self, step: &SequenceStep, logits: &[f32], sampler: &mut Sampler) {
        let Some(live) = self.sequences.get(&step.id).and_then(|sequence| self.jobs.get_mut(&sequence.job)) else {
            return;
        };
        let (prompt, n_top) = (&live.job.prompt, live.job.prompt_logprobs.unwrap_or(0) as usize);
        let predicted = prompt.get(step.start_position as usize + 1..).unwrap_or_default();
        for (row, &token) in logits.chunks_exact(sampler.vocab_size()).zip(predicted) {
            live.prompt_logprobs.push(sampler.logprobs(row, token, n_top));
        }
    }

    /// Samples a sequence's next token from its last row of logits, `[vocab_size]`, and tells the reader.
    ///
    /// `cached_tokens`: prompt tokens that the prefix cache held when the sequence started.
    pub(super) fn advance(
        &mut self,
        id: SeqId,
        logits: &[f32],
        cached_tokens: u32,
        sampler: &mut Sampler,
    ) -> Option<Outcome> {
        let sequence = self.sequences.get_mut(&id)?;
        let live = self.jobs.get_mut(&sequence.job)?;
        let job = &live.job;
        sequence.cached_tokens = cached_tokens;
        let token = sampler.sample(logits, &job.params, &job.prompt, &sequence.emitted, sequence.choice);
        let logprobs = job.logprobs.map(|n_top| sampler.logprobs(logits, token, n_top as usize));
        let mut delivered = true;
        if sequence.choice == 0 && sequence.emitted.is_empty() && job.prompt_logprobs.is_some() {
            let event = Event::PromptLogprobs(std::mem::take(&mut live.prompt_logprobs));
            delivered &= live.outlet.send(event);
        }
        let position = sequence.emitted.len() as u32;
        delivered &= live.outlet.send(Event::Token { choice: sequence.choice, position, token_id: token, logprobs });
        sequence.emitted.push(token);
        let stop = job.params.stop_token_ids.contains(&token);
        Some(Outcome { sampled: Sampled { id, token, stop }, cut_off: !delivered })
    }

    /// Ends one choice.
    pub(super) fn finish(&mut self, id: SeqId, reason: Reason) {
        let Some(sequence) = self.sequences.remove(&id) else { return };
        let Some(live) = self.jobs.get_mut(&sequence.job) else { return };
        let reason = match reason {
            Reason::Stop => sequence.emitted.last().map_or(FinishReason::Length, |id| FinishReason::StopToken(*id)),
            Reason::Length => FinishReason::Length,
            Reason::Deadline => FinishReason::Deadline,
        };
        live.sequences.retain(|other| *other != id);
        let never_started = reason == FinishReason::Deadline && sequence.emitted.is_empty();
        if never_started && live.job.n == 1 {
            live.outlet.fail(EngineError::Expired);
        } else {
            let LiveSequence { choice, cached_tokens, .. } = sequence;
            live.outlet.send(Event::Finish { choice, reason, cached_tokens });
        }
        if live.sequences.is_empty() {
            self.jobs.remove(&sequence.job);
        }
    }

    /// Drops the job that a sequence belongs to; its reader was told why, or is gone.
    pub(super) fn drop_job_of(&mut self, scheduler: &mut Scheduler, id: SeqId) {
        if let Some(key) = self.sequences.get(&id).map(|sequence| sequence.job) {
            self.drop_job(scheduler, key);
        }
    }

    /// Ends every job with an error.
    pub(super) fn fail_all(&mut self, error: &EngineError) {
        for (_, live) in self.jobs.drain() {
            live.outlet.fail(error.clone());
        }
        self.sequences.clear();
    }

    fn drop_job(&mut self, scheduler: &mut Scheduler, key: u64) {
        for id in self.jobs.remove(&key).into_iter().flat_map(|live| live.sequences) {
            self.sequences.remove(&id);
            scheduler.abort(id);
        }
    }
}

/// Why a choice ends, as the scheduler sees it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reason {
    /// A stop token was sampled.
    Stop,
    /// Out of tokens.
    Length,
    /// Out of time.
    Deadline,
}

impl Outlet {
    /// Never waits. False if the reader is gone, or so slow that it is cut off.
    fn send(&self, event: Event) -> bool {
        match self.events.try_send(event) {
            Ok(()) => true,
            Err(TrySendError::Closed(_)) => false,
            Err(TrySendError::Full(_)) => {
                self.fail(EngineError::SlowReader);
                false
            }
        }
    }

    /// The error that the reader finds when its stream ends; the first one counts.
    fn fail(&self, error: EngineError) {
        let _ = self.failure.set(error);
    }
}

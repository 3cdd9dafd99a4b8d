//! Live jobs: what the leader keeps of every job that it has admitted, and which sequence belongs to which choice.

use std::{collections::HashMap, time::Instant};

use lockstep_kernels::cuda::{ChoiceRule, MAX_CHOICES};
use tokio::sync::mpsc::error::TrySendError;

use super::{EngineError, Event, FinishReason, GenerationId, Job, draft_model::Asked, handle::Outlet};
use crate::{
    constraint::{
        guide::{Compiled, Guide},
        matcher::Next,
    },
    sampler::{self, Place, Sampler, TokenLogprobs},
    scheduler::{
        NewSequence, Refusal, Sampled, Scheduler,
        plan::{SeqId, SequenceStep, StepPlan},
        speculation::Draftable,
    },
};

/// A job and how far it has come.
#[derive(Debug)]
struct LiveJob {
    job: Job,
    outlet: Outlet,
    sequences: Vec<SeqId>,
    prompt_logprobs: Vec<TokenLogprobs>,
    /// Whether its reader has its [`Event::Started`].
    started: bool,
}

/// A choice of a job.
#[derive(Debug)]
struct LiveSequence {
    generation: GenerationId,
    choice: u32,
    emitted: Vec<u32>,
    /// Says what its tokens may be, if not everything.
    guide: Option<Guide>,
    /// Whether the followers know whose it is.
    announced: bool,
}

/// All jobs that run or wait in the scheduler.
#[derive(Debug, Default)]
pub(super) struct LiveJobs {
    jobs: HashMap<GenerationId, LiveJob>,
    sequences: HashMap<SeqId, LiveSequence>,
}

/// What a step gives for a sequence's rows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rows<'a> {
    /// Logits, `[n_rows, vocab_size]`.
    Logits(&'a [f32]),
    /// The tokens that were chosen, `[n_rows]`.
    Chosen(&'a [u32]),
}

/// What one sequence got out of a step.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Tokens. If it is cut off, the reader is too slow: the job is to be dropped.
    Sampled { sampled: Sampled, cut_off: bool },
    /// Its end: its constraint had allowed nothing more.
    Complete,
    /// Nothing: its constraint cannot be held, and its reader was told. The job is to be dropped.
    Failed,
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
                pooling: None,
                deadline: job.deadline,
                // The prompt is the same for every choice, so one of them is enough, and the others' tokens come later.
                prompt_logprobs: choice == 0 && job.prompt_logprobs.is_some(),
                after: sequences.first().copied(),
                // What may follow a draft is not known before the draft is chosen.
                no_drafts: job.constraint.is_some(),
            };
            match scheduler.add(sequence, now) {
                Ok(id) => sequences.push(id),
                Err(refusal) => {
                    sequences.into_iter().for_each(|id| scheduler.abort(id));
                    return Err(refusal);
                }
            }
        }
        let generation = GenerationId::random();
        for (choice, &id) in (0..).zip(&sequences) {
            let guide = job.constraint.as_deref().map(Compiled::guide);
            let sequence = LiveSequence { generation, choice, emitted: Vec::new(), guide, announced: false };
            self.sequences.insert(id, sequence);
        }
        self.jobs.insert(generation, LiveJob { job, outlet, sequences, prompt_logprobs: Vec::new(), started: false });
        Ok(())
    }

    /// Whether nothing runs or waits.
    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// The request ids of the sequences whose first rows are in `plan`: followers write them to their logs.
    pub(super) fn announce(&mut self, plan: &StepPlan) -> Vec<(SeqId, String)> {
        let mut announced = Vec::new();
        for id in plan.sequences.iter().map(|step| step.id) {
            let Some(sequence) = self.sequences.get_mut(&id).filter(|sequence| !sequence.announced) else { continue };
            sequence.announced = true;
            if let Some(live) = self.jobs.get(&sequence.generation) {
                announced.push((id, live.job.request_id.clone()));
            }
        }
        announced
    }

    /// Drops the jobs whose readers have gone. Returns how many.
    pub(super) fn drop_abandoned(&mut self, scheduler: &mut Scheduler) -> usize {
        let abandoned: Vec<GenerationId> =
            self.jobs.iter().filter(|(_, live)| live.outlet.events.is_closed()).map(|(id, _)| *id).collect();
        for &generation in &abandoned {
            self.drop_job(scheduler, generation);
        }
        abandoned.len()
    }

    /// Keeps the log-probabilities of the prompt's tokens that a chunk's logits, `[n, vocab_size]`, predict.
    pub(super) fn keep_prompt_logprobs(&mut self, step: &SequenceStep, logits: &[f32], sampler: &mut Sampler) {
        let Some(live) = self.sequences.get(&step.id).and_then(|sequence| self.jobs.get_mut(&sequence.generation))
        else {
            return;
        };
        let (prompt, n_top) = (&live.job.prompt, live.job.prompt_logprobs.unwrap_or(0) as usize);
        let predicted = prompt.get(step.start_position as usize + 1..).unwrap_or_default();
        for (row, &token) in logits.chunks_exact(sampler.vocab_size()).zip(predicted) {
            live.prompt_logprobs.push(sampler.logprobs(row, token, n_top));
        }
    }

    /// How a device is to choose the tokens of a plan, one rule for each row of logits. `None` if it cannot for one of them:
    /// its logits are to come to the host.
    pub(super) fn choice_rules(&self, plan: &StepPlan) -> Option<Vec<ChoiceRule>> {
        let mut rules = Vec::new();
        for step in plan.sequences.iter().filter(|step| step.n_logits_rows() > 0) {
            let sequence = self.sequences.get(&step.id)?;
            let job = &self.jobs.get(&sequence.generation)?.job;
            if sequence.guide.is_some() {
                return None;
            }
            let is_of_prompt = (step.start_position as usize) < job.prompt.len();
            if job.logprobs.is_some() || (job.prompt_logprobs.is_some() && is_of_prompt) {
                return None;
            }
            let end = step.start_position as usize + step.token_ids.len();
            for row in (0..step.n_logits_rows()).rev() {
                // Tokens up to the row's own; those of the prompt are known.
                let position = end - row;
                let n_emitted = position.checked_sub(job.prompt.len())?;
                rules.push(sampler::choice_rule(&job.params, position as u64, n_emitted, sequence.choice)?);
            }
        }
        (rules.len() <= MAX_CHOICES).then_some(rules)
    }

    /// What a draft model is to know of a sequence.
    pub(super) fn ask(&self, draftable: Draftable) -> Option<Asked<'_>> {
        let sequence = self.sequences.get(&draftable.id)?;
        let Job { prompt, params, .. } = &self.jobs.get(&sequence.generation)?.job;
        Some(Asked { draftable, prompt, emitted: &sequence.emitted, params, choice: sequence.choice })
    }

    /// Waits, until some time, for the masks that sequences need to be sampled. False if none does.
    pub(super) fn await_masks(&mut self, due: impl Iterator<Item = SeqId>, until: Instant) -> bool {
        let mut is_any = false;
        for id in due {
            if let Some(guide) = self.sequences.get_mut(&id).and_then(|sequence| sequence.guide.as_mut()) {
                is_any = true;
                // An error stays, and is found when the sequence is sampled.
                let _ = guide.next(until);
            }
        }
        is_any
    }

    /// Samples a sequence's next tokens, or takes those that were chosen, and tells the reader: one from the first of its
    /// `1 + drafts.len()` rows, and one from each further row, as long as the draft that the row is of is the token that
    /// came before. Every token is sampled from what it would be sampled from without drafts.
    ///
    /// `cached_tokens`: prompt tokens that the prefix cache held when the sequence started.
    pub(super) fn advance(
        &mut self,
        id: SeqId,
        rows: Rows<'_>,
        drafts: &[u32],
        cached_tokens: u32,
        sampler: &mut Sampler,
    ) -> Option<Outcome> {
        let LiveSequence { generation, choice, emitted, guide, .. } = self.sequences.get_mut(&id)?;
        let (generation, choice) = (*generation, *choice);
        let live = self.jobs.get_mut(&generation)?;
        let mask = match guide.as_mut().map(|guide| guide.next(Instant::now())) {
            None => None,
            Some(Ok(Next::Tokens(mask))) => Some(mask),
            Some(Ok(Next::Nothing)) => return Some(Outcome::Complete),
            Some(Err(error)) => {
                live.outlet.fail(error.into());
                return Some(Outcome::Failed);
            }
        };
        let mut delivered = live.start(generation, cached_tokens);
        let mut tokens = Vec::with_capacity(1 + drafts.len());
        let mut stop = false;
        for row in 0..=drafts.len() {
            let job = &live.job;
            let (token, logprobs) = match rows {
                Rows::Chosen(token_ids) => (token_ids[row], None),
                Rows::Logits(logits) => {
                    let vocab_size = sampler.vocab_size();
                    let logits = &logits[row * vocab_size..][..vocab_size];
                    let place = Place { params: &job.params, prompt: &job.prompt, emitted, choice, mask };
                    let token = sampler.sample(logits, place);
                    (token, job.logprobs.map(|n_top| sampler.logprobs(logits, token, n_top as usize)))
                }
            };
            let position = emitted.len() as u32;
            delivered &= live.outlet.send(Event::Token { choice, position, token_id: token, logprobs });
            emitted.push(token);
            stop = job.params.stop_token_ids.contains(&token);
            tokens.push(token);
            if stop || drafts.get(tokens.len() - 1) != Some(&token) {
                break;
            }
        }
        if let (Some(guide), Some(token), false) = (guide, tokens.last(), stop) {
            guide.advance(*token);
        }
        Some(Outcome::Sampled { sampled: Sampled { id, tokens, stop }, cut_off: !delivered })
    }

    /// Ends one choice, which the scheduler has ended.
    pub(super) fn finish(&mut self, id: SeqId, reason: Reason) {
        let Some(mut sequence) = self.sequences.remove(&id) else { return };
        let Some(live) = self.jobs.get_mut(&sequence.generation) else { return };
        let reason = match reason {
            Reason::Length { mask_by } if sequence.is_complete(mask_by) => FinishReason::Complete,
            Reason::Complete => FinishReason::Complete,
            Reason::Stop => sequence.emitted.last().map_or(FinishReason::Length, |id| FinishReason::StopToken(*id)),
            Reason::Length { .. } => FinishReason::Length,
            Reason::Deadline => FinishReason::Deadline,
            Reason::Ended => FinishReason::Ended,
        };
        if live.started {
            live.outlet.send(Event::Finish { choice: sequence.choice, reason });
        } else {
            // Its other choices have the same deadline, so that all of them end here.
            live.outlet.fail(EngineError::Expired);
        }
        live.sequences.retain(|other| *other != id);
        if live.sequences.is_empty() {
            self.jobs.remove(&sequence.generation);
        }
    }

    /// Ends one choice because its reader wants no more of it.
    pub(super) fn end_choice(&mut self, scheduler: &mut Scheduler, generation: GenerationId, choice: u32) {
        let sequences = self.jobs.get(&generation).map(|live| live.sequences.as_slice()).unwrap_or_default();
        let is_meant = |id: &&SeqId| self.sequences.get(id).is_some_and(|sequence| sequence.choice == choice);
        if let Some(&id) = sequences.iter().find(is_meant) {
            scheduler.abort(id);
            self.finish(id, Reason::Ended);
        }
    }

    /// Drops the job that a sequence belongs to; its reader was told why, or is gone.
    pub(super) fn drop_job_of(&mut self, scheduler: &mut Scheduler, id: SeqId) {
        if let Some(generation) = self.sequences.get(&id).map(|sequence| sequence.generation) {
            self.drop_job(scheduler, generation);
        }
    }

    /// Ends every job with an error.
    pub(super) fn fail_all(&mut self, error: &EngineError) {
        for (_, live) in self.jobs.drain() {
            live.outlet.fail(error.clone());
        }
        self.sequences.clear();
    }

    fn drop_job(&mut self, scheduler: &mut Scheduler, generation: GenerationId) {
        for id in self.jobs.remove(&generation).into_iter().flat_map(|live| live.sequences) {
            self.sequences.remove(&id);
            scheduler.abort(id);
        }
    }
}

impl LiveSequence {
    /// Whether its constraint allows nothing after its last token, as far as that is known by then.
    fn is_complete(&mut self, by: Instant) -> bool {
        let next = self.guide.as_mut().map(|guide| guide.next(by));
        matches!(next, Some(Ok(Next::Nothing)))
    }
}

impl LiveJob {
    /// Tells the reader that tokens follow, once. False if it is too slow.
    fn start(&mut self, generation: GenerationId, cached_tokens: u32) -> bool {
        if std::mem::replace(&mut self.started, true) {
            return true;
        }
        let mut delivered = self.outlet.send(Event::Started { generation, cached_tokens });
        if self.job.prompt_logprobs.is_some() {
            delivered &= self.outlet.send(Event::PromptLogprobs(std::mem::take(&mut self.prompt_logprobs)));
        }
        delivered
    }
}

/// Why a choice ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reason {
    /// A stop token was sampled.
    Stop,
    /// Out of tokens. What the constraint would allow next is waited for until then.
    Length { mask_by: Instant },
    /// Out of time.
    Deadline,
    /// Its reader wants no more of it.
    Ended,
    /// Its constraint allows nothing more.
    Complete,
}

impl Outlet {
    /// Never waits. False if the reader is so slow that it is cut off. One that has gone is found before the next step
    /// ([`LiveJobs::drop_abandoned`]).
    fn send(&self, event: Event) -> bool {
        match self.events.try_send(event) {
            Ok(()) | Err(TrySendError::Closed(_)) => true,
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

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, OnceLock},
        time::Duration,
    };

    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        constraint::{Constraint, grammar::Grammars, guide::MaskThreads, matcher::Matcher},
        sampler::SamplingParams,
        scheduler::{SchedulerConfig, plan::RowResults, speculation::Speculation},
    };

    const VOCAB_SIZE: usize = 8;

    /// An engine without a model: every row of logits is the same.
    struct Engine {
        live: LiveJobs,
        scheduler: Scheduler,
        sampler: Sampler,
    }

    /// The reader of a job.
    struct Reader {
        events: mpsc::Receiver<Event>,
        failure: Arc<OnceLock<EngineError>>,
    }

    impl Engine {
        fn new() -> Self {
            let config = SchedulerConfig {
                max_step_tokens: 16,
                max_prefill_chunk: 8,
                max_prompt_logits_rows: 2,
                max_running: 8,
                max_waiting: 8,
                n_blocks: 64,
                block_size: 2,
                context_length: 64,
                speculation: Speculation::Off,
            };
            let scheduler = Scheduler::new(config).unwrap();
            Self { live: LiveJobs::default(), scheduler, sampler: Sampler::new(VOCAB_SIZE) }
        }

        fn admit(&mut self, job: Job) -> Reader {
            let (sender, events) = mpsc::channel(64);
            let failure = Arc::new(OnceLock::new());
            let outlet = Outlet { events: sender, failure: Arc::clone(&failure) };
            self.live.admit(&mut self.scheduler, job, outlet, Instant::now()).unwrap();
            Reader { events, failure }
        }

        fn step(&mut self) {
            let now = Instant::now();
            let scheduled = self.scheduler.schedule(now);
            scheduled.expired.into_iter().for_each(|id| self.live.finish(id, Reason::Deadline));
            let Some(plan) = scheduled.plan else { return };
            for step in plan.sequences.iter().filter(|step| step.results == RowResults::AllLogits) {
                let rows = vec![0.0; step.token_ids.len() * VOCAB_SIZE];
                self.live.keep_prompt_logprobs(step, &rows, &mut self.sampler);
            }
            let due: Vec<SeqId> = self.scheduler.due().collect();
            self.live.await_masks(due.iter().copied(), now + Duration::from_secs(30));
            let mut sampled = Vec::new();
            for id in due {
                let cached_tokens = self.scheduler.cached_tokens(id);
                let rows = Rows::Logits(&[0.0; VOCAB_SIZE]);
                match self.live.advance(id, rows, &[], cached_tokens, &mut self.sampler) {
                    Some(Outcome::Sampled { sampled: of_sequence, .. }) => sampled.push(of_sequence),
                    Some(Outcome::Complete) => {
                        self.scheduler.abort(id);
                        self.live.finish(id, Reason::Complete);
                    }
                    Some(Outcome::Failed) => self.live.drop_job_of(&mut self.scheduler, id),
                    None => {}
                }
            }
            for (id, _) in self.scheduler.commit(&sampled) {
                self.live.finish(id, Reason::Length { mask_by: Instant::now() + crate::constraint::guide::MASK_WAIT });
            }
            self.scheduler.check_integrity();
        }
    }

    impl Reader {
        /// What has come since the last call.
        fn read(&mut self) -> Vec<Event> {
            std::iter::from_fn(|| self.events.try_recv().ok()).collect()
        }

        fn started(&mut self) -> GenerationId {
            match self.read().first() {
                Some(Event::Started { generation, .. }) => *generation,
                other => panic!("{other:?} comes first"),
            }
        }
    }

    /// Its choices share the prompt's first block: all run from the second step on.
    fn job(n: u32) -> Job {
        Job {
            request_id: "the same for all".into(),
            prompt: vec![1, 2, 3],
            params: SamplingParams::default(),
            max_new_tokens: 40,
            n,
            logprobs: None,
            prompt_logprobs: None,
            deadline: None,
            constraint: None,
        }
    }

    fn choices(events: &[Event]) -> Vec<u32> {
        let choice = |event: &Event| match event {
            Event::Token { choice, .. } => Some(*choice),
            _ => None,
        };
        events.iter().filter_map(choice).collect()
    }

    #[test]
    fn an_ended_choice_is_in_no_further_step_and_its_blocks_are_free() {
        let mut engine = Engine::new();
        let mut reader = engine.admit(job(3));
        engine.step();
        engine.step();
        let generation = reader.started();
        let before = engine.scheduler.stats();
        engine.live.end_choice(&mut engine.scheduler, generation, 1);
        let after = engine.scheduler.stats();
        assert_eq!((before.running, after.running), (3, 2));
        assert!(after.blocks.referenced < before.blocks.referenced, "{before:?} {after:?}");
        let told = reader.read();
        assert!(matches!(told[..], [Event::Finish { choice: 1, reason: FinishReason::Ended }]), "{told:?}");
        engine.step();
        assert_eq!(choices(&reader.read()), [0, 2]);
    }

    #[test]
    fn who_is_not_there_is_not_ended() {
        let mut engine = Engine::new();
        let (mut reader, mut other) = (engine.admit(job(2)), engine.admit(job(2)));
        engine.step();
        engine.step();
        let (generation, others) = (reader.started(), other.started());
        assert_ne!(generation, others, "although both requests have one id");
        for (generation, choice) in [(generation, 0), (generation, 0), (generation, 2), (GenerationId([0; 16]), 1)] {
            engine.live.end_choice(&mut engine.scheduler, generation, choice);
        }
        assert_eq!(engine.scheduler.stats().running, 3);
        assert_eq!((reader.read().len(), other.read().len()), (1, 0), "one Finish, once");
        engine.live.end_choice(&mut engine.scheduler, generation, 1);
        engine.live.end_choice(&mut engine.scheduler, others, 0);
        engine.live.end_choice(&mut engine.scheduler, others, 1);
        assert!(engine.live.is_empty());
        assert_eq!(engine.scheduler.stats().blocks.referenced, 0);
    }

    #[test]
    fn the_prompts_logprobs_come_whole_and_before_the_tokens_of_any_choice() {
        let mut engine = Engine::new();
        let long = Job { prompt: vec![1, 2, 3, 4, 5, 6, 7], max_new_tokens: 2, ..job(1) };
        let mut before = engine.admit(long);
        (0..3).for_each(|_| engine.step());
        assert!(!before.read().is_empty() && engine.live.is_empty(), "now the prompt is cached");
        let prompt = vec![1, 2, 3, 4, 5, 6, 7];
        let mut reader = engine.admit(Job { prompt, max_new_tokens: 2, prompt_logprobs: Some(1), ..job(3) });
        while !engine.live.is_empty() {
            engine.step();
        }
        let events = reader.read();
        assert!(matches!(events[0], Event::Started { cached_tokens: 0, .. }), "{events:?}");
        assert!(matches!(&events[1], Event::PromptLogprobs(tokens) if tokens.len() == 6), "{events:?}");
        let mut got = choices(&events[2..]);
        got.sort_unstable();
        assert_eq!(got, [0, 0, 1, 1, 2, 2]);
    }

    /// A job whose choices a regular expression constrains. A byte is the token of its number.
    fn constrained(n: u32, regex: &str) -> Job {
        let constraint = Constraint::Regex(regex.into());
        let grammars = Grammars::of_bytes(256, Vec::new()).unwrap();
        let (matcher, first) = Matcher::new(&grammars, &constraint, &[]).unwrap();
        let compiled = Compiled::new(&constraint, matcher, first, MaskThreads::spawn().unwrap());
        Job { constraint: Some(Box::new(compiled)), ..job(n) }
    }

    #[test]
    fn a_choice_ends_when_its_constraint_allows_nothing_more() {
        let finish = |max_new_tokens| {
            let mut engine = Engine::new();
            let mut reader = engine.admit(Job { max_new_tokens, ..constrained(1, "\\x04\\x02\\x06") });
            while !engine.live.is_empty() {
                engine.step();
            }
            assert_eq!(engine.scheduler.stats().blocks.referenced, 0);
            let events = reader.read();
            let token = |event: &Event| match event {
                Event::Token { token_id, .. } => Some(*token_id),
                _ => None,
            };
            let Some(Event::Finish { reason, .. }) = events.last() else { panic!("{events:?}") };
            (events.iter().filter_map(token).collect::<Vec<_>>(), *reason)
        };
        assert_eq!(finish(40), (vec![4, 2, 6], FinishReason::Complete));
        assert_eq!(finish(3), (vec![4, 2, 6], FinishReason::Complete), "also with the last token that it may have");
        assert_eq!(finish(2), (vec![4, 2], FinishReason::Length));
    }

    #[test]
    fn a_constraint_that_cannot_be_held_ends_its_job_and_no_other() {
        let mut engine = Engine::new();
        let mut other = engine.admit(job(1));
        // The sampler has eight tokens, and takes the first if none of them is possible.
        let mut reader = engine.admit(constrained(2, "\\x04[a-z]"));
        (0..6).for_each(|_| engine.step());
        assert!(matches!(reader.failure.get(), Some(EngineError::Constraint(_))), "{:?}", reader.failure);
        assert!(!reader.read().iter().any(|event| matches!(event, Event::Finish { .. })));
        assert_eq!((engine.scheduler.stats().running, choices(&other.read())), (1, vec![0; 6]));
    }

    #[test]
    fn a_job_that_never_started_has_no_events_but_expires() {
        let mut engine = Engine::new();
        let mut reader = engine.admit(Job { deadline: Some(Instant::now() + Duration::from_millis(1)), ..job(2) });
        while !engine.live.is_empty() {
            let expired = engine.scheduler.schedule(Instant::now() + Duration::from_secs(1)).expired;
            expired.into_iter().for_each(|id| engine.live.finish(id, Reason::Deadline));
        }
        assert!(reader.read().is_empty());
        assert!(matches!(reader.failure.get(), Some(EngineError::Expired)));
    }
}

//! The leader's loop: forms epochs, and turns jobs into steps while an epoch holds.

use std::{
    collections::{HashSet, VecDeque},
    ops::ControlFlow,
    sync::mpsc::{RecvTimeoutError, TryRecvError},
    time::{Duration, Instant},
};

use lockstep_collectives::Collective;
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::{
    EmbeddingJob, EngineError, EngineFailure,
    average::Average,
    cache_watchers::CacheWatchers,
    draft_model::DraftModel,
    embeddings::{Answer, LiveEmbeddings},
    handle::{Command, EnginePort, EngineStatus, Submission},
    live::{LiveJobs, Outcome, Reason, Rows},
    metrics::{Metrics, StepClock},
};
use crate::{
    constraint::guide::MASK_WAIT,
    group::{Epoch, GroupError, LeaderGroup},
    model::{StepError, output::StepOutput},
    model_runner::{RunStep, warm_up},
    sampler::Sampler,
    scheduler::{
        Ended, Sampled, Scheduler,
        plan::{RowResults, SeqId, StepPlan},
    },
};

/// How long an idle loop sleeps before it looks after its group and shows that it is alive.
const IDLE_TURN: Duration = Duration::from_millis(200);

/// Rank 0's engine.
#[derive(Debug)]
pub struct Leader {
    group: LeaderGroup,
    runner: Box<dyn RunStep>,
    out: StepOutput,
    /// Plans that every rank has and that are not committed: the one that is computed, and perhaps the next.
    under_way: VecDeque<StepPlan>,
    clock: StepClock,
    /// Of steps that only decode. Unit: seconds.
    decode_step: Average,
    draft_model: Option<DraftModel>,
    scheduler: Scheduler,
    sampler: Sampler,
    metrics: Metrics,
    port: EnginePort,
    live: LiveJobs,
    embeddings: LiveEmbeddings,
    cache_watchers: CacheWatchers,
    drained: Vec<oneshot::Sender<()>>,
    epoch: u64,
    ready: bool,
    draining: bool,
}

/// Why an epoch ended.
#[derive(Debug, thiserror::Error)]
enum EpochEnd {
    #[error("the engine was stopped")]
    Stopped,
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    Device(StepError),
}

impl Leader {
    /// An engine that will serve the port's handles.
    pub fn new(
        group: LeaderGroup,
        runner: Box<dyn RunStep>,
        scheduler: Scheduler,
        metrics: Metrics,
        port: EnginePort,
    ) -> Self {
        let sampler = Sampler::new(runner.vocab_size());
        Self {
            group,
            runner,
            out: StepOutput::default(),
            under_way: VecDeque::new(),
            clock: StepClock::default(),
            decode_step: Average::default(),
            draft_model: None,
            scheduler,
            sampler,
            metrics,
            port,
            live: LiveJobs::default(),
            embeddings: LiveEmbeddings::default(),
            cache_watchers: CacheWatchers::default(),
            drained: Vec::new(),
            epoch: 0,
            ready: false,
            draining: false,
        }
    }

    /// Has a draft model, of the same vocabulary, draft where the scheduler allows it.
    #[must_use]
    pub fn with_draft_model(self, draft_model: Option<DraftModel>) -> Self {
        Self { draft_model, ..self }
    }

    /// Serves until it is stopped. Blocks: the thread is the engine's own.
    ///
    /// # Errors
    /// A GPU that has failed.
    pub fn run(mut self) -> Result<(), EngineFailure> {
        loop {
            let end = match self.group.form() {
                Ok(epoch) => self.serve(epoch),
                Err(failure) => EpochEnd::Group(failure),
            };
            let end = match end {
                EpochEnd::Step(failure) if failure.is_of_device() => EpochEnd::Device(failure),
                // A collective that was aborted does not know why; the group does.
                EpochEnd::Step(_) => self.group.is_broken().map_or(end, EpochEnd::Group),
                other => other,
            };
            self.ready = false;
            let reason = end.to_string();
            self.group.give_up(&reason);
            self.scheduler.reset();
            let lost = EngineError::GroupLost(reason.clone());
            self.live.fail_all(&lost);
            self.embeddings.fail_all(&lost);
            self.publish();
            if matches!(end, EpochEnd::Stopped | EpochEnd::Group(GroupError::Stopped)) {
                info!("the engine has stopped");
                return Ok(());
            }
            warn!(epoch = self.epoch, reason, "the epoch has ended");
            if let EpochEnd::Device(failure) = end {
                return Err(EngineFailure::Device(failure));
            }
            if self.refuse_while_down(&reason).is_break() {
                return Ok(());
            }
        }
    }

    /// One epoch.
    fn serve(&mut self, epoch: Epoch) -> EpochEnd {
        let Epoch { number, mut collective } = epoch;
        self.epoch = number;
        self.metrics.epochs.inc();
        if let Err(failure) = warm_up(self.runner.as_mut(), collective.as_mut()) {
            self.runner.reset();
            return failure.into();
        }
        if let Some(Err(failure)) = self.draft_model.as_mut().map(DraftModel::reset) {
            self.go_on_without_draft_model(&failure);
        }
        self.ready = true;
        info!(epoch = number, world_size = collective.world_size(), "the group is ready");
        let end = loop {
            match self.turn(collective.as_mut()) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => break EpochEnd::Stopped,
                Err(end) => break end,
            }
        };
        self.under_way.clear();
        self.clock = StepClock::default();
        self.runner.reset();
        end
    }

    /// One turn of the loop: take commands in; start a step, or two; finish one.
    fn turn(&mut self, collective: &mut dyn Collective) -> Result<ControlFlow<()>, EpochEnd> {
        if self.receive().is_break() {
            return Ok(ControlFlow::Break(()));
        }
        if self.is_idle() && self.under_way.is_empty() && self.group.leaving().is_some() {
            self.group.idle();
        }
        if let Some(broken) = self.group.is_broken() {
            return Err(broken.into());
        }
        let abandoned =
            self.live.drop_abandoned(&mut self.scheduler) + self.embeddings.drop_abandoned(&mut self.scheduler);
        self.metrics.cancelled.inc_by(abandoned as u64);
        while self.may_start() && self.start_next(collective)? {}
        self.finish_oldest(collective)?;
        self.answer_drains();
        self.publish();
        Ok(ControlFlow::Continue(()))
    }

    /// Adds what the draft model guesses to a plan. A failure leaves the plan as it was.
    fn draft(&mut self, plan: &mut StepPlan) -> Result<(), StepError> {
        let Some(draft_model) = &mut self.draft_model else { return Ok(()) };
        draft_model.release(&plan.released);
        let draftable = self.scheduler.draftable(draft_model.step_time());
        let asked: Vec<_> = draftable.into_iter().filter_map(|draftable| self.live.ask(draftable)).collect();
        if asked.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        let drafts = draft_model.draft(&asked, &mut self.sampler)?;
        self.metrics.draft.observe(start.elapsed().as_secs_f64());
        self.scheduler.add_drafts(plan, drafts);
        Ok(())
    }

    /// Nothing that is served depends on what is drafted.
    fn go_on_without_draft_model(&mut self, failure: &StepError) {
        warn!(%failure, "the draft model has failed; going on without it");
        self.draft_model = None;
    }

    /// Whether another step may be started: the next one, or the one after it while devices choose the tokens of the next.
    /// A draft model needs to know these.
    fn may_start(&self) -> bool {
        match self.under_way.front() {
            None => true,
            Some(plan) => self.under_way.len() == 1 && plan.chooses && self.draft_model.is_none(),
        }
    }

    /// Starts the next step on every rank, if there is one.
    fn start_next(&mut self, collective: &mut dyn Collective) -> Result<bool, EpochEnd> {
        let scheduled = self.scheduler.schedule(Instant::now());
        for id in scheduled.expired {
            self.live.finish(id, Reason::Deadline);
            self.embeddings.expire(id);
        }
        let Some(mut plan) = scheduled.plan else { return Ok(false) };
        if self.under_way.is_empty()
            && let Err(failure) = self.draft(&mut plan)
        {
            self.go_on_without_draft_model(&failure);
        }
        let rules = if self.runner.runs_ahead(collective) { self.live.choice_rules(&plan) } else { None };
        plan.chooses = rules.as_ref().is_some_and(|rules| !rules.is_empty());
        let mut announced = self.live.announce(&plan);
        announced.extend(self.embeddings.announce(&plan));
        self.group.send_plan(&plan, announced)?;
        let runner = self.runner.as_mut();
        self.clock.start(collective, |collective| runner.start(&plan, &rules.unwrap_or_default(), collective))?;
        self.metrics.steps_ahead.inc_by(u64::from(!self.under_way.is_empty()));
        self.under_way.push_back(plan);
        Ok(true)
    }

    /// Waits for the oldest step under way and hands its tokens out.
    fn finish_oldest(&mut self, collective: &mut dyn Collective) -> Result<(), EpochEnd> {
        let Some(plan) = self.under_way.pop_front() else { return Ok(()) };
        let mut out = std::mem::take(&mut self.out);
        let runner = self.runner.as_mut();
        let (finished, took) =
            self.clock.finish(&self.metrics, collective, |collective| runner.finish(collective, &mut out));
        finished?;
        if plan.n_logits_rows() == plan.n_rows() {
            self.decode_step.note(took.as_secs_f64());
        }
        if let Some(draft_model) = &mut self.draft_model {
            draft_model.note_target_step(plan.n_rows(), took);
        }
        let (sampled, cut_off) = self.hand_out(&plan, &out);
        self.embeddings.take(&plan, &out.hidden);
        self.out = out;
        self.metrics.generated_tokens.inc_by(sampled.iter().map(|sampled| sampled.tokens.len() as u64).sum());
        // However many choices end, the step loop waits once.
        let mask_by = Instant::now() + MASK_WAIT;
        for (id, ended) in self.scheduler.commit(&sampled) {
            match ended {
                Ended::Stop => self.live.finish(id, Reason::Stop),
                Ended::Length => self.live.finish(id, Reason::Length { mask_by }),
                Ended::Embedded => self.embeddings.finish(id),
            }
        }
        for id in cut_off {
            self.live.drop_job_of(&mut self.scheduler, id);
            self.metrics.slow_readers.inc();
        }
        Ok(())
    }

    /// Waits for what constraints allow the tokens of a step to be.
    fn await_masks(&mut self, due: &HashSet<SeqId>) {
        let start = Instant::now();
        if self.live.await_masks(due.iter().copied(), start + MASK_WAIT) {
            self.metrics.mask_wait.observe(start.elapsed().as_secs_f64());
        }
    }

    /// Samples where tokens are due and tells the readers. Returns the tokens, and the sequences whose readers are too
    /// slow.
    fn hand_out(&mut self, plan: &StepPlan, out: &StepOutput) -> (Vec<Sampled>, Vec<SeqId>) {
        let due: HashSet<SeqId> = self.scheduler.due().collect();
        self.await_masks(&due);
        let vocab_size = self.sampler.vocab_size();
        let mut sampled = Vec::with_capacity(due.len());
        let mut cut_off = Vec::new();
        let mut end = 0;
        for step in &plan.sequences {
            let first = end;
            end += step.n_logits_rows();
            if step.results == RowResults::AllLogits && !plan.chooses {
                let logits = &out.logits[first * vocab_size..end * vocab_size];
                self.live.keep_prompt_logprobs(step, logits, &mut self.sampler);
            }
            if !due.contains(&step.id) {
                continue;
            }
            let drafts = self.scheduler.drafts(step.id);
            let first = end - (1 + drafts.len());
            let rows = match plan.chooses {
                true => Rows::Chosen(&out.token_ids[first..end]),
                false => Rows::Logits(&out.logits[first * vocab_size..end * vocab_size]),
            };
            let cached_tokens = self.scheduler.cached_tokens(step.id);
            match self.live.advance(step.id, rows, drafts, cached_tokens, &mut self.sampler) {
                Some(Outcome::Sampled { sampled: of_sequence, cut_off: is_cut_off }) => {
                    self.metrics.drafted_tokens.inc_by(drafts.len() as u64);
                    self.metrics.accepted_tokens.inc_by(of_sequence.tokens.len() as u64 - 1);
                    sampled.push(of_sequence);
                    cut_off.extend(is_cut_off.then_some(step.id));
                }
                Some(Outcome::Complete) => {
                    self.scheduler.abort(step.id);
                    self.live.finish(step.id, Reason::Complete);
                }
                Some(Outcome::Failed) => self.live.drop_job_of(&mut self.scheduler, step.id),
                None => {}
            }
        }
        (sampled, cut_off)
    }

    /// Takes in every command that waits; sleeps for one if there is nothing to compute.
    fn receive(&mut self) -> ControlFlow<()> {
        if self.is_idle() && self.under_way.is_empty() {
            match self.port.commands.recv_timeout(IDLE_TURN) {
                Ok(command) => self.obey(command)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return ControlFlow::Break(()),
            }
        }
        loop {
            match self.port.commands.try_recv() {
                Ok(command) => self.obey(command)?,
                Err(TryRecvError::Empty) => return ControlFlow::Continue(()),
                Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
            }
        }
    }

    fn obey(&mut self, command: Command) -> ControlFlow<()> {
        match command {
            Command::Submit(submission) => self.submit(submission),
            Command::Embed(job, answer) => self.embed(job, answer),
            Command::EndChoice { generation, choice } => self.live.end_choice(&mut self.scheduler, generation, choice),
            Command::WatchCache(answer) => {
                // A caller that is gone by now is found closed at the next turn.
                let _ = answer.send(self.cache_watchers.add(&mut self.scheduler));
            }
            Command::Drain(done) => {
                self.draining = true;
                self.drained.push(done);
            }
            Command::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    fn submit(&mut self, submission: Submission) {
        let Submission { job, accepted, outlet } = submission;
        let n_prompt = job.prompt.len() as u64;
        let request_id = job.request_id.clone();
        let answer = if self.is_draining() {
            Err(EngineError::Draining)
        } else {
            self.live.admit(&mut self.scheduler, job, outlet, Instant::now()).map_err(EngineError::from)
        };
        match &answer {
            Ok(()) => {
                self.metrics.prompt_tokens.inc_by(n_prompt);
                debug!(request_id, n_prompt, "admitted");
            }
            Err(refusal) => debug!(request_id, %refusal, "refused"),
        }
        // A caller that is gone by now has dropped its stream too, which the next turn sees.
        let _ = accepted.send(answer);
    }

    fn embed(&mut self, job: EmbeddingJob, answer: Answer) {
        if self.is_draining() {
            let _ = answer.send(Err(EngineError::Draining));
            return;
        }
        let (n_prompt, request_id) = (job.prompt.len() as u64, job.request_id.clone());
        match self.embeddings.admit(&mut self.scheduler, job, answer, Instant::now()) {
            Ok(()) => {
                self.metrics.prompt_tokens.inc_by(n_prompt);
                debug!(request_id, n_prompt, "admitted to be embedded");
            }
            Err(refusal) => debug!(request_id, %refusal, "refused"),
        }
    }

    /// Answers what came in while the group was not together, so that nobody waits for it.
    fn refuse_while_down(&mut self, reason: &str) -> ControlFlow<()> {
        while let Ok(command) = self.port.commands.try_recv() {
            match command {
                Command::Submit(submission) => {
                    let _ = submission.accepted.send(Err(EngineError::NotReady(reason.to_owned())));
                }
                Command::Embed(_, answer) => {
                    let _ = answer.send(Err(EngineError::NotReady(reason.to_owned())));
                }
                other => self.obey(other)?,
            }
        }
        self.answer_drains();
        ControlFlow::Continue(())
    }

    /// Whether nothing new is taken, because this rank or another one is to end.
    fn is_draining(&self) -> bool {
        self.draining || self.group.leaving().is_some()
    }

    /// Whether there is no job and no embedding.
    fn is_idle(&self) -> bool {
        self.live.is_empty() && self.embeddings.is_empty()
    }

    fn answer_drains(&mut self) {
        if self.is_idle() {
            for done in self.drained.drain(..) {
                let _ = done.send(());
            }
        }
    }

    fn publish(&mut self) {
        self.cache_watchers.tell(&mut self.scheduler);
        let stats = self.scheduler.stats();
        self.metrics.observe_stats(&stats);
        self.port.status.send_replace(EngineStatus {
            ready: self.ready,
            draining: self.is_draining(),
            epoch: self.epoch,
            stats,
            decode_step: self.decode_step.get().map(Duration::from_secs_f64),
            generated_tokens: self.metrics.generated_tokens.get(),
            last_turn: Instant::now(),
        });
    }
}

//! The leader's loop, one step at a time: a runner that computes nothing shows each plan and waits to be let go.

#![allow(clippy::unwrap_used, reason = "a test's helpers panic as tests do")]

use std::{
    future::{Future as _, poll_fn},
    pin::Pin,
    sync::mpsc::{Receiver, Sender, channel},
    task::Poll,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use futures_util::future::{BoxFuture, MaybeDone, maybe_done};
use lockstep_collectives::Collective;
use lockstep_kernels::cuda::ChoiceRule;
use lockstep_worker::{
    engine::{
        EngineError, EngineFailure, Job,
        handle::{self, EngineHandle, EventStream},
        leader::Leader,
        metrics::Metrics,
    },
    group::{Attestation, GroupConfig, LeaderGroup},
    model::{StepError, output::StepOutput},
    model_runner::RunStep,
    sampler::SamplingParams,
    scheduler::{Scheduler, SchedulerConfig, Stats, plan::StepPlan, speculation::Speculation},
};
use prometheus_client::registry::Registry;
use tokio::runtime::Runtime;

const VOCAB_SIZE: usize = 8;
const BLOCK_SIZE: u32 = 4;
const N_BLOCKS: u32 = 64;

/// Far longer than anything here takes: a test that would hang fails instead.
const HANG: Duration = Duration::from_secs(60);

/// A job on its way into the engine.
type Submitted = Pin<Box<MaybeDone<BoxFuture<'static, Result<EventStream, EngineError>>>>>;

/// A runner whose steps are seen and let go by the test.
#[derive(Debug)]
struct Stepped {
    plans: Sender<StepPlan>,
    permits: Receiver<()>,
    warmed_up: bool,
    n_rows: usize,
}

/// A leader without followers, and the test's ends of its runner.
struct Engine {
    handle: EngineHandle,
    plans: Receiver<StepPlan>,
    permits: Sender<()>,
    thread: JoinHandle<Result<(), EngineFailure>>,
    runtime: Runtime,
}

// === impl Stepped ===

impl RunStep for Stepped {
    fn runs_ahead(&self, _: &mut dyn Collective) -> bool {
        false
    }

    fn start(&mut self, plan: &StepPlan, _: &[ChoiceRule], _: &mut dyn Collective) -> Result<(), StepError> {
        if std::mem::replace(&mut self.warmed_up, true) {
            // The test's ends are gone when it has ended; the engine then runs on until it is stopped.
            let _ = self.plans.send(plan.clone());
            let _ = self.permits.recv();
        }
        self.n_rows = plan.sequences.iter().map(|step| step.n_logits_rows()).sum();
        Ok(())
    }

    fn finish(&mut self, _: &mut dyn Collective, out: &mut StepOutput) -> Result<(), StepError> {
        out.logits = vec![0.0; self.n_rows * VOCAB_SIZE];
        Ok(())
    }

    fn reset(&mut self) {}

    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn block_size(&self) -> usize {
        BLOCK_SIZE as usize
    }
}

// === impl Engine ===

impl Engine {
    fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let attestation = Attestation::from_iter([("test", "")]);
        let (group, _rpc) = LeaderGroup::new(GroupConfig::default(), attestation, None, runtime.handle()).unwrap();
        let scheduler = Scheduler::new(SchedulerConfig {
            max_step_tokens: 64,
            max_prompt_logits_rows: 64,
            max_prefill_chunk: 64,
            max_running: 8,
            max_waiting: 8,
            n_blocks: N_BLOCKS,
            block_size: BLOCK_SIZE,
            context_length: 128,
            speculation: Speculation::Off,
        });
        let (plan_sender, plans) = channel();
        let (permits, permit_receiver) = channel();
        let runner = Stepped { plans: plan_sender, permits: permit_receiver, warmed_up: false, n_rows: 0 };
        let (handle, port) = handle::channel(Instant::now());
        let metrics = Metrics::register(&mut Registry::default(), true);
        let leader = Leader::new(group, Box::new(runner), scheduler.unwrap(), metrics, port);
        let thread = std::thread::spawn(move || leader.run());
        let engine = Self { handle, plans, permits, thread, runtime };
        let ready = async { engine.handle.status().wait_for(|status| status.ready).await.map(drop) };
        engine.runtime.block_on(async { tokio::time::timeout(HANG, ready).await }).unwrap().unwrap();
        engine
    }

    /// Gives a job to the engine, which takes it in before its next step. Its prompt is its own: nothing is shared.
    fn submit(&self, token: u32) -> Submitted {
        let job = Job {
            request_id: "test".into(),
            prompt: vec![token; 6],
            params: SamplingParams::default(),
            max_new_tokens: 100,
            n: 1,
            logprobs: None,
            prompt_logprobs: None,
            deadline: None,
            constraint: None,
        };
        let handle = self.handle.clone();
        let mut submitted: Submitted = Box::pin(maybe_done(Box::pin(async move { handle.submit(job).await })));
        // The first poll hands the job over; the answer comes from the next turn of the engine's loop.
        let _answered = self.runtime.block_on(poll_fn(|cx| Poll::Ready(submitted.as_mut().poll(cx).is_ready())));
        submitted
    }

    fn accepted(&self, mut job: Submitted) -> EventStream {
        self.runtime.block_on(async { tokio::time::timeout(HANG, job.as_mut()).await }).unwrap();
        job.as_mut().take_output().unwrap().unwrap()
    }

    /// Waits until the next step computes, and leaves it at that.
    fn next_plan(&self) -> StepPlan {
        self.plans.recv_timeout(HANG).expect("the engine goes on")
    }

    /// Lets the step that computes end.
    fn let_go(&self) {
        self.permits.send(()).unwrap();
    }

    fn stop(self) {
        self.handle.stop();
        drop(self.permits);
        drop(self.plans);
        self.thread.join().unwrap().unwrap();
    }
}

#[test]
fn a_reader_that_goes_away_frees_its_blocks_within_one_step() {
    let engine = Engine::start();
    let job = engine.submit(1);
    let neighbour = engine.next_plan().sequences[0].id;
    let _neighbour_stream = engine.accepted(job);

    let job = engine.submit(2);
    engine.let_go();
    let plan = engine.next_plan();
    assert_eq!(plan.sequences.len(), 2);
    let leaver_stream = engine.accepted(job);
    let leaver = plan.sequences.iter().map(|step| step.id).find(|id| *id != neighbour).unwrap();
    // The step that computes now is the last with the leaver.
    drop(leaver_stream);

    engine.let_go();
    let next = engine.next_plan();
    assert_eq!(next.step_id, plan.step_id + 1);
    assert_eq!(next.released, [leaver], "every rank forgets it");
    assert_eq!(next.sequences.iter().map(|step| step.id).collect::<Vec<_>>(), [neighbour]);

    engine.let_go();
    engine.next_plan();
    let Stats { running, blocks, .. } = engine.handle.status().borrow().stats;
    let neighbour_blocks = (next.sequences[0].start_position + 1).div_ceil(BLOCK_SIZE) as usize;
    assert_eq!((running, blocks.referenced), (1, neighbour_blocks));
    assert_eq!(blocks.free + blocks.cached, N_BLOCKS as usize - neighbour_blocks);
    engine.stop();
}

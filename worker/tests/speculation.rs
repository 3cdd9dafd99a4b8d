//! Speculation changes nothing but the number of steps, and steps that are started ahead change nothing but the time: the
//! same jobs, with and without them, through the leader's loop.
//!
//! The model is a parrot. It keeps its tokens in slots, as others keep keys and values, and reads what it has heard from
//! there: a draft that was rejected and not written over would be heard. The draft model is a parrot that thinks less.

#![allow(clippy::unwrap_used, reason = "a test's helpers panic as tests do")]

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use lockstep_collectives::Collective;
use lockstep_kernels::KvEncoding;
use lockstep_kernels::cuda::ChoiceRule;
use lockstep_worker::{
    device::Device,
    engine::{
        EngineFailure, Event, FinishReason, Job,
        draft_model::DraftModel,
        handle::{self, EngineHandle},
        leader::Leader,
        metrics::Metrics,
    },
    group::{Attestation, GroupConfig, LeaderGroup},
    model::{StepError, output::StepOutput},
    model_runner::{RunStep, RunnerSettings},
    sampler::{SamplingParams, TokenLogprobs},
    scheduler::{
        Scheduler, SchedulerConfig,
        ahead::PENDING,
        plan::{RowResults, SeqId, StepPlan},
        speculation::Speculation,
    },
};
use prometheus_client::registry::Registry;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt as _;

const VOCAB_SIZE: usize = 24;
const BLOCK_SIZE: usize = 4;

/// What is said depends on what was said so many tokens before, mostly.
const PERIOD: usize = 9;

/// What a model runs before anybody asks it.
const N_WARM_UP_RUNS: u64 = 1;

/// Far longer than anything here takes: a test that would hang fails instead.
const HANG: Duration = Duration::from_secs(60);

/// The clock that draft models are measured by: they take no time, so that a busy machine never makes one too slow to be
/// asked.
fn standing_still() -> Instant {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    *START
}

/// How a parrot speaks.
#[derive(Clone, Copy, Debug)]
enum Speech {
    /// It says the same again.
    Repeats,
    /// It says the next number, so that no three tokens are followed by what followed them before.
    Counts,
}

/// What speculates.
#[derive(Clone, Copy, Debug)]
struct Setting {
    speech: Speech,
    n_blocks: u32,
    /// Jobs at a time.
    at_a_time: usize,
    draft_model: Option<DraftSetting>,
    /// Whether the model chooses tokens itself where it may, and is given its next step before it has finished one.
    runs_ahead: bool,
}

/// A draft model.
#[derive(Clone, Copy, Debug)]
struct DraftSetting {
    n_blocks: usize,
    /// Runs that it completes, those to warm up among them, before one fails.
    n_runs_max: u64,
}

/// See the module's documentation.
#[derive(Debug)]
struct Parrot {
    speech: Speech,
    /// Whether it has doubts.
    thinks: bool,
    slots: HashMap<usize, u32>,
    tables: HashMap<SeqId, Vec<usize>>,
    gone: HashSet<SeqId>,
    /// Sequences that came back after they had been preempted.
    n_came_back: Arc<AtomicU64>,
    n_runs: Arc<AtomicU64>,
    n_runs_max: u64,
    runs_ahead: bool,
    /// What it chose in the step before.
    chosen: HashMap<SeqId, u32>,
    /// What the steps that were started give.
    started: VecDeque<StepOutput>,
}

/// All that a job's reader was told, choice by choice.
#[derive(Clone, Default, PartialEq, Debug)]
struct Heard {
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
    tokens: HashMap<u32, Vec<(u32, Option<TokenLogprobs>)>>,
    finishes: HashMap<u32, FinishReason>,
}

/// A leader without followers.
struct Engine {
    handle: EngineHandle,
    metrics: Metrics,
    n_came_back: Arc<AtomicU64>,
    /// Runs of the draft model.
    n_draft_runs: Arc<AtomicU64>,
    thread: JoinHandle<Result<(), EngineFailure>>,
    runtime: Runtime,
}

// === impl Parrot ===

impl Parrot {
    fn new(speech: Speech, thinks: bool) -> Self {
        let (slots, tables, gone, n_came_back, n_runs) = Default::default();
        let (chosen, started) = Default::default();
        let (n_runs_max, runs_ahead) = (u64::MAX, false);
        Self { speech, thinks, slots, tables, gone, n_came_back, n_runs, n_runs_max, runs_ahead, chosen, started }
    }

    /// Logits after a text: noise that depends on every token of it, and a liking for what its speech demands. Who does not
    /// think hears no noise, and has no doubt either.
    fn logits(&self, heard: &[u32]) -> Vec<f32> {
        let seed = heard.iter().fold(1, |seed: u64, token| seed.wrapping_mul(0x100_0000_01B3) ^ u64::from(*token));
        let mut logits = vec![0.0; VOCAB_SIZE];
        if self.thinks {
            let mut noise = ChaCha8Rng::seed_from_u64(seed);
            logits.fill_with(|| noise.random_range(-2.0..2.0));
        }
        if let Some(said) = heard.iter().nth_back(PERIOD - 1) {
            let next = match self.speech {
                Speech::Repeats => *said as usize,
                Speech::Counts => (*said as usize + 1) % VOCAB_SIZE,
            };
            logits[next] += if self.thinks { 3.0 } else { 7.0 };
        }
        logits
    }
}

impl RunStep for Parrot {
    fn runs_ahead(&self, _: &mut dyn Collective) -> bool {
        self.runs_ahead
    }

    fn start(&mut self, plan: &StepPlan, rules: &[ChoiceRule], _: &mut dyn Collective) -> Result<(), StepError> {
        assert!(self.started.len() < if self.runs_ahead { 2 } else { 1 }, "too many steps at once");
        if self.n_runs.load(Ordering::Relaxed) == self.n_runs_max {
            return Err(StepError::Plan { step_id: plan.step_id, why: "it has said enough".into() });
        }
        self.n_runs.fetch_add(1, Ordering::Relaxed);
        for id in &plan.released {
            self.tables.remove(id);
            self.gone.insert(*id);
        }
        let mut logits = Vec::new();
        for step in &plan.sequences {
            self.n_came_back.fetch_add(u64::from(self.gone.remove(&step.id)), Ordering::Relaxed);
            let new_blocks = step.new_blocks.iter().map(|block| block.0 as usize);
            self.tables.entry(step.id).or_default().extend(new_blocks);
            let table = &self.tables[&step.id];
            let slot = |position: usize| table[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE;
            let rows = step.start_position as usize..step.start_position as usize + step.token_ids.len();
            let known = |id: &u32| if *id == PENDING { self.chosen[&step.id] } else { *id };
            self.slots.extend(rows.clone().map(slot).zip(step.token_ids.iter().map(known)));
            for row in rows.end - step.n_logits_rows()..rows.end {
                let heard: Vec<u32> = (0..=row).map(|position| self.slots[&slot(position)]).collect();
                logits.extend(self.logits(&heard));
            }
        }
        let mut out = StepOutput::default();
        self.chosen.clear();
        if plan.chooses {
            assert!(rules.iter().all(|rule| rule.temperature == 0.0), "the likeliest of all rows: {rules:?}");
            out.token_ids = logits.chunks_exact(VOCAB_SIZE).map(argmax).collect();
            assert_eq!(out.token_ids.len(), rules.len());
            let steps = plan.sequences.iter().filter(|step| step.results != RowResults::None);
            let mut end = 0;
            self.chosen = steps
                .map(|step| {
                    end += step.n_logits_rows();
                    (step.id, out.token_ids[end - 1])
                })
                .collect();
        } else {
            out.logits = logits;
        }
        self.started.push_back(out);
        Ok(())
    }

    fn finish(&mut self, _: &mut dyn Collective, out: &mut StepOutput) -> Result<(), StepError> {
        *out = self.started.pop_front().expect("a step was started");
        Ok(())
    }

    fn reset(&mut self) {
        self.slots.clear();
        self.tables.clear();
        self.started.clear();
    }

    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn block_size(&self) -> usize {
        BLOCK_SIZE
    }
}

// === impl Engine ===

impl Engine {
    fn start(speculation: Speculation, setting: Setting) -> Self {
        let runtime = Runtime::new().unwrap();
        let attestation = Attestation::from_iter([("test", "")]);
        let (group, _rpc) = LeaderGroup::new(GroupConfig::default(), attestation, None, runtime.handle()).unwrap();
        let scheduler = Scheduler::new(SchedulerConfig {
            max_step_tokens: 16,
            max_prefill_chunk: 7,
            max_prompt_logits_rows: 8,
            max_running: 4,
            max_waiting: 16,
            n_blocks: setting.n_blocks,
            block_size: BLOCK_SIZE as u32,
            context_length: 128,
            speculation,
        });
        let runner = Parrot { runs_ahead: setting.runs_ahead, ..Parrot::new(setting.speech, true) };
        let n_came_back = Arc::clone(&runner.n_came_back);
        let n_draft_runs = Arc::default();
        let draft_model = setting.draft_model.map(|DraftSetting { n_blocks, n_runs_max }| {
            let settings = RunnerSettings {
                device: Device::Cpu,
                threads: 1,
                n_blocks,
                block_size: BLOCK_SIZE,
                kv_encoding: KvEncoding::F16,
                context_length: 100,
                deterministic: true,
            };
            let n_runs = Arc::clone(&n_draft_runs);
            let runner = Parrot { n_runs, n_runs_max, ..Parrot::new(setting.speech, false) };
            DraftModel::new(Box::new(runner), &settings).with_clock(standing_still)
        });
        let (handle, port) = handle::channel(Instant::now());
        let metrics = Metrics::register(&mut Registry::default(), true);
        let leader = Leader::new(group, Box::new(runner), scheduler.unwrap(), metrics.clone(), port);
        let leader = leader.with_draft_model(draft_model);
        let thread = std::thread::spawn(move || leader.run());
        let engine = Self { handle, metrics, n_came_back, n_draft_runs, thread, runtime };
        engine.wait(async { engine.handle.status().wait_for(|status| status.ready).await.map(drop) }).unwrap();
        engine
    }

    fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(async { tokio::time::timeout(HANG, future).await }).unwrap()
    }

    /// Runs jobs side by side.
    fn run(&self, jobs: &[Job]) -> Vec<Heard> {
        self.wait(async {
            let mut streams = Vec::new();
            for job in jobs {
                streams.push(self.handle.submit(job.clone()).await.unwrap());
            }
            let mut all = Vec::new();
            for mut stream in streams {
                let mut heard = Heard::default();
                while let Some(event) = stream.next().await {
                    heard.note(event.unwrap());
                }
                all.push(heard);
            }
            all
        })
    }

    fn stop(self) {
        self.handle.stop();
        self.thread.join().unwrap().unwrap();
    }
}

// === impl Heard ===

impl Heard {
    fn note(&mut self, event: Event) {
        match event {
            Event::Started { .. } => {}
            Event::PromptLogprobs(logprobs) => self.prompt_logprobs = Some(logprobs),
            Event::Token { choice, position, token_id, logprobs } => {
                let tokens = self.tokens.entry(choice).or_default();
                assert_eq!(tokens.len(), position as usize);
                tokens.push((token_id, logprobs));
            }
            Event::Finish { choice, reason } => assert_eq!(self.finishes.insert(choice, reason), None),
        }
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == best).unwrap_or_default() as u32
}

/// A prompt that has begun to repeat itself.
fn job(params: SamplingParams) -> Job {
    Job {
        request_id: "test".into(),
        prompt: (0..2 * PERIOD).map(|i| (i % PERIOD) as u32).collect(),
        params: SamplingParams { seed: 7, ..params },
        max_new_tokens: 60,
        n: 1,
        logprobs: Some(2),
        prompt_logprobs: None,
        deadline: None,
        constraint: None,
    }
}

fn jobs() -> Vec<Job> {
    let off = SamplingParams::default;
    let penalised = SamplingParams { presence_penalty: 0.4, frequency_penalty: 0.2, ..off() };
    let stops = SamplingParams { stop_token_ids: vec![3, 20], min_new_tokens: 16, ..off() };
    let warped = SamplingParams { temperature: 0.6, top_p: 0.9, top_k: 8, ..off() };
    vec![
        job(off()),
        job(SamplingParams { temperature: 0.8, ..off() }),
        job(penalised.clone()),
        job(SamplingParams { temperature: 0.5, repetition_penalty: 1.2, ..penalised }),
        job(stops.clone()),
        job(SamplingParams { temperature: 0.7, ..stops }),
        Job { n: 3, ..job(warped.clone()) },
        Job { n: 2, prompt_logprobs: Some(1), max_new_tokens: 33, ..job(warped) },
        Job { prompt: (0..100).map(|i| i * i % VOCAB_SIZE as u32).collect(), ..job(off()) },
        Job { max_new_tokens: 1, ..job(off()) },
        Job { max_new_tokens: 2, ..job(off()) },
    ]
}

/// Runs jobs with and without speculation and compares all that their readers are told. Returns the speculative engine.
#[track_caller]
fn compare(setting: Setting, jobs: &[Job]) -> Engine {
    let plain = Engine::start(Speculation::Off, Setting { draft_model: None, runs_ahead: false, ..setting });
    let speculative = Engine::start(Speculation::Ngram, setting);
    for jobs in jobs.chunks(setting.at_a_time) {
        let (wanted, got) = (plain.run(jobs), speculative.run(jobs));
        for ((job, wanted), got) in jobs.iter().zip(wanted).zip(got) {
            assert_eq!(got, wanted, "{job:?}");
        }
    }
    let steps = |engine: &Engine| engine.metrics.generated_tokens.get() - engine.metrics.accepted_tokens.get();
    println!("{} steps of sequences, {} without drafts", steps(&speculative), steps(&plain));
    assert_eq!(plain.metrics.drafted_tokens.get(), 0);
    assert_eq!(speculative.metrics.epochs.get(), 1);
    plain.stop();
    speculative
}

/// Sees to it that drafts change nothing, and that there are many.
#[track_caller]
fn check(setting: Setting) {
    let engine = compare(setting, &jobs());
    let (drafted, accepted) = (engine.metrics.drafted_tokens.get(), engine.metrics.accepted_tokens.get());
    assert!(accepted >= 50 && drafted >= accepted + 20, "{accepted} of {drafted} drafts were right");
    if setting.n_blocks < 50 {
        assert!(engine.n_came_back.load(Ordering::Relaxed) > 0, "somebody was preempted");
    }
    let n_draft_runs = engine.n_draft_runs.load(Ordering::Relaxed);
    assert_eq!(n_draft_runs > N_WARM_UP_RUNS, setting.draft_model.is_some(), "{n_draft_runs} runs of the draft model");
    engine.stop();
}

/// Without a draft model.
const REPEATS: Setting =
    Setting { speech: Speech::Repeats, n_blocks: 256, at_a_time: 1, draft_model: None, runs_ahead: false };

/// A draft model whose cache holds all that runs.
const TALKER: DraftSetting = DraftSetting { n_blocks: 256, n_runs_max: u64::MAX };

/// With it.
const COUNTS: Setting = Setting { speech: Speech::Counts, draft_model: Some(TALKER), ..REPEATS };

#[test]
fn a_job_alone_is_told_the_same() {
    check(Setting { n_blocks: 64, ..REPEATS });
    check(Setting { n_blocks: 64, ..COUNTS });
}

#[test]
fn jobs_side_by_side_are_told_the_same() {
    check(Setting { at_a_time: 3, ..REPEATS });
    check(Setting { at_a_time: 3, ..COUNTS });
}

#[test]
fn jobs_that_preempt_one_another_are_told_the_same() {
    check(Setting { n_blocks: 36, at_a_time: 4, ..REPEATS });
    check(Setting { n_blocks: 36, at_a_time: 4, ..COUNTS });
}

#[test]
fn a_draft_model_and_what_was_said_before_may_take_turns() {
    check(Setting { at_a_time: 2, draft_model: Some(TALKER), ..REPEATS });
}

#[test]
fn a_draft_model_that_has_no_room_for_all_is_no_harm() {
    check(Setting { at_a_time: 3, draft_model: Some(DraftSetting { n_blocks: 24, ..TALKER }), ..COUNTS });
}

#[test]
fn a_draft_model_that_fails_is_missed_by_nobody() {
    // As it is warmed up, as it reads a prompt, as it drafts, and later.
    for n_runs_max in [0, N_WARM_UP_RUNS, N_WARM_UP_RUNS + 1, N_WARM_UP_RUNS + 4] {
        let draft_model = Some(DraftSetting { n_runs_max, ..TALKER });
        let engine = compare(Setting { at_a_time: 3, draft_model, ..COUNTS }, &jobs());
        assert_eq!(engine.n_draft_runs.load(Ordering::Relaxed), n_runs_max, "it has come to fail");
        engine.stop();
    }
}

/// Jobs that take the likeliest tokens; of some, and at some steps, a model cannot choose them itself.
fn likeliest_jobs() -> Vec<Job> {
    let likeliest = |job: &Job| job.params.temperature == 0.0;
    let with_logprobs = |i: usize| (i % 4 == 3).then_some(1);
    let jobs = jobs().into_iter().chain(jobs()).filter(likeliest).enumerate();
    jobs.map(|(i, job)| Job { logprobs: with_logprobs(i), ..job }).collect()
}

#[test]
fn steps_ahead_tell_jobs_the_same() {
    for setting in [
        Setting { n_blocks: 64, ..REPEATS },
        Setting { at_a_time: 3, speech: Speech::Counts, ..REPEATS },
        Setting { at_a_time: 4, n_blocks: 36, speech: Speech::Counts, ..REPEATS },
        Setting { at_a_time: 4, n_blocks: 36, ..REPEATS },
        // A draft model needs to know tokens first.
        COUNTS,
    ] {
        let engine = compare(Setting { runs_ahead: true, ..setting }, &likeliest_jobs());
        let n_ahead = engine.metrics.steps_ahead.get();
        println!("{n_ahead} steps ahead: {setting:?}");
        assert_eq!(n_ahead >= 20, setting.draft_model.is_none(), "{n_ahead} steps ahead: {setting:?}");
        engine.stop();
    }
}

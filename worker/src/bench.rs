//! Benchmark of the engine: prefill and decode rates of one model, in this process, without servers.

mod memory;
mod profile;
mod sums;

use std::{
    collections::{HashSet, VecDeque},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use lockstep_checkpoint::Checkpoint;
use lockstep_kernels::KvEncoding;
use serde::{
    Serialize,
    de::{DeserializeOwned, IntoDeserializer},
};

use crate::{
    config::default_kernel_cache,
    device::{DeviceChoice, DeviceSettings},
    local_group::LocalGroup,
    model::{load::Source, ops::profiled::Profile},
    model_runner::{self, RunStep, RunnerSettings},
    sampler::{Place, Sampler, SamplingParams},
    scheduler::{
        NewSequence, Sampled, Scheduler, SchedulerConfig,
        plan::{RowResults, SeqId, StepPlan},
        speculation::Speculation,
    },
};

pub use memory::MemoryBench;
use profile::Phase;
pub use sums::SumsBench;

/// Positions in a block, as the worker's default.
const BLOCK_SIZE: usize = 16;

/// Measures prefill and decode.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineBench {
    /// GGUF file or Hugging Face folder
    model: PathBuf,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens to generate for each sequence
    #[arg(long, default_value_t = 64)]
    generate: usize,
    /// Sequences at a time
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Threads in all, shared among the ranks
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Ranks that share the model, as threads of this process
    #[arg(long, default_value_t = 1)]
    world_size: usize,
    /// Rows of a prefill chunk
    #[arg(long, default_value_t = 512)]
    chunk: usize,
    /// Times that the measurement is repeated; medians are printed
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// What computes: auto, cuda, cpu or reference
    #[arg(long, default_value = "auto", value_parser = parse::<DeviceChoice>)]
    device: DeviceChoice,
    /// Number of the GPU; by default each rank's modulo the number of GPUs
    #[arg(long)]
    gpu: Option<usize>,
    /// Let GPUs give up the lockstep rule, as `engine.deterministic = false` does
    #[arg(long)]
    no_deterministic: bool,
    /// How keys and values are stored: f16 or int8
    #[arg(long, default_value = "f16", value_parser = parse::<KvEncoding>)]
    kv_cache_encoding: KvEncoding,
    /// Also print where the time of rank 0's prefill and decode steps goes; the stopwatches take a little themselves
    #[arg(long)]
    profile: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Reads a choice by the name that it has in settings.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T, serde::de::value::Error> {
    T::deserialize(text.into_deserializer())
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    device: String,
    kv_cache_encoding: KvEncoding,
    world_size: usize,
    threads: usize,
    batch: usize,
    prompt_tokens: usize,
    generated_tokens: usize,
    /// Prompt tokens a second, all sequences together.
    prefill_tokens_per_s: f64,
    /// Generated tokens a second once every prompt is computed, all sequences together.
    decode_tokens_per_s: f64,
    /// The part of the time of a decode step in which the device had nothing to do, if it works by itself.
    decode_idle_percent: Option<f64>,
    /// From the file to the first step, warm-up included.
    load_s: f64,
    /// Of the whole process.
    peak_memory_mib: Option<u64>,
    /// Of the last run; empty without `--profile`.
    prefill_profile: Vec<profile::Line>,
    decode_profile: Vec<profile::Line>,
}

impl EngineBench {
    /// Measures and prints.
    ///
    /// # Errors
    /// A model that cannot be loaded, or arguments that make no sense.
    pub fn run(&self) -> Result<()> {
        ensure!(self.prompt >= 1 && self.generate >= 2, "--prompt must be at least 1 and --generate at least 2");
        ensure!(self.batch >= 1 && self.repeat >= 1, "--batch and --repeat must be at least 1");
        ensure!(
            self.world_size >= 1 && self.threads >= self.world_size,
            "--threads must be at least --world-size, and that at least 1"
        );
        let start = Instant::now();
        let profile = Profile::default();
        let (mut group, device) = self.load(&profile)?;
        let load = start.elapsed();
        let progress = ProgressBar::new((self.repeat * self.batch * self.generate) as u64);
        let mut runs = Vec::new();
        for seed in 0..self.repeat {
            runs.push(self.measure(&mut group, seed as u32, &profile, &progress)?);
        }
        progress.finish_and_clear();
        group.0.stop()?;
        let median = |phase: fn(&Run) -> &Phase| {
            let mut rates: Vec<f64> = runs.iter().map(|run| phase(run).tokens_per_s()).collect();
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        };
        let last = runs.last().context("--repeat is at least 1")?;
        let profiles = if self.profile { [&last.prefill, &last.decode].map(Phase::lines) } else { Default::default() };
        let [prefill_profile, decode_profile] = profiles;
        self.print(&Report {
            model: self.model.display().to_string(),
            device,
            kv_cache_encoding: self.kv_cache_encoding,
            world_size: self.world_size,
            threads: self.threads,
            batch: self.batch,
            prompt_tokens: self.prompt,
            generated_tokens: self.generate,
            prefill_tokens_per_s: median(|run| &run.prefill),
            decode_tokens_per_s: median(|run| &run.decode),
            decode_idle_percent: last.decode.idle_percent(),
            load_s: load.as_secs_f64(),
            peak_memory_mib: peak_memory_mib(),
            prefill_profile,
            decode_profile,
        })
    }

    fn n_blocks(&self) -> usize {
        self.batch * (self.prompt + self.generate).div_ceil(BLOCK_SIZE)
    }

    /// The ranks and the vocabulary's size, and what rank 0 computes on.
    fn load(&self, profile: &Profile) -> Result<((LocalGroup, usize), String)> {
        let checkpoint = Arc::new(Checkpoint::open(&self.model)?);
        let threads = self.threads / self.world_size;
        let device = |rank| {
            let (choice, gpu, kernel_cache) = (self.device, self.gpu, default_kernel_cache());
            DeviceSettings { choice, gpu, rank, kernel_cache, threads }.open()
        };
        let settings = |device| RunnerSettings {
            device,
            threads,
            n_blocks: self.n_blocks(),
            block_size: BLOCK_SIZE,
            kv_encoding: self.kv_cache_encoding,
            context_length: self.prompt + self.generate,
            deterministic: !self.no_deterministic,
        };
        let mut vocab_size = 0;
        let mut devices = Vec::new();
        let mut runners: Vec<Box<dyn RunStep>> = Vec::new();
        for rank in 0..self.world_size {
            let source = Source::open(Arc::clone(&checkpoint), rank, self.world_size)
                .with_context(|| self.model.display().to_string())?;
            vocab_size = source.config().vocab_size;
            let settings = settings(device(rank).context("--device cuda")?);
            devices.push(settings.device.to_string());
            let is_profiled = self.profile && rank == 0;
            runners.push(match is_profiled {
                true => model_runner::build_profiled(&source, &settings, profile.clone())?,
                false => model_runner::build(&source, &settings)?,
            });
        }
        Ok(((LocalGroup::start(runners)?, vocab_size), devices.swap_remove(0)))
    }

    /// One run: every prompt, then every token, greedily.
    fn measure(
        &self,
        group: &mut (LocalGroup, usize),
        seed: u32,
        profile: &Profile,
        progress: &ProgressBar,
    ) -> Result<Run> {
        let (group, vocab_size) = (&mut group.0, group.1);
        group.reset();
        let mut scheduler = Scheduler::new(SchedulerConfig {
            max_step_tokens: self.chunk.max(self.batch),
            max_prefill_chunk: self.chunk,
            max_prompt_logits_rows: self.chunk,
            max_running: self.batch,
            max_waiting: self.batch,
            n_blocks: self.n_blocks() as u32,
            block_size: BLOCK_SIZE as u32,
            context_length: (self.prompt + self.generate) as u32,
            // A token of each sequence in a step, so that the rate does not depend on what the model says.
            speculation: Speculation::Off,
        })?;
        let mut sampler = Sampler::new(vocab_size);
        let params = SamplingParams::default();
        let start = Instant::now();
        for sequence in 0..self.batch {
            let prompt = random_prompt(self.prompt, vocab_size, seed * self.batch as u32 + sequence as u32);
            let max_new_tokens = self.generate as u32;
            scheduler.add(NewSequence { prompt, max_new_tokens, ..NewSequence::default() }, start)?;
        }
        let mut started: HashSet<SeqId> = HashSet::new();
        let mut run = Run::default();
        profile.take();
        let mut phase_start = start;
        let mut under_way = VecDeque::new();
        loop {
            start_plans(group, &mut scheduler, &mut under_way)?;
            let Some(plan) = under_way.pop_front() else { break };
            let out = group.finish_plan().context("a step failed")?;
            let sampling = Instant::now();
            let place = Place { params: &params, prompt: &[], emitted: &[], choice: 0, mask: None };
            let token = |row: usize| match out.token_ids.get(row) {
                Some(token_id) => *token_id,
                None => sampler.sample(&out.logits[row * vocab_size..][..vocab_size], place),
            };
            let tokens = (0..plan.n_logits_rows()).map(token).collect::<Vec<_>>();
            let due = plan.sequences.iter().filter(|step| step.results != RowResults::None);
            let sampled: Vec<Sampled> = due
                .zip(tokens)
                .map(|(step, token)| Sampled { id: step.id, tokens: vec![token], stop: false })
                .collect();
            profile.add_other("sample", sampling.elapsed());
            scheduler.commit(&sampled);
            progress.inc(sampled.len() as u64);
            let n_prompts_started = started.len();
            started.extend(sampled.iter().map(|sampled| sampled.id));
            if n_prompts_started == self.batch {
                run.decode.count_step(sampled.len(), out.device_time);
                continue;
            }
            run.prefill.count_step(0, out.device_time);
            if started.len() == self.batch {
                run.prefill.n_tokens = self.batch * self.prompt;
                run.prefill.end(&mut phase_start, profile);
            }
        }
        ensure!(started.len() == self.batch, "not every sequence was started");
        run.decode.end(&mut phase_start, profile);
        Ok(run)
    }

    #[allow(clippy::print_stdout, reason = "the report is the program's output")]
    fn print(&self, report: &Report) -> Result<()> {
        if self.json {
            println!("{}", serde_json::to_string(report)?);
            return Ok(());
        }
        println!("model     {}", report.model);
        println!(
            "setting   {}, {:?} KV cache, world size {}, {} threads, batch {}, {} + {} tokens, median of {}",
            report.device,
            report.kv_cache_encoding,
            report.world_size,
            report.threads,
            report.batch,
            report.prompt_tokens,
            report.generated_tokens,
            self.repeat
        );
        println!("prefill   {:.1} tok/s", report.prefill_tokens_per_s);
        println!("decode    {:.1} tok/s", report.decode_tokens_per_s);
        if let Some(percent) = report.decode_idle_percent {
            println!("idle      {percent:.1} % of a decode step, the device");
        }
        println!("load      {:.2} s", report.load_s);
        if let Some(mib) = report.peak_memory_mib {
            println!("memory    {mib} MiB at its peak");
        }
        profile::print("prefill", &report.prefill_profile);
        profile::print("decode", &report.decode_profile);
        Ok(())
    }
}

/// Starts the next plan, and the one after it if that can be planned already.
fn start_plans(group: &mut LocalGroup, scheduler: &mut Scheduler, under_way: &mut VecDeque<StepPlan>) -> Result<()> {
    let runs_ahead = group.runs_ahead();
    while under_way.is_empty() || under_way.len() == 1 && under_way[0].chooses {
        let Some(mut plan) = scheduler.schedule(Instant::now()).plan else { break };
        plan.chooses = runs_ahead && plan.n_logits_rows() > 0;
        group.start_plan(&plan).context("a step failed")?;
        under_way.push_back(plan);
    }
    Ok(())
}

/// One run: every prompt, then every token.
#[derive(Default)]
struct Run {
    prefill: Phase,
    decode: Phase,
}

/// Token ids that look random and share no prefix between seeds (a multiplicative hash, Knuth 1997, section 6.4).
fn random_prompt(n_tokens: usize, vocab_size: usize, seed: u32) -> Vec<u32> {
    (0..n_tokens as u32)
        .map(|i| ((seed.wrapping_mul(0x9E37_79B1) ^ i).wrapping_mul(0x85EB_CA77) >> 7) % vocab_size as u32)
        .collect()
}

/// `VmHWM` of Linux's `/proc/self/status`; `None` elsewhere.
fn peak_memory_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024)
}

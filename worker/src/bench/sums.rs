//! Benchmark of sums over ranks: what the lockstep rule costs between GPUs. To gather partial sums and add them in one order
//! is measured in turn with NCCL's all-reduce, which `engine.deterministic = false` uses.
//!
//! Every rank is a process, as NCCL wants it for graphs: this program starts itself once for each.

use std::{
    fmt::Write as _,
    io::{self, Read as _, Write as _},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lockstep_collectives::{Collective, Member, nccl};
use lockstep_kernels::{
    RopeStyle, RopeTable, SumTree,
    cuda::{self, Device, Exchange, ExchangeShape, Exchanges, Gpu, GpuHeads, KernelCache},
};
use serde::Serialize;

use crate::config::default_kernel_cache;

/// Measures sums over ranks.
#[derive(Clone, Debug, clap::Args)]
pub struct SumsBench {
    /// Ranks, each a process with a GPU of its own; with fewer GPUs they share, which shows only that it works
    #[arg(long, default_value_t = 2)]
    world_size: usize,
    /// Rows of a step
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32, 256])]
    rows: Vec<usize>,
    /// Columns of a sum
    #[arg(long, default_value_t = 4096)]
    width: usize,
    /// K-segments that the ranks share
    #[arg(long, default_value_t = 8)]
    segments: usize,
    /// Sums in one CUDA graph: a step has two in a layer
    #[arg(long, default_value_t = 64)]
    sums: usize,
    /// Times that each is measured; medians are printed
    #[arg(long, default_value_t = 50)]
    repeat: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// This process is a rank: how ranks meet comes from its standard input
    #[arg(long, hide = true)]
    rank: Option<usize>,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Report {
    device: String,
    nccl: String,
    world_size: usize,
    /// Then times mean nothing.
    shares_gpus: bool,
    width: usize,
    lines: Vec<Line>,
}

/// The medians of one number of rows, for one sum.
#[derive(Debug, Serialize)]
struct Line {
    n_rows: usize,
    gather_us: f64,
    all_reduce_us: f64,
    ratio: f64,
}

/// A rank's process, which ends with this.
struct Rank(Child);

/// More bytes than a unique id has.
const MAX_ID_BYTES: u64 = 1024;
/// Time for all ranks to start and meet.
const MEET: Duration = Duration::from_secs(60);

impl SumsBench {
    /// Measures and prints.
    ///
    /// # Errors
    /// Arguments that make no sense, no GPU, no NCCL, or a rank that fails.
    pub fn run(&self) -> Result<()> {
        ensure!(
            (1..=self.segments).contains(&self.world_size) && self.segments <= 64,
            "--world-size must be in 1..=--segments, and that at most 64"
        );
        let is_sound = self.width > 0 && self.width.is_multiple_of(32) && self.width <= 1 << 16;
        ensure!(is_sound, "--width must be a multiple of 32, at most 65536");
        ensure!(self.rows.iter().all(|rows| (1..=4096).contains(rows)), "--rows must be in 1..=4096");
        ensure!(
            (1..=1024).contains(&self.sums) && (1..=10_000).contains(&self.repeat),
            "--sums must be in 1..=1024, --repeat in 1..=10000"
        );
        match self.rank {
            None => self.start_ranks(),
            Some(rank) => self.measure(rank),
        }
    }

    /// Starts a process for each rank and waits for them. Ranks meet in this one.
    fn start_ranks(&self) -> Result<()> {
        let n_gpus = cuda::devices()?.len();
        ensure!(n_gpus > 0, "there is no GPU");
        let (id, version) = (nccl::UniqueId::new()?, nccl::version()?);
        let mut ranks = Vec::new();
        for rank in 0..self.world_size {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(std::env::args_os().skip(1)).args(["--rank", &rank.to_string()]).stdin(Stdio::piped());
            if n_gpus < self.world_size {
                let (name, value) = nccl::shared_gpu_environment(version, rank);
                command.env(name, value);
            }
            let mut child = Rank(command.spawn()?);
            let mut input = child.0.stdin.take().context("a rank has an input")?;
            input.write_all(id.as_bytes())?;
            ranks.push(child);
        }
        for (rank, child) in ranks.iter_mut().enumerate() {
            let status = child.0.wait()?;
            ensure!(status.success(), "rank {rank} failed: {status}");
        }
        Ok(())
    }

    /// What one rank does; the first prints.
    fn measure(&self, rank: usize) -> Result<()> {
        let n_gpus = cuda::devices()?.len();
        ensure!(n_gpus > 0, "there is no GPU");
        let device = Device::open(rank % n_gpus, KernelCache::new(default_kernel_cache()))?;
        let member = Member { rank, world_size: self.world_size, ..Member::default() };
        let mut end = nccl::connect(&read_id()?, device.collective_stream()?, member, Instant::now() + MEET)?;
        let mut report = Report {
            device: device.info().name.clone(),
            nccl: nccl::version()?.to_string(),
            world_size: self.world_size,
            shares_gpus: n_gpus < self.world_size,
            width: self.width,
            lines: Vec::new(),
        };
        // No attention is computed.
        let rope = RopeTable::new(64, 64, 1e4, None, 1, RopeStyle::Adjacent)?;
        let gpu = Gpu::new(device, GpuHeads { n_heads: 1, n_kv_heads: 1, head_dim: 64 }, &rope)?;
        for n_rows in &self.rows {
            report.lines.push(self.measure_rows(*n_rows, &gpu, &mut end)?);
        }
        if rank == 0 { self.print(&report) } else { Ok(()) }
    }

    /// One way and the other in turn, so that whatever else this machine does falls on both.
    fn measure_rows(&self, n_rows: usize, gpu: &Gpu, end: &mut dyn Collective) -> Result<Line> {
        let mut exchanges = Vec::new();
        for exchange in [Exchange::Gather, Exchange::AllReduce] {
            exchanges.push(Exchanges::record(gpu, exchange, &self.shape(exchange, n_rows), self.sums, end)?);
        }
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..self.repeat {
            for (times, exchanges) in times.iter_mut().zip(&mut exchanges) {
                times.push(exchanges.run(end)?.as_secs_f64() * 1e6 / self.sums as f64);
            }
        }
        let [gather_us, all_reduce_us] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        Ok(Line { n_rows, gather_us, all_reduce_us, ratio: gather_us / all_reduce_us })
    }

    fn shape(&self, exchange: Exchange, n_rows: usize) -> ExchangeShape {
        let (n_planes, order) = match exchange {
            // A rank has one plane, and its sum is in the same place.
            Exchange::AllReduce => (vec![1], SumTree::new(1).order(&SumTree::new(1).subtrees(0..1))),
            Exchange::Gather => {
                let tree = SumTree::new(self.segments);
                let first = |rank: usize| self.segments * rank / self.world_size;
                let owned = (0..self.world_size).map(|rank| tree.subtrees(first(rank)..first(rank + 1)));
                let subtrees: Vec<_> = owned.collect();
                (subtrees.iter().map(Vec::len).collect(), tree.order(&subtrees.concat()))
            }
        };
        ExchangeShape { n_rows, width: self.width, n_planes, order }
    }

    fn print(&self, report: &Report) -> Result<()> {
        let mut text = String::new();
        if self.json {
            writeln!(text, "{}", serde_json::to_string(report)?)?;
        } else {
            let Report { device, nccl, world_size, width, .. } = report;
            let (sums, repeat) = (self.sums, self.repeat);
            writeln!(
                text,
                "{world_size} ranks on {device}, NCCL {nccl}: us for each of {sums} sums of {width} columns"
            )?;
            writeln!(text, "in a graph, with the normalization that reads it; median of {repeat}")?;
            if report.shares_gpus {
                writeln!(text, "ranks share a GPU: these times show that it works, and nothing else")?;
            }
            writeln!(text, "rows  gather, fixed order  all-reduce  ratio")?;
            for Line { n_rows, gather_us, all_reduce_us, ratio } in &report.lines {
                writeln!(text, "{n_rows:>4}  {gather_us:>19.1}  {all_reduce_us:>10.1}  {ratio:>5.2}")?;
            }
        }
        Ok(io::stdout().write_all(text.as_bytes())?)
    }
}

/// The unique id that whoever started this process has written.
fn read_id() -> Result<nccl::UniqueId> {
    let mut bytes = Vec::new();
    io::stdin().take(MAX_ID_BYTES).read_to_end(&mut bytes)?;
    nccl::UniqueId::from_bytes(&bytes).context("--rank is for processes that this program starts")
}

impl Drop for Rank {
    fn drop(&mut self) {
        // A rank that has ended, or that ends by itself, is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

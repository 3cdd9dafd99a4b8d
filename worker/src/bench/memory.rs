//! Benchmark of memory: what a decode step, which reads every weight once, can reach at most.

use anyhow::{Result, ensure};
use lockstep_kernels::read_bandwidth;
use serde::Serialize;

/// Measures how fast memory is read.
#[derive(Clone, Debug, clap::Args)]
pub struct MemoryBench {
    /// Most threads; measured with one, and with each doubling up to this
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Memory to read, far more than caches hold. Unit: MiB
    #[arg(long, default_value_t = 1024)]
    size_mib: usize,
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

/// One measurement.
#[derive(Debug, Serialize)]
struct Reading {
    threads: usize,
    /// Places from which each thread reads at a time.
    streams: usize,
    bytes_per_s: f64,
}

impl MemoryBench {
    /// Measures and prints.
    ///
    /// # Errors
    /// Arguments that make no sense.
    #[allow(clippy::print_stdout, reason = "the report is the program's output")]
    pub fn run(&self) -> Result<()> {
        ensure!((1..=1024).contains(&self.threads), "--threads must be in 1..=1024");
        ensure!((1..=1 << 20).contains(&self.size_mib), "--size-mib must be in 1..=1048576");
        let size_bytes = self.size_mib << 20;
        let doublings = std::iter::successors(Some(1), |threads| Some(threads * 2));
        let mut readings = Vec::new();
        for threads in doublings.take_while(|threads| *threads < self.threads).chain([self.threads]) {
            for (streams, read) in [
                (1, read_bandwidth::<1> as fn(usize, usize) -> f64),
                (4, read_bandwidth::<4>),
                (16, read_bandwidth::<16>),
            ] {
                readings.push(Reading { threads, streams, bytes_per_s: read(threads, size_bytes) });
            }
        }
        if self.json {
            println!("{}", serde_json::to_string(&readings)?);
            return Ok(());
        }
        for Reading { threads, streams, bytes_per_s } in readings {
            println!("memory    {threads} threads x {streams:2} streams  {:.1} GB/s", bytes_per_s / 1e9);
        }
        Ok(())
    }
}

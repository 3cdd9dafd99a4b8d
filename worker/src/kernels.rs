//! Kernels for GPUs, all of them compiled in advance: to fill the cache of an image for machines without a compiler, and
//! to find, without a GPU, what does not compile or takes more registers than there are.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use lockstep_kernels::cuda::{self, Architecture, Compiled, KernelCache, Resources, Variant};
use lockstep_proto::telemetry::{self, LogSettings};

/// Compiles the kernels.
#[derive(Clone, Debug, clap::Args)]
pub struct Kernels {
    /// Architecture to compile for, such as sm_80 or sm_90a; may be given several times
    #[arg(long, required = true)]
    arch: Vec<Architecture>,
    /// Folder to keep them in, for engine.kernel_cache
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

impl Kernels {
    /// Compiles every kernel for every architecture, and prints what each takes.
    ///
    /// # Errors
    /// No compiler, an error in a source, a hot kernel that registers do not suffice for, or a folder that cannot be
    /// written.
    #[allow(clippy::print_stdout, reason = "the table is the program's output")]
    pub fn run(&self) -> Result<()> {
        telemetry::init(&LogSettings { filter: "warn".into(), ..LogSettings::default() })?;
        let cache = KernelCache::new(self.cache.clone());
        println!("NVRTC {}", cuda::compiler_version()?);
        println!(
            "{:<8} {:<16} {:>9} {:>12} {:>11} {:>11} {:>9}  program",
            "arch", "kernel", "registers", "shared bytes", "stack bytes", "spill bytes", "code KiB"
        );
        let mut n_over = 0;
        for architecture in &self.arch {
            for variant in cuda::variants() {
                let compiled = cuda::compile(&variant.program, *architecture)?;
                n_over += print(*architecture, &variant, &compiled)?;
                cache.store(&variant.program, *architecture, &compiled.code)?;
            }
        }
        if n_over > 0 {
            bail!("{n_over} hot kernels use local memory or spill registers");
        }
        Ok(())
    }
}

/// Prints a line for each entry point; how many of them are over what a hot kernel may take.
#[allow(clippy::print_stdout, reason = "the table is the program's output")]
fn print(architecture: Architecture, variant: &Variant, compiled: &Compiled) -> Result<usize> {
    let mut n_over = 0;
    for entry in variant.entries {
        let resources = Resources::of(entry, &compiled.log).with_context(|| {
            format!("{}: the compiler's log says nothing of {entry}:\n{}", variant.program, compiled.log)
        })?;
        let is_over = variant.hot && !resources.stays_in_registers();
        n_over += usize::from(is_over);
        let Resources { registers, shared_bytes, stack_bytes, spill_bytes } = resources;
        println!(
            "{:<8} {entry:<16} {registers:>9} {shared_bytes:>12} {stack_bytes:>11} {spill_bytes:>11} {:>9.1}  {}{}",
            architecture.to_string(),
            compiled.code.cubin.len() as f64 / 1024.0,
            variant.program,
            if is_over { "  OVER: it is hot" } else { "" }
        );
    }
    Ok(n_over)
}

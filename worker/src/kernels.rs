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

#[cfg(test)]
mod tests {
    use lockstep_kernels::cuda::{CompilerVersion, MachineCode, Program, Source};

    use super::*;

    /// How many of a program's kernels are over, by a log that says this of its only one.
    fn n_over(hot: bool, log: &str) -> Result<usize> {
        let variant = Variant { program: Program::new(Source::Probe, &[]), entries: &["axpy"], hot };
        let code = MachineCode { cubin: vec![0; 2048], compiler: CompilerVersion { major: 13, minor: 0 } };
        print("sm_80".parse()?, &variant, &Compiled { code, log: log.into() })
    }

    #[test]
    fn a_hot_kernel_is_over_if_registers_do_not_suffice() {
        let log = |bytes: [u32; 3]| {
            let [stack, stores, loads] = bytes;
            format!(
                "ptxas info    : Compiling entry function 'axpy' for 'sm_80'\n\
                 ptxas         .     {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads\n\
                 ptxas info    : Used 10 registers, used 1 barriers"
            )
        };
        assert_eq!(n_over(true, &log([0, 0, 0])).unwrap(), 0);
        for bytes in [[8, 0, 0], [0, 4, 0], [0, 0, 4]] {
            assert_eq!(n_over(true, &log(bytes)).unwrap(), 1, "{bytes:?}");
            assert_eq!(n_over(false, &log(bytes)).unwrap(), 0, "{bytes:?}");
        }
        assert!(n_over(true, "").unwrap_err().to_string().contains("says nothing of axpy"));
    }
}

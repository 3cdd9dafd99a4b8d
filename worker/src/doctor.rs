//! The doctor: what this machine offers a worker, and what a worker will make of it.

use std::{fs, thread};

use lockstep_collectives::nccl;
use lockstep_kernels::{Cpu, cuda};

/// Prints the findings, one a line: what was looked for, what was found, what follows.
#[allow(clippy::print_stdout, reason = "the findings are the program's output")]
pub fn run() {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    println!("cores         {cores}: a worker computes on {cores} threads unless engine.threads says otherwise");
    println!("cpu features  {}", cpu_features());
    println!("cpu kernels   {:?}, the best of what this processor has", Cpu::new(1).isa());
    match available_memory_mib() {
        Some(mib) => println!("memory        {mib} MiB available for weights and the KV cache"),
        None => println!("memory        not known: this system has no /proc/meminfo"),
    }
    print_gpus();
    match fs::metadata("/dev/shm") {
        Ok(_) => println!("transport     shm between ranks on this host (/dev/shm is there), tcp between hosts"),
        Err(_) => println!("transport     tcp only: there is no /dev/shm"),
    }
}

/// The driver, what it shows, and the compiler: what `engine.device = auto` looks at.
#[allow(clippy::print_stdout, reason = "the findings are the program's output")]
fn print_gpus() {
    match (cuda::driver_version(), cuda::devices()) {
        (Ok((major, minor)), Ok(devices)) => {
            println!("gpu driver    runs CUDA up to {major}.{minor} and shows {} GPUs", devices.len());
            for device in devices {
                println!("gpu           {device}");
            }
        }
        (Err(error), _) | (_, Err(error)) => println!("gpu           none that can be used: {error}"),
    }
    match cuda::compiler_version() {
        Ok(version) => println!("nvrtc         {version} compiles kernels for GPUs"),
        Err(error) => {
            println!("nvrtc         missing, so GPUs run only kernels that are in engine.kernel_cache: {error}")
        }
    }
    match cuda::blas_version() {
        Ok(version) => println!("cublaslt      {version} multiplies prompts where engine.deterministic is false"),
        Err(error) => println!("cublaslt      missing, so our own kernels multiply prompts in any case: {error}"),
    }
    match nccl::version() {
        Ok(version) => {
            let (name, value) = nccl::shared_gpu_environment(version, 0);
            println!(
                "nccl          {version} connects ranks that have a GPU each; to share one, rank 0 needs {name}={value}"
            );
        }
        Err(error) => println!("nccl          missing, so ranks exchange activations through host memory: {error}"),
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> String {
    macro_rules! found {
        ($($name:tt),*) => {
            [$(($name, std::arch::is_x86_feature_detected!($name))),*]
        };
    }
    let features = found!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vnni", "avx512bf16", "avxvnni");
    let names: Vec<&str> = features.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect();
    if names.is_empty() { "none that kernels use".into() } else { names.join(" ") }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_features() -> String {
    format!("{}: portable kernels", std::env::consts::ARCH)
}

fn available_memory_mib() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}

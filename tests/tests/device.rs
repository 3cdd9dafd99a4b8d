//! What a worker computes on: what it takes without being told, what it refuses, and how it says so.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result};
use lockstep_cuda_emulator as emulator;
use lockstep_tests::cluster::{Cluster, binary, demo_model};

/// A worker that is to end before it serves, with its libraries in `libraries`.
fn worker(libraries: &Path, args: &[&str]) -> Result<Output> {
    Ok(Command::new(binary("lockstep-worker")?).args(args).env("LD_LIBRARY_PATH", libraries).output()?)
}

/// Expects this exit status, and one line on stderr that holds all these parts.
fn check_refused(output: &Output, status: i32, parts: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{text}");
    let holds = |line: &&str| parts.iter().all(|part| line.contains(part));
    assert!(text.lines().any(|line| holds(&line)), "{parts:?} are not in a line of: {text}");
}

/// Whether the loader finds a driver on this machine; then its absence cannot be tested.
fn has_driver() -> bool {
    let has = Path::new("/proc/driver/nvidia").exists();
    if has {
        println!("this machine has a driver");
    }
    has
}

#[tokio::test]
async fn a_worker_without_a_gpu_says_why_and_computes_on_the_cpu() -> Result<()> {
    if has_driver() {
        return Ok(());
    }
    let unordered = Cluster::builder().device("auto").worker_arg("--engine.deterministic=false");
    let cluster = unordered.start().await?;
    let log = cluster.groups[0][0].log();
    let told = "engine.deterministic = false changes nothing: this rank does not compute on a GPU";
    assert_eq!(log.matches(told).count(), 1, "{log}");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("computing on")).collect();
    let [line] = lines.as_slice() else { panic!("not one line: {log}") };
    for part in
        ["no CUDA: NVIDIA's driver was not found: no libcuda.so or libcuda.so.1", "computing on the CPU with 1 threads"]
    {
        assert!(line.contains(part), "{part} is not in: {line}");
    }
    cluster.stop().await
}

#[test]
fn a_gpu_that_is_asked_for_and_not_there_is_an_error() -> Result<()> {
    let model = demo_model().display().to_string();
    let serve = ["--model.path", &model, "--listen", "127.0.0.1:0", "--engine.device", "cuda"];
    let bench = ["bench", "engine", &model, "--device", "cuda"];
    let nothing = tempfile::tempdir()?;
    if !has_driver() {
        check_refused(&worker(nothing.path(), &serve)?, 1, &["engine.device = cuda: NVIDIA's driver was not found"]);
        check_refused(&worker(nothing.path(), &bench)?, 1, &["--device cuda: NVIDIA's driver was not found"]);
    }
    let emulated = emulator::build()?;
    let ninth = [&serve[..], &["--engine.gpu", "8"]].concat();
    check_refused(&worker(&emulated, &ninth)?, 1, &["there is no CUDA device 8: the driver sees 8"]);
    Ok(())
}

#[test]
fn a_gpu_without_room_for_keys_and_values_is_an_error_before_anything_is_loaded() -> Result<()> {
    let model = demo_model().display().to_string();
    let serve = ["--model.path", &model, "--listen", "127.0.0.1:0", "--engine.device", "cuda"];
    let nothing = [&serve[..], &["--engine.gpu-memory-fraction", "0.001"]].concat();
    let parts = ["no room for keys and values", "engine.gpu_memory_fraction = 0.001"];
    check_refused(&worker(&emulator::build()?, &nothing)?, 1, &parts);
    let drafting = [&serve[..], &["--model.draft-path", &model]].concat();
    check_refused(&worker(&emulator::build()?, &drafting)?, 1, &["model.draft_path", "engine.kv_cache_tokens"]);
    let too_much = [&serve[..], &["--engine.gpu-memory-fraction", "1.5"]].concat();
    check_refused(&worker(Path::new(""), &too_much)?, 64, &["engine.gpu_memory_fraction", "at most 1"]);
    Ok(())
}

#[test]
fn a_device_that_does_not_exist_is_refused_by_name() -> Result<()> {
    for (key, value) in [("--engine.device", "tpu"), ("--engine.gpu", "first"), ("--engine.backend", "cpu")] {
        let output = worker(Path::new(""), &["--model.path", "m.gguf", key, value])?;
        check_refused(&output, 64, &[key.trim_start_matches('-')]);
    }
    Ok(())
}

#[test]
fn the_doctor_says_what_it_sees() -> Result<()> {
    let doctor = |libraries: &Path| -> Result<String> {
        let output = worker(libraries, &["doctor"])?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let text = doctor(&emulator::build()?)?;
    for part in [
        "gpu driver    runs CUDA up to",
        "shows 8 GPUs",
        "GPU 7: ",
        "compute capability 9.0",
        "nvrtc         13.",
        "cublaslt      13.0 multiplies prompts",
        "nccl          2.29.7",
    ] {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    if !has_driver() {
        let text = doctor(tempfile::tempdir()?.path())?;
        for part in [
            "gpu           none that can be used: NVIDIA's driver was not found",
            "nvrtc         missing",
            "cublaslt      missing",
            "nccl          missing",
        ] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }
    Ok(())
}

#[test]
fn kernels_are_not_compiled_without_a_compiler() -> Result<()> {
    let nothing = tempfile::tempdir()?;
    check_refused(&worker(nothing.path(), &["kernels"])?, 64, &["--arch"]);
    check_refused(&worker(nothing.path(), &["kernels", "--arch", "sm_75"])?, 64, &["sm_75", "sm_80 or newer"]);
    let output = worker(nothing.path(), &["kernels", "--arch", "sm_80"])?;
    let text = String::from_utf8(output.stderr)?;
    // A machine may have a toolkit.
    assert!(output.status.success() || text.contains("libnvrtc.so.13"), "{text}");
    Ok(())
}

#[test]
fn sums_between_gpus_are_measured_by_a_process_for_each_rank() -> Result<()> {
    let bench = |world_size: &str, n_gpus: &str, more: &[&str]| -> Result<Output> {
        let sizes = ["--width", "64", "--sums", "2", "--repeat", "3", "--rows", "1,3", "--world-size", world_size];
        let cache = emulator::build()?.join("kernels");
        Ok(Command::new(binary("lockstep-worker")?)
            .args(["bench", "sums"])
            .args([&sizes[..], more].concat())
            .env("LD_LIBRARY_PATH", emulator::build()?)
            .env("LOCKSTEP_EMULATOR_DEVICES", n_gpus)
            .env("XDG_CACHE_HOME", cache)
            .output()?)
    };
    // Three ranks share eight segments unevenly.
    for (world_size, n_gpus, shares_gpus) in [("1", "1", false), ("2", "2", false), ("3", "3", false), ("2", "1", true)]
    {
        let output = bench(world_size, n_gpus, &["--json"])?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!(report["world_size"].to_string(), world_size);
        assert_eq!(report["shares_gpus"], shares_gpus, "{report}");
        let lines = report["lines"].as_array().context("lines")?;
        assert_eq!(lines.iter().map(|line| line["n_rows"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(3)]);
        for line in lines {
            let [gather, all_reduce, ratio] = ["gather_us", "all_reduce_us", "ratio"].map(|key| line[key].as_f64());
            let (gather, all_reduce) = (gather.context("gather_us")?, all_reduce.context("all_reduce_us")?);
            assert!(gather > 0.0 && all_reduce > 0.0, "{report}");
            assert!((ratio.context("ratio")? - gather / all_reduce).abs() < 1e-9, "{report}");
        }
    }
    let table = String::from_utf8(bench("2", "1", &[])?.stdout)?;
    for part in
        ["2 ranks on CPU emulator of CUDA, NCCL 2.29.7", "ranks share a GPU", "rows  gather, fixed order  all-reduce"]
    {
        assert!(table.contains(part), "{part} is not in: {table}");
    }
    assert_eq!(table.lines().count(), 6, "{table}");
    check_refused(&bench("9", "9", &[])?, 1, &["--world-size must be in 1..=--segments"]);
    check_refused(&bench("2", "0", &[])?, 1, &["no CUDA-capable device"]);
    Ok(())
}

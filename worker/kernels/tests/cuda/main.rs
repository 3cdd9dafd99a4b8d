//! Devices, their memory and their kernels, on the emulator's libraries.
//!
//! What depends on a library's absence runs in a process of its own, which finds some of the libraries.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod ranks;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use lockstep_checkpoint::Encoding;
use lockstep_cuda_emulator as emulator;
use lockstep_kernels::{
    EncodedRows, RopeStyle, RopeTable,
    cuda::{self, Arg, CudaError, Device, Event, Gpu, GpuHeads, KernelCache, Program, Source},
};
use tempfile::TempDir;

/// Tells a test that it is the process of its own, and names its cache.
const CHILD: &str = "LOCKSTEP_TEST_CACHE";

fn program() -> Program {
    Program::new(Source::Probe, &[("FACTOR", 3)])
}

fn open(cache: &Path) -> Device {
    emulator::load_into_this_process().unwrap();
    Device::open(0, KernelCache::new(Some(cache.to_owned()))).unwrap()
}

/// Loads the program and computes with it: 2 * 3 x + y.
fn compute(device: &Device) -> Result<(), CudaError> {
    const N: usize = 1000;
    let kernel = device.kernel(&program(), "axpy")?;
    let x: Vec<f32> = (0..N).map(|i| i as f32).collect();
    let (x, mut y) = (device.upload_new(&x)?, device.upload_new(&[1.0_f32; N])?);
    let args = [Arg::F32(2.0), (&x).into(), (&y).into(), Arg::U32(N as u32)];
    // SAFETY: these are the parameters of `axpy`, and both buffers have N values.
    unsafe { kernel.launch([N.div_ceil(256) as u32, 1, 1], 256, 0, &args) }?;
    let mut values = vec![0.0; N];
    device.download(&y, 0..N, &mut values)?;
    assert!(values.iter().enumerate().all(|(i, value)| *value == 6.0 * i as f32 + 1.0), "{values:?}");
    device.fill_zeros(&mut y)?;
    device.download(&y, 0..N, &mut values)?;
    assert_eq!(values, vec![0.0; N]);
    Ok(())
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect()
}

/// A folder with a compiled program, and the file of it.
fn filled() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    compute(&open(folder.path())).unwrap();
    let files = files(folder.path());
    assert_eq!(files.len(), 1, "{files:?}");
    let file = files[0].clone();
    (folder, file)
}

#[test]
fn a_program_is_compiled_once_and_then_loaded() {
    let (folder, file) = filled();
    // What comes from the file is what runs: this program multiplies by another factor than its name says.
    let other = Program::new(Source::Probe, &[("FACTOR", 4)]);
    let others = tempfile::tempdir().unwrap();
    open(others.path()).kernel(&other, "axpy").unwrap();
    fs::copy(&files(others.path())[0], &file).unwrap();
    let device = open(folder.path());
    let kernel = device.kernel(&program(), "axpy").unwrap();
    let mut y = device.zeros::<f32>(1).unwrap();
    let x = device.upload_new(&[1.0_f32]).unwrap();
    let args = [Arg::F32(1.0), (&x).into(), (&y).into(), Arg::U32(1)];
    // SAFETY: these are the parameters of `axpy`, and both buffers have one value.
    unsafe { kernel.launch([1, 1, 1], 32, 0, &args) }.unwrap();
    let mut value = [0.0];
    device.download(&y, 0..1, &mut value).unwrap();
    assert_eq!(value, [4.0]);
    device.upload(&mut y, 0, &[7.0]).unwrap();
    device.download(&y, 0..1, &mut value).unwrap();
    assert_eq!(value, [7.0]);
}

#[test]
fn a_damaged_file_is_made_anew() {
    let (folder, file) = filled();
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    compute(&open(folder.path())).unwrap();
    assert!(fs::read(&file).unwrap().len() > whole.len() / 2, "it is as short as before");
    compute(&open(folder.path())).unwrap();
}

#[test]
fn a_folder_that_cannot_be_written_costs_time_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    compute(&open(&file.join("cache"))).unwrap();
}

/// Runs the test of this name in a process of its own, with these libraries of the emulator.
fn run_with(libraries: &[&str], test: &str, cache: &Path) {
    run_with_settings(libraries, test, cache, &[]);
}

/// As [`run_with`], with settings of the emulator.
fn run_with_settings(libraries: &[&str], test: &str, cache: &Path, settings: &[(&str, &str)]) {
    let folder = tempfile::tempdir().unwrap();
    let built = emulator::build().unwrap();
    for name in libraries {
        std::os::unix::fs::symlink(built.join(name), folder.path().join(name)).unwrap();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--include-ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env(CHILD, cache)
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// The cache of a process of its own; `None` in the one that `cargo test` runs.
fn child() -> Option<KernelCache> {
    Some(KernelCache::new(Some(std::env::var_os(CHILD)?.into())))
}

#[test]
#[ignore = "needs a process without NVRTC: kernels_that_are_cached_need_no_compiler starts one"]
fn without_nvrtc() {
    let Some(cache) = child() else { return };
    let device = Device::open(0, cache).unwrap();
    compute(&device).unwrap();
    let error = device.kernel(&Program::new(Source::Probe, &[("FACTOR", 5)]), "axpy").unwrap_err().to_string();
    for part in ["libnvrtc.so.13", "LD_LIBRARY_PATH (/"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    assert!(device.check_kernels().is_err(), "the cache lacks kernels");
}

#[test]
fn kernels_that_are_cached_need_no_compiler() {
    let (folder, _) = filled();
    run_with(&["libcuda.so", "libcuda.so.1"], "without_nvrtc", folder.path());
}

/// A product of as many rows as dense ones have, where nobody asks for those, and where somebody does.
fn products_of_many_rows(device: &Device) -> [Vec<f32>; 2] {
    let (n_rows, n_out, n_in) = (512, 32, 32);
    // Of many sizes, so that the order of sums shows.
    let value = |i: usize| ((i * 37 % 101) as f32 / 9.0).exp();
    let bytes: Vec<u8> = (0..n_out * n_in).flat_map(|i| value(i).to_le_bytes()).collect();
    let x: Vec<f32> = (0..n_rows * n_in).map(value).collect();
    let rope = RopeTable::new(64, 64, 10_000.0, None, 100, RopeStyle::Adjacent).unwrap();
    let gpu = || Gpu::new(device.clone(), GpuHeads { n_heads: 2, n_kv_heads: 1, head_dim: 64 }, &rope).unwrap();
    [gpu(), gpu().with_dense_prompts().unwrap()].map(|gpu| {
        let source = EncodedRows::new(Encoding::F32, &bytes, n_out, n_in).unwrap();
        let weight = gpu.load_matrix(&source, None).unwrap();
        let [out] = gpu.matmul([&weight], &gpu.upload_input(&x, n_in).unwrap()).unwrap();
        let mut values = Vec::new();
        gpu.download(&out, &mut values).unwrap();
        values
    })
}

#[test]
#[ignore = "needs a process without cuBLASLt: without_cublaslt_prompts_keep_the_rule starts one"]
fn without_cublaslt() {
    let Some(cache) = child() else { return };
    let Err(error) = cuda::blas_version() else {
        println!("this machine has cuBLASLt");
        return;
    };
    let error = error.to_string();
    for part in ["libcublasLt.so.13", "LD_LIBRARY_PATH (/"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    let [own, dense] = products_of_many_rows(&Device::open(0, cache).unwrap());
    assert_eq!(own, dense);
}

#[test]
fn without_cublaslt_prompts_keep_the_rule() {
    let folder = tempfile::tempdir().unwrap();
    let [own, dense] = products_of_many_rows(&open(folder.path()));
    assert_ne!(own, dense, "another order of sums");
    assert_eq!(cuda::blas_version().unwrap().to_string(), "13.0");
    let others = ["libcuda.so", "libcuda.so.1", "libnvrtc.so", "libnvrtc.so.13"];
    run_with(&others, "without_cublaslt", folder.path());
}

#[test]
#[ignore = "needs a process without libraries: without_a_driver_an_error_says_what_was_looked_for starts one"]
fn without_libraries() {
    if child().is_none() {
        return;
    }
    let error = Device::open(0, KernelCache::new(None)).unwrap_err().to_string();
    assert_eq!(cuda::unavailable().as_ref(), Some(&error));
    for part in ["libcuda.so.1", "NVIDIA's driver", "LD_LIBRARY_PATH (/"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    assert!(cuda::compiler_version().is_err());
}

#[test]
fn without_a_driver_an_error_says_what_was_looked_for() {
    if Path::new("/proc/driver/nvidia").exists() {
        println!("this machine has a driver");
        return;
    }
    run_with(&[], "without_libraries", Path::new("/nonexistent"));
}

/// Whether a kernel that `compute` launches may start before the one ahead of it has ended.
fn overlaps(cache: KernelCache) -> bool {
    emulator::load_into_this_process().unwrap();
    compute(&Device::open(0, cache).unwrap()).unwrap();
    emulator::overlapping_launches().unwrap() > 0
}

#[test]
#[ignore = "needs an older device or driver: kernels_overlap_where_device_and_driver_can starts a process with one"]
fn without_overlap() {
    if let Some(cache) = child() {
        assert!(!overlaps(cache));
    }
}

#[test]
fn kernels_overlap_where_device_and_driver_can() {
    let folder = tempfile::tempdir().unwrap();
    assert!(overlaps(KernelCache::new(Some(folder.path().to_owned()))));
    for setting in [("LOCKSTEP_EMULATOR_ARCH", "89"), ("LOCKSTEP_EMULATOR_DRIVER", "12020")] {
        run_with_settings(&[], "without_overlap", folder.path(), &[setting]);
    }
}

#[test]
fn a_device_says_what_it_is() {
    let device = open(Path::new("/nonexistent"));
    assert_eq!(cuda::unavailable(), None);
    assert_eq!(device.info(), &cuda::devices().unwrap()[0]);
    assert_eq!(device.architecture().to_string(), "sm_90a");
    assert!(device.info().limits.shared_bytes_per_block >= 48 << 10);
    let error = Device::open(1000, KernelCache::new(None)).unwrap_err().to_string();
    assert!(error.contains("no CUDA device 1000"), "{error}");
}

#[test]
fn an_entry_point_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = open(folder.path()).kernel(&program(), "axpyz").unwrap_err().to_string();
    assert!(error.contains("probe.cu FACTOR=3 has no entry point `axpyz`"), "{error}");
}

#[test]
fn a_source_that_is_wrong_comes_with_the_compilers_log() {
    let folder = tempfile::tempdir().unwrap();
    // Without its define.
    let error = open(folder.path()).kernel(&Program::new(Source::Probe, &[]), "axpy").unwrap_err().to_string();
    assert!(error.contains("probe.cu does not compile for sm_90a") && error.contains("FACTOR"), "{error}");
    assert_eq!(files(folder.path()), Vec::<PathBuf>::new());
}

#[test]
fn copies_stay_inside_their_buffers() {
    let device = open(Path::new("/nonexistent"));
    let mut buffer = device.zeros::<u16>(8).unwrap();
    device.upload(&mut buffer, 5, &[1, 2, 3]).unwrap();
    let mut values = [9; 4];
    device.download(&buffer, 4..8, &mut values).unwrap();
    assert_eq!(values, [0, 1, 2, 3]);
    for (offset, len) in [(6, 3), (9, 0), (usize::MAX, 2)] {
        assert!(buffer.at(offset, len).is_err(), "{len} at {offset}");
    }
    assert_eq!(buffer.at(8, 0).unwrap(), buffer.pointer() + 16);
    assert!(device.upload(&mut buffer, 6, &[1, 2, 3]).is_err());
    assert!(device.download(&buffer, 0..3, &mut values).is_err(), "as many values as the range has");
    assert!(device.download(&buffer, 5..9, &mut values).is_err());
    let empty = device.alloc::<f32>(0).unwrap();
    assert!(empty.is_empty());
    device.download(&empty, 0..0, &mut []).unwrap();
}

#[test]
fn memory_that_is_not_there_is_refused_with_what_is() {
    let device = open(Path::new("/nonexistent"));
    let free = device.memory_info().unwrap().free;
    let wanted = free + (1 << 20);
    let error = device.alloc::<u8>(wanted).unwrap_err();
    let CudaError::OutOfMemory { wanted: said, memory } = error else { panic!("{error}") };
    assert!(said == wanted && memory.free <= memory.total && memory.total < wanted, "{memory:?}");
    assert!(matches!(device.alloc::<u64>(usize::MAX / 4), Err(CudaError::TooLarge { .. })));
    let error = device.alloc::<u64>(usize::MAX / 4).unwrap_err().to_string();
    assert!(error.contains("more than can be addressed"), "{error}");
}

/// Ends a wait that would never end.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait_for(event: &Event) {
    let deadline = Instant::now() + PATIENCE;
    while !event.is_done().unwrap() {
        assert!(Instant::now() < deadline, "the device never came so far");
        std::thread::yield_now();
    }
}

#[test]
fn a_copy_is_queued_and_an_event_tells_when_it_is_done() {
    let device = open(Path::new("/nonexistent"));
    let event = device.event().unwrap();
    assert!(event.is_done().unwrap(), "nothing was marked");
    let mut buffer = device.zeros::<u32>(6).unwrap();
    let mut host = device.host_buffer::<u32>(4).unwrap();
    assert_eq!(host.as_slice(), [0; 4]);
    host.as_mut_slice().copy_from_slice(&[1, 2, 3, 4]);
    let mut back = device.host_buffer::<u32>(6).unwrap();
    // SAFETY: both stay as they are until the event is done.
    unsafe { device.queue_upload(&mut buffer, 3, &host, 1..4) }.unwrap();
    // SAFETY: as above.
    unsafe { device.queue_download(&buffer, 1..6, &mut back) }.unwrap();
    event.record().unwrap();
    wait_for(&event);
    assert_eq!(back.as_slice(), [0, 0, 2, 3, 4, 0]);
    for (offset, range) in [(4, 1..4), (0, 2..5), (0, 5..6)] {
        // SAFETY: nothing is queued.
        let refused = unsafe { device.queue_upload(&mut buffer, offset, &host, range.clone()) };
        assert!(refused.is_err(), "{range:?} at {offset}");
    }
    // SAFETY: nothing is queued.
    assert!(unsafe { device.queue_download(&buffer, 0..5, &mut host) }.is_err());
    assert!(device.host_buffer::<u64>(usize::MAX / 4).is_err());
    assert!(device.host_buffer::<u64>(0).unwrap().as_slice().is_empty());
}

#[test]
fn a_graph_does_what_was_recorded_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let device = open(folder.path());
    let kernel = device.kernel(&program(), "axpy").unwrap();
    let (x, y) = (device.upload_new(&[1.0_f32; 8]).unwrap(), device.zeros::<f32>(8).unwrap());
    // SAFETY: these are the parameters of `axpy`, and both buffers have 8 values.
    let add = || unsafe { kernel.launch([1, 1, 1], 32, 0, &[Arg::F32(1.0), (&x).into(), (&y).into(), Arg::U32(8)]) };
    let mut graph = device.capture(|| add().and_then(|()| add())).unwrap();
    let mut values = [9.0; 8];
    let mut after = |launches: usize, expected: f32| {
        for _ in 0..launches {
            // SAFETY: the buffers are still there.
            unsafe { graph.launch() }.unwrap();
        }
        device.download(&y, 0..8, &mut values).unwrap();
        assert_eq!(values, [expected; 8]);
    };
    // Recording does nothing.
    after(0, 0.0);
    after(1, 6.0);
    after(2, 18.0);
}

#[test]
fn what_cannot_be_recorded_leaves_the_device_usable() {
    let device = open(Path::new("/nonexistent"));
    let missing = || Err(CudaError::Arguments { n_args: 99, limit: 32 });
    assert!(matches!(device.capture(missing), Err(CudaError::Arguments { .. })));
    let mut value = [0_u8];
    device.download(&device.upload_new(&[7_u8]).unwrap(), 0..1, &mut value).unwrap();
    assert_eq!(value, [7]);
}

#[test]
fn memory_is_given_back() {
    let device = open(Path::new("/nonexistent"));
    let len = device.memory_info().unwrap().total / 2 + 1;
    // Two at a time would not fit.
    for _ in 0..3 {
        drop(device.alloc::<u8>(len).unwrap());
    }
}

//! Faults of kernels and of host code show. Where they end the process, or need settings of their own, a test runs its
//! body in a child process: itself, once more.

use std::process::{Command, Output};
use std::ptr::null_mut;

use cudarc::driver::CudaContext;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUresult, cuLaunchKernelEx,
};
use cudarc::nvrtc::CompileError;

use crate::gpu::{Gpu, compile, shape};

const CHILD: &str = "LOCKSTEP_EMULATOR_TEST_CHILD";

/// Runs `body` in a child process, which is the test `name` of this file.
fn in_child(name: &str, settings: &[(&str, &str)], body: impl FnOnce()) -> Option<Output> {
    if std::env::var_os(CHILD).is_some() {
        body();
        return None;
    }
    lockstep_cuda_emulator::build().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("faults::{name}"), "--nocapture"]).env(CHILD, "1").envs(settings.iter().copied());
    Some(child.output().unwrap())
}

/// The child ended with `abort`, and said each of these.
fn assert_aborted(child: Option<Output>, said: &[&str]) {
    let Some(child) = child else { return };
    let messages = String::from_utf8_lossy(&child.stderr);
    assert!(!child.status.success(), "{messages}");
    for text in said {
        assert!(messages.contains(text), "{text:?} is not in\n{messages}");
    }
}

fn assert_passed(child: Option<Output>) {
    let Some(child) = child else { return };
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
}

/// The neighbouring warp's values, with or without the barrier that they need.
fn exchange(barrier: &str) -> Vec<f32> {
    let source = format!(
        r#"extern "C" __global__ void exchange(const float* in, float* out) {{
            __shared__ float tile[128];
            tile[threadIdx.x] = in[threadIdx.x];
            {barrier};
            out[threadIdx.x] = tile[(threadIdx.x + 32) % 128];
        }}"#
    );
    let input: Vec<f32> = (0..128).map(|i| i as f32).collect();
    Gpu::open().map(&source, "exchange", shape(1, 128), &input, 128)
}

#[test]
fn missing_barrier_reads_poison() {
    let expected: Vec<f32> = (0..128).map(|i| ((i + 32) % 128) as f32).collect();
    assert_eq!(exchange("__syncthreads()"), expected);
    let found = exchange("");
    assert!(found.iter().any(|x| x.is_nan()), "{found:?}");
}

/// Which of two warps writes last is a matter of the seed.
#[test]
fn seed_decides_the_order_of_warps() {
    let source = r#"
        extern "C" __global__ void race(const float* in, float* out) { out[0] = in[threadIdx.x]; }"#;
    let winner = || Gpu::open().map(source, "race", shape(1, 64), &(0..64).map(|i| i as f32).collect::<Vec<_>>(), 1)[0];
    let mut winners: Vec<u32> = (0..20).map(|_| winner() as u32 / 32).collect();
    winners.sort_unstable();
    winners.dedup();
    assert_eq!(winners, [0, 1]);
}

#[test]
fn diverging_barrier_aborts() {
    let child = in_child("diverging_barrier_aborts", &[], || {
        let source = r#"
            extern "C" __global__ void diverge(const float* in, float* out) {
                if (threadIdx.x < 40) return;
                __syncthreads();
            }"#;
        Gpu::open().map(source, "diverge", shape(1, 64), &[0.0], 1);
    });
    let said = [
        "kernel diverge, block (0, 0, 0)",
        "threads 0 to 39 have exited",
        "threads 40 to 63 wait at __syncthreads at test.cu:4",
    ];
    assert_aborted(child, &said);
}

/// Runs a kernel of 64 threads that may start before the one ahead of it has ended.
fn run_overlapping(source: &str, name: &str) {
    let gpu = Gpu::open();
    let kernel = gpu.kernel(source, name);
    let mut overlaps = CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = CUlaunchConfig {
        gridDimX: 1,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: 64,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: gpu.stream.cu_stream(),
        attrs: &raw mut overlaps,
        numAttrs: 1,
    };
    // SAFETY: the kernel is loaded and has no parameters.
    let launched = unsafe { cuLaunchKernelEx(&raw const config, kernel.cu_function(), null_mut(), null_mut()) };
    launched.result().unwrap();
    gpu.stream.synchronize().unwrap();
}

#[test]
fn kernel_that_overlaps_and_does_not_wait_aborts() {
    run_overlapping(r#"extern "C" __global__ void waits() { begin_kernel(); }"#, "waits");
    let child = in_child("kernel_that_overlaps_and_does_not_wait_aborts", &[], || {
        let source = r#"
            extern "C" __global__ void hasty() {
                if (threadIdx.x == 40) return;
                begin_kernel();
            }"#;
        run_overlapping(source, "hasty");
    });
    assert_aborted(child, &["kernel hasty, block (0, 0, 0), thread (40, 0, 0): ended without begin_kernel()"]);
}

#[test]
fn lane_that_misses_a_shuffle_aborts() {
    let child = in_child("lane_that_misses_a_shuffle_aborts", &[], || {
        let source = r#"
            extern "C" __global__ void miss(const float* in, float* out) {
                if (threadIdx.x != 7) out[0] = __shfl_sync(0xffffffff, in[0], 0);
            }"#;
        Gpu::open().map(source, "miss", shape(1, 32), &[0.0], 1);
    });
    assert_aborted(child, &["kernel miss", "threads 8 to 31 wait at __shfl_sync for the lanes ffffffff at test.cu:3"]);
}

#[test]
fn lanes_at_different_operations_abort() {
    let child = in_child("lanes_at_different_operations_abort", &[], || {
        let source = r#"
            extern "C" __global__ void differ(const float* in, float* out) {
                if (threadIdx.x < 16) __syncwarp();
                else out[0] = __shfl_sync(0xffffffff, in[0], 0);
            }"#;
        Gpu::open().map(source, "differ", shape(1, 32), &[0.0], 1);
    });
    assert_aborted(child, &["kernel differ", "meets", "at test.cu:"]);
}

#[test]
fn access_past_an_allocation_aborts() {
    let child = in_child("access_past_an_allocation_aborts", &[], || {
        let source = r#"
            extern "C" __global__ void stray(const float* in, float* out) {
                out[threadIdx.x] = in[64 * threadIdx.x];
            }"#;
        Gpu::open().map(source, "stray", shape(1, 32), &[0.0; 64], 32);
    });
    assert_aborted(child, &["kernel stray, block (0, 0, 0), thread (", "no such memory", "at test.cu:3"]);
}

/// A write so short of the allocation's end that only alignment keeps it from the page that cannot be touched.
#[test]
fn write_between_allocations_aborts() {
    let child = in_child("write_between_allocations_aborts", &[], || {
        let source = r#"extern "C" __global__ void off_by_one(const float* in, float* out) { out[1] = 1; }"#;
        Gpu::open().map(source, "off_by_one", shape(1, 1), &[0.0], 1);
    });
    assert_aborted(child, &["byte 4 of an allocation of 4 bytes was written"]);
}

#[test]
fn misaligned_access_aborts() {
    let child = in_child("misaligned_access_aborts", &[], || {
        let source = r#"
            extern "C" __global__ void skew(const float* in, float* out) { out[0] = load_once((const uint4*)(in + 1)).x; }"#;
        Gpu::open().map(source, "skew", shape(1, 1), &[0.0; 8], 1);
    });
    assert_aborted(child, &["kernel skew", "misaligned", "at test.cu:2"]);
}

#[test]
fn shared_array_has_bounds() {
    let child = in_child("shared_array_has_bounds", &[], || {
        let source = r#"
            extern "C" __global__ void wide(const float* in, float* out) {
                __shared__ float tile[32];
                tile[threadIdx.x] = in[0];
                out[0] = tile[0];
            }"#;
        Gpu::open().map(source, "wide", shape(1, 64), &[0.0], 1);
    });
    assert_aborted(child, &["kernel wide", "out of bounds at test.cu:4"]);
}

/// Not even where the first access is far beyond the stack's guard page.
#[test]
fn locals_larger_than_a_stack_abort() {
    let child = in_child("locals_larger_than_a_stack_abort", &[], || {
        let source = r#"
            extern "C" __global__ void large(const float* in, float* out) {
                float local[50000];
                local[int(in[0])] = 1;
                out[0] = local[int(in[1])];
            }"#;
        Gpu::open().map(source, "large", shape(1, 64), &[0.0; 2], 1);
    });
    assert_aborted(child, &["kernel large", "no such memory", "at test.cu:2"]);
}

#[test]
fn compiler_log_names_the_line() {
    let failure = compile("extern \"C\" __global__ void broken() {\n    int x = 1;\n    y = x;\n}\n").unwrap_err();
    let CompileError::CompileError { log, .. } = failure else { panic!("{failure:?}") };
    let log = log.to_string_lossy().into_owned();
    assert!(log.contains("test.cu:3") && log.contains("was not declared"), "{log}");
}

#[test]
fn launch_beyond_the_limits_is_refused() {
    let gpu = Gpu::open();
    let source = r#"extern "C" __global__ void __launch_bounds__(128) small() {}"#;
    let small = gpu.kernel(source, "small");
    let launch = |n_blocks, n_threads, shared_mem_bytes| {
        let mut shape = shape(n_blocks, n_threads);
        shape.shared_mem_bytes = shared_mem_bytes;
        // SAFETY: the kernel does nothing.
        unsafe { gpu.stream.launch_builder(&small).launch(shape) }.map(|_| ())
    };
    assert_eq!(launch(1, 128, 48 << 10), Ok(()));
    assert_eq!(launch(0, 128, 0), Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE)));
    assert_eq!(launch(1, 1025, 0), Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE)));
    assert_eq!(launch(1, 256, 0), Err(DriverError(CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES)));
    assert_eq!(launch(1, 128, (48 << 10) + 1), Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE)));

    use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
    assert!(small.set_attribute(SHARED, (227 << 10) + 1).is_err());
    small.set_attribute(SHARED, 227 << 10).unwrap();
    assert_eq!(launch(1, 128, 227 << 10), Ok(()));
    gpu.stream.synchronize().unwrap();
}

#[test]
fn copies_outside_allocations_are_refused() {
    let gpu = Gpu::open();
    let memory = gpu.stream.alloc_zeros::<u8>(100).unwrap();
    let (start, _guard) = cudarc::driver::DevicePtr::device_ptr(&memory, &gpu.stream);
    let mut bytes = [0_u8; 101];
    // SAFETY: the driver checks what it is given, which is what this test is about.
    unsafe {
        assert!(result::memcpy_dtoh_sync(&mut bytes[..100], start).is_ok());
        let refused = Err(DriverError(CUresult::CUDA_ERROR_INVALID_VALUE));
        assert_eq!(result::memcpy_dtoh_sync(&mut bytes, start), refused);
        assert_eq!(result::memcpy_htod_sync(start + 1, &bytes[..100]), refused);
        assert_eq!(result::memcpy_htod_sync(1 << 20, &bytes), refused);
        assert_eq!(result::free_sync(start + 1), refused);
    }
}

#[test]
fn memory_runs_out() {
    let child = in_child("memory_runs_out", &[("LOCKSTEP_EMULATOR_MEMORY", "1000000")], || {
        let gpu = Gpu::open();
        let first = gpu.stream.alloc_zeros::<u8>(600_000).unwrap();
        assert_eq!(gpu.stream.context().mem_get_info().unwrap(), (400_000, 1_000_000));
        let refused = gpu.stream.alloc_zeros::<u8>(400_001).unwrap_err();
        assert_eq!(refused, DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        drop(first);
        gpu.stream.synchronize().unwrap();
        assert!(gpu.stream.alloc_zeros::<u8>(1_000_000).is_ok());
    });
    assert_passed(child);
}

#[test]
fn launch_fails_on_demand_and_for_good() {
    let child = in_child("launch_fails_on_demand_and_for_good", &[("LOCKSTEP_EMULATOR_FAIL_LAUNCH", "2")], || {
        let gpu = Gpu::open();
        let nothing = gpu.kernel(r#"extern "C" __global__ void nothing() {}"#, "nothing");
        // SAFETY: the kernel does nothing.
        let launch = || unsafe { gpu.stream.launch_builder(&nothing).launch(shape(1, 1)) }.map(|_| ());
        launch().unwrap();
        gpu.stream.synchronize().unwrap();
        launch().unwrap();
        let failed = Err(DriverError(CUresult::CUDA_ERROR_LAUNCH_FAILED));
        assert_eq!(gpu.stream.synchronize(), failed);
        assert_eq!(launch(), failed);
        assert_eq!(gpu.stream.alloc_zeros::<u8>(1).map(|_| ()), failed);
    });
    assert_passed(child);
}

#[test]
fn machine_without_devices() {
    let child = in_child("machine_without_devices", &[("LOCKSTEP_EMULATOR_DEVICES", "0")], || {
        lockstep_cuda_emulator::load_into_this_process().unwrap();
        assert_eq!(CudaContext::new(0).unwrap_err(), DriverError(CUresult::CUDA_ERROR_NO_DEVICE));
    });
    assert_passed(child);
}

/// Code for one architecture does not run on another, and an `a` says: on this one only.
#[test]
fn code_for_another_architecture_is_refused() {
    let child = in_child("code_for_another_architecture_is_refused", &[("LOCKSTEP_EMULATOR_ARCH", "80")], || {
        let gpu = Gpu::open();
        assert_eq!(gpu.stream.context().compute_capability().unwrap(), (8, 0));
        let refused = gpu.stream.context().load_module(compile("").unwrap()).unwrap_err();
        assert_eq!(refused, DriverError(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU));
    });
    assert_passed(child);
}

#[test]
fn unknown_option_is_refused() {
    lockstep_cuda_emulator::load_into_this_process().unwrap();
    let options = cudarc::nvrtc::CompileOptions { options: vec!["--fast-maths".to_owned()], ..Default::default() };
    assert!(cudarc::nvrtc::compile_ptx_with_opts("", options).is_err());
}

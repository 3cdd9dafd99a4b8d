//! Streams, events, pinned memory and graphs.

use std::ffi::c_void;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender};

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaContext, CudaStream, DevicePtrMut, DriverError, PushKernelArg, result};

use crate::gpu::{Gpu, shape};

const INCREMENT: &str = r#"extern "C" __global__ void increment(float* x) { x[threadIdx.x] += 1; }"#;

#[test]
fn devices_describe_themselves() {
    let gpu = Gpu::open();
    let context = gpu.stream.context();
    assert_eq!(CudaContext::device_count().unwrap(), 8);
    assert_eq!(context.name().unwrap(), "CPU emulator of CUDA");
    assert_eq!(context.compute_capability().unwrap(), (9, 0));
    assert_eq!(CudaContext::new(8).unwrap_err(), DriverError(CUresult::CUDA_ERROR_INVALID_DEVICE));
}

/// Whoever opens the libraries by one of their names, in this process or in a child with the folder in its search path, has
/// the emulator's, whatever else is installed.
#[test]
fn names_reach_the_emulator() {
    let folder = lockstep_cuda_emulator::build().unwrap();
    if std::env::var_os("LD_LIBRARY_PATH").is_none_or(|path| *path != *folder) {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "driver::names_reach_the_emulator"]).env("LD_LIBRARY_PATH", &folder);
        assert!(child.status().unwrap().success());
        lockstep_cuda_emulator::load_into_this_process().unwrap();
    }
    let open = |name: &str| {
        // SAFETY: these libraries do nothing when they are opened.
        let library = unsafe { libloading::Library::new(name) }.unwrap();
        let symbol = match name.split('.').next() {
            Some("libcuda") => "cuDeviceGetName",
            Some("libcublasLt") => "cublasLtGetVersion",
            _ => "nvrtcVersion",
        };
        // SAFETY: the symbol is not called.
        unsafe { *library.get::<*const c_void>(symbol).unwrap() }
    };
    assert_eq!(open("libcuda.so"), open("libcuda.so.1"));
    assert_eq!(open("libnvrtc.so"), open("libnvrtc.so.13"));
    assert_eq!(open("libcublasLt.so"), open("libcublasLt.so.13"));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for library in ["libcuda.so.1", "libnvrtc.so.13", "libcublasLt.so.13"] {
        let mut mapped = maps.lines().filter(|line| line.ends_with(library));
        assert!(mapped.all(|line| line.contains(folder.to_str().unwrap())), "{maps}");
    }
}

/// Holds the stream until the sender is used.
pub(crate) fn hold(stream: &CudaStream) -> Sender<()> {
    unsafe extern "C" fn wait(receiver: *mut c_void) {
        // SAFETY: it is the box that `hold` gave away.
        let receiver = unsafe { Box::from_raw(receiver.cast::<Receiver<()>>()) };
        receiver.recv().expect("the test sends");
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    let receiver = Box::into_raw(Box::new(receiver));
    // SAFETY: the function is called once, with the box.
    unsafe { result::stream::launch_host_function(stream.cu_stream(), wait, receiver.cast()) }.unwrap();
    sender
}

/// Nothing that comes after what holds the stream runs, events are not ready, and the host goes on.
#[test]
fn streams_run_in_order_and_behind_the_host() {
    let gpu = Gpu::open();
    let increment = gpu.kernel(INCREMENT, "increment");
    let mut x = gpu.stream.alloc_zeros::<f32>(32).unwrap();
    let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
    let (before, after) = (gpu.stream.record_event(flags).unwrap(), gpu.stream.context().new_event(flags).unwrap());
    let release = hold(&gpu.stream);
    // SAFETY: the kernel takes one pointer, to as many floats as there are threads.
    unsafe { gpu.stream.launch_builder(&increment).arg(&mut x).launch(shape(1, 32)) }.unwrap();
    after.record(&gpu.stream).unwrap();
    assert!(!after.is_complete());

    let other = gpu.stream.context().new_stream().unwrap();
    other.wait(&after).unwrap();
    release.send(()).unwrap();
    other.synchronize().unwrap();
    assert!(after.is_complete());
    assert!(before.elapsed_ms(&after).unwrap() >= 0.0);
    assert_eq!(gpu.stream.clone_dtoh(&x).unwrap(), [1.0; 32]);
}

/// Pinned memory is read when the copy runs, pageable memory when it is ordered.
#[test]
fn copies_from_pinned_memory_run_behind_the_host() {
    let gpu = Gpu::open();
    let mut to = gpu.stream.alloc_zeros::<u32>(2).unwrap();
    let (start, _guard) = to.device_ptr_mut(&gpu.stream);
    let stream = gpu.stream.cu_stream();
    let mut pageable = 7_u32;
    // SAFETY: the pinned word lives until the copies are done, and is written by nobody while one may read it.
    let copied = unsafe {
        let pinned = result::malloc_host(4, 0).unwrap().cast::<u32>();
        *pinned = 7;
        let release = hold(&gpu.stream);
        result::memcpy_htod_async(start, std::slice::from_ref(&*pinned), stream).unwrap();
        result::memcpy_htod_async(start + 4, std::slice::from_ref(&pageable), stream).unwrap();
        *pinned = 8;
        pageable += 1;
        release.send(()).unwrap();
        let mut copied = [0_u32, pageable];
        result::memcpy_dtoh_async(&mut copied, start, stream).unwrap();
        result::stream::synchronize(stream).unwrap();
        result::free_host(pinned.cast()).unwrap();
        copied
    };
    assert_eq!(copied, [8, 7]);
}

#[test]
fn graphs_replay_what_was_captured() {
    let gpu = Gpu::open();
    let increment = gpu.kernel(INCREMENT, "increment");
    // SAFETY: all work is on one stream. (cudarc's events between streams cannot be captured.)
    unsafe { gpu.stream.context().disable_event_tracking() };
    let mut x = gpu.stream.alloc_zeros::<f32>(32).unwrap();
    gpu.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    for _ in 0..3 {
        // SAFETY: the kernel takes one pointer, to as many floats as there are threads.
        unsafe { gpu.stream.launch_builder(&increment).arg(&mut x).launch(shape(1, 32)) }.unwrap();
    }
    assert_eq!(gpu.stream.synchronize(), Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)));
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = gpu.stream.end_capture(flags).unwrap().unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&x).unwrap(), [0.0; 32]);
    graph.launch().unwrap();
    graph.launch().unwrap();
    assert_eq!(gpu.stream.clone_dtoh(&x).unwrap(), [6.0; 32]);
}

//! Kernels that use each builtin, compiled and run through cudarc, against what they should give.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};

fn stream() -> Arc<CudaStream> {
    lockstep_cuda_emulator::load_into_this_process().unwrap();
    CudaContext::new(0).unwrap().new_stream().unwrap()
}

fn compile(source: &str) -> Ptx {
    let options = CompileOptions { options: vec!["--gpu-architecture=sm_90a".to_owned()], ..Default::default() };
    compile_ptx_with_opts(source, options).unwrap()
}

fn kernel(stream: &CudaStream, source: &str, name: &str) -> CudaFunction {
    stream.context().load_module(compile(source)).unwrap().load_function(name).unwrap()
}

fn shape(grid: u32, block: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (block, 1, 1), shared_mem_bytes: 0 }
}

#[test]
fn vectors_add() {
    let stream = stream();
    let add = kernel(
        &stream,
        r#"
        #include "device.cuh"
        extern "C" __global__ void __launch_bounds__(256) add(float* sum, const float* a, const float* b, unsigned n) {
            unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) sum[i] = a[i] + b[i];
        }"#,
        "add",
    );
    let n = 1000_u32;
    let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let b: Vec<f32> = (0..n).map(|i| 0.5 * i as f32).collect();
    let (a_device, b_device) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
    let mut sum = stream.alloc_zeros::<f32>(n as usize).unwrap();
    let mut launch = stream.launch_builder(&add);
    launch.arg(&mut sum).arg(&a_device).arg(&b_device).arg(&n);
    // SAFETY: the kernel takes these four, and stays below `n`.
    unsafe { launch.launch(shape(4, 256)) }.unwrap();
    let sum = stream.clone_dtoh(&sum).unwrap();
    assert!((0..n as usize).all(|i| sum[i] == a[i] + b[i]));
}

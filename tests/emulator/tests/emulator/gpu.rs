//! A device of the emulator with a stream, for tests.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts};

pub(crate) struct Gpu {
    pub(crate) stream: Arc<CudaStream>,
}

impl Gpu {
    pub(crate) fn open() -> Self {
        lockstep_cuda_emulator::load_into_this_process().unwrap();
        Self { stream: CudaContext::new(0).unwrap().new_stream().unwrap() }
    }

    pub(crate) fn kernel(&self, source: &str, name: &str) -> CudaFunction {
        self.stream.context().load_module(compile(source).unwrap()).unwrap().load_function(name).unwrap()
    }

    /// Runs a kernel of the parameters (const float* in, float* out), and returns what it wrote.
    pub(crate) fn map(&self, source: &str, name: &str, shape: LaunchConfig, input: &[f32], n_out: usize) -> Vec<f32> {
        let kernel = self.kernel(source, name);
        let input = self.stream.clone_htod(input).unwrap();
        // SAFETY: what the kernel does not write is the emulator's poison, which tests look for.
        let mut out = unsafe { self.stream.alloc::<f32>(n_out) }.unwrap();
        let mut launch = self.stream.launch_builder(&kernel);
        launch.arg(&input).arg(&mut out);
        // SAFETY: the parameters are as the function says. Kernels that go astray run in child processes.
        unsafe { launch.launch(shape) }.unwrap();
        self.stream.clone_dtoh(&out).unwrap()
    }
}

pub(crate) fn compile(source: &str) -> Result<Ptx, CompileError> {
    lockstep_cuda_emulator::load_into_this_process().unwrap();
    let options = vec!["--gpu-architecture=sm_90a".to_owned(), "--fmad=false".to_owned()];
    compile_ptx_with_opts(source, CompileOptions { options, name: Some("test.cu".to_owned()), ..Default::default() })
}

pub(crate) fn shape(n_blocks: u32, n_threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (n_blocks, 1, 1), block_dim: (n_threads, 1, 1), shared_mem_bytes: 0 }
}

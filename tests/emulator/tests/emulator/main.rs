//! The emulator through cudarc, as the GPU worker uses CUDA.
#![allow(clippy::unwrap_used, reason = "a test's helpers panic as tests do")]
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod cublaslt;
mod device_code;
mod driver;
mod faults;
mod gpu;

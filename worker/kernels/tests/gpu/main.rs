//! The kernels for GPUs, against f64 arithmetic and against themselves: rows alone and among others, prompts in chunks,
//! layers over ranks. They run on a GPU where `LOCKSTEP_TEST_GPU` names one (0 is the first), else on an emulator.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges with one range")]

mod attention;
mod choice;
mod dense;
mod elementwise;
mod embeddings;
mod products;
#[path = "../conformance/random.rs"]
mod random;
mod ranks;

use std::env;

use lockstep_kernels::{
    RopeStyle, RopeTable,
    cuda::{Device, Gpu, GpuHeads, KernelCache},
};

/// The device that all tests of this process share.
fn device() -> Device {
    let (ordinal, cache) = match env::var("LOCKSTEP_TEST_GPU") {
        Ok(ordinal) => (
            ordinal.parse().expect("LOCKSTEP_TEST_GPU is a device's number"),
            env::temp_dir().join("lockstep-test-kernels"),
        ),
        Err(_) => {
            lockstep_cuda_emulator::load_into_this_process().expect("the emulator builds");
            // An emulator loads what its own compiler has made.
            (0, lockstep_cuda_emulator::build().expect("it is built").join("kernels"))
        }
    };
    Device::open(ordinal, KernelCache::new(Some(cache))).expect("a device")
}

/// A GPU for attention of one small shape.
fn gpu() -> Gpu {
    let rope = RopeTable::new(64, 64, 10_000.0, None, 100, RopeStyle::Adjacent).expect("a small table");
    Gpu::new(device(), GpuHeads { n_heads: 2, n_kv_heads: 1, head_dim: 64 }, &rope).expect("a GPU")
}

/// Asserts that two results have the same bits, and says where they first differ.
#[track_caller]
fn assert_same_bits(actual: &[f32], expected: &[f32], what: &dyn std::fmt::Display) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let difference = actual.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = difference {
        panic!("{what}: element {i} of {} is {:e}, should be {:e}", actual.len(), actual[i], expected[i]);
    }
}

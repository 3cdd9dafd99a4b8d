//! A tensor-parallel shard of a model, advancing in lockstep with its group.
//!
//! # Layout
//!
//! In the order in which a request meets them:
//!
//! * [`config`]: what an operator can choose; [`serve`]: how a rank is put together; [`service`], [`request`], [`status`]: what the gateway calls.
//! * [`vllm`]: the same for routers that speak to vLLM.
//! * [`constraint`]: what the text of an answer must be, where a request says so.
//! * [`engine`]: the step loop; [`scheduler`] decides what a step computes, over the blocks of [`kv`], of which [`kv_room`] says how many fit.
//! * [`device`]: what computes. [`model_runner`]: a step plan to logits, through the layers of [`model`]; [`sampler`]: logits to token ids.
//! * [`group`]: how ranks find each other, attest, and notice death.
//! * [`stub`]: a stand-in for all of that, to measure the rest of a cluster with.
//! * [`bench`], [`inspect`], [`make_model`], [`kernels`], [`doctor`]: the other things that the program does; [`local_group`]: ranks as threads.

#![forbid(unsafe_code)]

pub mod bench;
pub mod config;
pub mod constraint;
pub mod device;
pub mod doctor;
pub mod engine;
pub mod group;
pub mod inspect;
pub mod kernels;
pub mod kv;
pub mod kv_room;
pub mod local_group;
pub mod make_model;
pub mod model;
pub mod model_runner;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod serve;
pub mod service;
pub mod status;
pub mod stub;
#[cfg(test)]
mod test_seed;
pub mod vllm;

/// This program's version, which every rank of a group must share.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

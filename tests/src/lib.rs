//! What the tests of the cluster share.
//!
//! # Layout
//!
//! * [`cluster`]: starts the real programs as child processes on free ports.
//! * [`ranks`]: ranks of one model as threads of the test, for what needs no servers.
//! * [`lockstep`]: the lockstep rule as a check, whatever the device.
//! * [`tiny_model`]: writes small random models in every shape and encoding.
//! * [`smg`]: starts the Shepherd Model Gateway.
//! * [`timed_stub`]: a worker without a model that knows when it has sent what.
//! * [`oracle`]: a Llama in `f64`, the standard for logits.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod lockstep;
pub mod oracle;
pub mod ranks;
pub mod smg;
pub mod timed_stub;
pub mod tiny_model;

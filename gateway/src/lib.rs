//! The front of a Lockstep cluster: chat templates, sampling policy, routing.
//!
//! # Layout
//!
//! * [`admission`]: who may call, and how much may be under way.
#![forbid(unsafe_code)]

pub mod admission;

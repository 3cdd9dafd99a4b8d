//! The front of a Lockstep cluster: chat templates, sampling policy, routing.
//!
//! # Layout
//!
//! * [`admission`]: who may call, and how much may be under way;
//! * [`stop`]: generated text is searched for stop strings, across token boundaries;
//! * [`router`]: which group takes a request; [`groups`] is the router with clients.
#![forbid(unsafe_code)]

pub mod admission;
mod backoff;
pub mod groups;
pub mod router;
pub mod stop;

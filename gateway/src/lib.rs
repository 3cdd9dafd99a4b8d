//! The front of a Lockstep cluster: chat templates, sampling policy, routing.
//!
//! # Layout
//!
//! * [`admission`]: who may call, and how much may be under way;
//! * [`request`]: wire messages become `Valid*` types, or an error that names every field at fault;
//! * [`sampling`]: the request's parameters over the model's defaults, under the operator's policy;
//! * [`template`]: a conversation becomes the text that the model was trained on;
//! * [`stop`]: generated text is searched for stop strings, across token boundaries;
//! * [`router`]: which group takes a request; [`groups`] is the router with clients.
#![forbid(unsafe_code)]

pub mod admission;
mod backoff;
pub mod groups;
pub mod request;
pub mod router;
pub mod sampling;
pub mod stop;
pub mod template;

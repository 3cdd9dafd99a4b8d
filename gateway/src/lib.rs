//! The gateway: what stands between the clients of a cluster and its tokenizer service and workers.
//!
//! # Layout
//!
//! In the order in which a request meets them:
//!
//! * [`admission`]: who may call, and how much may be under way.
//! * [`request`]: wire messages become `Valid*` types, or an error that names every field at fault.
//! * [`sampling`]: the request's parameters over the model's defaults, under the operator's policy.
//! * [`template`]: a conversation becomes the text that the model was trained on.
//! * [`router`]: which group takes the request; [`groups`] is the router with clients.
//! * [`stop`]: generated text is searched for stop strings, across token boundaries.
//!
//! Around them: [`config`].
#![forbid(unsafe_code)]

pub mod admission;
mod backoff;
pub mod config;
pub mod groups;
pub mod request;
pub mod router;
pub mod sampling;
pub mod stop;
pub mod template;

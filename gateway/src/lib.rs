//! The gateway: what stands between the clients of a cluster and its tokenizer service and workers.
//!
//! # Layout
//!
//! In the order in which a request meets them:
//!
//! * [`service`] and [`kserve`] (gRPC), [`openai`] and [`tgi`] (HTTP): the fronts, which translate; [`http`] is what those for HTTP
//!   share, [`json`] reads what clients write, `lockstep_proto::fields` names what is wrong with it, [`openapi`] describes it
//!   all.
//! * [`page`]: the page at `/`, a client of OpenAI's API in the browser, and the state of the cluster that it shows.
//! * [`pipeline`]: what happens to a request, whatever front it came by.
//! * [`admission`]: who may call, and how much may be under way.
//! * [`request`]: wire messages become `Valid*` types, or an error that names every field at fault.
//! * [`sampling`]: the request's parameters over the model's defaults, under the operator's policy.
//! * [`generation`]: one request's life from there to its last event; the rest of this list serves it.
//! * [`embedding`]: the same for requests whose answer is vectors.
//! * [`template`]: a conversation becomes the text that the model was trained on.
//! * [`tools`]: how models spell calls of tools, in prompts and in answers.
//! * [`tokenizer`]: text becomes ids by the tokenizer service, and ids text by its vocabulary.
//! * [`router`]: which group takes the request; [`groups`] is the router with clients.
//! * [`stop`]: generated text is searched for stop strings, across token boundaries.
//! * [`status`]: how a failure crosses the wire.
//!
//! Around them: [`app`] puts a gateway together from its [`config`]; [`models`] are what it serves; [`backends`] keeps
//! what is known of the other services fresh; [`metrics`] count.
#![forbid(unsafe_code)]

pub mod admission;
pub mod app;
pub mod backends;
mod backoff;
pub mod config;
pub mod embedding;
pub mod generation;
pub mod groups;
pub mod http;
pub mod json;
pub mod kserve;
pub mod metrics;
pub mod models;
pub mod openai;
pub mod openapi;
pub mod page;
pub mod pipeline;
pub mod request;
pub mod router;
pub mod sampling;
pub mod service;
pub mod status;
pub mod stop;
pub mod template;
pub mod tgi;
pub mod tokenizer;
pub mod tools;

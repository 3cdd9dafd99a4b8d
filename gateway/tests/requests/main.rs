//! A real gateway between real clients and a tokenizer and workers that the tests act out.
#![allow(clippy::unwrap_used, reason = "a test that meets the unexpected ends there")]

mod backpressure;
mod cluster;
mod deadlines;
mod embeddings;
mod failures;
mod fake_tokenizer;
mod fake_worker;
mod gate;
mod http;
mod kserve;
mod life;
mod models;
mod openai;
mod page;
mod tools;

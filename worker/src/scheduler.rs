//! The scheduler: decides what each step computes.

pub mod plan;

//! Measures the time of an all-gather for each transport: `cargo bench -p lockstep-collectives`.
//!
//! Ranks are threads, which for the kernel's scheduler are the same as processes. The sizes are those of one decode
//! step of a small and of a large model (a row of 576 or 4,096 floats), and of a prefill chunk (64 rows of 4,096).

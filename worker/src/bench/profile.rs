//! The table of `bench engine --profile`: where the time of a phase's steps goes.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::model::ops::profiled::{OpTime, Profile};

/// One phase of a run: prefill, or decode.
#[derive(Debug, Default)]
pub(super) struct Phase {
    pub(super) n_steps: usize,
    pub(super) n_tokens: usize,
    pub(super) time: Duration,
    /// That of it in which the device computed, if it works by itself.
    device_time: Option<Duration>,
    /// Empty without `--profile`.
    pub(super) ops: Vec<OpTime>,
}

/// One line of the table: all calls of an op in an average step.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    op: String,
    calls: f64,
    us: f64,
    /// Of the step's time.
    percent: f64,
    /// Weights read.
    gb_per_s: Option<f64>,
    /// A multiplication and an addition for each weight and row.
    gop_per_s: Option<f64>,
}

// === impl Phase ===

impl Phase {
    /// A step of the phase is done.
    pub(super) fn count_step(&mut self, n_tokens: usize, device_time: Option<Duration>) {
        self.n_steps += 1;
        self.n_tokens += n_tokens;
        if let Some(device_time) = device_time {
            *self.device_time.get_or_insert_default() += device_time;
        }
    }

    /// The part of the time in which the device had nothing to do.
    pub(super) fn idle_percent(&self) -> Option<f64> {
        Some(100.0 * (1.0 - self.device_time?.as_secs_f64() / self.time.as_secs_f64()))
    }

    /// The phase ends now, having begun at `start`; the next begins.
    pub(super) fn end(&mut self, start: &mut Instant, profile: &Profile) {
        let now = Instant::now();
        self.time = now - std::mem::replace(start, now);
        self.ops = profile.take();
    }

    pub(super) fn tokens_per_s(&self) -> f64 {
        self.n_tokens as f64 / self.time.as_secs_f64()
    }

    /// The lines of the table; then what no op took (planning, laying out and embedding rows), and the whole.
    pub(super) fn lines(&self) -> Vec<Line> {
        let in_ops: Duration = self.ops.iter().map(|op| op.time).sum();
        let ops = self.ops.iter().map(|op| {
            let name = op.shape.map_or(op.name.to_owned(), |[n_out, n_in]| format!("{} {n_out} x {n_in}", op.name));
            let rate = |amount: usize| (amount > 0).then(|| amount as f64 / op.time.as_secs_f64() / 1e9);
            Line {
                gb_per_s: rate(op.bytes),
                gop_per_s: rate(2 * op.n_products),
                ..self.line(name, op.n_calls, op.time)
            }
        });
        let whole = self.line("all".into(), self.n_steps, self.time);
        ops.chain([self.line("everything else".into(), self.n_steps, self.time.saturating_sub(in_ops)), whole])
            .collect()
    }

    fn line(&self, op: String, n_calls: usize, time: Duration) -> Line {
        let n_steps = self.n_steps as f64;
        Line {
            op,
            calls: n_calls as f64 / n_steps,
            us: time.as_secs_f64() * 1e6 / n_steps,
            percent: 100.0 * time.as_secs_f64() / self.time.as_secs_f64(),
            gb_per_s: None,
            gop_per_s: None,
        }
    }
}

/// Prints the table of a phase, if there is one.
#[allow(clippy::print_stdout, reason = "the report is the program's output")]
pub(super) fn print(phase: &str, lines: &[Line]) {
    if lines.is_empty() {
        return;
    }
    println!("\n{:<28} {:>6} {:>10} {:>6} {:>7} {:>7}", format!("a {phase} step"), "calls", "us", "%", "GB/s", "Gop/s");
    for line in lines {
        let rate = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!("{rate:.1}"));
        let (gb, gop) = (rate(line.gb_per_s), rate(line.gop_per_s));
        println!("{:<28} {:>6.1} {:>10.1} {:>6.1} {gb:>7} {gop:>7}", line.op, line.calls, line.us, line.percent);
    }
}

//! A [`Report`] is the figures of a load: how long a client waits for the first token (TTFT) and between tokens (ITL),
//! and how many tokens the cluster moves a second.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use super::load::{Outcome, Outcomes, Plan};

/// The figures of a load.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    model: String,
    concurrency: u32,
    rate: Option<f64>,
    max_new_tokens: u32,
    requests: usize,
    pub(super) succeeded: usize,
    /// Failed requests by reason.
    errors: BTreeMap<&'static str, usize>,
    wall_s: f64,
    requests_per_s: f64,
    /// Of successful requests.
    prompt_tokens: u64,
    prompt_tokens_per_s: f64,
    output_tokens: u64,
    output_tokens_per_s: f64,
    /// Of one stream after its first tokens: the inverse of the mean ITL.
    stream_tokens_per_s: Option<f64>,
    ttft_ms: Percentiles,
    itl_ms: Percentiles,
    request_ms: Percentiles,
}

/// Percentiles by nearest rank; absent if there is nothing to rank.
#[derive(Debug, Default, Serialize)]
struct Percentiles {
    p50: Option<f64>,
    p90: Option<f64>,
    p99: Option<f64>,
}

// === impl Report ===

impl Report {
    /// Latencies and prompt tokens are those of requests that succeeded; output tokens are all that came.
    pub(super) fn new(plan: &Plan, outcomes: &Outcomes) -> Self {
        let good: Vec<&Outcome> = outcomes.each.iter().filter(|outcome| outcome.error.is_none()).collect();
        let mut errors = BTreeMap::new();
        for error in outcomes.each.iter().filter_map(|outcome| outcome.error.as_ref()) {
            *errors.entry(error.reason().name()).or_default() += 1;
        }
        let output_tokens: u64 = outcomes.each.iter().map(|outcome| u64::from(outcome.tokens)).sum();
        let prompt_tokens: u64 = good.iter().map(|outcome| u64::from(outcome.prompt_tokens)).sum();
        let gaps = || good.iter().flat_map(|outcome| outcome.gaps.iter().copied());
        let time_between_tokens: f64 = gaps().sum();
        let per_second = |count: f64| if outcomes.wall > 0.0 { count / outcomes.wall } else { 0.0 };
        Self {
            model: plan.model.clone(),
            concurrency: plan.concurrency,
            rate: plan.rate,
            max_new_tokens: plan.max_new_tokens,
            requests: outcomes.each.len(),
            succeeded: good.len(),
            errors,
            wall_s: outcomes.wall,
            requests_per_s: per_second(good.len() as f64),
            prompt_tokens,
            prompt_tokens_per_s: per_second(prompt_tokens as f64),
            output_tokens,
            output_tokens_per_s: per_second(output_tokens as f64),
            stream_tokens_per_s: (time_between_tokens > 0.0).then(|| gaps().count() as f64 / time_between_tokens),
            ttft_ms: Percentiles::of_seconds(good.iter().filter_map(|outcome| outcome.first_token)),
            itl_ms: Percentiles::of_seconds(gaps()),
            request_ms: Percentiles::of_seconds(good.iter().map(|outcome| outcome.total)),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} requests, {} at a time, at most {} new tokens each",
            self.model, self.requests, self.concurrency, self.max_new_tokens
        )?;
        writeln!(f, "succeeded    {:>10}   in {:.2} s", self.succeeded, self.wall_s)?;
        for (reason, count) in &self.errors {
            writeln!(f, "failed       {count:>10}   {reason}")?;
        }
        writeln!(f, "requests/s   {:>10.2}", self.requests_per_s)?;
        writeln!(f, "prompt tok/s {:>10.1}   {} tokens", self.prompt_tokens_per_s, self.prompt_tokens)?;
        writeln!(f, "output tok/s {:>10.1}   {} tokens", self.output_tokens_per_s, self.output_tokens)?;
        if let Some(rate) = self.stream_tokens_per_s {
            writeln!(f, "stream tok/s {rate:>10.1}   each, after its first tokens")?;
        }
        writeln!(f, "                    p50        p90        p99")?;
        writeln!(f, "TTFT ms      {}", self.ttft_ms)?;
        writeln!(f, "ITL ms       {}", self.itl_ms)?;
        writeln!(f, "request ms   {}", self.request_ms)
    }
}

// === impl Percentiles ===

impl Percentiles {
    fn of_seconds(seconds: impl Iterator<Item = f64>) -> Self {
        let mut ms: Vec<f64> = seconds.map(|seconds| seconds * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let rank = |percent: usize| ms.get((ms.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Self { p50: rank(50), p90: rank(90), p99: rank(99) }
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = [self.p50, self.p90, self.p99];
        for (index, value) in columns.iter().enumerate() {
            let separator = if index == 0 { "" } else { " " };
            match value {
                Some(value) => write!(f, "{separator}{value:>10.1}")?,
                None => write!(f, "{separator}{:>10}", "-")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lockstep_proto::error::{Error, Reason};

    use super::*;
    use crate::bench::prompts::Prompts;

    fn plan() -> Plan {
        Plan {
            model: "m".into(),
            requests: 3,
            concurrency: 2,
            prompts: Prompts::Random { tokens: 100, vocab_size: 10, seed: 0 },
            max_new_tokens: 3,
            rate: None,
            seed: 0,
        }
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let of = |count: u32| Percentiles::of_seconds((1..=count).rev().map(|ms| f64::from(ms) / 1e3));
        let rounded = |p: Percentiles| [p.p50, p.p90, p.p99].map(|value| value.map(f64::round));
        assert_eq!(rounded(of(0)), [None; 3]);
        assert_eq!(rounded(of(1)), [Some(1.0); 3]);
        assert_eq!(rounded(of(200)), [Some(100.0), Some(180.0), Some(198.0)]);
    }

    #[test]
    fn failed_requests_count_by_reason_and_not_in_latencies() {
        let good = Outcome {
            first_token: Some(0.1),
            gaps: vec![0.01, 0.03],
            total: 0.2,
            prompt_tokens: 100,
            tokens: 3,
            error: None,
        };
        let draining = Some(Error::new(Reason::Draining, "later"));
        let bad = Outcome { first_token: Some(9.0), total: 9.0, tokens: 1, error: draining, ..good.clone() };
        let report = Report::new(&plan(), &Outcomes { each: vec![good, bad.clone(), bad], wall: 2.0 });
        assert_eq!((report.requests, report.succeeded, report.errors["DRAINING"]), (3, 1, 2));
        assert_eq!((report.output_tokens, report.output_tokens_per_s), (5, 2.5));
        assert_eq!((report.ttft_ms.p99, report.itl_ms.p50), (Some(100.0), Some(10.0)));
        assert_eq!((report.prompt_tokens_per_s, report.stream_tokens_per_s), (50.0, Some(50.0)));
        let text = report.to_string();
        assert!(text.contains("DRAINING") && text.lines().all(|line| line.len() < 100), "{text}");
    }
}

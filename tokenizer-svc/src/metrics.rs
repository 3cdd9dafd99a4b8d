//! Metrics: what the service counts and times, for Prometheus.

use std::time::Instant;

use lockstep_proto::{error::Error, telemetry::SECONDS};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Everything that is counted. Clones share it.
#[derive(Debug, Clone)]
pub struct Metrics {
    requests: Family<Outcome, Counter>,
    seconds: Family<Method, Histogram>,
    encoded_bytes: Counter,
    encoded_tokens: Counter,
    decoded_tokens: Counter,
    jobs: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    method: &'static str,
    outcome: &'static str,
}

// === impl Metrics ===

impl Metrics {
    /// Metrics that the registry shows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
            encoded_bytes: Counter::default(),
            encoded_tokens: Counter::default(),
            decoded_tokens: Counter::default(),
            jobs: Gauge::default(),
        };
        let registry = registry.sub_registry_with_prefix("tokenizer");
        registry.register("requests", "Calls that have ended, by outcome", metrics.requests.clone());
        registry.register("request_seconds", "Time from a call's arrival to its answer", metrics.seconds.clone());
        registry.register("encoded_bytes", "Bytes of text that were encoded", metrics.encoded_bytes.clone());
        registry.register("encoded_tokens", "Tokens that encoding gave", metrics.encoded_tokens.clone());
        registry.register("decoded_tokens", "Tokens that were decoded", metrics.decoded_tokens.clone());
        registry.register("jobs", "Calls that run or wait for a thread", metrics.jobs.clone());
        metrics
    }

    /// Counts a call that has ended and how long it took; `OK`, or the name of the reason why not.
    pub(crate) fn ended<T>(&self, method: &'static str, arrived: Instant, answer: &Result<T, Error>) {
        let outcome = answer.as_ref().map_or_else(|e| e.reason().name(), |_| "OK");
        self.requests.get_or_create(&Outcome { method, outcome }).inc();
        self.seconds.get_or_create(&Method { method }).observe(arrived.elapsed().as_secs_f64());
    }

    /// The gauge of calls that run or wait.
    pub(crate) fn jobs(&self) -> Gauge {
        self.jobs.clone()
    }

    /// Counts a text and what it became.
    pub(crate) fn encoded(&self, n_bytes: usize, n_tokens: usize) {
        self.encoded_bytes.inc_by(n_bytes as u64);
        self.encoded_tokens.inc_by(n_tokens as u64);
    }

    /// Counts ids that became text.
    pub(crate) fn decoded(&self, n_tokens: usize) {
        self.decoded_tokens.inc_by(n_tokens as u64);
    }
}

/// The metrics of a service that shows them to nobody.
impl Default for Metrics {
    fn default() -> Self {
        Self::register(&mut Registry::default())
    }
}

/// A gauge that is one higher while this lives.
#[derive(Debug)]
pub(crate) struct Present(Gauge);

// === impl Present ===

impl Present {
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.dec();
    }
}

//! Metrics: what the gateway counts and times, for Prometheus.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::{error::Reason, telemetry::SECONDS};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use crate::{groups::Groups, status::Failure};

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    requests: Family<Outcome, Counter>,
    in_flight: Gauge,
    cancels: Counter,
    prompt_tokens: Counter,
    completion_tokens: Counter,
    ttft: Histogram,
    itl: Histogram,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    method: &'static str,
    outcome: &'static str,
}

/// One request, counted when it is dropped: as cancelled, unless something else was said of it.
#[derive(Debug)]
pub struct Meter {
    metrics: Arc<Metrics>,
    method: &'static str,
    arrived: Instant,
    outcome: &'static str,
}

/// What groups have to do, read when Prometheus asks.
#[derive(Debug)]
struct GroupLoads(Arc<Groups>);

// === impl Metrics ===

impl Metrics {
    /// Metrics that the registry shows.
    pub fn register(registry: &mut Registry, groups: Arc<Groups>) -> Arc<Self> {
        let histogram = || Histogram::new(SECONDS);
        let metrics = Self {
            requests: Family::default(),
            in_flight: Gauge::default(),
            cancels: Counter::default(),
            prompt_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            ttft: histogram(),
            itl: histogram(),
        };
        let registry = registry.sub_registry_with_prefix("gateway");
        registry.register("requests", "Requests that ended, by method and outcome", metrics.requests.clone());
        registry.register("requests_in_flight", "Requests that have not ended", metrics.in_flight.clone());
        registry.register("cancels", "Requests whose client went away", metrics.cancels.clone());
        registry.register("prompt_tokens", "Tokens of prompts", metrics.prompt_tokens.clone());
        registry.register("completion_tokens", "Tokens generated", metrics.completion_tokens.clone());
        registry.register_with_unit(
            "time_to_first_token",
            "From a request's arrival to its first token",
            Unit::Seconds,
            metrics.ttft.clone(),
        );
        registry.register_with_unit(
            "inter_token_latency",
            "Between two chunks of one choice",
            Unit::Seconds,
            metrics.itl.clone(),
        );
        registry.register_collector(Box::new(GroupLoads(groups)));
        Arc::new(metrics)
    }

    /// Counts a request that arrives.
    pub fn meter(self: &Arc<Self>, method: &'static str, arrived: Instant) -> Meter {
        self.in_flight.inc();
        Meter { metrics: Arc::clone(self), method, arrived, outcome: Reason::Cancelled.name() }
    }
}

// === impl Meter ===

impl Meter {
    /// When the request arrived.
    pub fn arrived(&self) -> Instant {
        self.arrived
    }

    /// The request's first token has come.
    pub fn first_token(&self, now: Instant) {
        self.metrics.ttft.observe(now.saturating_duration_since(self.arrived).as_secs_f64());
    }

    /// A choice's next tokens have come, this long after those before.
    pub fn next_tokens(&self, gap: Duration) {
        self.metrics.itl.observe(gap.as_secs_f64());
    }

    /// The request had these tokens.
    pub fn tokens(&self, prompt: u32, completion: u32) {
        self.metrics.prompt_tokens.inc_by(prompt.into());
        self.metrics.completion_tokens.inc_by(completion.into());
    }

    /// Takes note of a failure, if this is one.
    ///
    /// # Errors
    /// The failure itself.
    pub fn note<T>(&mut self, step: Result<T, Failure>) -> Result<T, Failure> {
        if let Err(failure) = &step {
            self.end(Some(failure.reason()));
        }
        step
    }

    /// Takes note of how the request ended.
    ///
    /// # Errors
    /// The failure itself.
    pub fn settle<T>(&mut self, outcome: Result<T, Failure>) -> Result<T, Failure> {
        self.end(None);
        self.note(outcome)
    }

    /// How the request ended.
    pub fn end(&mut self, failure: Option<Reason>) {
        self.outcome = failure.map_or("OK", Reason::name);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let (method, outcome) = (self.method, self.outcome);
        self.metrics.requests.get_or_create(&Outcome { method, outcome }).inc();
        self.metrics.in_flight.dec();
        if outcome == Reason::Cancelled.name() {
            self.metrics.cancels.inc();
        }
    }
}

// === impl GroupLoads ===

impl Collector for GroupLoads {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let outstanding = Family::<GroupLabel, ConstGauge<i64>>::default().metric_type();
        let help = "Tokens of this gateway's requests that a group has still to compute, at most";
        let mut family = encoder.encode_descriptor("group_outstanding_tokens", help, None, outstanding)?;
        for (id, address) in self.0.iter() {
            let tokens = i64::try_from(self.0.own_tokens(id)).unwrap_or(i64::MAX);
            let label = GroupLabel { group: address.to_owned() };
            ConstGauge::new(tokens).encode(family.encode_family(&label)?)?;
        }
        let mut family =
            encoder.encode_descriptor("group_ready", "Whether a group can take work", None, outstanding)?;
        for (id, address) in self.0.iter() {
            let label = GroupLabel { group: address.to_owned() };
            ConstGauge::new(i64::from(self.0.ready(id))).encode(family.encode_family(&label)?)?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GroupLabel {
    group: String,
}

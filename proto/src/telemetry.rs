//! Telemetry is what a running service says about itself: log lines on stderr and Prometheus metrics.
//!
//! Logs carry the request id of the call that they belong to (see [`crate::trace`]) and never the text of prompts or
//! answers. Metrics live in one [`Registry`] for each process, filled at start and read by `/metrics`.

use std::{fmt, io::IsTerminal as _};

use prometheus_client::{
    encoding::text::encode,
    metrics::{family::Family, gauge::ConstGauge},
    registry::Registry,
};
use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::config::{ConfigError, Key};

/// Bucket limits of every histogram of durations, so that figures of different services compare. Unit: seconds.
/// From half a millisecond, a step of a small model, to the minutes that a long answer takes.
pub const SECONDS: [f64; 18] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0];

/// The media type of [`metrics_text`].
pub const METRICS_CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The keys of [`LogSettings`], for a service that holds them in a field `log`.
pub const KEYS: &[Key] = &[
    Key { path: "log.format", help: "Form of log lines: text or json. Default: text." },
    Key {
        path: "log.filter",
        help: "Which log lines are written: a level, or target=level pairs (`info,lockstep_worker=debug`). More costs \
               time. Default: info.",
    },
];

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// Form of log lines.
    pub format: LogFormat,
    /// A level, or `target=level` pairs, in the syntax of `tracing_subscriber::EnvFilter`.
    pub filter: String,
}

// === impl LogSettings ===

impl Default for LogSettings {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".into() }
    }
}

impl LogSettings {
    /// Checks the filter's syntax.
    ///
    /// # Errors
    /// If it has none.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.parse_filter().map(|_| ())
    }

    fn parse_filter(&self) -> Result<EnvFilter, ConfigError> {
        EnvFilter::builder()
            .parse(&self.filter)
            .map_err(|error| ConfigError::invalid("log.filter", format!("`{}`", self.filter), error.to_string()))
    }
}

/// Sends the log lines of this process to stderr. The first call wins; later ones change nothing.
///
/// # Errors
/// If the filter is not readable.
pub fn init(settings: &LogSettings) -> Result<(), ConfigError> {
    let filter = settings.parse_filter()?;
    // By default a line that cannot be written panics, through `eprintln!`. A service whose supervisor has died, and the
    // other end of stderr with it, must still drain.
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
    let lines = match settings.format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
    };
    // A second subscriber in one process is no fault of the settings: tests start several services in one.
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
    Ok(())
}

/// A registry for the metrics of a service; every name starts with `lockstep_`. It holds
/// `lockstep_build_info{service, version}`, which is a gauge: programs that read Prometheus' older text format, such as the
/// Gateway API Inference Extension, give all of `/metrics` up if there is an OpenMetrics info.
#[must_use]
pub fn registry(service: &str) -> Registry {
    let mut registry = Registry::with_prefix("lockstep");
    let labels = vec![("service", service.to_owned()), ("version", env!("CARGO_PKG_VERSION").to_owned())];
    let build = Family::<_, ConstGauge>::new_with_constructor(|| ConstGauge::new(1));
    drop(build.get_or_create(&labels));
    registry.register("build_info", "What runs here", build);
    registry
}

/// All metrics as `/metrics` answers them.
///
/// # Errors
/// If a metric cannot be encoded, which none of this crate's can.
pub fn metrics_text(registry: &Registry) -> Result<String, fmt::Error> {
    let mut text = String::new();
    encode(&mut text, registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_ascend() {
        assert!(SECONDS.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn build_info_names_service_and_version() {
        let text = metrics_text(&registry("gateway")).unwrap();
        assert!(text.contains("lockstep_build_info{service=\"gateway\",version=\""), "{text}");
    }

    #[test]
    fn readers_of_the_older_format_find_no_type_that_they_do_not_know() {
        let text = metrics_text(&registry("worker")).unwrap();
        let types: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        assert_eq!(types, ["# TYPE lockstep_build_info gauge"]);
    }

    #[test]
    fn unreadable_filter_is_an_error_that_names_it() {
        let settings = LogSettings { filter: "a=b=c".into(), ..LogSettings::default() };
        let text = settings.validate().unwrap_err().to_string();
        assert!(text.contains("log.filter") && text.contains("a=b=c"), "{text}");
    }
}

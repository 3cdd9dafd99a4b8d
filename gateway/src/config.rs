//! The gateway's settings: [`GatewaySettings`], read as every service reads its own
//! ([`lockstep_proto::config`]).

use std::{net::SocketAddr, time::Duration};

use lockstep_proto::{
    client::endpoint,
    config::{ConfigError, Key, Settings},
    server::{
        self, Limits,
        tls::{self, TlsSettings},
    },
    telemetry::{self, LogSettings},
};
use serde::{Deserialize, Serialize};

use crate::{
    admission::{AdmissionLimits, ApiKey},
    router::{RouterSettings, breaker::BreakerSettings},
};

/// Everything that an operator can choose about a gateway; [`KEYS`](Settings::KEYS) says what each costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewaySettings {
    /// For gRPC.
    pub listen: SocketAddr,
    /// For HTTP: the page, and the APIs of OpenAI and of Text Generation Inference.
    pub http_listen: SocketAddr,
    /// For `/metrics`.
    pub metrics_listen: Option<SocketAddr>,
    /// Shut down when standard input ends.
    pub exit_with_parent: bool,
    /// The certificate of both; none: they are not encrypted.
    pub tls: TlsSettings,
    /// Limits of the server and of calls to other services.
    pub limits: Limits,
    /// Logs.
    pub log: LogSettings,
    /// Names of the models to serve; empty: whatever the groups report.
    pub models: Vec<String>,
    /// Addresses of the tokenizer service's instances.
    pub tokenizers: Vec<String>,
    /// Addresses of the groups' leaders.
    pub groups: Vec<String>,
    /// A TOML file; see [`crate::sampling::Policy`].
    pub policy_file: Option<String>,
    /// Keys that callers may show; none here and none in the file: everyone may call.
    pub api_keys: Vec<ApiKey>,
    /// A file with one key a line.
    pub api_keys_file: Option<String>,
    /// What one gateway takes on.
    pub requests: RequestLimits,
    /// Which group takes a request.
    pub router: RouterConfig,
    /// Longest wait for the answer of one tokenizer instance. Unit: milliseconds.
    pub tokenizer_timeout_ms: u64,
}

/// What one gateway takes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RequestLimits {
    /// Requests at a time.
    pub max_in_flight: u32,
    /// Bytes of their messages.
    pub max_prompt_bytes: u32,
    /// Longest life of a request. Unit: milliseconds.
    pub max_duration_ms: u64,
    /// Longest time that a client may leave an event unread. Unit: milliseconds.
    pub slow_reader_timeout_ms: u64,
}

/// Which group takes a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterConfig {
    /// How much more a group may have to do and still be preferred for its cache. Unit: tokens.
    pub affinity_slack_tokens: u64,
    /// Failures in a row after which a group is left alone.
    pub breaker_failures: u32,
    /// The first pause. Unit: milliseconds.
    pub breaker_pause_ms: u64,
    /// The longest pause. Unit: milliseconds.
    pub breaker_max_pause_ms: u64,
    /// Silence after which a group counts as lost. Unit: milliseconds.
    pub status_timeout_ms: u64,
}

/// The longest duration that a setting takes: a day. Deadlines are added to clocks, which must not overflow.
const MAX_MS: u64 = 24 * 60 * 60 * 1_000;

const OWN_KEYS: &[Key] = &[
    Key {
        path: "http_listen",
        help: "Address for HTTP (the page, and the APIs of OpenAI and of Text Generation Inference); port 0 takes a free \
               one. Default: 127.0.0.1:8080.",
    },
    Key {
        path: "models",
        help: "Names of the models to serve. Default: none, which serves every model that a group reports.",
    },
    Key { path: "tokenizers", help: "Addresses of the tokenizer service's instances, at least one." },
    Key { path: "groups", help: "Addresses of the leaders of the worker groups, at least one." },
    Key {
        path: "policy_file",
        help: "TOML file with caps, defaults and forbidden parameters for each model. Default: none.",
    },
    Key {
        path: "api_keys",
        help: "Keys, one of which a caller must show (`authorization: Bearer KEY`). Default: none, which lets everyone \
               call.",
    },
    Key { path: "api_keys_file", help: "File with one such key a line; `#` begins a comment. Default: none." },
    Key {
        path: "requests.max_in_flight",
        help: "Requests at a time; further ones are refused. Default: 1024. More cost memory, and wait for one another \
               where a group's `limits.max_concurrent_streams` is less.",
    },
    Key {
        path: "requests.max_prompt_bytes",
        help: "Bytes of the messages of all requests in flight. Default: 268435456. More cost memory.",
    },
    Key {
        path: "requests.max_duration_ms",
        help: "Longest life of a request; its answer then ends with what there is. Default: 600000. More lets a \
               request hold its place for longer.",
    },
    Key {
        path: "requests.slow_reader_timeout_ms",
        help: "How long a client may leave an event unread before it is cut off. Default: 30000. More lets slow \
               clients hold a worker's memory for longer.",
    },
    Key {
        path: "router.affinity_slack_tokens",
        help: "How many tokens more than the idlest group one may have to do and still get a prompt whose beginning \
               it has cached. Default: 2048. More saves prefill, less spreads load.",
    },
    Key {
        path: "router.breaker_failures",
        help: "Failures in a row after which a group gets no requests for a pause. Default: 5. Less reacts sooner and \
               may leave out a group that is well.",
    },
    Key { path: "router.breaker_pause_ms", help: "The first such pause; each failed probe doubles it. Default: 1000." },
    Key {
        path: "router.breaker_max_pause_ms",
        help: "The longest such pause. Default: 30000. Less tries a dead group more often.",
    },
    Key {
        path: "router.status_timeout_ms",
        help: "Silence after which a group counts as lost; groups report once a second. Default: 3000. Less notices \
               a hung group sooner and may leave out a slow one.",
    },
    Key {
        path: "tokenizer_timeout_ms",
        help: "Longest wait for one tokenizer instance. Default: 10000. Less goes on to the next one sooner and may \
               fail long prompts.",
    },
];

// === impl GatewaySettings ===

impl Default for GatewaySettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50_051)),
            http_listen: SocketAddr::from(([127, 0, 0, 1], 8_080)),
            metrics_listen: None,
            exit_with_parent: false,
            tls: TlsSettings::default(),
            limits: Limits::default(),
            log: LogSettings::default(),
            models: Vec::new(),
            tokenizers: Vec::new(),
            groups: Vec::new(),
            policy_file: None,
            api_keys: Vec::new(),
            api_keys_file: None,
            requests: RequestLimits::default(),
            router: RouterConfig::default(),
            tokenizer_timeout_ms: 10_000,
        }
    }
}

impl Settings for GatewaySettings {
    const SERVICE: &'static str = "gateway";
    const KEYS: &'static [&'static [Key]] = &[server::KEYS, tls::KEYS, telemetry::KEYS, OWN_KEYS];

    fn validate(&self) -> Result<(), ConfigError> {
        self.tls.validate()?;
        self.limits.validate()?;
        self.log.validate()?;
        for (key, list) in [("tokenizers", &self.tokenizers), ("groups", &self.groups)] {
            if list.is_empty() {
                return Err(ConfigError::invalid(key, "[]", "must name at least one address"));
            }
            for address in list {
                let checked = endpoint(address, &self.limits.client());
                checked.map_err(|error| ConfigError::invalid(key, address, error.to_string()))?;
            }
        }
        if !self.api_keys.iter().all(ApiKey::is_valid) {
            return Err(ConfigError::invalid(
                "api_keys",
                "(not shown)",
                "a key is at least one visible ASCII character",
            ));
        }
        let counts = [
            ("requests.max_in_flight", self.requests.max_in_flight),
            ("requests.max_prompt_bytes", self.requests.max_prompt_bytes),
            ("router.breaker_failures", self.router.breaker_failures),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::invalid(*key, 0, "must be at least 1"));
        }
        let durations = [
            ("requests.max_duration_ms", self.requests.max_duration_ms),
            ("requests.slow_reader_timeout_ms", self.requests.slow_reader_timeout_ms),
            ("router.breaker_pause_ms", self.router.breaker_pause_ms),
            ("router.breaker_max_pause_ms", self.router.breaker_max_pause_ms),
            ("router.status_timeout_ms", self.router.status_timeout_ms),
            ("tokenizer_timeout_ms", self.tokenizer_timeout_ms),
        ];
        match durations.iter().find(|(_, value)| !(1..=MAX_MS).contains(value)) {
            Some((key, value)) => Err(ConfigError::invalid(*key, value, format!("must be from 1 to {MAX_MS}"))),
            None => Ok(()),
        }
    }
}

// === impl RequestLimits ===

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            max_in_flight: 1_024,
            max_prompt_bytes: 256 << 20,
            max_duration_ms: 600_000,
            slow_reader_timeout_ms: 30_000,
        }
    }
}

impl RequestLimits {
    /// As the gate takes them.
    pub fn admission(&self) -> AdmissionLimits {
        AdmissionLimits { requests: self.max_in_flight, prompt_bytes: self.max_prompt_bytes }
    }

    /// Longest life of a request.
    pub fn max_duration(&self) -> Duration {
        Duration::from_millis(self.max_duration_ms)
    }

    /// Longest time that a client may leave an event unread.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.slow_reader_timeout_ms)
    }
}

// === impl RouterConfig ===

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            affinity_slack_tokens: 2_048,
            breaker_failures: 5,
            breaker_pause_ms: 1_000,
            breaker_max_pause_ms: 30_000,
            status_timeout_ms: 3_000,
        }
    }
}

impl RouterConfig {
    /// As the router takes them.
    pub fn settings(&self) -> RouterSettings {
        RouterSettings {
            affinity_slack_tokens: self.affinity_slack_tokens,
            breaker: BreakerSettings {
                failures: self.breaker_failures,
                pause: Duration::from_millis(self.breaker_pause_ms),
                max_pause: Duration::from_millis(self.breaker_max_pause_ms),
            },
        }
    }

    /// Silence after which a group counts as lost.
    pub fn status_timeout(&self) -> Duration {
        Duration::from_millis(self.status_timeout_ms)
    }
}

/// Reads the keys of an `api_keys_file`.
///
/// # Errors
/// Names the first line that is no key, without showing it.
pub fn parse_api_keys(text: &str) -> Result<Vec<ApiKey>, ConfigError> {
    let lines = text.lines().map(str::trim).zip(1..).filter(|(line, _)| !line.is_empty() && !line.starts_with('#'));
    let key = |(line, number): (&str, usize)| {
        ApiKey::new(line).ok_or_else(|| {
            ConfigError::invalid("api_keys_file", format!("line {number}"), "a key is visible ASCII characters")
        })
    };
    lines.map(key).collect()
}

#[cfg(test)]
mod tests {
    use lockstep_proto::config;

    use super::*;

    fn valid() -> GatewaySettings {
        GatewaySettings { tokenizers: vec!["t:1".into()], groups: vec!["g:1".into()], ..GatewaySettings::default() }
    }

    #[test]
    fn every_setting_has_a_key_and_every_key_a_setting() {
        lockstep_proto::config::assert_keys_match_fields::<GatewaySettings>();
    }

    #[test]
    fn printed_keys_are_hidden_and_do_not_load() {
        let args = |text: &str| text.split_whitespace().map(std::ffi::OsString::from).collect::<Vec<_>>();
        let flags = "gateway --tokenizers t:1 --groups g:1 --api-keys secret --print-config";
        let printed = config::load_from::<GatewaySettings>(args(flags).into_iter(), std::iter::empty()).unwrap();
        let config::Command::Print(text) = printed else { panic!("{printed:?}") };
        assert!(!text.contains("secret") && text.contains("(not shown)"), "{text}");
        let settings: GatewaySettings = toml::from_str(&text).unwrap();
        let error = settings.validate().unwrap_err().to_string();
        assert!(error.starts_with("`api_keys`"), "{error}");
    }

    #[test]
    fn broken_rules_are_named() {
        let check = |change: fn(&mut GatewaySettings), key: &str| {
            let mut settings = valid();
            change(&mut settings);
            let error = settings.validate().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{key}`")), "{error}");
        };
        assert!(valid().validate().is_ok());
        check(|settings| settings.groups.clear(), "groups");
        check(|settings| settings.tokenizers.clear(), "tokenizers");
        check(|settings| settings.groups.push("nowhere".into()), "groups");
        check(|settings| settings.requests.max_in_flight = 0, "requests.max_in_flight");
        check(|settings| settings.router.breaker_failures = 0, "router.breaker_failures");
        check(|settings| settings.requests.max_duration_ms = u64::MAX, "requests.max_duration_ms");
        check(|settings| settings.tokenizer_timeout_ms = 0, "tokenizer_timeout_ms");
    }

    #[test]
    fn a_key_file_has_one_key_a_line() {
        let keys = parse_api_keys("# ours\nalpha\n\n  beta  \r\n").unwrap();
        assert_eq!(keys, [ApiKey::new("alpha").unwrap(), ApiKey::new("beta").unwrap()]);
        let error = parse_api_keys("alpha\nsecret key\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains("secret"), "{error}");
    }
}

//! A policy is what the operator of a cluster allows: caps, defaults and forbidden parameters, for each model.
//!
//! It is a TOML file. What a model's own section leaves out comes from `[default]`, setting by setting:
//!
//! ```toml
//! [default]
//! forbidden = ["logit_bias"]
//! [default.caps]
//! max_new_tokens = 4096
//! n = 4
//! temperature = { max = 1.5 }
//! [default.defaults]
//! max_new_tokens = 512
//!
//! [models.smollm2.caps]
//! max_new_tokens = 1024
//! ```

use std::{collections::BTreeMap, fmt};

use lockstep_proto::v1::SamplingParams;
use serde::Deserialize;

use super::range::{self, Range};
use crate::request::Violations;

/// The policies of all models.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    default: ModelPolicy,
    models: BTreeMap<String, ModelPolicy>,
}

/// A policy file that cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Not TOML, or a key or value that no policy has.
    #[error("policy file: {0}")]
    Syntax(String),
    /// A value out of its range, or a default over its own cap.
    #[error("policy file: {section}.{setting}: {message}")]
    Value {
        /// `default` or `models.NAME`.
        section: String,
        /// The setting.
        setting: String,
        /// What is wrong with it.
        message: String,
    },
}

/// What the operator sets for one model.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct ModelPolicy {
    pub(super) caps: Caps,
    pub(super) defaults: Defaults,
    forbidden: Option<Vec<Parameter>>,
}

/// Highest values that a request may ask for; a missing cap leaves the contract's own limit.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Caps {
    pub(super) prompt_tokens: Option<u32>,
    pub(super) max_new_tokens: Option<u32>,
    n: Option<u32>,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    stop: Option<u32>,
    stop_token_ids: Option<u32>,
    logit_bias: Option<u32>,
    temperature: Bounds,
}

/// Lowest and highest value.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct Bounds {
    min: Option<f32>,
    max: Option<f32>,
}

/// Values for what a request leaves unset.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Defaults {
    pub(super) max_new_tokens: Option<u32>,
    pub(super) do_sample: Option<bool>,
    pub(super) temperature: Option<f32>,
    pub(super) top_k: Option<u32>,
    pub(super) top_p: Option<f32>,
    pub(super) min_p: Option<f32>,
    pub(super) typical_p: Option<f32>,
    pub(super) repetition_penalty: Option<f32>,
    pub(super) presence_penalty: Option<f32>,
    pub(super) frequency_penalty: Option<f32>,
}

/// A parameter that can be forbidden, under its name in the contract.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(super) enum Parameter {
    MaxNewTokens,
    MinNewTokens,
    DoSample,
    Temperature,
    TopK,
    TopP,
    MinP,
    TypicalP,
    RepetitionPenalty,
    PresencePenalty,
    FrequencyPenalty,
    LogitBias,
    Stop,
    StopTokenIds,
    IgnoreEos,
    Seed,
    N,
    Constraint,
    Logprobs,
    PromptLogprobs,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    default: ModelPolicy,
    models: BTreeMap<String, ModelPolicy>,
}

// === impl Policy ===

impl Policy {
    /// Reads a policy file's text. An empty text forbids and caps nothing.
    ///
    /// # Errors
    ///
    /// Text that is no TOML, an unknown key, or a value that no request could have.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let file: File = toml::from_str(text).map_err(|error| PolicyError::Syntax(one_line(&error)))?;
        file.default.check("default")?;
        let mut models = BTreeMap::new();
        for (name, section) in file.models {
            let merged = section.over(&file.default);
            merged.check(&format!("models.{name}"))?;
            models.insert(name, merged);
        }
        Ok(Self { default: file.default, models })
    }

    /// The policy for one model.
    pub fn for_model(&self, name: &str) -> &ModelPolicy {
        self.models.get(name).unwrap_or(&self.default)
    }
}

// === impl ModelPolicy ===

impl ModelPolicy {
    /// Notes what of a request's sampling parameters the policy does not allow, under `sampling`.
    pub(super) fn check_sampling(&self, asked: &SamplingParams, violations: &mut Violations) {
        for (parameter, name) in set_parameters(asked) {
            self.check_forbidden(parameter, format_args!("sampling.{name}"), violations);
        }
        let caps = [
            ("max_new_tokens", asked.max_new_tokens, self.caps.max_new_tokens),
            ("n", asked.n, self.caps.n),
            ("stop", count(asked.stop.len()), self.caps.stop),
            ("stop_token_ids", count(asked.stop_token_ids.len()), self.caps.stop_token_ids),
            ("logit_bias", count(asked.logit_bias.len()), self.caps.logit_bias),
        ];
        for (name, asked, cap) in caps {
            check_cap(format_args!("sampling.{name}"), asked, cap, violations);
        }
        if let Some(message) = asked.temperature.and_then(|asked| self.caps.temperature.refuse(asked)) {
            violations.over_policy("sampling.temperature", message);
        }
    }

    /// Notes a count of log-probabilities that the policy does not allow. `name` is the option's name under `output`.
    pub(crate) fn check_output(&self, name: &str, asked: u32, violations: &mut Violations) {
        let (parameter, cap) = match name {
            "prompt_logprobs" => (Parameter::PromptLogprobs, self.caps.prompt_logprobs),
            _ => (Parameter::Logprobs, self.caps.logprobs),
        };
        self.check_forbidden(parameter, format_args!("output.{name}"), violations);
        check_cap(format_args!("output.{name}"), Some(asked), cap, violations);
    }

    /// Brings a temperature that nobody asked for within the caps.
    pub(super) fn bound_temperature(&self, temperature: f32) -> f32 {
        let Bounds { min, max } = self.caps.temperature;
        let at_least = min.map_or(temperature, |min| temperature.max(min));
        max.map_or(at_least, |max| at_least.min(max))
    }

    fn check_forbidden(&self, parameter: Parameter, path: impl fmt::Display, violations: &mut Violations) {
        if self.forbidden.as_ref().is_some_and(|forbidden| forbidden.contains(&parameter)) {
            violations.over_policy(path, "the policy forbids this parameter");
        }
    }

    /// These settings where they are made, `fallback`'s elsewhere.
    fn over(self, fallback: &Self) -> Self {
        let (caps, defaults) = (&fallback.caps, &fallback.defaults);
        Self {
            caps: Caps {
                prompt_tokens: self.caps.prompt_tokens.or(caps.prompt_tokens),
                max_new_tokens: self.caps.max_new_tokens.or(caps.max_new_tokens),
                n: self.caps.n.or(caps.n),
                logprobs: self.caps.logprobs.or(caps.logprobs),
                prompt_logprobs: self.caps.prompt_logprobs.or(caps.prompt_logprobs),
                stop: self.caps.stop.or(caps.stop),
                stop_token_ids: self.caps.stop_token_ids.or(caps.stop_token_ids),
                logit_bias: self.caps.logit_bias.or(caps.logit_bias),
                temperature: Bounds {
                    min: self.caps.temperature.min.or(caps.temperature.min),
                    max: self.caps.temperature.max.or(caps.temperature.max),
                },
            },
            defaults: Defaults {
                max_new_tokens: self.defaults.max_new_tokens.or(defaults.max_new_tokens),
                do_sample: self.defaults.do_sample.or(defaults.do_sample),
                temperature: self.defaults.temperature.or(defaults.temperature),
                top_k: self.defaults.top_k.or(defaults.top_k),
                top_p: self.defaults.top_p.or(defaults.top_p),
                min_p: self.defaults.min_p.or(defaults.min_p),
                typical_p: self.defaults.typical_p.or(defaults.typical_p),
                repetition_penalty: self.defaults.repetition_penalty.or(defaults.repetition_penalty),
                presence_penalty: self.defaults.presence_penalty.or(defaults.presence_penalty),
                frequency_penalty: self.defaults.frequency_penalty.or(defaults.frequency_penalty),
            },
            forbidden: self.forbidden.or_else(|| fallback.forbidden.clone()),
        }
    }

    /// Finds settings that no request could meet or that contradict one another.
    fn check(&self, section: &str) -> Result<(), PolicyError> {
        let refuse = |setting: &str, message: String| {
            Err(PolicyError::Value { section: section.into(), setting: setting.into(), message })
        };
        for (name, value, range) in self.ranged() {
            if let Some(message) = value.and_then(|value| range.refuse(value)) {
                return refuse(name, message);
            }
        }
        let at_least_one = [
            ("caps.prompt_tokens", self.caps.prompt_tokens),
            ("caps.max_new_tokens", self.caps.max_new_tokens),
            ("caps.n", self.caps.n),
            ("defaults.max_new_tokens", self.defaults.max_new_tokens),
        ];
        if let Some((name, _)) = at_least_one.iter().find(|(_, value)| *value == Some(0)) {
            return refuse(name, "0 is not at least 1".into());
        }
        let Bounds { min, max } = self.caps.temperature;
        if let (Some(min), Some(max)) = (min, max)
            && min > max
        {
            return refuse("caps.temperature", format!("min {min} is over max {max}"));
        }
        if let Some(message) = self.defaults.temperature.and_then(|default| self.caps.temperature.refuse(default)) {
            return refuse("defaults.temperature", message);
        }
        match (self.defaults.max_new_tokens, self.caps.max_new_tokens) {
            (Some(default), Some(cap)) if default > cap => {
                refuse("defaults.max_new_tokens", format!("{default} is over the policy's cap of {cap}"))
            }
            _ => Ok(()),
        }
    }

    fn ranged(&self) -> [(&'static str, Option<f32>, Range); 9] {
        let defaults = &self.defaults;
        [
            ("caps.temperature.min", self.caps.temperature.min, range::TEMPERATURE),
            ("caps.temperature.max", self.caps.temperature.max, range::TEMPERATURE),
            ("defaults.temperature", defaults.temperature, range::TEMPERATURE),
            ("defaults.top_p", defaults.top_p, range::TOP_P),
            ("defaults.min_p", defaults.min_p, range::MIN_P),
            ("defaults.typical_p", defaults.typical_p, range::TYPICAL_P),
            ("defaults.repetition_penalty", defaults.repetition_penalty, range::REPETITION_PENALTY),
            ("defaults.presence_penalty", defaults.presence_penalty, range::PRESENCE_PENALTY),
            ("defaults.frequency_penalty", defaults.frequency_penalty, range::FREQUENCY_PENALTY),
        ]
    }
}

// === impl Bounds ===

impl Bounds {
    fn refuse(self, value: f32) -> Option<String> {
        match self {
            Self { max: Some(max), .. } if value > max => Some(format!("{value} is over the policy's cap of {max}")),
            Self { min: Some(min), .. } if value < min => Some(format!("{value} is under the policy's floor of {min}")),
            _ => None,
        }
    }
}

fn check_cap(path: impl fmt::Display, asked: Option<u32>, cap: Option<u32>, violations: &mut Violations) {
    if let (Some(asked), Some(cap)) = (asked, cap)
        && asked > cap
    {
        violations.over_policy(path, format!("{asked} is over the policy's cap of {cap}"));
    }
}

fn count(length: usize) -> Option<u32> {
    Some(u32::try_from(length).unwrap_or(u32::MAX))
}

/// The parameters that a request sets, with their names in the contract. The contract's fields are all named, so that a
/// new one cannot be forgotten and escape the policy.
fn set_parameters(asked: &SamplingParams) -> impl Iterator<Item = (Parameter, &'static str)> {
    let SamplingParams {
        max_new_tokens,
        min_new_tokens,
        do_sample,
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        stop,
        stop_token_ids,
        ignore_eos,
        seed,
        n,
        constraint,
    } = asked;
    let all = [
        (max_new_tokens.is_some(), Parameter::MaxNewTokens, "max_new_tokens"),
        (min_new_tokens.is_some(), Parameter::MinNewTokens, "min_new_tokens"),
        (do_sample.is_some(), Parameter::DoSample, "do_sample"),
        (temperature.is_some(), Parameter::Temperature, "temperature"),
        (top_k.is_some(), Parameter::TopK, "top_k"),
        (top_p.is_some(), Parameter::TopP, "top_p"),
        (min_p.is_some(), Parameter::MinP, "min_p"),
        (typical_p.is_some(), Parameter::TypicalP, "typical_p"),
        (repetition_penalty.is_some(), Parameter::RepetitionPenalty, "repetition_penalty"),
        (presence_penalty.is_some(), Parameter::PresencePenalty, "presence_penalty"),
        (frequency_penalty.is_some(), Parameter::FrequencyPenalty, "frequency_penalty"),
        (!logit_bias.is_empty(), Parameter::LogitBias, "logit_bias"),
        (!stop.is_empty(), Parameter::Stop, "stop"),
        (!stop_token_ids.is_empty(), Parameter::StopTokenIds, "stop_token_ids"),
        (ignore_eos.is_some(), Parameter::IgnoreEos, "ignore_eos"),
        (seed.is_some(), Parameter::Seed, "seed"),
        (n.is_some(), Parameter::N, "n"),
        (constraint.is_some(), Parameter::Constraint, "constraint"),
    ];
    all.into_iter().filter_map(|(is_set, parameter, name)| is_set.then_some((parameter, name)))
}

/// A TOML error on one line: where, and what.
fn one_line(error: &toml::de::Error) -> String {
    error.to_string().lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

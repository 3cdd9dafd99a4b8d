//! Reading `SamplingParams`: every value against its range, the vocabulary, the context and the policy.

use std::collections::BTreeMap;

use lockstep_proto::{v1::SamplingParams, worker::v1::ResolvedSampling};

use super::{
    LengthRule, ValidSampling, constraint,
    range::{self, Range},
};
use crate::request::{ModelFacts, Rules, Violations};

/// Most choices for one prompt, as the contract states it.
pub(crate) const MAX_N: u32 = 128;
/// Most stop strings, and their longest. Unit of the second: bytes.
pub(crate) const MAX_STOP: usize = 16;
pub(crate) const MAX_STOP_BYTES: usize = 1_024;
/// Most stop token ids and biases, as the contract states them.
pub(crate) const MAX_STOP_TOKEN_IDS: usize = 64;
pub(crate) const MAX_LOGIT_BIAS: usize = 300;

impl ValidSampling {
    /// Reads the parameters, noting what is wrong with them under `sampling`.
    pub(crate) fn read(wire: Option<SamplingParams>, rules: Rules<'_>, violations: &mut Violations) -> Self {
        let wire = wire.unwrap_or_default();
        check_ranges(&wire, violations);
        check_counts(&wire, rules.facts, violations);
        check_stops(&wire, rules.facts, violations);
        check_logit_bias(&wire, rules.facts, violations);
        rules.policy.check_sampling(&wire, violations);
        let constraint = constraint::read(wire.constraint.as_ref(), violations);
        Self {
            shape: ResolvedSampling { constraint, ..shape(&wire, rules) },
            constraint_path: wire.constraint.as_ref().map(constraint::path),
            seed: wire.seed,
            length: length(&wire, rules),
            n: wire.n.unwrap_or(1),
            stop: wire.stop,
        }
    }
}

/// What a request is sampled with that samples and sets nothing else.
pub(crate) fn defaults(rules: Rules<'_>) -> SamplingParams {
    let unset = SamplingParams { do_sample: Some(true), ..SamplingParams::default() };
    let shape = shape(&unset, rules);
    SamplingParams {
        max_new_tokens: length(&unset, rules).default,
        temperature: Some(shape.temperature),
        top_k: Some(shape.top_k),
        top_p: Some(shape.top_p),
        min_p: Some(shape.min_p),
        typical_p: Some(shape.typical_p),
        repetition_penalty: Some(shape.repetition_penalty),
        presence_penalty: Some(shape.presence_penalty),
        frequency_penalty: Some(shape.frequency_penalty),
        ..unset
    }
}

fn check_ranges(wire: &SamplingParams, violations: &mut Violations) {
    let ranged: [(&str, Option<f32>, Range); 7] = [
        ("temperature", wire.temperature, range::TEMPERATURE),
        ("top_p", wire.top_p, range::TOP_P),
        ("min_p", wire.min_p, range::MIN_P),
        ("typical_p", wire.typical_p, range::TYPICAL_P),
        ("repetition_penalty", wire.repetition_penalty, range::REPETITION_PENALTY),
        ("presence_penalty", wire.presence_penalty, range::PRESENCE_PENALTY),
        ("frequency_penalty", wire.frequency_penalty, range::FREQUENCY_PENALTY),
    ];
    for (name, value, range) in ranged {
        if let Some(message) = value.and_then(|value| range.refuse(value)) {
            violations.invalid(format_args!("sampling.{name}"), message);
        }
    }
}

fn check_counts(wire: &SamplingParams, facts: &ModelFacts, violations: &mut Violations) {
    let counts = [
        ("max_new_tokens", wire.max_new_tokens, 1, facts.context_length()),
        ("top_k", wire.top_k, 0, facts.vocab_size()),
        ("n", wire.n, 1, MAX_N),
    ];
    for (name, value, low, high) in counts {
        if let Some(value) = value.filter(|value| !(low..=high).contains(value)) {
            violations.invalid(format_args!("sampling.{name}"), format!("{value} is not in [{low}, {high}]"));
        }
    }
    if let Some(min) = wire.min_new_tokens {
        let max = wire.max_new_tokens.unwrap_or(facts.context_length());
        if min > max {
            let limit = if wire.max_new_tokens.is_some() { "max_new_tokens" } else { "the context" };
            violations.invalid("sampling.min_new_tokens", format!("{min} is over {limit} of {max}"));
        }
    }
}

fn check_stops(wire: &SamplingParams, facts: &ModelFacts, violations: &mut Violations) {
    if wire.stop.len() > MAX_STOP {
        violations.invalid("sampling.stop", format!("{} stop strings are over {MAX_STOP}", wire.stop.len()));
    }
    for (index, stop) in wire.stop.iter().enumerate() {
        let path = format_args!("sampling.stop[{index}]");
        if stop.is_empty() {
            violations.invalid(path, "the stop string is empty");
        } else if stop.len() > MAX_STOP_BYTES {
            violations.invalid(path, format!("{} bytes are over {MAX_STOP_BYTES}", stop.len()));
        }
    }
    if wire.stop_token_ids.len() > MAX_STOP_TOKEN_IDS {
        let message = format!("{} token ids are over {MAX_STOP_TOKEN_IDS}", wire.stop_token_ids.len());
        violations.invalid("sampling.stop_token_ids", message);
    }
    for (index, &id) in wire.stop_token_ids.iter().enumerate().filter(|&(_, &id)| id >= facts.vocab_size()) {
        let message = format!("{id} is not below the vocabulary's size of {}", facts.vocab_size());
        violations.invalid(format_args!("sampling.stop_token_ids[{index}]"), message);
    }
}

fn check_logit_bias(wire: &SamplingParams, facts: &ModelFacts, violations: &mut Violations) {
    if wire.logit_bias.len() > MAX_LOGIT_BIAS {
        let message = format!("{} entries are over {MAX_LOGIT_BIAS}", wire.logit_bias.len());
        violations.invalid("sampling.logit_bias", message);
        return;
    }
    // The wire's map has no order; the error's text should have one.
    for (id, &bias) in wire.logit_bias.iter().collect::<BTreeMap<_, _>>() {
        let path = format_args!("sampling.logit_bias[{id}]");
        if *id >= facts.vocab_size() {
            violations.invalid(path, format!("{id} is not below the vocabulary's size of {}", facts.vocab_size()));
        } else if let Some(message) = range::LOGIT_BIAS.refuse(bias) {
            violations.invalid(path, message);
        }
    }
}

/// Settles everything but the length of the output and the seed.
fn shape(wire: &SamplingParams, rules: Rules<'_>) -> ResolvedSampling {
    let (policy, model) = (&rules.policy.defaults, rules.facts.defaults());
    let mut shape = ResolvedSampling {
        min_new_tokens: wire.min_new_tokens.unwrap_or(0),
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        typical_p: 1.0,
        repetition_penalty: first([wire.repetition_penalty, policy.repetition_penalty, model.repetition_penalty], 1.0),
        presence_penalty: first([wire.presence_penalty, policy.presence_penalty], 0.0),
        frequency_penalty: first([wire.frequency_penalty, policy.frequency_penalty], 0.0),
        logit_bias: wire.logit_bias.clone(),
        stop_token_ids: stop_token_ids(wire, rules.facts),
        // Settled by `read` and by `ValidSampling::resolve`. Every field is named, so that a new one cannot be forgotten.
        constraint: None,
        max_new_tokens: 0,
        seed: 0,
    };
    // Greedy decoding leaves the values that shape sampling at "off", so that equal outcomes have equal parameters.
    if samples(wire, rules) {
        let default = first([policy.temperature, model.temperature], 1.0);
        shape.temperature = wire.temperature.unwrap_or_else(|| rules.policy.bound_temperature(default));
    }
    if shape.temperature > 0.0 {
        let top_k = first([wire.top_k, policy.top_k, model.top_k], 0);
        shape.top_k = top_k.min(rules.facts.vocab_size());
        shape.top_p = first([wire.top_p, policy.top_p, model.top_p], 1.0);
        shape.min_p = first([wire.min_p, policy.min_p, model.min_p], 0.0);
        shape.typical_p = first([wire.typical_p, policy.typical_p, model.typical_p], 1.0);
    }
    shape
}

/// Whether tokens are sampled: as asked; else yes if the request shapes sampling; else by the defaults.
fn samples(wire: &SamplingParams, rules: Rules<'_>) -> bool {
    let is_shaped = wire.temperature.is_some()
        || wire.top_k.is_some()
        || wire.top_p.is_some()
        || wire.min_p.is_some()
        || wire.typical_p.is_some();
    let by_default = || first([rules.policy.defaults.do_sample, rules.facts.defaults().do_sample], false);
    wire.do_sample.unwrap_or_else(|| is_shaped || by_default())
}

fn stop_token_ids(wire: &SamplingParams, facts: &ModelFacts) -> Vec<u32> {
    let mut ids = wire.stop_token_ids.clone();
    if !wire.ignore_eos.unwrap_or(false) {
        ids.extend_from_slice(facts.eos_token_ids());
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn length(wire: &SamplingParams, rules: Rules<'_>) -> LengthRule {
    let (policy, model) = (rules.policy, rules.facts.defaults());
    let default = policy.defaults.max_new_tokens.or(model.max_new_tokens);
    let default = [default, policy.caps.max_new_tokens].into_iter().flatten().min();
    LengthRule {
        asked: wire.max_new_tokens,
        default,
        prompt_cap: policy.caps.prompt_tokens,
        context_length: rules.facts.context_length(),
    }
}

fn first<T, const N: usize>(settings: [Option<T>; N], fallback: T) -> T {
    settings.into_iter().flatten().next().unwrap_or(fallback)
}

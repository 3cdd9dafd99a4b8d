//! A sampling setting is `NAME=VALUE` with the names of `SamplingParams`, from `--set` or from `/set` in a chat.
//!
//! Only the form is checked here. What a value may be is the gateway's to say, which knows the model and the policy.

use std::{fmt::Display, str::FromStr};

use lockstep_proto::v1::SamplingParams;

/// Every name that can be set, for messages.
pub(crate) const NAMES: &str = "max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p, min_p, \
    typical_p, repetition_penalty, presence_penalty, frequency_penalty, seed, ignore_eos, stop";

/// The word that takes a setting back.
const DEFAULT: &str = "default";

/// Reads `NAME=VALUE` for the command line.
pub(crate) fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    set(&mut SamplingParams::default(), name, value)?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Sampling parameters with these settings.
pub(crate) fn from_pairs(pairs: &[(String, String)]) -> Result<SamplingParams, String> {
    let mut params = SamplingParams::default();
    for (name, value) in pairs {
        set(&mut params, name, value)?;
    }
    Ok(params)
}

/// Sets one parameter; the value `default` takes it back, and each `stop` adds one.
pub(crate) fn set(params: &mut SamplingParams, name: &str, value: &str) -> Result<(), String> {
    match name {
        "max_new_tokens" => put(&mut params.max_new_tokens, name, value),
        "min_new_tokens" => put(&mut params.min_new_tokens, name, value),
        "do_sample" => put(&mut params.do_sample, name, value),
        "temperature" => put(&mut params.temperature, name, value),
        "top_k" => put(&mut params.top_k, name, value),
        "top_p" => put(&mut params.top_p, name, value),
        "min_p" => put(&mut params.min_p, name, value),
        "typical_p" => put(&mut params.typical_p, name, value),
        "repetition_penalty" => put(&mut params.repetition_penalty, name, value),
        "presence_penalty" => put(&mut params.presence_penalty, name, value),
        "frequency_penalty" => put(&mut params.frequency_penalty, name, value),
        "seed" => put(&mut params.seed, name, value),
        "ignore_eos" => put(&mut params.ignore_eos, name, value),
        "stop" if value == DEFAULT => {
            params.stop.clear();
            Ok(())
        }
        "stop" => {
            params.stop.push(value.to_owned());
            Ok(())
        }
        _ => Err(format!("`{name}` is none of {NAMES}")),
    }
}

/// What is set, as [`set`] takes it, one setting a line.
pub(crate) fn show(params: &SamplingParams) -> String {
    fn line<T: Display>(name: &str, value: Option<T>) -> Option<String> {
        value.map(|value| format!("{name} = {value}"))
    }
    // Every field is named, so that a new one is not forgotten; the last four have no form `NAME=VALUE`.
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
        seed,
        ignore_eos,
        stop,
        logit_bias: _,
        stop_token_ids: _,
        n: _,
        constraint: _,
    } = params;
    let set = [
        line("max_new_tokens", *max_new_tokens),
        line("min_new_tokens", *min_new_tokens),
        line("do_sample", *do_sample),
        line("temperature", *temperature),
        line("top_k", *top_k),
        line("top_p", *top_p),
        line("min_p", *min_p),
        line("typical_p", *typical_p),
        line("repetition_penalty", *repetition_penalty),
        line("presence_penalty", *presence_penalty),
        line("frequency_penalty", *frequency_penalty),
        line("seed", *seed),
        line("ignore_eos", *ignore_eos),
    ];
    let stop = stop.iter().filter_map(|text| line("stop", Some(text)));
    let lines: Vec<String> = set.into_iter().flatten().chain(stop).collect();
    if lines.is_empty() { "nothing is set: the model's defaults hold".into() } else { lines.join("\n") }
}

fn put<T: FromStr<Err: Display>>(slot: &mut Option<T>, name: &str, value: &str) -> Result<(), String> {
    *slot = match value {
        DEFAULT => None,
        _ => Some(value.parse().map_err(|error| format!("{name} cannot be `{value}`: {error}"))?),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_can_be_set_and_shown() {
        for name in NAMES.split(", ") {
            let value = if matches!(name, "do_sample" | "ignore_eos") { "true" } else { "1" };
            let mut params = SamplingParams::default();
            set(&mut params, name, value).unwrap();
            assert_ne!(params, SamplingParams::default(), "{name}");
            assert_eq!(show(&params), format!("{name} = {value}"));
            set(&mut params, name, DEFAULT).unwrap();
            assert_eq!(params, SamplingParams::default(), "{name}");
        }
    }

    #[test]
    fn unknown_names_and_unreadable_values_are_named() {
        assert!(parse_pair("temprature=1").unwrap_err().contains("`temprature`"));
        assert!(parse_pair("top_k=many").unwrap_err().contains("`many`"));
        assert!(parse_pair("top_k").is_err());
    }

    #[test]
    fn value_may_hold_an_equals_sign() {
        let params = from_pairs(&[parse_pair("stop=a=b").unwrap()]).unwrap();
        assert_eq!(params.stop, ["a=b"]);
    }
}

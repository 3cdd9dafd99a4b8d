//! Parameters that chats and completions share, under OpenAI's names and those that the ecosystem has added.

use std::collections::{BTreeMap, HashMap};

use lockstep_proto::v1::{Constraint, SamplingParams};
use schemars::{JsonSchema, Schema, json_schema};
use serde::Deserialize;
use serde_json::json;

use crate::{
    json::{Object, OneOrMany},
    openapi::rules::{either, set, unset, where_set},
    request::{RequestError, Violations},
    sampling::{
        range::LOGIT_BIAS,
        read::{MAX_LOGIT_BIAS, MAX_STOP, MAX_STOP_BYTES},
    },
};

/// What comes at the end of a stream.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StreamOptions {
    /// One more event with the counts, before the end.
    pub(super) include_usage: Option<bool>,
    /// Counts so far in every event. Taken if false.
    #[schemars(transform = crate::openapi::rules::never)]
    pub(super) continuous_usage_stats: Option<bool>,
    /// Random padding against eavesdroppers. Taken, and none is added.
    #[allow(dead_code, reason = "it is taken, and nothing follows from it")]
    pub(super) include_obfuscation: Option<bool>,
}

/// Declares a request: its own fields, and those that decide how tokens are chosen. (serde can not flatten a struct into
/// one that refuses unknown fields.)
macro_rules! request {
    ($(#[$meta:meta])* struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)+ }) => {
        #[derive(Debug, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields)]
        $(#[$meta])*
        pub(super) struct $name {
            $($(#[$field_meta])* $field: $type,)+
            /// Flattens the distribution that tokens are drawn from; 0 always takes the most probable one. Default: 1.
            #[schemars(transform = crate::sampling::range::TEMPERATURE.in_schema())]
            temperature: Option<f32>,
            /// Tokens are drawn from the most probable ones that together have this much probability.
            #[schemars(transform = crate::sampling::range::TOP_P.in_schema())]
            top_p: Option<f32>,
            /// Tokens are drawn from this many of the most probable ones, no more than the vocabulary has; -1 and 0: from
            /// all.
            #[schemars(range(min = -1, max = u32::MAX))]
            top_k: Option<i64>,
            /// Drops tokens that are less probable than this share of the most probable one.
            #[schemars(transform = crate::sampling::range::MIN_P.in_schema())]
            min_p: Option<f32>,
            /// Tokens are drawn from the most typical ones that together have this much probability.
            #[schemars(transform = crate::sampling::range::TYPICAL_P.in_schema())]
            typical_p: Option<f32>,
            /// Divides the chances of tokens that occurred, in the prompt or since. 1: off.
            #[schemars(transform = crate::sampling::range::REPETITION_PENALTY.in_schema())]
            repetition_penalty: Option<f32>,
            /// Subtracted from the logits of tokens that the answer has.
            #[schemars(transform = crate::sampling::range::PRESENCE_PENALTY.in_schema())]
            presence_penalty: Option<f32>,
            /// The same for each time that the answer has them.
            #[schemars(transform = crate::sampling::range::FREQUENCY_PENALTY.in_schema())]
            frequency_penalty: Option<f32>,
            /// Added to the logits of tokens, by their ids.
            #[schemars(transform = super::parameters::bound_biases)]
            logit_bias: Option<std::collections::BTreeMap<String, f32>>,
            /// Strings that end the answer, of at most 1024 bytes; it does not have them.
            #[schemars(transform = super::parameters::bound_stops)]
            stop: Option<crate::json::OneOrMany<String>>,
            /// Tokens that end the answer, beside the model's own.
            #[schemars(length(max = crate::sampling::read::MAX_STOP_TOKEN_IDS))]
            stop_token_ids: Option<Vec<u32>>,
            /// Whether the model's own end does not end the answer.
            ignore_eos: Option<bool>,
            /// Tokens before which the model's end and `stop_token_ids` are not chosen.
            min_tokens: Option<u32>,
            /// What random numbers are made from: the same seed gives the same answer. Default: a random one.
            seed: Option<i64>,
            /// How many answers. Default: 1.
            #[schemars(range(min = 1, max = crate::sampling::read::MAX_N))]
            n: Option<u32>,
            /// What the answer must be, in OpenAI's words.
            response_format: Option<crate::json::Object<super::constraint::ResponseFormat>>,
            /// What the answer must be, in vLLM's words.
            structured_outputs: Option<crate::json::Object<super::constraint::StructuredOutputs>>,
        }

        impl $name {
            /// How tokens are chosen, at most `max_new_tokens` of them.
            fn sampling(
                &mut self,
                max_new_tokens: Option<u32>,
            ) -> Result<lockstep_proto::v1::SamplingParams, crate::request::RequestError> {
                super::parameters::Sampling {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    typical_p: self.typical_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.take(),
                    stop: self.stop.take(),
                    stop_token_ids: self.stop_token_ids.take(),
                    ignore_eos: self.ignore_eos,
                    min_tokens: self.min_tokens,
                    seed: self.seed,
                    n: self.n,
                    constraint: super::constraint::read(
                        self.response_format.take().map(|format| format.0),
                        self.structured_outputs.take().map(|outputs| outputs.0),
                    )?,
                }
                .params(max_new_tokens)
            }
        }
    };
}
pub(super) use request;

/// How tokens are chosen, as it came.
#[derive(Debug, Default)]
pub(super) struct Sampling {
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) top_k: Option<i64>,
    pub(super) min_p: Option<f32>,
    pub(super) typical_p: Option<f32>,
    pub(super) repetition_penalty: Option<f32>,
    pub(super) presence_penalty: Option<f32>,
    pub(super) frequency_penalty: Option<f32>,
    pub(super) logit_bias: Option<BTreeMap<String, f32>>,
    pub(super) stop: Option<OneOrMany<String>>,
    pub(super) stop_token_ids: Option<Vec<u32>>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) min_tokens: Option<u32>,
    pub(super) seed: Option<i64>,
    pub(super) n: Option<u32>,
    pub(super) constraint: Option<Constraint>,
}

// === impl Sampling ===

impl Sampling {
    /// The same for the pipeline.
    ///
    /// # Errors
    /// A bias for what is no token id, or a `top_k` below -1.
    pub(super) fn params(self, max_new_tokens: Option<u32>) -> Result<SamplingParams, RequestError> {
        let mut violations = Violations::default();
        let top_k = self.top_k.map(|top_k| match top_k {
            // vLLM's word for "off".
            -1 => 0,
            top_k => u32::try_from(top_k).unwrap_or_else(|_| {
                violations.invalid("top_k", format!("{top_k} is not in [-1, {}]", u32::MAX));
                0
            }),
        });
        let mut logit_bias = HashMap::new();
        for (name, bias) in self.logit_bias.unwrap_or_default() {
            // `07` and `+7` are other names of a token that has one.
            match name.parse().ok().filter(|id: &u32| id.to_string() == name) {
                Some(id) => drop(logit_bias.insert(id, bias)),
                None => violations.invalid(format_args!("logit_bias.{name}"), "the name is no token id"),
            }
        }
        violations.into_result()?;
        let stop = match self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        Ok(SamplingParams {
            max_new_tokens,
            min_new_tokens: self.min_tokens,
            // The protocol's default is a temperature of 1, not greedy decoding.
            do_sample: Some(true),
            temperature: self.temperature,
            top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias,
            stop,
            stop_token_ids: self.stop_token_ids.unwrap_or_default(),
            ignore_eos: self.ignore_eos,
            // The protocol's seeds have a sign; any 64 bits are a seed.
            seed: self.seed.map(i64::cast_unsigned),
            n: self.n,
            constraint: self.constraint,
        })
    }
}

/// Whether a stream ends with the counts.
///
/// # Errors
/// Options without a stream, or one that is not supported.
pub(super) fn include_usage(stream: bool, options: Option<Object<StreamOptions>>) -> Result<bool, RequestError> {
    let Some(Object(options)) = options else { return Ok(false) };
    if !stream {
        return Err(RequestError::invalid("stream_options", "it is for streams: set `stream` to true"));
    }
    if options.continuous_usage_stats == Some(true) {
        return Err(RequestError::invalid("stream_options.continuous_usage_stats", "this is not supported"));
    }
    Ok(options.include_usage.unwrap_or(false))
}

/// The rule that options of streams go with streams.
pub(super) fn options_of_streams(request: &mut Schema) {
    either(request, [where_set([("stream_options", unset())]), set("stream", json!({ "const": true }))]);
}

/// The schema of `logit_bias`, with its limits.
pub(super) fn bound_biases(biases: &mut Schema) {
    biases.insert("maxProperties".into(), MAX_LOGIT_BIAS.into());
    let mut bias = json_schema!({ "type": "number", "format": "float" });
    LOGIT_BIAS.in_schema()(&mut bias);
    biases.insert("patternProperties".into(), json!({ "^(0|[1-9][0-9]{0,9})$": bias }));
    biases.insert("additionalProperties".into(), false.into());
}

/// The schema of `stop`, with its limits.
pub(super) fn bound_stops(stops: &mut Schema) {
    // A character has at least one byte.
    let stop = json!({ "type": "string", "minLength": 1, "maxLength": MAX_STOP_BYTES });
    let forms = json!([stop, { "type": "array", "items": stop, "maxItems": MAX_STOP }, { "type": "null" }]);
    stops.insert("anyOf".into(), forms);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_and_off_are_what_they_are_elsewhere() {
        let sampling = Sampling { temperature: Some(0.0), top_k: Some(-1), seed: Some(-1), ..Sampling::default() };
        let params = sampling.params(Some(3)).unwrap();
        assert_eq!((params.temperature, params.top_k, params.seed), (Some(0.0), Some(0), Some(u64::MAX)));
        assert_eq!(params.max_new_tokens, Some(3));
    }

    #[test]
    fn what_is_no_id_or_count_is_named() {
        let logit_bias = Some(["7", "07", "x"].map(|id| (id.to_owned(), 1.0)).into());
        let error = Sampling { top_k: Some(-2), logit_bias, ..Sampling::default() }.params(None).unwrap_err();
        let paths: Vec<_> = error.violations().iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!(paths, ["top_k", "logit_bias.07", "logit_bias.x"]);
    }

    #[test]
    fn options_need_a_stream() {
        let options = Some(Object(StreamOptions { include_usage: Some(true), ..StreamOptions::default() }));
        assert_eq!(include_usage(true, options), Ok(true));
        assert_eq!(include_usage(true, None), Ok(false));
        assert!(include_usage(false, options).is_err());
    }
}

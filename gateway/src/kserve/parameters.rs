//! Parameters: how tokens are chosen, as a request's `parameters` and its input `sampling_parameters` say it. The names
//! are those of `lockstep.v1` and, where vLLM has others, vLLM's. Clients of Triton write numbers as texts, too.

use std::{collections::HashMap, fmt::Display, str::FromStr, time::Duration};

use lockstep_proto::{
    inference::{InferParameter, infer_parameter::ParameterChoice},
    v1::SamplingParams,
};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _},
};
use serde_json::{Map, Number, Value};

use crate::{
    json::{OneOrMany, parse},
    request::RequestError,
};

/// Triton's own parameters, which choose no tokens.
const TIMEOUT: &str = "timeout";
const FINAL_RESPONSE: &str = "triton_enable_empty_final_response";

/// All that the parameters say.
#[derive(Debug)]
pub(super) struct Parameters {
    /// How tokens are chosen.
    pub(super) sampling: SamplingParams,
    /// Most likely alternatives to each token; none: no log-probabilities.
    pub(super) logprobs: Option<u32>,
    /// Leaves control tokens out of the text.
    pub(super) skip_special_tokens: Option<bool>,
    /// What the client gives the request.
    pub(super) timeout: Option<Duration>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    #[serde(alias = "max_tokens")]
    max_new_tokens: Option<Lenient<u32>>,
    #[serde(alias = "min_tokens")]
    min_new_tokens: Option<Lenient<u32>>,
    do_sample: Option<Lenient<bool>>,
    temperature: Option<Lenient<f32>>,
    top_k: Option<Lenient<i64>>,
    top_p: Option<Lenient<f32>>,
    min_p: Option<Lenient<f32>>,
    typical_p: Option<Lenient<f32>>,
    repetition_penalty: Option<Lenient<f32>>,
    presence_penalty: Option<Lenient<f32>>,
    frequency_penalty: Option<Lenient<f32>>,
    logit_bias: Option<HashMap<String, f32>>,
    stop: Option<OneOrMany<String>>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<Lenient<bool>>,
    seed: Option<Lenient<u64>>,
    n: Option<Lenient<u32>>,
    logprobs: Option<Lenient<u32>>,
    skip_special_tokens: Option<Lenient<bool>>,
}

/// A value, or a text of it.
#[derive(Debug, Clone, Copy)]
struct Lenient<T>(T);

impl<'de, T> Deserialize<'de> for Lenient<T>
where
    T: DeserializeOwned + FromStr,
    T::Err: Display,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => {
                text.parse().map(Self).map_err(|error| D::Error::custom(format_args!("{text:?}: {error}")))
            }
            value => T::deserialize(value).map(Self).map_err(D::Error::custom),
        }
    }
}

// === impl Parameters ===

impl Parameters {
    /// Reads a request's parameters, and those in the input `sampling_parameters`, which are a JSON object.
    ///
    /// # Errors
    /// Names what is no parameter, is there twice or has another type.
    pub(super) fn read(
        mut parameters: HashMap<String, InferParameter>,
        sampling_parameters: Option<&str>,
    ) -> Result<Self, RequestError> {
        let timeout = parameters.remove(TIMEOUT).map(timeout).transpose()?;
        // The last response to a request is marked whether the client asks for it or not, so that a flag says nothing.
        if let Some(wanted) = parameters.remove(FINAL_RESPONSE)
            && !matches!(wanted.parameter_choice, Some(ParameterChoice::BoolParam(_)))
        {
            return Err(RequestError::invalid(FINAL_RESPONSE, "it is no truth value"));
        }
        let mut values = match sampling_parameters {
            Some(json) => serde_json::from_str(json)
                .map_err(|error| RequestError::invalid("inputs.sampling_parameters", error.to_string()))?,
            None => Map::new(),
        };
        for (name, parameter) in parameters {
            let value = json_value(&name, parameter)?;
            if values.insert(name.clone(), value).is_some() {
                return Err(RequestError::invalid(name, "it is in sampling_parameters, too"));
            }
        }
        let named: Named = parse(Value::Object(values).to_string().as_bytes())?;
        Ok(Self {
            logprobs: named.logprobs.map(Lenient::into_inner),
            skip_special_tokens: named.skip_special_tokens.map(Lenient::into_inner),
            sampling: named.into_sampling()?,
            timeout,
        })
    }
}

fn timeout(parameter: InferParameter) -> Result<Duration, RequestError> {
    let micros = match parameter.parameter_choice {
        Some(ParameterChoice::Int64Param(micros)) => u64::try_from(micros).ok(),
        Some(ParameterChoice::Uint64Param(micros)) => Some(micros),
        _ => None,
    };
    let micros = micros.ok_or_else(|| RequestError::invalid(TIMEOUT, "it is no number of microseconds"))?;
    Ok(Duration::from_micros(micros))
}

fn json_value(name: &str, parameter: InferParameter) -> Result<Value, RequestError> {
    let value = match parameter.parameter_choice {
        Some(ParameterChoice::BoolParam(value)) => Some(Value::Bool(value)),
        Some(ParameterChoice::Int64Param(value)) => Some(value.into()),
        Some(ParameterChoice::Uint64Param(value)) => Some(value.into()),
        Some(ParameterChoice::StringParam(value)) => Some(Value::String(value)),
        Some(ParameterChoice::DoubleParam(value)) => Number::from_f64(value).map(Value::Number),
        None => None,
    };
    value.ok_or_else(|| RequestError::invalid(name, "it has no value, or one that is not finite"))
}

// === impl Named ===

impl Named {
    fn into_sampling(self) -> Result<SamplingParams, RequestError> {
        let top_k = match self.top_k {
            // vLLM's word for "off".
            Some(Lenient(-1)) => Some(0),
            Some(Lenient(top_k)) => Some(
                u32::try_from(top_k)
                    .map_err(|_| RequestError::invalid("top_k", format!("{top_k} is not in [-1, {}]", u32::MAX)))?,
            ),
            None => None,
        };
        let bias = |(id, bias): (String, f32)| match id.parse() {
            Ok(id) => Ok((id, bias)),
            Err(_) => Err(RequestError::invalid(format_args!("logit_bias.{id}"), "the name is no token id")),
        };
        let stop = match self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop],
            Some(OneOrMany::Many(stops)) => stops,
        };
        Ok(SamplingParams {
            max_new_tokens: self.max_new_tokens.map(Lenient::into_inner),
            min_new_tokens: self.min_new_tokens.map(Lenient::into_inner),
            do_sample: self.do_sample.map(Lenient::into_inner),
            temperature: self.temperature.map(Lenient::into_inner),
            top_k,
            top_p: self.top_p.map(Lenient::into_inner),
            min_p: self.min_p.map(Lenient::into_inner),
            typical_p: self.typical_p.map(Lenient::into_inner),
            repetition_penalty: self.repetition_penalty.map(Lenient::into_inner),
            presence_penalty: self.presence_penalty.map(Lenient::into_inner),
            frequency_penalty: self.frequency_penalty.map(Lenient::into_inner),
            logit_bias: self.logit_bias.into_iter().flatten().map(bias).collect::<Result<_, _>>()?,
            stop,
            stop_token_ids: self.stop_token_ids.unwrap_or_default(),
            ignore_eos: self.ignore_eos.map(Lenient::into_inner),
            seed: self.seed.map(Lenient::into_inner),
            n: self.n.map(Lenient::into_inner),
            constraint: None,
        })
    }
}

// === impl Lenient ===

impl<T> Lenient<T> {
    fn into_inner(self) -> T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameter(choice: ParameterChoice) -> InferParameter {
        InferParameter { parameter_choice: Some(choice) }
    }

    fn read(parameters: &[(&str, ParameterChoice)], json: Option<&str>) -> Result<Parameters, String> {
        let parameters = parameters.iter().map(|(name, choice)| ((*name).to_owned(), parameter(choice.clone())));
        Parameters::read(parameters.collect(), json).map_err(|error| error.to_string())
    }

    #[test]
    fn both_places_are_read_and_numbers_may_be_texts() {
        use ParameterChoice::{BoolParam, DoubleParam, Int64Param, StringParam, Uint64Param};
        let given = [
            ("temperature", DoubleParam(0.1)),
            ("top_p", Int64Param(1)),
            ("max_tokens", StringParam("7".into())),
            ("seed", Uint64Param(u64::MAX)),
            ("stop", StringParam("END".into())),
            ("ignore_eos", BoolParam(true)),
            ("timeout", Int64Param(1_500_000)),
            ("triton_enable_empty_final_response", BoolParam(true)),
        ];
        let json = r#"{"top_k": -1, "min_p": "0.25", "stop_token_ids": [3], "logit_bias": {"4": -1}, "logprobs": 2}"#;
        let parameters = read(&given, Some(json)).unwrap();
        let expected = SamplingParams {
            temperature: Some(0.1),
            top_p: Some(1.0),
            max_new_tokens: Some(7),
            seed: Some(u64::MAX),
            stop: vec!["END".into()],
            ignore_eos: Some(true),
            top_k: Some(0),
            min_p: Some(0.25),
            stop_token_ids: vec![3],
            logit_bias: [(4, -1.0)].into(),
            ..SamplingParams::default()
        };
        assert_eq!(parameters.sampling, expected);
        assert_eq!((parameters.logprobs, parameters.timeout), (Some(2), Some(Duration::from_millis(1_500))));
    }

    #[test]
    fn what_is_not_said_is_left_to_the_model() {
        assert_eq!(read(&[], None).unwrap().sampling, SamplingParams::default());
        assert_eq!(read(&[], Some(r#"{"temperature": null}"#)).unwrap().sampling, SamplingParams::default());
    }

    #[test]
    fn what_is_no_parameter_is_named() {
        use ParameterChoice::{BoolParam, DoubleParam, Int64Param, StringParam};
        for (parameters, json, expected) in [
            (vec![("sequence_id", Int64Param(1))], None, "sequence_id: unknown field `sequence_id` is not supported"),
            (vec![("temperature", DoubleParam(f64::NAN))], None, "temperature: it has no value, or one that is not"),
            (vec![("temperature", BoolParam(true))], None, "temperature: invalid type: boolean `true`, expected f32"),
            (vec![("max_tokens", StringParam("many".into()))], None, "max_tokens: \"many\": invalid digit"),
            (vec![("max_tokens", Int64Param(-1))], None, "max_tokens: invalid value: integer `-1`, expected u32"),
            (vec![("top_k", Int64Param(-2))], None, "top_k: -2 is not in [-1, 4294967295]"),
            (vec![("n", DoubleParam(1.5))], None, "n: invalid type: floating point `1.5`, expected u32"),
            (vec![("timeout", Int64Param(-1))], None, "timeout: it is no number of microseconds"),
            (vec![("triton_enable_empty_final_response", Int64Param(1))], None, "triton_enable_empty_final_response: "),
            (vec![("top_p", DoubleParam(0.5))], Some(r#"{"top_p": 0.5}"#), "top_p: it is in sampling_parameters, too"),
            (vec![], Some(r#"{"max_tokens": 1, "max_new_tokens": 1}"#), "body: duplicate field `max_new_tokens`"),
            (vec![], Some(r#"{"lora_name": "x"}"#), "lora_name: unknown field `lora_name` is not supported"),
            (vec![], Some(r#"{"stop": [1]}"#), "stop[0]: invalid type: integer `1`, expected a string"),
            (vec![], Some(r#"{"logit_bias": {"cat": 1}}"#), "logit_bias.cat: the name is no token id"),
            (vec![], Some("[]"), "inputs.sampling_parameters: invalid type: sequence, expected a map"),
            (vec![], Some("{"), "inputs.sampling_parameters: EOF"),
        ] {
            let error = read(&parameters, json).unwrap_err();
            assert!(error.starts_with(expected), "{error} is not {expected}");
        }
    }
}

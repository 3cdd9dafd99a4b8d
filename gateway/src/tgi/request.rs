//! A request, as clients of Text Generation Inference write it, and what it is for the pipeline.

use lockstep_proto::v1::{
    self, Constraint, GenerateRequest, OutputOptions, RawPrompt, SamplingParams, constraint::Kind,
};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    json::{Object, Unsupported},
    openapi::rules::{either, never, off, where_set},
    request::{MAX_LOGPROBS, RequestError, Violations},
    sampling::{
        closed,
        constraint::MAX_BYTES,
        range::{FREQUENCY_PENALTY, REPETITION_PENALTY, TEMPERATURE, TOP_P, TYPICAL_P},
        read::{MAX_STOP, MAX_STOP_BYTES},
    },
};

/// Where a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// `/`, whose body says whether it is a stream.
    Root,
    /// `/generate`.
    Generate,
    /// `/generate_stream`.
    GenerateStream,
}

/// What a client sends.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "GenerateRequest")]
pub(super) struct Body {
    /// The prompt.
    #[schemars(length(min = 1))]
    inputs: String,
    /// How tokens are chosen, and what comes beside the text.
    parameters: Option<Object<Parameters>>,
    /// Whether the answer comes as it is made.
    stream: Option<bool>,
    /// Whether the prompt is encoded as the model was trained, which it always is.
    #[schemars(extend("enum" = [true, null]))]
    add_special_tokens: Option<bool>,
}

/// How tokens are chosen, and what comes beside the text.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "GenerateParameters")]
struct Parameters {
    /// Answers that the best is chosen from: one, since nothing is chosen here.
    #[schemars(range(min = 1, max = 1))]
    best_of: Option<u32>,
    /// Whether the tokens of the prompt come with the answer. Streams have no place for them.
    decoder_input_details: Option<bool>,
    /// Whether the tokens of the answer come with it.
    details: Option<bool>,
    /// Whether tokens are drawn, rather than the most probable ones taken. Default: false, unless there are no parameters.
    do_sample: Option<bool>,
    /// Subtracted from the logits of tokens, once for each time that the answer has them.
    #[schemars(transform = FREQUENCY_PENALTY.in_schema())]
    frequency_penalty: Option<f32>,
    /// What the answer must be.
    grammar: Option<Object<Grammar>>,
    /// Most tokens of the answer, no more than the context has room for. Default: what the operator or the model says.
    #[schemars(range(min = 1))]
    max_new_tokens: Option<u32>,
    /// Divides the chances of tokens that occurred, in the prompt or since. 1: off.
    #[schemars(transform = REPETITION_PENALTY.in_schema())]
    repetition_penalty: Option<f32>,
    /// Whether the text begins with the prompt. Default: at `/` alone.
    return_full_text: Option<bool>,
    /// What random numbers are made from: the same seed gives the same answer. Default: a random one.
    seed: Option<u64>,
    /// Strings that end the answer, of at most 1024 bytes.
    #[schemars(length(max = MAX_STOP), inner(length(min = 1, max = MAX_STOP_BYTES)))]
    stop: Option<Vec<String>>,
    /// Flattens the distribution that tokens are drawn from; 0 always takes the most probable one.
    #[schemars(transform = TEMPERATURE.in_schema())]
    temperature: Option<f32>,
    /// Tokens are drawn from this many of the most probable ones, no more than the vocabulary has; 0: from all.
    top_k: Option<u32>,
    /// How many of the most probable tokens come with each.
    #[schemars(range(max = MAX_LOGPROBS))]
    top_n_tokens: Option<u32>,
    /// Tokens are drawn from the most probable ones that together have this much probability.
    #[schemars(transform = TOP_P.in_schema())]
    top_p: Option<f32>,
    /// Tokens are drawn from the most typical ones that together have this much probability.
    #[schemars(transform = TYPICAL_P.in_schema())]
    typical_p: Option<f32>,
    /// Answers have no watermark.
    #[schemars(transform = never)]
    watermark: Option<bool>,
    #[serde(rename = "adapter_id")]
    _adapter_id: Option<Unsupported>,
    #[serde(rename = "truncate")]
    _truncate: Option<Unsupported>,
}

/// What the text must be: JSON that a JSON Schema accepts, or matched as a whole by a regular expression.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "value", rename_all = "snake_case", deny_unknown_fields)]
enum Grammar {
    Json(
        /// The JSON Schema.
        #[schemars(extend("type" = ["object", "boolean"]))]
        Value,
    ),
    JsonSchema(Object<NamedSchema>),
    Regex(
        /// The regular expression.
        #[schemars(length(min = 1, max = MAX_BYTES), extend("format" = "regex"))]
        String,
    ),
}

/// A JSON Schema with a name.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "GrammarSchema")]
struct NamedSchema {
    /// For the client's own use.
    #[serde(rename = "name")]
    _name: Option<String>,
    /// The JSON Schema.
    #[schemars(extend("type" = ["object", "boolean"]))]
    schema: Value,
}

/// What a client asks for.
#[derive(Debug)]
pub(super) struct Ask {
    /// For the pipeline.
    pub(super) generate: GenerateRequest,
    /// What of the answer is shown.
    pub(super) view: View,
    /// Whether it comes in pieces.
    pub(super) stream: bool,
}

/// What of an answer a client wants to see.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct View {
    /// Stands before the generated text: the prompt, or nothing.
    pub(super) prefix: String,
    /// Counts, reason and tokens beside the text.
    pub(super) details: bool,
    /// The alternatives to each token.
    pub(super) top_tokens: bool,
}

/// The schema of a body at `/`.
pub(super) fn schema(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = generator.subschema_for::<Body>();
    either(&mut schema, [where_set([("stream", off())]), without_prefill()]);
    schema
}

/// The schema of a body at `/generate`.
pub(super) fn schema_of_whole(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = generator.subschema_for::<Body>();
    either(&mut schema, [where_set([("stream", off())])]);
    schema
}

/// The schema of a body at `/generate_stream`.
pub(super) fn schema_of_streamed(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = generator.subschema_for::<Body>();
    either(&mut schema, [where_set([("stream", json!({ "enum": [true, null] }))])]);
    either(&mut schema, [without_prefill()]);
    schema
}

fn without_prefill() -> Value {
    where_set([("parameters", where_set([("decoder_input_details", off())]))])
}

// === impl Path ===

impl Path {
    /// How metrics name it.
    pub(super) fn method(self) -> &'static str {
        match self {
            Self::Root => "tgi",
            Self::Generate => "generate",
            Self::GenerateStream => "generate_stream",
        }
    }

    fn streams(self, asked: Option<bool>) -> Result<bool, RequestError> {
        match (self, asked) {
            (Self::Root, asked) => Ok(asked.unwrap_or(false)),
            (Self::Generate, Some(true)) => Err(RequestError::invalid("stream", "/generate_stream is for streams")),
            (Self::GenerateStream, Some(false)) => {
                Err(RequestError::invalid("stream", "/generate is for whole answers"))
            }
            (path, _) => Ok(path == Self::GenerateStream),
        }
    }
}

// === impl Body ===

impl Body {
    /// Reads it, as it came to a path.
    ///
    /// # Errors
    /// Names what is wrong or not supported.
    pub(super) fn into_ask(self, path: Path) -> Result<Ask, RequestError> {
        let Self { inputs, parameters, stream, add_special_tokens } = self;
        let stream = path.streams(stream)?;
        // The API samples where nothing at all is said, and is greedy where something is and not that.
        let sampled_by_default = parameters.is_none();
        let parameters = parameters.map(|Object(parameters)| parameters).unwrap_or_default();
        let mut violations = Violations::default();
        if inputs.is_empty() {
            violations.invalid("inputs", "there is no text");
        }
        if add_special_tokens == Some(false) {
            violations.invalid("add_special_tokens", "false is not supported");
        }
        parameters.check(stream, &mut violations);
        violations.into_result()?;

        let with_prefill = parameters.decoder_input_details.unwrap_or(false);
        let details = parameters.details.unwrap_or(false) || with_prefill;
        let top_n_tokens = parameters.top_n_tokens.filter(|&n| n > 0);
        // At the root the text begins with the prompt, as it does on the Hub, unless the client says no.
        let full_text = parameters.return_full_text.unwrap_or(path == Path::Root);
        let view = View {
            prefix: if full_text { inputs.clone() } else { String::new() },
            details,
            top_tokens: top_n_tokens.is_some(),
        };
        let output = OutputOptions {
            // The tokens of streams and details have them.
            logprobs: (details || stream).then_some(top_n_tokens.unwrap_or(0)),
            prompt_logprobs: with_prefill.then_some(0),
            ..OutputOptions::default()
        };
        let generate = GenerateRequest {
            model: String::new(),
            prompt: Some(RawPrompt { prompt: Some(v1::raw_prompt::Prompt::Text(inputs)) }),
            sampling: Some(parameters.into_sampling(sampled_by_default)),
            output: Some(output),
        };
        Ok(Ask { generate, view, stream })
    }
}

// === impl Parameters ===

impl Parameters {
    fn check(&self, stream: bool, violations: &mut Violations) {
        if let Some(best_of) = self.best_of.filter(|&best_of| best_of != 1) {
            violations
                .invalid("parameters.best_of", format!("{best_of} is not 1: the best of more is not chosen here"));
        }
        if let Some(n) = self.top_n_tokens.filter(|&n| n > MAX_LOGPROBS) {
            violations.invalid("parameters.top_n_tokens", format!("{n} is over {MAX_LOGPROBS}"));
        }
        if self.watermark == Some(true) {
            violations.invalid("parameters.watermark", "true is not supported");
        }
        if stream && self.decoder_input_details == Some(true) {
            violations.invalid("parameters.decoder_input_details", "a stream has no place for them");
        }
    }

    fn into_sampling(self, sampled_by_default: bool) -> SamplingParams {
        let is_shaped =
            self.temperature.is_some() || self.top_k.is_some() || self.top_p.is_some() || self.typical_p.is_some();
        SamplingParams {
            max_new_tokens: self.max_new_tokens,
            do_sample: Some(self.do_sample.unwrap_or(sampled_by_default) || is_shaped),
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            stop: self.stop.unwrap_or_default(),
            seed: self.seed,
            constraint: self.grammar.map(|Object(grammar)| grammar.into()),
            ..SamplingParams::default()
        }
    }
}

impl From<Grammar> for Constraint {
    fn from(grammar: Grammar) -> Self {
        let kind = match grammar {
            Grammar::Json(schema) | Grammar::JsonSchema(Object(NamedSchema { schema, .. })) => {
                Kind::JsonSchema(closed(schema).to_string())
            }
            Grammar::Regex(regex) => Kind::Regex(regex),
        };
        Self { kind: Some(kind) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn read(path: Path, text: &str) -> Result<Ask, String> {
        let body = parse::<Body>(text.as_bytes()).map_err(|error| error.to_string())?;
        body.into_ask(path).map_err(|error| error.to_string())
    }

    fn sampling(text: &str) -> SamplingParams {
        read(Path::Generate, text).unwrap().generate.sampling.unwrap()
    }

    #[test]
    fn tokens_are_sampled_where_the_api_samples_them() {
        for (text, sampled) in [
            (r#"{"inputs": "a"}"#, true),
            (r#"{"inputs": "a", "parameters": {}}"#, false),
            (r#"{"inputs": "a", "parameters": {"do_sample": true}}"#, true),
            (r#"{"inputs": "a", "parameters": {"do_sample": false, "top_p": 0.5}}"#, true),
            (r#"{"inputs": "a", "parameters": {"temperature": null, "seed": 1}}"#, false),
        ] {
            assert_eq!(sampling(text).do_sample, Some(sampled), "{text}");
        }
        let text = r#"{"inputs": "a", "parameters": {"max_new_tokens": 3, "stop": ["x"], "typical_p": 0.5}}"#;
        let given = sampling(text);
        assert_eq!((given.max_new_tokens, given.stop, given.typical_p), (Some(3), vec!["x".to_owned()], Some(0.5)));
    }

    #[test]
    fn the_path_says_whether_it_is_a_stream_and_has_the_prompt() {
        for (path, more, stream, prefix) in [
            (Path::Root, "", false, "a"),
            (Path::Root, r#", "stream": true"#, true, "a"),
            (Path::Root, r#", "parameters": {"return_full_text": false}"#, false, ""),
            (Path::Generate, "", false, ""),
            (Path::Generate, r#", "stream": false, "parameters": {"return_full_text": true}"#, false, "a"),
            (Path::GenerateStream, "", true, ""),
        ] {
            let ask = read(path, &format!(r#"{{"inputs": "a"{more}}}"#)).unwrap();
            assert_eq!((ask.stream, ask.view.prefix.as_str()), (stream, prefix), "{path:?} {more}");
        }
    }

    #[test]
    fn log_probabilities_are_asked_for_where_they_are_shown() {
        for (path, parameters, expected) in [
            (Path::Generate, "{}", (None, None)),
            (Path::Generate, r#"{"top_n_tokens": 2}"#, (None, None)),
            (Path::Generate, r#"{"details": true}"#, (Some(0), None)),
            (Path::Generate, r#"{"details": true, "top_n_tokens": 2}"#, (Some(2), None)),
            (Path::Generate, r#"{"decoder_input_details": true}"#, (Some(0), Some(0))),
            (Path::GenerateStream, r#"{"top_n_tokens": 2}"#, (Some(2), None)),
        ] {
            let ask = read(path, &format!(r#"{{"inputs": "a", "parameters": {parameters}}}"#)).unwrap();
            let output = ask.generate.output.unwrap();
            assert_eq!((output.logprobs, output.prompt_logprobs), expected, "{path:?} {parameters}");
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (path, text, expected) in [
            (Path::Generate, "{}", "body: missing field `inputs`"),
            (Path::Generate, r#"{"inputs": ""}"#, "inputs: there is no text"),
            (Path::Generate, r#"{"inputs": ["a"]}"#, "inputs: invalid type: sequence, expected a string"),
            (Path::Generate, r#"{"inputs": "a", "stream": true}"#, "stream: /generate_stream is for streams"),
            (Path::GenerateStream, r#"{"inputs": "a", "stream": false}"#, "stream: /generate is for whole answers"),
            (Path::Generate, r#"{"inputs": "a", "add_special_tokens": false}"#, "add_special_tokens: false is not"),
            (Path::Generate, r#"{"inputs": "a", "what": 1}"#, "what: unknown field `what` is not supported"),
        ] {
            let error = read(path, text).unwrap_err();
            assert!(error.starts_with(expected), "{error} is not {expected}");
        }
        for (parameters, expected) in [
            (r#"{"best_of": 2}"#, "parameters.best_of: 2 is not 1"),
            (r#"{"top_n_tokens": 21}"#, "parameters.top_n_tokens: 21 is over 20"),
            (r#"{"watermark": true}"#, "parameters.watermark: true is not supported"),
            (r#"{"grammar": {"type": "yaml", "value": "a"}}"#, "parameters.grammar"),
            (r#"{"grammar": {"type": "regex", "value": 1}}"#, "parameters.grammar"),
            (r#"{"truncate": 5}"#, "parameters.truncate: this is not supported"),
            (r#"{"adapter_id": "x"}"#, "parameters.adapter_id: this is not supported"),
            (r#"{"decoder_input_details": true}"#, "parameters.decoder_input_details: a stream has no place"),
            (r#"{"top_k": -1}"#, "parameters.top_k: invalid value: integer `-1`"),
            (r#"{"stop": "x"}"#, "parameters.stop: invalid type: string"),
            (r#"{"what": 1}"#, "parameters.what: unknown field `what` is not supported"),
        ] {
            let text = format!(r#"{{"inputs": "a", "parameters": {parameters}}}"#);
            let error = read(Path::GenerateStream, &text).unwrap_err();
            assert!(error.starts_with(expected), "{error} is not {expected}");
        }
    }

    #[test]
    fn a_grammar_is_a_constraint() {
        let kind = |grammar: &str| {
            let text = format!(r#"{{"inputs": "a", "parameters": {{"grammar": {grammar}}}}}"#);
            sampling(&text).constraint.unwrap().kind.unwrap()
        };
        let schema = r#"{"type":"object","properties":{}}"#;
        let closed = Kind::JsonSchema(r#"{"type":"object","properties":{},"additionalProperties":false}"#.into());
        assert_eq!(kind(r#"{"type": "regex", "value": "a+"}"#), Kind::Regex("a+".into()));
        assert_eq!(kind(&format!(r#"{{"type": "json", "value": {schema}}}"#)), closed);
        let named = format!(r#"{{"type": "json_schema", "value": {{"name": "x", "schema": {schema}}}}}"#);
        assert_eq!(kind(&named), closed);
    }

    #[test]
    fn what_changes_nothing_is_taken() {
        let parameters = r#"{"best_of": 1, "watermark": false, "grammar": null, "truncate": null, "adapter_id": null}"#;
        let text = format!(r#"{{"inputs": "a", "add_special_tokens": true, "parameters": {parameters}}}"#);
        assert!(read(Path::Generate, &text).is_ok());
    }
}

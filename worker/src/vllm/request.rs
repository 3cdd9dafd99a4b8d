//! Requests become those of `lockstep.worker.v1`, which are checked as ever ([`request`](crate::request)). Checked here is
//! only what has no place there.

use std::{collections::HashMap, sync::Arc, time::Instant};

use lockstep_proto::{
    error::FieldViolation,
    fields,
    vllm::grpc::engine::{
        ChoiceConstraint, EmbedRequest, GenerateRequest, SamplingParams, generate_request::Input,
        sampling_params::Constraint as Asking,
    },
    worker::v1::{self as worker, Constraint, Pooling, ResolvedSampling, constraint::Kind},
};
use serde_json::Value;

use super::{files::Facts, stop};
use crate::request;

/// Longest name of a request. Unit: bytes. smg's have 66 and more.
const MAX_NAME_BYTES: usize = 256;

/// Bytes of it that the logs of all ranks have.
const LOG_NAME_BYTES: usize = 64;

/// Most texts to choose from.
const MAX_CHOICES: usize = 1024;

/// What the interface calls the fields of `lockstep.worker.v1`.
const NAMES: &fields::Names = &[
    ("prompt_token_ids", "tokenized.input_ids"),
    ("sampling.max_new_tokens", "sampling_params.max_tokens"),
    ("sampling.min_new_tokens", "sampling_params.min_tokens"),
    ("sampling.constraint.", "sampling_params."),
    ("sampling", "sampling_params"),
    ("logprobs", "sampling_params.logprobs"),
    ("prompt_logprobs", "sampling_params.prompt_logprobs"),
    ("n", "sampling_params.n"),
];

/// The names of a request's fields.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Names {
    /// The field that became a grammar.
    grammar: Option<&'static str>,
}

/// What a request asks for beside what the worker is asked.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) names: Names,
    /// Whether tokens go out as they come.
    pub(super) streams: bool,
    pub(super) n: u32,
    /// The prompt.
    pub(super) prompt: Vec<u32>,
    /// Alternatives with log-probabilities.
    pub(super) n_top: u32,
    /// The same for the prompt.
    pub(super) n_prompt_top: u32,
    /// Ids that end a choice and are not the model's own.
    pub(super) stop_token_ids: Vec<u32>,
    /// What looks for stop strings, if there are any.
    pub(super) stop: Option<Stop>,
}

/// What looks for stop strings.
#[derive(Debug)]
pub(super) struct Stop {
    pub(super) search: stop::StopSearch,
    pub(super) facts: Arc<Facts>,
    /// Tokens before which nothing is looked for.
    pub(super) min_tokens: u32,
}

/// Notes what is wrong.
#[derive(Default)]
struct Violations(Vec<FieldViolation>);

// === impl Names ===

impl Names {
    pub(super) fn name(self, path: &str) -> String {
        match self.grammar {
            Some(field) if path == "sampling.constraint.lark" => field.to_owned(),
            _ => fields::name(NAMES, path),
        }
    }
}

// === impl Violations ===

impl Violations {
    fn note(&mut self, path: &str, message: impl Into<String>) {
        self.0.push(FieldViolation { path: path.to_owned(), message: message.into() });
    }

    /// A number that must not be negative.
    fn unsigned(&mut self, path: &str, number: i32) -> u32 {
        u32::try_from(number).unwrap_or_else(|_| {
            self.note(path, format!("{number} is negative"));
            0
        })
    }
}

/// Looks at what decides how much is kept for a request, before anything is.
///
/// # Errors
/// A name that is too long, or too many choices.
pub(super) fn check_bounds(request: &GenerateRequest) -> Result<(), Vec<FieldViolation>> {
    let mut violations = Violations::default();
    let n_bytes = request.request_id.len();
    if n_bytes > MAX_NAME_BYTES {
        violations.note("request_id", format!("has {n_bytes} bytes, more than {MAX_NAME_BYTES}"));
    }
    let n = request.sampling_params.as_ref().map_or(0, |params| params.n);
    if n > request::MAX_CHOICES {
        violations.note("sampling_params.n", format!("is {n}, which is not in 1..={}", request::MAX_CHOICES));
    }
    if violations.0.is_empty() { Ok(()) } else { Err(violations.0) }
}

/// What the worker is asked, and what else is. `longest`: tokens of prompt and output together.
///
/// # Errors
/// Every field that asks for what a worker has not.
pub(super) fn generation(
    request: GenerateRequest,
    facts: &Arc<Facts>,
    longest: usize,
    deadline: Option<Instant>,
) -> Result<(worker::GenerateRequest, Asked), Vec<FieldViolation>> {
    let mut violations = Violations::default();
    refuse_what_is_not_here(&request, &mut violations);
    let prompt = match request.input {
        Some(Input::Tokenized(tokenized)) => tokenized.input_ids,
        Some(Input::Text(_)) => {
            violations.note("text", "a worker has no tokenizer: send tokenized.input_ids");
            Vec::new()
        }
        None => Vec::new(),
    };
    let mut params = request.sampling_params.unwrap_or_default();
    let mut names = Names::default();
    let constraint = match params.constraint.take() {
        Some(asking) => constraint(asking, &mut names, &mut violations),
        None => None,
    };
    let mut count = |path, number: Option<i32>| number.map(|number| violations.unsigned(path, number));
    let logprobs = count("sampling_params.logprobs", params.logprobs);
    let prompt_logprobs = count("sampling_params.prompt_logprobs", params.prompt_logprobs);
    let stop = stop_search(&mut params, facts, &mut violations);
    let logit_bias = logit_bias(&params.logit_bias, &mut violations);
    let n = if params.n == 0 { 1 } else { params.n };
    if !violations.0.is_empty() {
        return Err(violations.0);
    }
    let asked = Asked {
        names,
        streams: request.stream,
        n,
        prompt: prompt.clone(),
        n_top: logprobs.unwrap_or(0),
        n_prompt_top: prompt_logprobs.unwrap_or(0),
        stop_token_ids: params.stop_token_ids.clone(),
        stop,
    };
    let room = longest.saturating_sub(prompt.len()).max(1) as u32;
    let request = worker::GenerateRequest {
        request_id: log_name(&request.request_id),
        prompt_token_ids: prompt,
        sampling: Some(ResolvedSampling { constraint, logit_bias, ..resolved(params, facts, room) }),
        n,
        logprobs,
        prompt_logprobs,
        budget_ms: budget_ms(deadline),
    };
    Ok((request, asked))
}

/// What the worker is asked, whose defaults are those of our own gateway.
pub(super) fn embedding(request: EmbedRequest, deadline: Option<Instant>) -> (worker::EmbedRequest, Names) {
    let request = worker::EmbedRequest {
        request_id: log_name(&request.request_id),
        prompt_token_ids: request.tokenized.unwrap_or_default().input_ids,
        pooling: Pooling::Mean.into(),
        budget_ms: budget_ms(deadline),
    };
    (request, Names::default())
}

/// The beginning of a request's name, for logs.
fn log_name(id: &str) -> String {
    let fits = |(start, letter): &(usize, char)| start + letter.len_utf8() <= LOG_NAME_BYTES;
    id.char_indices().take_while(fits).map(|(_, letter)| letter).collect()
}

fn budget_ms(deadline: Option<Instant>) -> Option<u32> {
    let left = deadline?.saturating_duration_since(Instant::now());
    Some(u32::try_from(left.as_millis()).unwrap_or(u32::MAX))
}

fn refuse_what_is_not_here(request: &GenerateRequest, violations: &mut Violations) {
    let params = request.sampling_params.as_ref();
    let media = "the models here read text alone";
    let transfer = "keys and values do not travel between groups";
    for (is_set, path, why) in [
        (request.mm_inputs.is_some(), "mm_inputs", media),
        (!request.extra_mm_inputs.is_empty(), "extra_mm_inputs", media),
        (request.media_refs.is_some(), "media_refs", media),
        (request.kv_transfer_params.is_some(), "kv_transfer_params", transfer),
        (request.kv_transfer_params_json.is_some(), "kv_transfer_params_json", transfer),
        (
            params.is_some_and(|params| params.truncate_prompt_tokens.is_some()),
            "sampling_params.truncate_prompt_tokens",
            "prompts are not cut here",
        ),
    ] {
        if is_set {
            violations.note(path, why);
        }
    }
    if let Some(rank @ (..=-1 | 1..)) = request.data_parallel_rank {
        violations.note("data_parallel_rank", format!("{rank} is not 0, and a group is one"));
    }
}

/// What the worker is told. Zeros that stand for "not set" become what that means.
fn resolved(params: SamplingParams, facts: &Facts, room: u32) -> ResolvedSampling {
    let one_unless_set = |value: f32| if value == 0.0 { 1.0 } else { value };
    let mut stop_token_ids = params.stop_token_ids;
    if !params.ignore_eos {
        stop_token_ids.extend(&facts.special.end);
    }
    ResolvedSampling {
        max_new_tokens: params.max_tokens.unwrap_or(room),
        min_new_tokens: params.min_tokens,
        temperature: params.temperature.unwrap_or(1.0),
        top_k: params.top_k,
        top_p: one_unless_set(params.top_p),
        min_p: params.min_p,
        typical_p: 1.0,
        repetition_penalty: one_unless_set(params.repetition_penalty),
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        stop_token_ids,
        seed: params.seed.map_or_else(random_seed, |seed| i64::from(seed) as u64),
        ..ResolvedSampling::default()
    }
}

fn random_seed() -> u64 {
    getrandom::u64().expect("the system has a source of random numbers")
}

fn logit_bias(wire: &HashMap<i32, f32>, violations: &mut Violations) -> HashMap<u32, f32> {
    wire.iter().map(|(id, bias)| (violations.unsigned("sampling_params.logit_bias", *id), *bias)).collect()
}

fn stop_search(params: &mut SamplingParams, facts: &Arc<Facts>, violations: &mut Violations) -> Option<Stop> {
    let path = "sampling_params.stop";
    let strings = std::mem::take(&mut params.stop);
    if strings.is_empty() {
        return None;
    }
    if strings.len() > stop::MAX_STRINGS {
        violations.note(path, format!("has {} entries, more than {}", strings.len(), stop::MAX_STRINGS));
    }
    if let Some(at) = strings.iter().position(|string| !(1..=stop::MAX_BYTES).contains(&string.len())) {
        let n_bytes = strings[at].len();
        let message = format!("has {n_bytes} bytes, which is not in 1..={}", stop::MAX_BYTES);
        violations.note(&format!("{path}[{at}]"), message);
    }
    if facts.token_bytes.is_none() {
        violations.note(path, "this model's files do not say which bytes its tokens stand for");
    }
    let search = stop::StopSearch::new(strings.into());
    Some(Stop { search, facts: Arc::clone(facts), min_tokens: params.min_tokens })
}

fn constraint(asking: Asking, names: &mut Names, violations: &mut Violations) -> Option<Constraint> {
    let kind = match asking {
        Asking::JsonSchema(schema) => Kind::JsonSchema(schema),
        Asking::Regex(regex) => Kind::Regex(regex),
        Asking::JsonObject(true) => Kind::JsonSchema(r#"{"type":"object"}"#.to_owned()),
        Asking::JsonObject(false) => return None,
        Asking::Grammar(grammar) => {
            names.grammar = Some("sampling_params.grammar");
            if grammar.contains("::=") {
                violations.note("sampling_params.grammar", "is EBNF; llguidance's form of Lark is understood");
            }
            Kind::Lark(grammar)
        }
        Asking::Choice(ChoiceConstraint { choices }) => {
            names.grammar = Some("sampling_params.choice");
            if !(1..=MAX_CHOICES).contains(&choices.len()) || choices.iter().any(String::is_empty) {
                let message = format!("has {} texts, not 1 to {MAX_CHOICES} that are not empty", choices.len());
                violations.note("sampling_params.choice", message);
            }
            Kind::Lark(one_of(&choices))
        }
        Asking::StructuralTag(_) => {
            violations.note("sampling_params.structural_tag", "is no constraint that is held here");
            return None;
        }
    };
    Some(Constraint { kind: Some(kind) })
}

/// A grammar of one terminal: of rules, the longer of two texts would hide the shorter one.
fn one_of(choices: &[String]) -> String {
    // A string of Lark is one of JSON, but for DEL, which must be escaped.
    let texts = choices.iter().map(|text| Value::from(text.as_str()).to_string().replace('\u{7f}', "\\u007f"));
    format!("start: CHOICE\nCHOICE: {}\n", texts.collect::<Vec<_>>().join(" | "))
}

#[cfg(test)]
mod tests;

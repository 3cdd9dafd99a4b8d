//! A valid request: what the wire says, checked once, as the engine takes it. Past this file nothing doubts a job.

use std::time::{Duration, Instant};

use lockstep_proto::{
    error::FieldViolation,
    worker::v1::{
        self as wire, EmbedRequest, GenerateRequest, Pooling as WirePooling, ResolvedSampling, constraint::Kind,
    },
};

use crate::{
    constraint::{self, Constraint},
    engine::{EmbeddingJob, GenerationId, Job},
    sampler::SamplingParams,
    scheduler::Pooling,
};

/// Choices of one request; the scheduler's queue bounds them further.
pub(crate) const MAX_CHOICES: u32 = 128;
const MAX_LOGPROBS: u32 = 20;
const MAX_LOGIT_BIAS: usize = 300;
/// The API's 64 and every end-of-turn token of a model.
const MAX_STOP_TOKENS: usize = 128;
const MAX_REQUEST_ID_BYTES: usize = 64;

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Longest prompt and output together.
    pub context_length: usize,
}

/// Checks a request and makes it a job, and what is left to be compiled for it.
///
/// # Errors
/// Every field that breaks a rule of the contract.
pub fn valid_job(
    request: GenerateRequest,
    limits: Limits,
    now: Instant,
) -> Result<(Job, Option<Constraint>), Vec<FieldViolation>> {
    let mut check = Check { violations: Vec::new() };
    check.request_id(&request.request_id);
    check.prompt(&request.prompt_token_ids, limits.vocab_size);
    let (n_tokens, context_length) = (request.prompt_token_ids.len(), limits.context_length);
    check.that(n_tokens < context_length, "prompt_token_ids", || {
        format!("has {n_tokens} tokens; the context of {context_length} takes one less at most")
    });
    check.that((1..=MAX_CHOICES).contains(&request.n), "n", || format!("{} is not in 1..={MAX_CHOICES}", request.n));
    for (path, value) in [("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)] {
        let value = value.unwrap_or(0);
        check.that(value <= MAX_LOGPROBS, path, || format!("{value} is more than {MAX_LOGPROBS}"));
    }
    let mut sampling = request.sampling.unwrap_or_default();
    check.sampling(&sampling, limits);
    let constraint = sampling.constraint.take().and_then(|constraint| check.constraint(constraint));
    if !check.violations.is_empty() {
        return Err(check.violations);
    }
    let job = Job {
        request_id: request.request_id,
        prompt: request.prompt_token_ids,
        max_new_tokens: sampling.max_new_tokens,
        params: params(sampling),
        n: request.n,
        logprobs: request.logprobs,
        prompt_logprobs: request.prompt_logprobs,
        deadline: deadline(request.budget_ms, now),
        constraint: None,
    };
    Ok((job, constraint))
}

/// Checks a request and makes it the job of embedding its prompt.
///
/// # Errors
/// Every field that breaks a rule of the contract.
pub fn valid_embedding(
    request: EmbedRequest,
    limits: Limits,
    now: Instant,
) -> Result<EmbeddingJob, Vec<FieldViolation>> {
    let mut check = Check { violations: Vec::new() };
    check.request_id(&request.request_id);
    check.prompt(&request.prompt_token_ids, limits.vocab_size);
    let (n_tokens, context_length) = (request.prompt_token_ids.len(), limits.context_length);
    check.that(n_tokens <= context_length, "prompt_token_ids", || {
        format!("has {n_tokens} tokens, more than the context of {context_length}")
    });
    let pooling = match request.pooling() {
        WirePooling::Mean => Some(Pooling::Mean),
        WirePooling::Last => Some(Pooling::Last),
        // So is a value that this version does not know.
        WirePooling::Unspecified => None,
    };
    check.that(pooling.is_some(), "pooling", || format!("{} is no way to pool", request.pooling));
    match pooling.filter(|_| check.violations.is_empty()) {
        None => Err(check.violations),
        Some(pooling) => Ok(EmbeddingJob {
            request_id: request.request_id,
            prompt: request.prompt_token_ids,
            pooling,
            deadline: deadline(request.budget_ms, now),
        }),
    }
}

fn deadline(budget_ms: Option<u32>, now: Instant) -> Option<Instant> {
    budget_ms.map(|ms| now + Duration::from_millis(ms.into()))
}

/// Checks the name of a generation.
///
/// # Errors
/// If it cannot be one.
pub fn valid_generation(id: &[u8]) -> Result<GenerationId, Vec<FieldViolation>> {
    let message = || format!("has {} bytes instead of 16", id.len());
    let violation = |_| vec![FieldViolation { path: "generation_id".to_owned(), message: message() }];
    id.try_into().map(GenerationId).map_err(violation)
}

fn params(sampling: ResolvedSampling) -> SamplingParams {
    let mut logit_bias: Vec<(u32, f32)> = sampling.logit_bias.into_iter().collect();
    // A map has no order of its own; sums must not depend on one.
    logit_bias.sort_by_key(|(id, _)| *id);
    SamplingParams {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        typical_p: sampling.typical_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        logit_bias,
        stop_token_ids: sampling.stop_token_ids,
        min_new_tokens: sampling.min_new_tokens,
        seed: sampling.seed,
    }
}

/// Collects violations.
struct Check {
    violations: Vec<FieldViolation>,
}

impl Check {
    fn that(&mut self, holds: bool, path: &str, message: impl FnOnce() -> String) {
        if !holds {
            self.violations.push(FieldViolation { path: path.to_owned(), message: message() });
        }
    }

    fn request_id(&mut self, id: &str) {
        let n_bytes = id.len();
        self.that((1..=MAX_REQUEST_ID_BYTES).contains(&n_bytes), "request_id", || {
            format!("has {n_bytes} bytes, which is not in 1..={MAX_REQUEST_ID_BYTES}")
        });
    }

    fn prompt(&mut self, ids: &[u32], vocab_size: usize) {
        self.that(!ids.is_empty(), "prompt_token_ids", || "is empty".into());
        if let Some(at) = ids.iter().position(|id| *id as usize >= vocab_size) {
            self.that(false, &format!("prompt_token_ids[{at}]"), || {
                format!("{} is not below the vocabulary's size {vocab_size}", ids[at])
            });
        }
    }

    fn sampling(&mut self, sampling: &ResolvedSampling, limits: Limits) {
        let vocab_size = limits.vocab_size;
        let ids = sampling.logit_bias.keys().chain(&sampling.stop_token_ids);
        let unknown = ids.filter(|id| **id as usize >= vocab_size).min().copied();
        self.that(unknown.is_none(), "sampling", || {
            format!("token id {} is not below the vocabulary's size {vocab_size}", unknown.unwrap_or_default())
        });
        self.that(sampling.max_new_tokens >= 1, "sampling.max_new_tokens", || "must be at least 1".into());
        self.that(sampling.min_new_tokens <= sampling.max_new_tokens, "sampling.min_new_tokens", || {
            format!("{} is more than max_new_tokens = {}", sampling.min_new_tokens, sampling.max_new_tokens)
        });
        self.range("temperature", sampling.temperature, 0.0, 100.0);
        self.range("top_p", sampling.top_p, f32::MIN_POSITIVE, 1.0);
        self.range("min_p", sampling.min_p, 0.0, 1.0);
        self.range("typical_p", sampling.typical_p, f32::MIN_POSITIVE, 1.0);
        self.range("repetition_penalty", sampling.repetition_penalty, f32::MIN_POSITIVE, 100.0);
        self.range("presence_penalty", sampling.presence_penalty, -2.0, 2.0);
        self.range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0);
        for bias in sampling.logit_bias.values() {
            self.range("logit_bias", *bias, -100.0, 100.0);
        }
        for (name, len, max) in [
            ("logit_bias", sampling.logit_bias.len(), MAX_LOGIT_BIAS),
            ("stop_token_ids", sampling.stop_token_ids.len(), MAX_STOP_TOKENS),
        ] {
            self.that(len <= max, &format!("sampling.{name}"), || format!("has {len} entries, more than {max}"));
        }
    }

    fn constraint(&mut self, constraint: wire::Constraint) -> Option<Constraint> {
        let constraint = match constraint.kind {
            Some(Kind::JsonSchema(text)) => Constraint::JsonSchema(text),
            Some(Kind::Regex(text)) => Constraint::Regex(text),
            Some(Kind::Lark(text)) => Constraint::Lark(text),
            None => {
                self.that(false, "sampling.constraint", || "is not set".into());
                return None;
            }
        };
        let n_bytes = constraint.text().len();
        self.that(n_bytes <= constraint::MAX_BYTES, constraint.field(), || {
            format!("has {n_bytes} bytes, more than {}", constraint::MAX_BYTES)
        });
        Some(constraint)
    }

    /// NaN is in no range.
    fn range(&mut self, name: &str, value: f32, min: f32, max: f32) {
        self.that((min..=max).contains(&value), &format!("sampling.{name}"), || {
            format!("{value} is not between {min} and {max}")
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocab_size: 100, context_length: 16 };

    fn request() -> GenerateRequest {
        GenerateRequest {
            request_id: "r".into(),
            prompt_token_ids: vec![1, 2, 3],
            sampling: Some(ResolvedSampling {
                max_new_tokens: 4,
                top_p: 1.0,
                typical_p: 1.0,
                repetition_penalty: 1.0,
                ..Default::default()
            }),
            n: 1,
            ..Default::default()
        }
    }

    fn check(path: &str, change: impl FnOnce(&mut GenerateRequest, &mut ResolvedSampling)) {
        let mut request = request();
        let mut sampling = request.sampling.take().unwrap();
        change(&mut request, &mut sampling);
        request.sampling = Some(sampling);
        let violations = valid_job(request, LIMITS, Instant::now()).expect_err(path);
        let paths: Vec<_> = violations.iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!(paths, [path]);
    }

    #[test]
    fn a_request_within_all_limits_becomes_a_job() {
        let (job, constraint) = valid_job(request(), LIMITS, Instant::now()).expect("valid");
        assert_eq!(constraint, None);
        assert_eq!((job.prompt, job.n, job.max_new_tokens), (vec![1, 2, 3], 1, 4));
    }

    #[test]
    fn a_generation_is_named_by_16_bytes() {
        assert_eq!(valid_generation(&[7; 16]).expect("valid"), GenerationId([7; 16]));
        for wrong in [0, 15, 17] {
            let violations = valid_generation(&vec![7; wrong]).expect_err("no name");
            assert_eq!(violations[0].message, format!("has {wrong} bytes instead of 16"));
        }
    }

    #[test]
    fn a_field_out_of_range_is_named() {
        check("request_id", |request, _| request.request_id.clear());
        check("prompt_token_ids", |request, _| request.prompt_token_ids.clear());
        check("prompt_token_ids", |request, _| request.prompt_token_ids = vec![1; 16]);
        check("prompt_token_ids[1]", |request, _| request.prompt_token_ids[1] = 100);
        check("n", |request, _| request.n = 0);
        check("n", |request, _| request.n = 129);
        check("logprobs", |request, _| request.logprobs = Some(21));
        check("sampling.max_new_tokens", |_, sampling| sampling.max_new_tokens = 0);
        check("sampling.min_new_tokens", |_, sampling| sampling.min_new_tokens = 5);
        check("sampling.temperature", |_, sampling| sampling.temperature = f32::NAN);
        check("sampling.top_p", |_, sampling| sampling.top_p = 0.0);
        check("sampling.repetition_penalty", |_, sampling| sampling.repetition_penalty = 0.0);
        check("sampling.logit_bias", |_, sampling| {
            sampling.logit_bias.insert(1, f32::INFINITY);
        });
        check("sampling", |_, sampling| sampling.stop_token_ids.push(100));
        check("sampling.constraint", |_, sampling| sampling.constraint = Some(wire::Constraint { kind: None }));
        check("sampling.constraint.regex", |_, sampling| {
            sampling.constraint = Some(wire::Constraint { kind: Some(Kind::Regex("a".repeat(65_537))) });
        });
    }

    #[test]
    fn a_constraint_is_left_to_be_compiled() {
        let mut request = request();
        let constraint = wire::Constraint { kind: Some(Kind::Lark("start: \"a\"".into())) };
        request.sampling.as_mut().expect("it has some").constraint = Some(constraint);
        let (_, constraint) = valid_job(request, LIMITS, Instant::now()).expect("valid");
        assert_eq!(constraint, Some(Constraint::Lark("start: \"a\"".into())));
    }

    fn embed_request() -> EmbedRequest {
        EmbedRequest {
            request_id: "r".into(),
            prompt_token_ids: vec![1; 16],
            pooling: WirePooling::Last.into(),
            budget_ms: Some(5),
        }
    }

    #[test]
    fn a_prompt_that_fills_the_context_can_be_embedded() {
        let now = Instant::now();
        let job = valid_embedding(embed_request(), LIMITS, now).expect("valid");
        assert_eq!(
            (job.prompt.len(), job.pooling, job.deadline),
            (16, Pooling::Last, Some(now + Duration::from_millis(5)))
        );
    }

    #[test]
    fn a_field_of_an_embedding_out_of_range_is_named() {
        let check = |path: &str, change: fn(&mut EmbedRequest)| {
            let mut request = embed_request();
            change(&mut request);
            let violations = valid_embedding(request, LIMITS, Instant::now()).expect_err(path);
            assert_eq!(violations.iter().map(|violation| violation.path.as_str()).collect::<Vec<_>>(), [path]);
        };
        check("request_id", |request| request.request_id = "r".repeat(65));
        check("prompt_token_ids", |request| request.prompt_token_ids.clear());
        check("prompt_token_ids", |request| request.prompt_token_ids.push(1));
        check("prompt_token_ids[15]", |request| request.prompt_token_ids[15] = 100);
        check("pooling", |request| request.pooling = 0);
        check("pooling", |request| request.pooling = 77);
    }
}

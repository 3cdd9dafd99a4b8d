//! Which of request, policy, model and contract decides a parameter, and what each may not do.

use lockstep_proto::{
    tokenizer::v1::{GenerationDefaults, GetTokenizerResponse},
    v1::{Constraint, OutputOptions, RawPrompt, SamplingParams, constraint::Kind, raw_prompt::Prompt},
    worker::v1 as worker,
};

use super::*;
use crate::request::{ModelFacts, Rules, ValidGenerate, ViolationKind};

/// A model with a vocabulary of 100, a context of 64 and two end-of-turn tokens.
fn facts(generation_defaults: GenerationDefaults) -> ModelFacts {
    let tokenizer = GetTokenizerResponse {
        vocab_size: 100,
        eos_token_ids: vec![7, 3],
        generation_defaults: Some(generation_defaults),
        ..GetTokenizerResponse::default()
    };
    ModelFacts::new(&tokenizer, 64).unwrap()
}

fn read(
    policy: &str,
    model: GenerationDefaults,
    sampling: SamplingParams,
    output: OutputOptions,
) -> Result<ValidGenerate, RequestError> {
    let (facts, policy) = (facts(model), Policy::parse(policy).unwrap());
    let rules = Rules { facts: &facts, policy: policy.for_model("m") };
    let request = lockstep_proto::v1::GenerateRequest {
        prompt: Some(RawPrompt { prompt: Some(Prompt::Text("x".into())) }),
        sampling: Some(sampling),
        output: Some(output),
        ..Default::default()
    };
    ValidGenerate::new(request, rules)
}

/// Resolves for a prompt of 14 tokens, which leaves 50.
fn resolve(policy: &str, model: GenerationDefaults, sampling: SamplingParams) -> ResolvedSampling {
    read(policy, model, sampling, OutputOptions::default()).unwrap().sampling().resolve(14).unwrap()
}

#[track_caller]
fn check_over_policy(policy: &str, sampling: SamplingParams, expected: &str) {
    let error = read(policy, GenerationDefaults::default(), sampling, OutputOptions::default()).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (ViolationKind::OverPolicy, expected));
}

#[track_caller]
fn check_policy(text: &str, expected: &str) {
    assert_eq!(Policy::parse(text).unwrap_err().to_string(), expected);
}

fn asked() -> SamplingParams {
    SamplingParams::default()
}

fn silent() -> GenerationDefaults {
    GenerationDefaults::default()
}

#[test]
fn with_nothing_set_anywhere_the_contract_s_defaults_hold() {
    let resolved = resolve("", silent(), asked());
    let expected = ResolvedSampling {
        max_new_tokens: 50,
        min_new_tokens: 0,
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: [].into(),
        stop_token_ids: vec![3, 7],
        seed: resolved.seed,
        constraint: None,
    };
    assert_eq!(resolved, expected);
}

#[test]
fn the_request_goes_before_the_policy_and_the_policy_before_the_model() {
    let model = GenerationDefaults {
        do_sample: Some(true),
        temperature: Some(0.5),
        top_k: Some(50),
        top_p: Some(0.9),
        repetition_penalty: Some(1.1),
        ..silent()
    };
    let policy = "[default.defaults]\ntop_p = 0.8\ntop_k = 40\npresence_penalty = 0.25";
    let resolved = resolve(policy, model, SamplingParams { top_k: Some(30), ..asked() });
    assert_eq!((resolved.top_k, resolved.top_p, resolved.temperature), (30, 0.8, 0.5));
    assert_eq!((resolved.repetition_penalty, resolved.presence_penalty), (1.1, 0.25));
}

#[test]
fn what_is_said_to_be_the_default_is_what_a_request_that_samples_gets() {
    let model = GenerationDefaults { temperature: Some(0.6), top_p: Some(0.9), max_new_tokens: Some(40), ..silent() };
    let text = "[default.caps]\nmax_new_tokens = 30\n[default.defaults]\nrepetition_penalty = 1.2";
    let (facts, policy) = (facts(model), Policy::parse(text).unwrap());
    let said = defaults(Rules { facts: &facts, policy: policy.for_model("m") });
    let resolved = resolve(text, model, SamplingParams { do_sample: Some(true), ..asked() });
    assert_eq!(said.max_new_tokens, Some(resolved.max_new_tokens));
    let of_said = [said.temperature, said.top_p, said.min_p, said.typical_p, said.repetition_penalty];
    let of_resolved =
        [resolved.temperature, resolved.top_p, resolved.min_p, resolved.typical_p, resolved.repetition_penalty];
    assert_eq!(of_said, of_resolved.map(Some));
    assert_eq!((said.temperature, said.repetition_penalty, said.max_new_tokens), (Some(0.6), Some(1.2), Some(30)));
}

#[test]
fn zero_is_a_value_and_not_unset() {
    let model = GenerationDefaults { do_sample: Some(true), top_k: Some(50), min_p: Some(0.1), ..silent() };
    let resolved = resolve("", model, SamplingParams { top_k: Some(0), min_p: Some(0.0), ..asked() });
    assert_eq!((resolved.temperature, resolved.top_k, resolved.min_p), (1.0, 0, 0.0));
}

#[test]
fn sampling_is_on_when_a_request_shapes_it() {
    for shaped in [
        SamplingParams { temperature: Some(0.7), ..asked() },
        SamplingParams { top_k: Some(5), ..asked() },
        SamplingParams { top_p: Some(0.5), ..asked() },
        SamplingParams { min_p: Some(0.5), ..asked() },
        SamplingParams { typical_p: Some(0.5), ..asked() },
        SamplingParams { do_sample: Some(true), ..asked() },
    ] {
        assert!(resolve("", GenerationDefaults { do_sample: Some(false), ..silent() }, shaped).temperature > 0.0);
    }
    assert_eq!(resolve("", silent(), SamplingParams { seed: Some(1), ..asked() }).temperature, 0.0);
}

#[test]
fn greedy_decoding_turns_off_what_shapes_sampling_and_keeps_penalties() {
    let shaped = SamplingParams {
        top_k: Some(5),
        top_p: Some(0.5),
        min_p: Some(0.5),
        typical_p: Some(0.5),
        repetition_penalty: Some(1.5),
        ..asked()
    };
    for greedy in [
        SamplingParams { do_sample: Some(false), temperature: Some(0.7), ..shaped.clone() },
        SamplingParams { temperature: Some(0.0), do_sample: Some(true), ..shaped },
    ] {
        let resolved = resolve("", silent(), greedy);
        assert_eq!((resolved.temperature, resolved.top_k, resolved.top_p), (0.0, 0, 1.0));
        assert_eq!((resolved.min_p, resolved.typical_p, resolved.repetition_penalty), (0.0, 1.0, 1.5));
    }
}

#[test]
fn stop_tokens_are_the_request_s_and_the_model_s_unless_those_are_ignored() {
    let stops = SamplingParams { stop_token_ids: vec![9, 3, 9], ..asked() };
    assert_eq!(resolve("", silent(), stops.clone()).stop_token_ids, [3, 7, 9]);
    let ignoring = SamplingParams { ignore_eos: Some(true), ..stops };
    assert_eq!(resolve("", silent(), ignoring).stop_token_ids, [3, 9]);
}

#[test]
fn a_seed_is_kept_or_drawn() {
    assert_eq!(resolve("", silent(), SamplingParams { seed: Some(0), ..asked() }).seed, 0);
    let drawn = || resolve("", silent(), asked()).seed;
    assert_ne!(drawn(), drawn());
}

#[test]
fn the_length_is_what_was_asked_else_a_default_within_the_room() {
    let length = |policy: &str, model, asked| resolve(policy, model, asked).max_new_tokens;
    let model = GenerationDefaults { max_new_tokens: Some(20), ..silent() };
    assert_eq!(length("", model, SamplingParams { max_new_tokens: Some(50), ..asked() }), 50);
    assert_eq!(length("", model, asked()), 20);
    assert_eq!(length("[default.defaults]\nmax_new_tokens = 5", model, asked()), 5);
    assert_eq!(length("[default.caps]\nmax_new_tokens = 10", model, asked()), 10);
    assert_eq!(length("", GenerationDefaults { max_new_tokens: Some(2_000), ..silent() }, asked()), 50);
}

#[test]
fn a_prompt_that_leaves_too_little_is_refused_with_the_numbers() {
    let refuse = |policy: &str, sampling, prompt_tokens| {
        let valid = read(policy, silent(), sampling, OutputOptions::default()).unwrap();
        valid.sampling().resolve(prompt_tokens).unwrap_err().to_string()
    };
    assert_eq!(refuse("", asked(), 64), "the prompt's 64 tokens leave no place in the context of 64");
    assert_eq!(
        refuse("", SamplingParams { max_new_tokens: Some(51), ..asked() }, 14),
        "sampling.max_new_tokens: 51 is over the 50 tokens that a prompt of 14 leaves of the context of 64"
    );
    assert_eq!(
        refuse("", SamplingParams { min_new_tokens: Some(51), ..asked() }, 14),
        "sampling.min_new_tokens: 51 is over the 50 tokens that can be generated"
    );
    assert_eq!(
        refuse("[default.caps]\nprompt_tokens = 10", asked(), 11),
        "prompt: 11 tokens are over the policy's cap of 10"
    );
}

#[test]
fn a_request_over_a_cap_is_refused_by_name_with_both_values() {
    let caps = "[default.caps]\nmax_new_tokens = 8\nn = 2\nstop = 1\nstop_token_ids = 1\nlogit_bias = 1\n\
                temperature = { min = 0.25, max = 1.5 }";
    check_over_policy(
        caps,
        SamplingParams {
            max_new_tokens: Some(9),
            n: Some(3),
            stop: vec!["a".into(), "b".into()],
            stop_token_ids: vec![1, 2],
            logit_bias: [(1, 0.0), (2, 0.0)].into(),
            temperature: Some(1.75),
            ..asked()
        },
        "sampling.max_new_tokens: 9 is over the policy's cap of 8; sampling.n: 3 is over the policy's cap of 2; \
         sampling.stop: 2 is over the policy's cap of 1; sampling.stop_token_ids: 2 is over the policy's cap of 1; \
         sampling.logit_bias: 2 is over the policy's cap of 1; \
         sampling.temperature: 1.75 is over the policy's cap of 1.5",
    );
    check_over_policy(
        caps,
        SamplingParams { temperature: Some(0.0), ..asked() },
        "sampling.temperature: 0 is under the policy's floor of 0.25",
    );
    let at_the_caps = SamplingParams { max_new_tokens: Some(8), n: Some(2), temperature: Some(1.5), ..asked() };
    assert_eq!(resolve(caps, silent(), at_the_caps).temperature, 1.5);
}

#[test]
fn output_options_have_caps_too() {
    let output = OutputOptions { logprobs: Some(3), prompt_logprobs: Some(0), ..OutputOptions::default() };
    let policy = "[default]\nforbidden = [\"prompt_logprobs\"]\n[default.caps]\nlogprobs = 2";
    let error = read(policy, silent(), asked(), output).unwrap_err();
    let expected = "output.logprobs: 3 is over the policy's cap of 2; \
                    output.prompt_logprobs: the policy forbids this parameter";
    assert_eq!((error.kind(), error.to_string().as_str()), (ViolationKind::OverPolicy, expected));
}

#[test]
fn a_constraint_goes_to_the_worker_unless_the_policy_forbids_it() {
    let constraint = |kind| SamplingParams { constraint: Some(Constraint { kind: Some(kind) }), ..asked() };
    let gbnf = constraint(Kind::Gbnf("root ::= \"a\"".into()));
    let lark = worker::constraint::Kind::Lark("start: T0-ROOT\nT0-ROOT: \"a\"\n".into());
    let resolved = resolve("", silent(), gbnf.clone()).constraint.unwrap();
    assert_eq!(resolved.kind, Some(lark));
    let read = read("", silent(), gbnf.clone(), OutputOptions::default()).unwrap();
    assert_eq!(read.sampling().constraint_path(), Some("sampling.constraint.gbnf"));
    let forbidden = "sampling.constraint: the policy forbids this parameter";
    check_over_policy("[default]\nforbidden = [\"constraint\"]", gbnf, forbidden);
}

#[test]
fn a_forbidden_parameter_is_refused_whatever_its_value() {
    check_over_policy(
        "[default]\nforbidden = [\"seed\", \"logit_bias\", \"stop\"]",
        SamplingParams { seed: Some(0), logit_bias: [(1, 0.0)].into(), stop: vec!["x".into()], ..asked() },
        "sampling.logit_bias: the policy forbids this parameter; sampling.stop: the policy forbids this parameter; \
         sampling.seed: the policy forbids this parameter",
    );
}

#[test]
fn a_model_s_default_is_brought_within_the_caps() {
    let model = GenerationDefaults { do_sample: Some(true), temperature: Some(2.0), ..silent() };
    assert_eq!(resolve("[default.caps]\ntemperature = { max = 1.5 }", model, asked()).temperature, 1.5);
}

#[test]
fn a_model_s_section_goes_before_the_default_one_setting_by_setting() {
    let policy = "[default]\nforbidden = [\"seed\"]\n[default.caps]\nn = 2\nstop = 1\n\
                  [models.m]\nforbidden = []\n[models.m.caps]\nn = 4";
    let sampling = SamplingParams { seed: Some(1), n: Some(4), ..asked() };
    assert_eq!(resolve(policy, silent(), sampling).seed, 1);
    let stops = SamplingParams { stop: vec!["a".into(), "b".into()], ..asked() };
    check_over_policy(policy, stops, "sampling.stop: 2 is over the policy's cap of 1");
}

#[test]
fn a_policy_that_nobody_can_follow_is_refused() {
    check_policy("[default.caps]\nn = 0", "policy file: default.caps.n: 0 is not at least 1");
    check_policy("[models.m.defaults]\ntop_p = 2.0", "policy file: models.m.defaults.top_p: 2 is not in (0, 1]");
    check_policy(
        "[default.caps]\ntemperature = { min = 1.0, max = 0.5 }",
        "policy file: default.caps.temperature: min 1 is over max 0.5",
    );
    check_policy(
        "[default.caps]\ntemperature = { max = 0.5 }\n[models.m.defaults]\ntemperature = 1.0",
        "policy file: models.m.defaults.temperature: 1 is over the policy's cap of 0.5",
    );
    check_policy(
        "[default.defaults]\nmax_new_tokens = 9\n[models.m.caps]\nmax_new_tokens = 8",
        "policy file: models.m.defaults.max_new_tokens: 9 is over the policy's cap of 8",
    );
}

#[test]
fn unknown_keys_of_a_policy_are_named() {
    for (text, named) in [
        ("[default.caps]\nmax_tokens = 1", "max_tokens"),
        ("[default]\nforbidden = [\"top_q\"]", "top_q"),
        ("[defaults]", "defaults"),
        ("[default.caps", "line 1"),
    ] {
        let error = Policy::parse(text).unwrap_err().to_string();
        assert!(error.contains(named) && !error.contains('\n'), "{error}");
    }
}

//! What requests become, and what is refused by which name.

use std::time::Duration;

use lockstep_checkpoint::{SpecialTokens, Spelling, TokenBytes};
use lockstep_proto::vllm::grpc::engine::{KvTransferParams, MediaRefs, MultimodalInputs, TokenizedInput};

use super::*;

const LONGEST: usize = 16;

fn facts() -> Arc<Facts> {
    let token_bytes = Some(TokenBytes::new(&Spelling::ByteLevel, ["a", "b"]));
    Arc::new(Facts { special: SpecialTokens { begin: None, end: vec![2, 7] }, token_bytes })
}

fn request(change: impl FnOnce(&mut GenerateRequest, &mut SamplingParams)) -> GenerateRequest {
    let tokenized = TokenizedInput { input_ids: vec![1, 2, 3], ..TokenizedInput::default() };
    let input = Some(Input::Tokenized(tokenized));
    let mut request = GenerateRequest { request_id: "r".into(), input, ..GenerateRequest::default() };
    let mut params = SamplingParams::default();
    change(&mut request, &mut params);
    request.sampling_params = Some(params);
    request
}

fn read(
    change: impl FnOnce(&mut GenerateRequest, &mut SamplingParams),
) -> Result<(worker::GenerateRequest, Asked), Vec<FieldViolation>> {
    let request = request(change);
    check_bounds(&request)?;
    generation(request, &facts(), LONGEST, None)
}

#[track_caller]
fn refused(path: &str, message: &str, change: impl FnOnce(&mut GenerateRequest, &mut SamplingParams)) {
    let violations = read(change).expect_err(path);
    let found: Vec<_> = violations.iter().map(|found| (found.path.as_str(), found.message.as_str())).collect();
    assert_eq!(found, [(path, message)]);
}

fn constrained(asking: Asking) -> (Option<Kind>, Names) {
    let (request, asked) = read(|_, params| params.constraint = Some(asking)).expect("it is taken");
    let constraint = request.sampling.expect("it has some").constraint;
    (constraint.and_then(|constraint| constraint.kind), asked.names)
}

#[test]
fn what_is_not_set_means_what_it_does_in_vllm() {
    let (request, asked) = read(|_, _| {}).expect("it is taken");
    let sampling = request.sampling.expect("it has some");
    let expected = ResolvedSampling {
        max_new_tokens: 13,
        temperature: 1.0,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        stop_token_ids: vec![2, 7],
        seed: sampling.seed,
        ..ResolvedSampling::default()
    };
    assert_eq!(sampling, expected);
    assert_eq!((request.n, request.logprobs, request.budget_ms), (1, None, None));
    assert_eq!((asked.n, asked.streams, asked.prompt), (1, false, vec![1, 2, 3]));
}

#[test]
fn what_is_set_is_kept() {
    let deadline = Some(Instant::now() + Duration::from_secs(9));
    let request = request(|request, params| {
        request.stream = true;
        request.data_parallel_rank = Some(0);
        *params = SamplingParams {
            temperature: Some(0.0),
            top_p: 0.5,
            top_k: 4,
            min_p: 0.1,
            frequency_penalty: 0.2,
            presence_penalty: 0.3,
            repetition_penalty: 1.1,
            max_tokens: Some(5),
            min_tokens: 2,
            stop: vec!["x".into()],
            stop_token_ids: vec![9],
            ignore_eos: true,
            n: 3,
            logprobs: Some(2),
            prompt_logprobs: Some(0),
            seed: Some(-1),
            logit_bias: [(4, 0.5)].into(),
            ..SamplingParams::default()
        };
    });
    let (request, asked) = generation(request, &facts(), LONGEST, deadline).expect("it is taken");
    let expected = ResolvedSampling {
        max_new_tokens: 5,
        min_new_tokens: 2,
        temperature: 0.0,
        top_k: 4,
        top_p: 0.5,
        min_p: 0.1,
        typical_p: 1.0,
        repetition_penalty: 1.1,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        logit_bias: [(4, 0.5)].into(),
        stop_token_ids: vec![9],
        seed: u64::MAX,
        constraint: None,
    };
    assert_eq!(request.sampling, Some(expected));
    assert_eq!((request.n, request.logprobs, request.prompt_logprobs), (3, Some(2), Some(0)));
    assert!(request.budget_ms.is_some_and(|budget| (8_000..=9_000).contains(&budget)));
    assert!(asked.streams && asked.stop.is_some_and(|stop| stop.min_tokens == 2));
    assert_eq!((asked.n, asked.n_top, asked.n_prompt_top, asked.stop_token_ids), (3, 2, 0, vec![9]));
}

#[test]
fn what_a_worker_has_not_is_refused_by_name() {
    let media = "the models here read text alone";
    let transfer = "keys and values do not travel between groups";
    refused("mm_inputs", media, |request, _| request.mm_inputs = Some(MultimodalInputs::default()));
    refused("extra_mm_inputs", media, |request, _| request.extra_mm_inputs = vec![MultimodalInputs::default()]);
    refused("media_refs", media, |request, _| request.media_refs = Some(MediaRefs::default()));
    let params = KvTransferParams::default();
    refused("kv_transfer_params", transfer, |request, _| request.kv_transfer_params = Some(params));
    refused("kv_transfer_params_json", transfer, |request, _| request.kv_transfer_params_json = Some("{}".into()));
    let rank = "1 is not 0, and a group is one";
    refused("data_parallel_rank", rank, |request, _| request.data_parallel_rank = Some(1));
    let text = "a worker has no tokenizer: send tokenized.input_ids";
    refused("text", text, |request, _| request.input = Some(Input::Text("Hi".into())));
    let cut = "prompts are not cut here";
    refused("sampling_params.truncate_prompt_tokens", cut, |_, params| params.truncate_prompt_tokens = Some(-1));
    refused("sampling_params.logprobs", "-1 is negative", |_, params| params.logprobs = Some(-1));
    refused("sampling_params.prompt_logprobs", "-1 is negative", |_, params| params.prompt_logprobs = Some(-1));
    refused("sampling_params.logit_bias", "-4 is negative", |_, params| params.logit_bias = [(-4, 1.0)].into());
    let many = "has 17 entries, more than 16";
    refused("sampling_params.stop", many, |_, params| params.stop = vec!["x".into(); 17]);
    let empty = "has 0 bytes, which is not in 1..=1024";
    refused("sampling_params.stop[1]", empty, |_, params| params.stop = vec!["x".into(), String::new()]);
    let tag = Asking::StructuralTag("{}".into());
    let why = "is no constraint that is held here";
    refused("sampling_params.structural_tag", why, |_, params| params.constraint = Some(tag));
    let grammar = Asking::Grammar("root ::= \"a\"".into());
    let why = "is EBNF; llguidance's form of Lark is understood";
    refused("sampling_params.grammar", why, |_, params| params.constraint = Some(grammar));
    for choices in [vec![], vec![String::new()]] {
        let why = format!("has {} texts, not 1 to 1024 that are not empty", choices.len());
        let choice = Asking::Choice(ChoiceConstraint { choices });
        refused("sampling_params.choice", &why, |_, params| params.constraint = Some(choice));
    }
}

#[test]
fn logs_have_the_beginning_of_a_long_name() {
    let named = |id: &str| read(|request, _| request.request_id = id.to_owned()).map(|(request, _)| request.request_id);
    assert_eq!(named(&"r".repeat(66)).expect("it is taken"), "r".repeat(64));
    assert_eq!(named(&"é".repeat(128)).expect("it is taken"), "é".repeat(32));
    assert_eq!(named(&format!("x{}", "é".repeat(60))).expect("it is taken"), format!("x{}", "é".repeat(31)));
    refused("sampling_params.n", "is 129, which is not in 1..=128", |_, params| params.n = 129);
    refused("request_id", "has 257 bytes, more than 256", |request, _| request.request_id = "r".repeat(257));
}

#[test]
fn constraints_become_those_of_the_worker() {
    assert_eq!(constrained(Asking::JsonSchema("{}".into())).0, Some(Kind::JsonSchema("{}".into())));
    assert_eq!(constrained(Asking::Regex("a+".into())).0, Some(Kind::Regex("a+".into())));
    let object = Kind::JsonSchema(r#"{"type":"object"}"#.into());
    assert_eq!(constrained(Asking::JsonObject(true)).0, Some(object));
    assert_eq!(constrained(Asking::JsonObject(false)).0, None);
    let (kind, names) = constrained(Asking::Grammar("start: \"a\"".into()));
    assert_eq!(kind, Some(Kind::Lark("start: \"a\"".into())));
    assert_eq!(names.name("sampling.constraint.lark"), "sampling_params.grammar");
    let choices = ["yes", "a \"b\"\u{7f}"].map(str::to_owned).to_vec();
    let (kind, names) = constrained(Asking::Choice(ChoiceConstraint { choices }));
    assert_eq!(kind, Some(Kind::Lark("start: CHOICE\nCHOICE: \"yes\" | \"a \\\"b\\\"\\u007f\"\n".into())));
    assert_eq!(names.name("sampling.constraint.lark"), "sampling_params.choice");
}

#[test]
fn fields_have_the_names_of_the_interface() {
    for (ours, theirs) in [
        ("request_id", "request_id"),
        ("prompt_token_ids[3]", "tokenized.input_ids[3]"),
        ("sampling.max_new_tokens", "sampling_params.max_tokens"),
        ("sampling.min_new_tokens", "sampling_params.min_tokens"),
        ("sampling.top_p", "sampling_params.top_p"),
        ("sampling", "sampling_params"),
        ("sampling.constraint.regex", "sampling_params.regex"),
        ("n", "sampling_params.n"),
        ("logprobs", "sampling_params.logprobs"),
        ("prompt_logprobs", "sampling_params.prompt_logprobs"),
    ] {
        assert_eq!(Names::default().name(ours), theirs);
    }
}

use rand::seq::{IndexedMutRandom, IndexedRandom};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::softmax::FULL_WEIGHT;
use super::*;
use crate::test_seed::seed;

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - total.ln()).collect()
}

#[track_caller]
fn check_logprobs(logits: &[f32], token: u32, n_top: usize, expected_top: &[u32]) {
    let expected = log_softmax(logits);
    let logprobs = Sampler::new(logits.len()).logprobs(logits, token, n_top);
    assert_eq!(logprobs.token.id, token);
    assert_eq!(logprobs.top.iter().map(|top| top.id).collect::<Vec<_>>(), expected_top);
    for entry in logprobs.top.iter().chain([&logprobs.token]) {
        assert!((f64::from(entry.logprob) - expected[entry.id as usize]).abs() < 1e-6, "{entry:?}");
    }
}

#[test]
fn logprobs_are_those_of_the_raw_distribution_best_first() {
    let logits = [1.0, 3.0, -2.0, 3.0, 0.5];
    check_logprobs(&logits, 2, 3, &[1, 3, 0]);
    check_logprobs(&logits, 1, 1, &[1]);
    check_logprobs(&logits, 4, 0, &[]);
    check_logprobs(&logits, 4, 9, &[1, 3, 0, 4, 2]);
}

#[test]
fn logprobs_are_finite_and_at_most_zero_whatever_the_logits() {
    for logits in [[f32::NAN; 3], [f32::NEG_INFINITY; 3], [f32::INFINITY, f32::NAN, 0.0], [f32::MAX, f32::MIN, 0.0]] {
        let logprobs = Sampler::new(3).logprobs(&logits, 1, 3);
        for entry in logprobs.top.iter().chain([&logprobs.token]) {
            assert!(entry.logprob.is_finite() && entry.logprob <= 0.0, "{entry:?} of {logits:?}");
        }
    }
}

// === against transformers ===

/// One case of `tests/data/sampler_goldens.json`, which `tests/reference/make_sampler_goldens.py` writes.
#[derive(serde::Deserialize)]
struct Golden {
    params: GoldenParams,
    logits: Vec<f32>,
    prompt: Vec<u32>,
    emitted: Vec<u32>,
    /// What the next token is drawn from: ids, ascending, with their probabilities.
    kept: Vec<(u32, f64)>,
}

#[derive(serde::Deserialize)]
struct GoldenParams {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    logit_bias: Vec<(u32, f32)>,
    stop_token_ids: Vec<u32>,
    min_new_tokens: u32,
}

impl From<&GoldenParams> for SamplingParams {
    fn from(params: &GoldenParams) -> Self {
        Self {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            typical_p: params.typical_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params.logit_bias.clone(),
            stop_token_ids: params.stop_token_ids.clone(),
            min_new_tokens: params.min_new_tokens,
            seed: 0,
        }
    }
}

/// transformers computes in f32, each warper with a softmax of its own; we in f64 and integers.
const TOLERANCE: f64 = 2e-6;
/// What is less likely may weigh nothing here: the likeliest token weighs 2^44.
const NEGLIGIBLE: f64 = 1.0 / FULL_WEIGHT as f64;

#[test]
fn what_may_be_drawn_is_what_transformers_leaves() {
    let goldens = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/sampler_goldens.json")).unwrap();
    let goldens: Vec<Golden> = serde_json::from_slice(&goldens).unwrap();
    assert!(goldens.len() >= 60, "{} cases", goldens.len());
    for (case_idx, golden) in goldens.iter().enumerate() {
        let params = SamplingParams::from(&golden.params);
        let mut logits = golden.logits.clone();
        let mut counts = vec![0; logits.len()];
        processors::apply(&mut logits, &params, &golden.prompt, &golden.emitted, &mut counts);
        let kept = Candidates::new(logits.len()).distribution(&logits, &params);
        let ids = |kept: &[(u32, f64)]| kept.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        let (ids_of_ours, mut theirs) = (ids(&kept), golden.kept.clone());
        theirs.retain(|(id, probability)| *probability > NEGLIGIBLE || ids_of_ours.contains(id));
        assert_eq!(ids_of_ours, ids(&theirs), "case {case_idx}: {params:?}");
        for (ours, theirs) in kept.iter().zip(&theirs) {
            assert!((ours.1 - theirs.1).abs() <= TOLERANCE, "case {case_idx}: {ours:?}, not {theirs:?}");
        }
    }
}

// === draws ===

fn place<'a>(params: &'a SamplingParams, prompt: &'a [u32], emitted: &'a [u32]) -> Place<'a> {
    Place { params, prompt, emitted, choice: 0, mask: None }
}

fn draw(params: &SamplingParams, logits: &[f32], n: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(logits.len());
    let mut emitted = Vec::new();
    for _ in 0..n {
        emitted.push(sampler.sample(logits, place(params, &[0], &emitted)));
    }
    emitted
}

#[test]
fn tokens_come_as_often_as_their_probabilities_say() {
    const N: usize = 40_000;
    let logits = [0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, f32::NEG_INFINITY];
    for seed in 0..5 {
        let drawn = draw(&SamplingParams { temperature: 1.0, seed, ..SamplingParams::default() }, &logits, N);
        let chi_square: f64 = (0..).zip(log_softmax(&logits)).take(7).fold(0.0, |sum, (id, logprob)| {
            let expected = logprob.exp() * N as f64;
            let count = drawn.iter().filter(|&&drawn| drawn == id).count() as f64;
            sum + (count - expected).powi(2) / expected
        });
        assert!(!drawn.contains(&7), "it is impossible");
        assert!(chi_square < 22.46, "6 degrees of freedom, one in a thousand: {chi_square} with seed {seed}");
    }
}

#[test]
fn the_split_into_prompt_and_output_does_not_change_the_draw() {
    let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
    let params = SamplingParams { temperature: 1.0, repetition_penalty: 1.2, seed: 9, ..SamplingParams::default() };
    let text: Vec<u32> = draw(&params, &logits, 30);
    let mut sampler = Sampler::new(logits.len());
    let drawn: Vec<u32> =
        (0..=30).map(|at| sampler.sample(&logits, place(&params, &text[..at], &text[at..]))).collect();
    assert!(drawn.iter().all(|token| *token == drawn[0]), "{drawn:?}");
}

#[test]
fn greedy_ignores_the_warpers_and_keeps_the_processors() {
    let logits = [1.0, 3.0, 2.9];
    let params = SamplingParams { top_k: 1, top_p: 0.1, typical_p: 0.1, ..SamplingParams::default() };
    assert_eq!(draw(&params, &logits, 3), [1, 1, 1]);
    let params = SamplingParams { frequency_penalty: 0.2, ..SamplingParams::default() };
    assert_eq!(draw(&params, &logits, 4), [1, 2, 1, 2]);
}

#[test]
fn a_masked_token_is_never_chosen_whatever_the_parameters() {
    let logits: Vec<f32> = (0..70).map(|id| if id == 5 { 9.0 } else { 0.1 * id as f32 }).collect();
    let mut mask = TokenMask::new(vec![0; 3]);
    [7, 40, 68].into_iter().for_each(|id| mask.set(id, true));
    let mut sampler = Sampler::new(logits.len());
    let mut sample = |params: &SamplingParams, position: usize| {
        let prompt = vec![0; position];
        sampler.sample(&logits, Place { mask: Some(&mask), ..place(params, &prompt, &[]) })
    };
    assert_eq!(sample(&SamplingParams::default(), 1), 68, "the likeliest of those that may be");
    let biased = SamplingParams { logit_bias: vec![(5, 100.0), (7, 50.0)], ..SamplingParams::default() };
    assert_eq!(sample(&biased, 1), 7);
    let mut seen = [0; 70];
    for seed in 0..200 {
        let params = SamplingParams { temperature: 5.0, seed, ..SamplingParams::default() };
        seen[sample(&params, 3) as usize] += 1;
    }
    assert_eq!(seen[7] + seen[40] + seen[68], 200);
    assert!([7, 40, 68].into_iter().all(|id| seen[id] > 10), "each of them may be: {seen:?}");
}

// === on a GPU ===

#[test]
fn a_gpu_chooses_where_neither_logits_are_changed_nor_typical_ones_kept() {
    let rule = |params: &SamplingParams, n_emitted| choice_rule(params, 1 << 33, n_emitted, 2);
    let (greedy, seed) = (SamplingParams::default(), 5);
    assert_eq!(rule(&greedy, 3), Some(ChoiceRule { top_p: 1.0, ..ChoiceRule::default() }));
    assert_eq!(rule(&SamplingParams { typical_p: 0.5, ..greedy.clone() }, 3), rule(&greedy, 3));
    let sampled = SamplingParams { temperature: 0.5, top_k: 7, top_p: 0.9, min_p: 0.1, seed, ..greedy };
    let [low, high] = rule(&sampled, 3).unwrap().uniform;
    assert_eq!(u64::from(high) << 32 | u64::from(low), random::uniform(seed, 2, 1 << 33));
    let expected = ChoiceRule { temperature: 0.5, top_k: 7, top_p: 0.9, min_p: 0.1, uniform: [low, high] };
    assert_eq!(rule(&sampled, 3), Some(expected));
    assert_eq!(rule(&SamplingParams { typical_p: 0.5, ..sampled.clone() }, 3), None);
    assert_eq!(rule(&SamplingParams { logit_bias: vec![(1, 1.0)], ..sampled.clone() }, 3), None);
    let penalized = SamplingParams { presence_penalty: 1.0, ..sampled };
    assert_eq!((rule(&penalized, 0), rule(&penalized, 1)), (Some(expected), None), "nothing is penalized yet");
}

// === whatever comes ===

#[test]
fn no_logits_and_no_parameters_make_it_panic_or_choose_the_impossible() {
    let mut rng = ChaCha8Rng::seed_from_u64(seed());
    let mut samplers: Vec<Sampler> = [1, 2, 5, 300, 5000].into_iter().map(Sampler::new).collect();
    for _ in 0..3000 {
        let sampler = samplers.choose_mut(&mut rng).unwrap();
        let (logits, params) = (any_logits(&mut rng, sampler.logits.len()), any_params(&mut rng));
        let prompt: Vec<u32> = (0..rng.random_range(0..20)).map(|_| rng.random_range(0..400)).collect();
        let (prompt, emitted) = prompt.split_at(rng.random_range(0..=prompt.len()));
        let choice = rng.random();
        let place = Place { choice, ..place(&params, prompt, emitted) };
        let token = sampler.sample(&logits, place);
        assert_eq!(token, sampler.sample(&logits, place), "scratch does not matter");
        assert!((token as usize) < logits.len());
        let mut processed = logits.clone();
        processors::apply(&mut processed, &params, prompt, emitted, &mut sampler.counts);
        let is_possible = |logit: &f32| !logit.is_nan() && *logit > f32::NEG_INFINITY;
        assert!(
            is_possible(&processed[token as usize]) || !processed.iter().any(is_possible),
            "{token} of {processed:?} under {params:?}"
        );
        let logprobs = sampler.logprobs(&logits, token, rng.random_range(0..8));
        assert!(logprobs.top.iter().all(|top| top.logprob.is_finite() && top.logprob <= 0.0));
    }
}

const EXTREMES: [f32; 10] =
    [0.0, -0.0, 1.0, -1.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];

fn any_logits(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let share_of_extremes = *[0.0, 0.1, 1.0].choose(rng).unwrap();
    let scale = *[0.0, 1.0, 30.0, 1e30].choose(rng).unwrap();
    let any = |rng: &mut ChaCha8Rng| match rng.random_bool(share_of_extremes) {
        true => *EXTREMES.choose(rng).unwrap(),
        false => rng.random_range(-1.0f32..1.0) * scale,
    };
    (0..n).map(|_| any(rng)).collect()
}

fn any_params(rng: &mut ChaCha8Rng) -> SamplingParams {
    let off = SamplingParams::default();
    let mut any = |off: f32| match rng.random_range(0..4) {
        0 => rng.random_range(0.0..1.5),
        1 => *EXTREMES.choose(rng).unwrap(),
        _ => off,
    };
    SamplingParams {
        temperature: any(1.0),
        top_p: any(off.top_p),
        min_p: any(off.min_p),
        typical_p: any(off.typical_p),
        repetition_penalty: any(off.repetition_penalty),
        presence_penalty: any(off.presence_penalty),
        frequency_penalty: any(off.frequency_penalty),
        logit_bias: vec![(3, any(0.0)), (u32::MAX, any(0.0))],
        top_k: *[0, 1, 7, 2000, u32::MAX].choose(rng).unwrap(),
        stop_token_ids: vec![0, 4, u32::MAX],
        min_new_tokens: *[0, 5, u32::MAX].choose(rng).unwrap(),
        seed: rng.random(),
    }
}

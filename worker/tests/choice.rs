//! The token that a GPU chooses is the one that the sampler would, whatever the logits and the rule. On a GPU where
//! `LOCKSTEP_TEST_GPU` names one (0 is the first), else on an emulator.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "../src/test_seed.rs"]
mod test_seed;

use std::env;

use lockstep_kernels::{
    AttentionRow, KvEncoding, RopeStyle, RopeTable,
    cuda::{ChoiceRule, Device, Gpu, GpuHeads, GpuKvCache, KernelCache, StepRows},
};
use lockstep_worker::sampler::{Place, Sampler, SamplingParams, choice_rule};
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const EXTREMES: [f32; 10] =
    [0.0, -0.0, 1.0, -1.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];

/// A row of logits, and what is to be done with it.
#[derive(Debug)]
struct Case {
    logits: Vec<f32>,
    params: SamplingParams,
    position: usize,
    choice: u32,
}

impl Case {
    fn any(rng: &mut ChaCha8Rng, n_tokens: usize) -> Self {
        let (position, choice) = (rng.random_range(0..50), rng.random_range(0..4));
        Self { logits: any_logits(rng, n_tokens), params: any_params(rng, n_tokens as u32), position, choice }
    }

    fn rule(&self) -> ChoiceRule {
        choice_rule(&self.params, self.position as u64, 0, self.choice).expect("a GPU has these rules")
    }

    fn sample(&self, sampler: &mut Sampler) -> u32 {
        let prompt = vec![0; self.position];
        let place = Place { params: &self.params, prompt: &prompt, emitted: &[], choice: self.choice, mask: None };
        sampler.sample(&self.logits, place)
    }

    /// The rule with the greatest number that still draws the token: one more, and a sum that is off by one shows.
    fn last_rule(&self, sampler: &mut Sampler) -> ChoiceRule {
        let rule = |number| with_number(self.rule(), number);
        let (mut same, mut end) = (number_of(&self.rule()), 1 << 53);
        let token = sampler.choose(&self.logits, &rule(same));
        while same + 1 < end {
            let middle = same.midpoint(end);
            if sampler.choose(&self.logits, &rule(middle)) == token { same = middle } else { end = middle }
        }
        rule(same)
    }
}

fn number_of(rule: &ChoiceRule) -> u64 {
    let [low, high] = rule.uniform;
    u64::from(high) << 32 | u64::from(low)
}

fn with_number(rule: ChoiceRule, number: u64) -> ChoiceRule {
    ChoiceRule { uniform: [number as u32, (number >> 32) as u32], ..rule }
}

fn any_logits(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let scale = *[0.0, 1e-3, 1.0, 3.0, 12.0, 1e30].choose(rng).unwrap();
    // Sums of several are as peaked as logits are.
    let bell = |rng: &mut ChaCha8Rng| (0..6).map(|_| rng.random_range(-1.0f32..1.0)).sum::<f32>() * scale;
    let mut logits: Vec<f32> = (0..n).map(|_| bell(rng)).collect();
    match rng.random_range(0..8) {
        // Ties, of a few values or of many.
        0 => logits.iter_mut().for_each(|logit| *logit = logit.round()),
        1 => logits.iter_mut().for_each(|logit| *logit = (*logit * 50.0).round() / 50.0),
        2 => logits.iter_mut().for_each(|logit| *logit = *EXTREMES.choose(rng).unwrap()),
        3 => logits.iter_mut().for_each(|logit| *logit = *[*logit, f32::NAN, f32::NEG_INFINITY].choose(rng).unwrap()),
        // Some far above all others.
        4 => {
            (0..rng.random_range(1..6)).for_each(|_| logits[rng.random_range(0..n)] = 20.0 + rng.random_range(0.0..3.0))
        }
        5 => (0..rng.random_range(1..6)).for_each(|_| logits[rng.random_range(0..n)] = *EXTREMES.choose(rng).unwrap()),
        _ => {}
    }
    logits
}

fn any_params(rng: &mut ChaCha8Rng, n_tokens: u32) -> SamplingParams {
    let share = |rng: &mut ChaCha8Rng, off: f32, usual: &[f32]| match rng.random_range(0..6) {
        0 => rng.random_range(-0.1..1.1),
        1 => *EXTREMES.choose(rng).unwrap(),
        2 => *usual.choose(rng).unwrap(),
        _ => off,
    };
    let top_k = [0, 0, 0, 1, 2, 40, 600, n_tokens - 1, n_tokens, u32::MAX, rng.random_range(0..=n_tokens)];
    SamplingParams {
        temperature: *[0.0, 1e-45, 0.01, 0.6, 1.0, 1.0, 1.7, 1e6, f32::INFINITY, f32::NAN].choose(rng).unwrap(),
        top_k: *top_k.choose(rng).unwrap(),
        top_p: share(rng, 1.0, &[0.5, 0.9, 0.95, 1.0 - f32::EPSILON]),
        min_p: share(rng, 0.0, &[0.05, 0.3, 1.0, 1e-9]),
        seed: rng.random(),
        ..SamplingParams::default()
    }
}

/// Ends of ranks' ranges: one rank's, or several's.
fn any_ends(rng: &mut ChaCha8Rng, n_tokens: u32) -> Vec<u32> {
    let mut ends: Vec<u32> = (1..rng.random_range(1..5)).map(|_| rng.random_range(0..=n_tokens)).collect();
    ends.sort_unstable();
    ends.push(n_tokens);
    ends
}

fn gpu() -> Gpu {
    let (ordinal, cache) = match env::var("LOCKSTEP_TEST_GPU") {
        Ok(ordinal) => (ordinal.parse().unwrap(), env::temp_dir().join("lockstep-test-kernels")),
        Err(_) => {
            lockstep_cuda_emulator::load_into_this_process().unwrap();
            (0, lockstep_cuda_emulator::build().unwrap().join("kernels"))
        }
    };
    let rope = RopeTable::new(64, 64, 10_000.0, None, 16, RopeStyle::Adjacent).unwrap();
    let device = Device::open(ordinal, KernelCache::new(Some(cache))).unwrap();
    Gpu::new(device, GpuHeads { n_heads: 1, n_kv_heads: 1, head_dim: 64 }, &rope).unwrap()
}

/// What the device chooses for rows of one vocabulary, all in one step.
fn choose(gpu: &mut Gpu, kv: &GpuKvCache, cases: &[Case], rules: &[ChoiceRule], ends: &[u32]) -> Vec<u32> {
    let n_rows = cases.len();
    let attention: Vec<_> = (0..n_rows).map(|table| AttentionRow { position: 0, table }).collect();
    let step = StepRows {
        tokens: &vec![0; n_rows],
        slots: &vec![0; n_rows],
        rows: &attention,
        result_rows: &(0..n_rows as u32).collect::<Vec<_>>(),
        result_attention: &attention,
        choices: rules,
        tables: &vec![vec![0]; n_rows],
    };
    let step = gpu.begin(&step, kv, None).unwrap();
    let mut logits = Vec::new();
    let mut begin = 0;
    for end in ends.iter().map(|end| *end as usize) {
        logits.extend(cases.iter().flat_map(|case| &case.logits[begin..end]));
        begin = end;
    }
    let logits = gpu.upload(&logits, begin).unwrap();
    gpu.choose(&logits, &gpu.load_vocab(ends).unwrap(), &step).unwrap();
    gpu.download_choices(n_rows).unwrap()
}

#[test]
fn a_gpu_chooses_what_the_sampler_does() {
    let rng = &mut ChaCha8Rng::seed_from_u64(test_seed::seed());
    let mut gpu = gpu();
    let kv = gpu.new_kv(1, 1, 16, KvEncoding::F16).unwrap();
    for (n_tokens, n_steps, n_rows) in [(8, 50, 100), (1_000, 20, 100), (49_152, 2, 30), (128_256, 1, 20)] {
        let mut sampler = Sampler::new(n_tokens);
        for _ in 0..n_steps {
            let cases: Vec<_> = (0..n_rows).map(|_| Case::any(rng, n_tokens)).collect();
            let ends = any_ends(rng, n_tokens as u32);
            let rules: Vec<_> = cases.iter().map(Case::rule).collect();
            for (case, found) in cases.iter().zip(choose(&mut gpu, &kv, &cases, &rules, &ends)) {
                let expected = case.sample(&mut sampler);
                let Case { params, logits, .. } = case;
                let [found_logit, logit] = [found, expected].map(|id| logits[id as usize]);
                assert_eq!(
                    found, expected,
                    "{found_logit:?}, not {logit:?}; {n_tokens} tokens, ranges up to {ends:?}, {params:?}"
                );
            }
        }
    }
}

#[test]
fn sums_of_weights_have_the_same_bits_on_a_gpu() {
    let rng = &mut ChaCha8Rng::seed_from_u64(test_seed::seed());
    let mut gpu = gpu();
    let kv = gpu.new_kv(1, 1, 16, KvEncoding::F16).unwrap();
    // Of few tokens, a number in [0, 1) of 53 bits tells sums apart that differ by one.
    for (n_tokens, n_steps, n_rows) in [(8, 20, 100), (300, 10, 100)] {
        let mut sampler = Sampler::new(n_tokens);
        for _ in 0..n_steps {
            let cases: Vec<_> = (0..n_rows).map(|_| Case::any(rng, n_tokens)).collect();
            let ends = any_ends(rng, n_tokens as u32);
            let mut rules: Vec<_> = cases.iter().map(|case| case.last_rule(&mut sampler)).collect();
            for _ in 0..2 {
                for ((case, rule), found) in cases.iter().zip(&rules).zip(choose(&mut gpu, &kv, &cases, &rules, &ends))
                {
                    assert_eq!(found, sampler.choose(&case.logits, rule), "{n_tokens} tokens, {rule:?}");
                }
                rules.iter_mut().for_each(|rule| *rule = with_number(*rule, (number_of(rule) + 1) % (1 << 53)));
            }
        }
    }
}

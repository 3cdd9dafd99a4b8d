use super::*;

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

//! Logits processors: what changes the logits themselves, whether the next token is then sampled or the best one taken.
//!
//! Names, meaning and order are those of `transformers` 5.23 (`generation/utils.py`, `_get_logits_processor`), which has
//! no presence and frequency penalties; those are OpenAI's, and stand where vLLM has them, after the repetition penalty:
//!
//! 1. `logit_bias` (there: `sequence_bias`)
//! 2. `repetition_penalty`
//! 3. `frequency_penalty`, `presence_penalty`
//! 4. `min_new_tokens`
//!
//! The [mask](super::TokenMask) of a constraint comes after all of them: nothing makes possible again what it forbids.
//!
//! All are computed in f32, as there.

use super::SamplingParams;

/// Whether the parameters change any logit now, after `n_emitted` tokens.
pub(super) fn are_active(params: &SamplingParams, n_emitted: usize) -> bool {
    !params.logit_bias.is_empty()
        || params.repetition_penalty != 1.0
        || (penalizes_output(params) && n_emitted > 0)
        || suppresses_stop(params, n_emitted)
}

/// Applies them in order. `counts` is `[vocab_size]` zeros, and is left so. Token ids outside the vocabulary are passed
/// over.
pub(super) fn apply(logits: &mut [f32], params: &SamplingParams, prompt: &[u32], emitted: &[u32], counts: &mut [u32]) {
    for &(token_id, bias) in &params.logit_bias {
        change(logits, token_id, |logit| logit + bias);
    }
    if params.repetition_penalty != 1.0 {
        penalize_repetition(logits, params.repetition_penalty, &[prompt, emitted], counts);
    }
    if penalizes_output(params) {
        penalize_output(logits, params, emitted, counts);
    }
    if suppresses_stop(params, emitted.len()) {
        for &token_id in &params.stop_token_ids {
            change(logits, token_id, |_| f32::NEG_INFINITY);
        }
    }
}

fn penalizes_output(params: &SamplingParams) -> bool {
    params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
}

fn suppresses_stop(params: &SamplingParams, n_emitted: usize) -> bool {
    n_emitted < params.min_new_tokens as usize && !params.stop_token_ids.is_empty()
}

/// Once for each token that occurs, however often: towards less likely on either side of 0.
fn penalize_repetition(logits: &mut [f32], penalty: f32, texts: &[&[u32]], counts: &mut [u32]) {
    for &token_id in texts.iter().copied().flatten() {
        if let Some(count @ 0) = counts.get_mut(token_id as usize) {
            *count = 1;
            change(logits, token_id, |logit| if logit < 0.0 { logit * penalty } else { logit / penalty });
        }
    }
    for &token_id in texts.iter().copied().flatten() {
        if let Some(count) = counts.get_mut(token_id as usize) {
            *count = 0;
        }
    }
}

fn penalize_output(logits: &mut [f32], params: &SamplingParams, emitted: &[u32], counts: &mut [u32]) {
    for &token_id in emitted {
        if let Some(count) = counts.get_mut(token_id as usize) {
            *count += 1;
        }
    }
    for &token_id in emitted {
        let Some(count) = counts.get_mut(token_id as usize).map(std::mem::take) else { continue };
        if count > 0 {
            let frequency = params.frequency_penalty * count as f32;
            change(logits, token_id, |logit| logit - frequency - params.presence_penalty);
        }
    }
}

fn change(logits: &mut [f32], token_id: u32, to: impl Fn(f32) -> f32) {
    if let Some(logit) = logits.get_mut(token_id as usize) {
        *logit = to(*logit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: f32 = f32::NEG_INFINITY;

    /// Over the logits 1, 0, -1, 4, with the prompt 0, 2 and the output 2, 3, 3.
    #[track_caller]
    fn check(params: SamplingParams, expected: [f32; 4]) {
        let (prompt, emitted) = ([0, 2], [2, 3, 3]);
        let mut logits = [1.0, 0.0, -1.0, 4.0];
        let is_active = are_active(&params, emitted.len());
        let mut counts = [0; 4];
        apply(&mut logits, &params, &prompt, &emitted, &mut counts);
        assert_eq!(logits, expected);
        assert_eq!(counts, [0; 4], "the scratch is left clean");
        assert_eq!(is_active, logits != [1.0, 0.0, -1.0, 4.0]);
    }

    fn off() -> SamplingParams {
        SamplingParams::default()
    }

    #[test]
    fn nothing_is_changed_by_default() {
        check(off(), [1.0, 0.0, -1.0, 4.0]);
    }

    #[test]
    fn repetition_divides_positive_and_multiplies_negative_logits_once() {
        check(SamplingParams { repetition_penalty: 2.0, ..off() }, [0.5, 0.0, -2.0, 2.0]);
    }

    #[test]
    fn presence_counts_the_output_once_and_not_the_prompt() {
        check(SamplingParams { presence_penalty: 0.5, ..off() }, [1.0, 0.0, -1.5, 3.5]);
    }

    #[test]
    fn frequency_counts_each_time() {
        check(SamplingParams { frequency_penalty: 0.5, ..off() }, [1.0, 0.0, -1.5, 3.0]);
    }

    #[test]
    fn a_bias_is_added_before_the_penalty() {
        check(SamplingParams { logit_bias: vec![(0, 1.0), (1, -1.0)], ..off() }, [2.0, -1.0, -1.0, 4.0]);
        let both = SamplingParams { logit_bias: vec![(0, 1.0)], repetition_penalty: 2.0, ..off() };
        check(both, [1.0, 0.0, -2.0, 2.0]);
    }

    #[test]
    fn stop_tokens_are_impossible_until_enough_is_emitted() {
        let params = |min_new_tokens| SamplingParams { min_new_tokens, stop_token_ids: vec![1, 3], ..off() };
        check(params(4), [1.0, NEVER, -1.0, NEVER]);
        check(params(3), [1.0, 0.0, -1.0, 4.0]);
    }

    #[test]
    fn ids_outside_the_vocabulary_are_passed_over() {
        let params = SamplingParams {
            logit_bias: vec![(4, 1.0), (u32::MAX, 1.0)],
            repetition_penalty: 2.0,
            frequency_penalty: 1.0,
            stop_token_ids: vec![9],
            min_new_tokens: 9,
            ..off()
        };
        let (mut logits, mut counts) = ([1.0; 4], [0; 4]);
        apply(&mut logits, &params, &[4, u32::MAX], &[7], &mut counts);
        assert_eq!((logits, counts), ([1.0; 4], [0; 4]));
    }
}

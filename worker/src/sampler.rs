//! The sampler: from the logits of a position to the next token id.
//!
//! What it does is a function of logits, prompt ids, emitted ids, choice and parameters, and of nothing else: there is no
//! random state to carry along. A stream that is resumed on another replica goes on token for token.
//!
//! In the order of work: [`processors`] change the logits, [`select`] takes the best or draws among those that the
//! warpers leave, with a number from [`random`]; [`softmax`] is the arithmetic under both drawing and log-probabilities.
//!
//! [`choice_rule`] says what a GPU needs to know to choose by itself, the same token.
//!
//! Logits that are NaN count as impossible, infinite ones as the largest number; neither is an error here.

use lockstep_kernels::cuda::ChoiceRule;

mod mask;
mod processors;
mod random;
mod select;
mod softmax;

pub use mask::TokenMask;

use select::Candidates;
use softmax::{BLOCK_LEN, clean, exp_block};

/// How the next token is chosen; the fields mean what they do in `transformers`' `GenerationConfig`, and in OpenAI's API
/// where that has none of the name. The default takes the likeliest token.
#[derive(Clone, PartialEq, Debug)]
pub struct SamplingParams {
    /// Divides the logits. 0 (or less, or NaN) takes the likeliest token, and the warpers below are off.
    pub temperature: f32,
    /// Keeps the k likeliest tokens, and what is as likely as the last of them. 0: off.
    pub top_k: u32,
    /// Keeps the smallest set of likeliest tokens that has this probability. 1: off.
    pub top_p: f32,
    /// Drops tokens less likely than this fraction of the likeliest one's probability. 0: off.
    pub min_p: f32,
    /// Keeps the tokens whose information is nearest to the entropy, up to this probability. 1: off.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output. 1: off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output. 0: off.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time that it is in the output. 0: off.
    pub frequency_penalty: f32,
    /// Added to the logits of tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that end the sequence; impossible before `min_new_tokens`.
    pub stop_token_ids: Vec<u32>,
    /// Tokens of output before which none of `stop_token_ids` is chosen. 0: off.
    pub min_new_tokens: u32,
    /// Decides the random numbers, with choice and position.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            stop_token_ids: Vec::new(),
            min_new_tokens: 0,
            seed: 0,
        }
    }
}

/// A token with the natural logarithm of its probability.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Logprob {
    /// The token.
    pub id: u32,
    /// Finite and at most 0; `f32::MIN` for what is impossible.
    pub logprob: f32,
}

/// A token's log-probability, with what else might have stood there.
#[derive(Clone, PartialEq, Debug)]
pub struct TokenLogprobs {
    /// The token that stands there.
    pub token: Logprob,
    /// The likeliest ones, best first, of equal ones the lower id first.
    pub top: Vec<Logprob>,
}

/// What decides a token beside the logits.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// How it is chosen.
    pub params: &'a SamplingParams,
    /// The tokens before `emitted`.
    pub prompt: &'a [u32],
    /// The output so far.
    pub emitted: &'a [u32],
    /// Whose output it is, of several.
    pub choice: u32,
    /// The tokens that it may be; None: any.
    pub mask: Option<&'a TokenMask>,
}

/// Chooses tokens. Owns the scratch for it, and nothing that outlives a call.
#[derive(Debug)]
pub struct Sampler {
    /// Processed logits, `[vocab_size]`.
    logits: Vec<f32>,
    /// Zeros between calls, `[vocab_size]`.
    counts: Vec<u32>,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler for logits of `[vocab_size]`. Takes 52 bytes for each.
    ///
    /// # Panics
    /// If the vocabulary is empty.
    pub fn new(vocab_size: usize) -> Self {
        assert!(vocab_size > 0, "the vocabulary is empty");
        Self { logits: vec![0.0; vocab_size], counts: vec![0; vocab_size], candidates: Candidates::new(vocab_size) }
    }

    /// Token ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.logits.len()
    }

    /// The next token, for which the model gave `logits`, `[vocab_size]`. If all of them are impossible, it is token 0.
    ///
    /// # Panics
    /// If there are more or fewer logits than the vocabulary has tokens.
    pub fn sample(&mut self, logits: &[f32], place: Place<'_>) -> u32 {
        let Place { params, prompt, emitted, choice, mask } = place;
        let position = (prompt.len() + emitted.len()) as u64;
        let rule = choice_rule(params, position, emitted.len(), choice);
        if let Some(rule) = rule.filter(|_| mask.is_none()) {
            return self.choose(logits, &rule);
        }
        self.check_len(logits);
        self.logits.copy_from_slice(logits);
        processors::apply(&mut self.logits, params, prompt, emitted, &mut self.counts);
        if let Some(mask) = mask {
            mask.apply(&mut self.logits);
        }
        if params.temperature > 0.0 {
            let uniform = random::uniform(params.seed, choice, position);
            self.candidates.choose(&self.logits, params, uniform)
        } else {
            select::argmax(&self.logits)
        }
    }

    /// The token that a rule chooses: what a GPU does, here.
    ///
    /// # Panics
    /// If there are more or fewer logits than the vocabulary has tokens.
    pub fn choose(&mut self, logits: &[f32], rule: &ChoiceRule) -> u32 {
        self.check_len(logits);
        let ChoiceRule { temperature, top_k, top_p, min_p, uniform: [low, high] } = *rule;
        if temperature > 0.0 {
            let params = SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
            self.candidates.choose(logits, &params, u64::from(high) << 32 | u64::from(low))
        } else {
            select::argmax(logits)
        }
    }

    /// The log-probability of `token` and of the `n_top` likeliest tokens, before any parameter is applied.
    ///
    /// # Panics
    /// If there are more or fewer logits than the vocabulary has tokens, or `token` is not one of them.
    pub fn logprobs(&mut self, logits: &[f32], token: u32, n_top: usize) -> TokenLogprobs {
        self.check_len(logits);
        let top = highest(logits, n_top.max(1));
        let max_logit = f64::from(top[0].1);
        let log_total = total_weight(logits, max_logit).ln();
        let logprob = |(id, logit): (u32, f32)| {
            // At least f32::MIN where nothing is possible, and at most 0 in spite of rounding.
            let logprob = (f64::from(logit) - max_logit - log_total).min(0.0).max(f64::from(f32::MIN));
            Logprob { id, logprob: logprob as f32 }
        };
        TokenLogprobs {
            token: logprob((token, clean(logits[token as usize]))),
            top: top.into_iter().take(n_top).map(logprob).collect(),
        }
    }

    fn check_len(&self, logits: &[f32]) {
        assert_eq!(logits.len(), self.logits.len(), "the vocabulary's size");
    }
}

/// How a GPU is to choose what [`Sampler::sample`] would at `position` (of the whole sequence, prompt included), after
/// `n_emitted` tokens of output, if that may be any token: a GPU knows of no masks. `None` if it cannot: where logits are
/// changed first, and with `typical_p`.
pub fn choice_rule(params: &SamplingParams, position: u64, n_emitted: usize, choice: u32) -> Option<ChoiceRule> {
    // Every field is named, so that the compiler leads a new one here.
    #[rustfmt::skip]
    let SamplingParams {
        temperature, top_k, top_p, min_p, typical_p, seed,
        repetition_penalty: _, presence_penalty: _, frequency_penalty: _, logit_bias: _, stop_token_ids: _, min_new_tokens: _,
    } = *params;
    let samples = temperature > 0.0;
    if processors::are_active(params, n_emitted) || (samples && typical_p < 1.0) {
        return None;
    }
    let uniform = if samples { random::uniform(seed, choice, position) } else { 0 };
    Some(ChoiceRule { temperature, top_k, top_p, min_p, uniform: [uniform as u32, (uniform >> 32) as u32] })
}

/// The sum of all weights, relative to that of `max_logit`.
fn total_weight(logits: &[f32], max_logit: f64) -> f64 {
    let mut total = 0.0;
    for block in logits.chunks(BLOCK_LEN) {
        let mut weights = [f64::NEG_INFINITY; BLOCK_LEN];
        for (weight, &logit) in weights.iter_mut().zip(block) {
            *weight = f64::from(clean(logit)) - max_logit;
        }
        exp_block(&mut weights);
        total += weights.iter().sum::<f64>();
    }
    total
}

/// The `n` highest logits with their ids, highest first, of equal ones the lower id first.
fn highest(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n.min(logits.len()) + 1);
    for (id, &logit) in (0..).zip(logits) {
        let logit = clean(logit);
        if top.len() < n || top.last().is_some_and(|last| logit > last.1) {
            let rank = top.partition_point(|other| other.1 >= logit);
            top.insert(rank, (id, logit));
            top.truncate(n);
        }
    }
    top
}

#[cfg(test)]
mod tests;

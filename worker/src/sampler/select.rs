//! Selection: which of the tokens is the next one, given the processed logits.
//!
//! Either the likeliest ([`argmax`]), or one of the [`Candidates`] that the warpers leave. Warpers are those of
//! `transformers` 5.23 in its order (`generation/utils.py`): temperature, `top_k`, `top_p`, `min_p`, `typical_p`. Each
//! sees the distribution that the one before has left, renormalized, and each leaves at least one candidate. Where that
//! library leaves open which of equally likely tokens goes first, the lower id does here.
//!
//! A token's weight is an integer, in proportion to its probability (`weigh_block` in `softmax.rs`, of the logit less the
//! highest one, over the temperature): sums are exact, so the outcome depends on nothing but logits and parameters, and a
//! GPU that adds in another order chooses the same token (`worker/kernels/cuda/choose.cu`). Tokens of weight 0 are never
//! chosen. With the sum of all weights that are left as the total:
//!
//! - `top_k` keeps the k highest logits, and what equals the last of them.
//! - `top_p` keeps the first tokens by descending weight, of equal ones the lower id first, up to the one with which their
//!   sum reaches ceil(`top_p` * total). (The total is rounded to f64, then the product is; the ceiling is exact.)
//! - `min_p` keeps weights of at least `min_p` * 2^44, which is exact: 2^44 is the likeliest token's.
//! - `typical_p` keeps by a distance in f64 up to a sum as that of `top_p`. (It is the only rule that no GPU has.)
//! - The draw: with u the uniform number times 2^53, the first id at which the sum of all weights up to there exceeds
//!   floor(u * total / 2^53), which is exact.

use std::cmp::Ordering;

use super::SamplingParams;
use super::random::UNIFORM_BITS;
use super::softmax::{BLOCK_LEN, FULL_WEIGHT, clean, weigh_block};

/// How many ranked candidates are sorted first; four times as many each further time.
const FIRST_RANKS: usize = 64;
/// Candidates over `top_k` that are gathered, at least, before the surplus is dropped.
const TOP_K_SLACK: usize = 1024;

/// Logits whose highest is found before it is known where it stands.
const ARGMAX_BLOCK: usize = 1024;
/// Logits that are compared side by side.
const ARGMAX_LANES: usize = 16;

/// The id of the highest logit, the lowest id if there are several. 0 if there is none above minus infinity.
pub(super) fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (block_idx, block) in logits.chunks(ARGMAX_BLOCK).enumerate() {
        let (vectors, tail) = block.as_chunks::<ARGMAX_LANES>();
        let mut highest = [best.1; ARGMAX_LANES];
        for vector in vectors {
            // Never true of NaN.
            highest.iter_mut().zip(vector).for_each(|(best, &logit)| *best = if logit > *best { logit } else { *best });
        }
        let highest = highest.iter().chain(tail).fold(best.1, |best, &logit| if logit > best { logit } else { best });
        if highest > best.1 {
            let position = block.iter().position(|&logit| logit == highest).unwrap_or_default();
            best = ((block_idx * ARGMAX_BLOCK + position) as u32, highest);
        }
    }
    best.0
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    token_id: u32,
    logit: f32,
    /// Its probability, times a factor that is the same for all; the likeliest one's is [`FULL_WEIGHT`].
    weight: u64,
}

/// Where a candidate stands in an order that a warper cuts.
#[derive(Clone, Copy, Debug)]
struct Rank {
    key: u64,
    token_id: u32,
    weight: u64,
}

impl Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key.cmp(&other.key).then(self.token_id.cmp(&other.token_id))
    }
}

/// The tokens that may still be chosen, always by ascending id, and scratch to narrow them down.
#[derive(Debug)]
pub(super) struct Candidates {
    candidates: Vec<Candidate>,
    /// The highest logit among them.
    max_logit: f32,
    ranks: Vec<Rank>,
    sorted_logits: Vec<f32>,
}

impl Candidates {
    /// With room for a vocabulary.
    pub(super) fn new(vocab_size: usize) -> Self {
        Self {
            candidates: Vec::with_capacity(vocab_size),
            max_logit: f32::NEG_INFINITY,
            ranks: Vec::with_capacity(vocab_size),
            sorted_logits: Vec::with_capacity(vocab_size),
        }
    }

    /// Chooses by a number in [0, 1), of which `uniform` is 2^53 times: the first token, by id, at which the cumulative
    /// probability exceeds it. 0 if no logit is above minus infinity.
    pub(super) fn choose(&mut self, logits: &[f32], params: &SamplingParams, uniform: u64) -> u32 {
        self.narrow(logits, params);
        self.at_cumulative(uniform)
    }

    /// Leaves the tokens that the warpers leave.
    fn narrow(&mut self, logits: &[f32], params: &SamplingParams) {
        // Temperature keeps the order, so top_k may come before it.
        self.load(logits, params.top_k as usize);
        self.weigh(params.temperature);
        if params.top_p < 1.0 {
            self.keep_top_p(f64::from(params.top_p));
        }
        if params.min_p > 0.0 {
            self.keep_min_p(f64::from(params.min_p));
        }
        if params.typical_p < 1.0 {
            self.keep_typical_p(f64::from(params.typical_p), params.temperature);
        }
    }

    /// What [`choose`](Self::choose) draws from: ids, ascending, with their probabilities.
    #[cfg(test)]
    pub(super) fn distribution(&mut self, logits: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
        self.narrow(logits, params);
        let total = self.total_weight();
        let share = |weight: u64| weight as f64 / total as f64;
        let possible = self.candidates.iter().filter(|candidate| candidate.weight > 0);
        possible.map(|candidate| (candidate.token_id, share(candidate.weight))).collect()
    }

    /// Takes in the `top_k` highest logits (0: all), and all that equal the lowest of these. One pass, which drops the
    /// surplus each time that it has grown too large.
    fn load(&mut self, logits: &[f32], top_k: usize) {
        self.candidates.clear();
        self.max_logit = f32::NEG_INFINITY;
        let top_k = if top_k == 0 { usize::MAX } else { top_k };
        let mut capacity = top_k.saturating_add(top_k.max(TOP_K_SLACK));
        let mut floor = f32::MIN;
        for (token_id, &logit) in (0..).zip(logits) {
            let logit = clean(logit);
            if logit < floor {
                continue;
            }
            self.max_logit = self.max_logit.max(logit);
            self.candidates.push(Candidate { token_id, logit, weight: 0 });
            if self.candidates.len() >= capacity {
                floor = self.keep_top_k(top_k);
                // Ties may have left more than top_k; looking again at each further one would take quadratic time.
                capacity = capacity.max(2 * self.candidates.len());
            }
        }
        self.keep_top_k(top_k);
    }

    /// Returns the lowest logit that it keeps, or the lowest of all if there is no need to drop any.
    fn keep_top_k(&mut self, top_k: usize) -> f32 {
        let Some(n_surplus) = self.candidates.len().checked_sub(top_k) else { return f32::MIN };
        self.sorted_logits.clear();
        self.sorted_logits.extend(self.candidates.iter().map(|candidate| candidate.logit));
        let (_, floor, _) = self.sorted_logits.select_nth_unstable_by(n_surplus, f32::total_cmp);
        let floor = *floor;
        self.candidates.retain(|candidate| candidate.logit >= floor);
        floor
    }

    /// Turns logits into weights. Those that are 0 change no sum; looking for them takes longer than carrying them along.
    fn weigh(&mut self, temperature: f32) {
        let (max_logit, scale) = (f64::from(self.max_logit), scale(temperature));
        for block in self.candidates.chunks_mut(BLOCK_LEN) {
            let mut scaled = [0.0; BLOCK_LEN];
            for (scaled, candidate) in scaled.iter_mut().zip(&*block) {
                *scaled = (f64::from(candidate.logit) - max_logit) * scale;
            }
            for (candidate, weight) in block.iter_mut().zip(weigh_block(&scaled)) {
                candidate.weight = weight;
            }
        }
    }

    fn total_weight(&self) -> u64 {
        self.candidates.iter().map(|candidate| candidate.weight).sum()
    }

    /// Keeps the likeliest candidates up to the one with which they have the mass `top_p`.
    fn keep_top_p(&mut self, top_p: f64) {
        let total = self.total_weight();
        let mass = share_of(total, top_p);
        // All candidates below this together have less than what top_p leaves out, and they are the last in the order:
        // the cut is before them. On a peaked distribution that is nearly all, and they need not be ranked.
        let floor = total.saturating_sub(mass) / (self.candidates.len() as u64).max(1);
        let key = |candidate: &Candidate| !candidate.weight;
        if let Some(last) = self.rank_at_mass(mass, floor, key) {
            self.candidates.retain(|candidate| (key(candidate), candidate.token_id) <= (last.key, last.token_id));
        }
    }

    /// Drops candidates less likely than `min_p` times the likeliest.
    fn keep_min_p(&mut self, min_p: f64) {
        // The likeliest one stays.
        let floor = (min_p.min(1.0) * FULL_WEIGHT as f64).ceil() as u64;
        self.candidates.retain(|candidate| candidate.weight >= floor);
    }

    /// Keeps the candidates whose information is nearest to the entropy, up to the mass `typical_p`, and those that are
    /// as near as the last of them.
    ///
    /// With x the logit over the temperature and Z the total weight, a candidate's information is ln Z - x and the
    /// entropy, the mean of that, is ln Z - mean(x): they differ by |mean(x) - x|.
    fn keep_typical_p(&mut self, typical_p: f64, temperature: f32) {
        let (max_logit, scale) = (f64::from(self.max_logit), scale(temperature));
        let scaled = |candidate: &Candidate| (f64::from(candidate.logit) - max_logit) * scale;
        let total = self.total_weight();
        let weighted: f64 = self.candidates.iter().map(|candidate| candidate.weight as f64 * scaled(candidate)).sum();
        let mean = weighted / total as f64;
        // The bits of what is not negative are in its order.
        let distance = |candidate: &Candidate| (mean - scaled(candidate)).abs().to_bits();
        if let Some(last) = self.rank_at_mass(share_of(total, typical_p), 0, distance) {
            self.candidates.retain(|candidate| distance(candidate) <= last.key);
        }
    }

    /// Adds up the weights that are at least `floor`, by ascending key, then id, and returns where the sum reaches `mass`.
    /// None if it never does. Sorts no more than it needs: most often the first few hold nearly all of the mass.
    fn rank_at_mass(&mut self, mass: u64, floor: u64, key: impl Fn(&Candidate) -> u64) -> Option<Rank> {
        let ranked = self.candidates.iter().filter(|candidate| candidate.weight >= floor);
        self.ranks.clear();
        self.ranks.extend(ranked.map(|candidate| Rank {
            key: key(candidate),
            token_id: candidate.token_id,
            weight: candidate.weight,
        }));
        let mut unsorted = self.ranks.as_mut_slice();
        let mut n_sorted = FIRST_RANKS;
        let mut sum = 0;
        while !unsorted.is_empty() {
            if n_sorted < unsorted.len() {
                unsorted.select_nth_unstable_by(n_sorted, Rank::cmp);
            }
            let (next, rest) = unsorted.split_at_mut(n_sorted.min(unsorted.len()));
            next.sort_unstable_by(Rank::cmp);
            for rank in next {
                sum += rank.weight;
                if sum >= mass {
                    return Some(*rank);
                }
            }
            unsorted = rest;
            n_sorted *= 4;
        }
        None
    }

    fn at_cumulative(&self, uniform: u64) -> u32 {
        let target = (u128::from(uniform) * u128::from(self.total_weight())) >> UNIFORM_BITS;
        let mut sum = 0;
        for candidate in &self.candidates {
            sum += candidate.weight;
            if u128::from(sum) > target {
                return candidate.token_id;
            }
        }
        0
    }
}

/// By what differences between logits are multiplied.
fn scale(temperature: f32) -> f64 {
    1.0 / f64::from(temperature)
}

/// The least sum that has this share of the total.
fn share_of(total: u64, share: f64) -> u64 {
    (share * total as f64).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ln(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|probability| probability.ln()).collect()
    }

    fn uniform(number: f64) -> u64 {
        (number * 2f64.powi(53)) as u64
    }

    /// The tokens that can come out at all, over a fine grid of numbers.
    #[track_caller]
    fn check(logits: &[f32], params: SamplingParams, expected: &[u32]) {
        let mut candidates = Candidates::new(logits.len());
        let mut chosen: Vec<u32> =
            (0..1000).map(|step| candidates.choose(logits, &params, uniform(f64::from(step) / 1000.0))).collect();
        assert!(chosen.is_sorted(), "ids ascend with the number");
        chosen.dedup();
        assert_eq!(chosen, expected);
    }

    fn off() -> SamplingParams {
        SamplingParams { temperature: 1.0, ..SamplingParams::default() }
    }

    #[test]
    fn the_best_token_is_the_lowest_id_of_the_highest_logit() {
        assert_eq!(argmax(&[1.0, 3.0, 2.0, 3.0]), 1);
        assert_eq!(argmax(&[f32::NAN, -3.0, f32::NAN, f32::NEG_INFINITY]), 1);
        assert_eq!(argmax(&[0.0, f32::INFINITY, f32::MAX]), 1);
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), 0);
    }

    #[test]
    fn everything_possible_can_be_chosen() {
        check(&ln(&[0.1, 0.4, 0.0, 0.5]), off(), &[0, 1, 3]);
        check(&[f32::NAN, 0.0, f32::NEG_INFINITY, 1.0], off(), &[1, 3]);
        check(&[f32::NAN, f32::NEG_INFINITY], off(), &[0]);
        check(&[5.0, f32::INFINITY, 7.0, f32::INFINITY], off(), &[1, 3]);
    }

    #[test]
    fn the_number_is_compared_with_the_cumulative_probability() {
        let mut candidates = Candidates::new(4);
        let logits = ln(&[0.25, 0.25, 0.0, 0.5]);
        let below_one = 1.0 - 2f64.powi(-53);
        for (number, expected) in [(0.0, 0), (0.249, 0), (0.251, 1), (0.499, 1), (0.501, 3), (below_one, 3)] {
            assert_eq!(candidates.choose(&logits, &off(), uniform(number)), expected, "{number}");
        }
    }

    #[test]
    fn a_low_temperature_leaves_the_best_and_a_high_one_all() {
        check(&[1.0, 2.0, 3.0], SamplingParams { temperature: 0.001, ..off() }, &[2]);
        check(&[1.0, 2.0, 3.0], SamplingParams { temperature: 1e-45, ..off() }, &[2]);
        check(&[-50.0, 0.0, 50.0], SamplingParams { temperature: 100.0, ..off() }, &[0, 1, 2]);
        check(&[-50.0, 0.0, 50.0], SamplingParams { temperature: f32::INFINITY, ..off() }, &[0, 1, 2]);
    }

    #[test]
    fn top_k_keeps_what_equals_the_last_one() {
        let logits = [1.0, 3.0, 2.0, 2.0, 0.0];
        let top_k = |top_k| SamplingParams { top_k, ..off() };
        check(&logits, top_k(1), &[1]);
        check(&logits, top_k(2), &[1, 2, 3]);
        check(&logits, top_k(3), &[1, 2, 3]);
        check(&logits, top_k(4), &[0, 1, 2, 3]);
        check(&logits, top_k(5), &[0, 1, 2, 3, 4]);
        check(&logits, top_k(u32::MAX), &[0, 1, 2, 3, 4]);
    }

    #[test]
    fn top_k_of_a_large_vocabulary_is_that_of_a_full_sort() {
        for (n_values, top_k) in [(1_000_003, 50), (1_000_003, 3000), (7, 10), (1, 10)] {
            let logits: Vec<f32> = (0..20_000u64).map(|i| (i * 7_919 % n_values) as f32).collect();
            let mut sorted = logits.clone();
            sorted.sort_by(f32::total_cmp);
            let floor = sorted[sorted.len() - top_k];
            let expected: Vec<u32> = (0..20_000).filter(|&i| logits[i as usize] >= floor).collect();
            let mut candidates = Candidates::new(logits.len());
            candidates.load(&logits, top_k);
            let kept: Vec<u32> = candidates.candidates.iter().map(|candidate| candidate.token_id).collect();
            assert_eq!(kept, expected, "{n_values} values, top {top_k}");
        }
    }

    #[test]
    fn top_p_keeps_the_one_that_reaches_the_mass() {
        let logits = ln(&[0.125, 0.5, 0.25, 0.125]);
        let top_p = |top_p| SamplingParams { top_p, ..off() };
        check(&logits, top_p(0.0), &[1]);
        check(&logits, top_p(-1.0), &[1]);
        check(&logits, top_p(0.49), &[1]);
        check(&logits, top_p(0.6), &[1, 2]);
        check(&logits, top_p(0.8), &[0, 1, 2]);
        check(&logits, top_p(0.9), &[0, 1, 2, 3]);
    }

    #[test]
    fn top_p_reaches_far_into_a_flat_distribution() {
        let logits = vec![0.0; 1000];
        let expected: Vec<u32> = (0..750).collect();
        let mut candidates = Candidates::new(logits.len());
        candidates.load(&logits, 0);
        candidates.weigh(1.0);
        candidates.keep_top_p(0.75);
        let kept: Vec<u32> = candidates.candidates.iter().map(|candidate| candidate.token_id).collect();
        assert_eq!(kept, expected, "the lower ids of equally likely ones");
    }

    #[test]
    fn min_p_is_relative_to_the_best() {
        let logits = ln(&[0.1, 0.5, 0.15, 0.25]);
        let min_p = |min_p| SamplingParams { min_p, ..off() };
        check(&logits, min_p(0.1), &[0, 1, 2, 3]);
        check(&logits, min_p(0.25), &[1, 2, 3]);
        check(&logits, min_p(0.45), &[1, 3]);
        check(&logits, min_p(1.0), &[1]);
        check(&logits, min_p(f32::INFINITY), &[1]);
    }

    #[test]
    fn typical_p_prefers_the_usual_to_the_likeliest() {
        let logits = ln(&[0.5, 0.15, 0.15, 0.1, 0.1]);
        let typical_p = |typical_p| SamplingParams { typical_p, ..off() };
        // In nats: entropy 1.376, distances from it 0.683, 0.521, 0.521, 0.926, 0.926.
        check(&logits, typical_p(0.1), &[1, 2]);
        check(&logits, typical_p(0.5), &[0, 1, 2]);
        check(&logits, typical_p(0.9), &[0, 1, 2, 3, 4]);
    }

    #[test]
    fn each_warper_sees_what_the_one_before_has_left() {
        // After top_k = 2 the likeliest has 0.5 / 0.75 of the mass, which is enough for top_p = 0.6.
        let logits = ln(&[0.25, 0.5, 0.125, 0.125]);
        check(&logits, SamplingParams { top_p: 0.6, ..off() }, &[0, 1]);
        check(&logits, SamplingParams { top_p: 0.6, top_k: 2, ..off() }, &[1]);
    }
}

//! An allowance: what a sequence may spend on drafts.
//!
//! A draft that is rejected has cost time, a draft that is accepted has saved a step. The unit of account is a hundredth
//! of the time of a step without drafts: each step earns [`INCOME`], each drafted row is paid for in advance, each
//! accepted draft earns the step that it saves. Drafts that hit thus pay for further ones; where nothing hits, a row is
//! drafted now and then to see whether that is still so. Over any number of steps a sequence has thus lost at most their
//! income and [`START`]: whatever it says, it is not slowed down by more than one step and 2 % of all of them.

use super::speculation::MAX_ROWS;

/// What a step earns: the loss that drafts may cause in the long run, in percent.
const INCOME: usize = 2;

/// What an accepted draft earns: a whole step.
const STEP: usize = 100;

/// At the beginning: the first guesses are free, so that a copy is quick from its first token on.
const START: usize = STEP;

/// The most that can be saved up, so that what hit long ago does not pay for what misses now: a step full of drafts.
const MAX: usize = 2 * STEP;

/// See the module's documentation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    credit: usize,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { credit: START }
    }
}

impl Allowance {
    /// Drafts that it covers in a step with `n_decoding` sequences, all of which wait for them.
    pub(super) fn n_drafts(&self, n_decoding: usize) -> usize {
        self.credit / price(n_decoding)
    }

    /// Pays for drafts.
    pub(super) fn pay(&mut self, n_drafts: usize, n_decoding: usize) {
        self.credit -= n_drafts * price(n_decoding);
    }

    /// A step has been made in which so many drafts were accepted.
    pub(super) fn earn(&mut self, n_accepted: usize) {
        self.credit = MAX.min(self.credit + INCOME + n_accepted * STEP);
    }
}

/// What a drafted row costs all sequences of the step together, in hundredths of what its own saves with a step.
///
/// A row adds a quarter to the time of a step with one row: with SmolLM2-135M on two Zen 4 cores, the most expensive
/// rows measured, steps of 1, 2, 4 and 8 rows take 4.5, 5.6, 7.1 and 12.5 ms; of a larger model, more of the time goes
/// into reading weights, once for all rows. A step of n rows thus takes (3 + n)/4, and a further row costs n/4.
fn price(n_decoding: usize) -> usize {
    STEP * n_decoding / (3 + n_decoding)
}

const _: () = assert!(MAX >= (MAX_ROWS - 1) * (STEP / 4), "a step full of drafts can be paid for");

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::test_seed::seed;

    /// Steps of one sequence among `n_decoding` that would like `wanted` drafts each time, of which each is right with
    /// this probability at this step if the ones before it are. Returns the time that drafted rows took from all
    /// sequences, and the time that accepted ones saved, in steps without drafts.
    fn live(
        rng: &mut impl rand::Rng,
        n_decoding: usize,
        wanted: usize,
        n_steps: usize,
        p: impl Fn(usize) -> f64,
    ) -> (f64, f64) {
        let n = n_decoding as f64;
        let mut allowance = Allowance::default();
        let (mut spent, mut saved) = (0.0, 0.0);
        for step in 0..n_steps {
            let n_drafts = wanted.min(allowance.n_drafts(n_decoding));
            allowance.pay(n_drafts, n_decoding);
            let n_accepted = (0..n_drafts).take_while(|_| rng.random_bool(p(step))).count();
            allowance.earn(n_accepted);
            spent += n * n_drafts as f64 / (3.0 + n);
            saved += n_accepted as f64;
        }
        (spent, saved)
    }

    #[test]
    fn whatever_is_rejected_costs_two_percent_and_the_start() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        for _ in 0..2_000 {
            let n_steps = 10_usize.pow(rng.random_range(0..5));
            let n_decoding = rng.random_range(1..=MAX_ROWS / 2);
            let wanted = rng.random_range(1..MAX_ROWS);
            // Drafts are right for a while and wrong for a while, or wrong all the time.
            let (burst, p) = (rng.random_range(1..200), if rng.random_bool(0.3) { 0.0 } else { rng.random() });
            let p = |step: usize| if (step / burst).is_multiple_of(2) { 0.0 } else { p };
            let (spent, saved) = live(&mut rng, n_decoding, wanted, n_steps, p);
            // Prices are whole hundredths, rounded down.
            let allowed = 1.02 * (saved + 0.02 * n_steps as f64 + 1.0);
            assert!(spent <= allowed, "{spent} of {allowed}: {n_steps} steps, {n_decoding} decode, {wanted} wanted");
        }
    }

    #[test]
    fn what_is_accepted_is_never_held_back_for_long() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        let (_, saved) = live(&mut rng, 1, 7, 1_000, |_| 1.0);
        assert!(saved >= 7.0 * 998.0, "{saved}");
        // After any text without a hit, a copy is found out within the steps that a row takes to be saved up.
        let (_, saved) = live(&mut rng, 1, 7, 1_020, |step| if step < 1_000 { 0.0 } else { 1.0 });
        assert!(saved >= 7.0 * 5.0, "{saved}");
    }
}

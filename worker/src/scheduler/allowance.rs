//! An allowance: what a sequence may spend on drafts.
//!
//! A draft that is rejected has cost time, a draft that is accepted has saved a step. The unit of account is the time of
//! a step without drafts: each step earns [`INCOME`], drafts are paid for in advance, each accepted draft earns the step
//! that it saves. Drafts that hit thus pay for further ones; where nothing hits, one is made now and then to see whether
//! that is still so. Over any number of steps a sequence has thus lost at most their income and [`START`]: whatever it
//! says, it is not slowed down by more than one step and 2 % of all of them.
//!
//! What a drafted row takes is known; what a draft model takes is measured and comes as an argument. It may turn out
//! more than was expected, as when others of the step shared in less of it, and leave a debt, which is paid off first.

use super::speculation::{MAX_ROWS, ROW_TIME, step_time};

/// What a step earns: the loss that drafts may cause in the long run.
const INCOME: f64 = 0.02;

/// At the beginning: the first guesses are free, so that a copy is quick from its first token on.
const START: f64 = 1.0;

/// The most that can be saved up, so that what hit long ago does not pay for what misses now: a step full of drafts.
const MAX: f64 = 2.0;

/// See the module's documentation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    credit: f64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { credit: START }
    }
}

impl Allowance {
    /// Drafts at this price that it covers.
    pub(super) fn n_drafts(&self, price: f64) -> usize {
        // Debts cover none: the conversion ends at 0.
        (self.credit / price) as usize
    }

    /// Pays for drafts.
    pub(super) fn pay(&mut self, price: f64) {
        self.credit -= price;
    }

    /// A step has been made in which so many drafts were accepted.
    pub(super) fn earn(&mut self, n_accepted: usize) {
        self.credit = MAX.min(self.credit + INCOME + n_accepted as f64);
    }
}

/// What it costs the `n_decoding` sequences of a step together that it takes longer by `time`, in steps of one row: all
/// of them wait, and an accepted draft saves one of them a step.
pub(super) fn price(time: f64, n_decoding: usize) -> f64 {
    n_decoding as f64 * time / step_time(n_decoding)
}

const _: () = assert!(MAX >= (MAX_ROWS - 1) as f64 * ROW_TIME, "a step full of drafts can be paid for");

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::test_seed::seed;

    /// What a sequence would draft, and how.
    struct Life {
        n_decoding: usize,
        n_steps: usize,
        /// Drafts in each step.
        wanted: usize,
        /// Time of a draft model's step, which makes one of them.
        draft_step_time: f64,
    }

    /// What drafts have come to, in steps without drafts.
    #[derive(Default, Debug)]
    struct Balance {
        /// Time that they took from all sequences.
        spent: f64,
        /// Time that accepted ones saved.
        saved: f64,
        /// Steps that had any.
        n_probes: usize,
    }

    impl Life {
        /// Each draft is right with the probability `p` at this step, if the ones before it are.
        fn live(&self, rng: &mut impl rand::Rng, p: impl Fn(usize) -> f64) -> Balance {
            let each = price(ROW_TIME + self.draft_step_time, self.n_decoding);
            let mut allowance = Allowance::default();
            let mut balance = Balance::default();
            for step in 0..self.n_steps {
                let n_drafts = self.wanted.min(allowance.n_drafts(each));
                allowance.pay(n_drafts as f64 * each);
                let n_accepted = (0..n_drafts).take_while(|_| rng.random_bool(p(step))).count();
                allowance.earn(n_accepted);
                balance.spent += n_drafts as f64 * each;
                balance.saved += n_accepted as f64;
                balance.n_probes += usize::from(n_drafts > 0);
            }
            balance
        }
    }

    #[test]
    fn a_row_costs_what_was_measured() {
        // Steps of 1, 2 and 8 rows take 1, 5/4 and 11/4.
        assert_eq!([1, 2, 4].map(|n_decoding| price(ROW_TIME, n_decoding)), [1.0 / 4.0, 2.0 / 5.0, 4.0 / 7.0]);
        assert_eq!([1, 2, 4].map(|n_decoding| price(0.5, n_decoding)), [0.5, 4.0 / 5.0, 8.0 / 7.0]);
    }

    #[test]
    fn whatever_is_rejected_costs_two_percent_and_the_start() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        for _ in 0..2_000 {
            let life = Life {
                n_decoding: rng.random_range(1..=MAX_ROWS / 2),
                n_steps: 10_usize.pow(rng.random_range(0..5)),
                wanted: rng.random_range(1..MAX_ROWS),
                draft_step_time: if rng.random() { 0.0 } else { rng.random_range(0.0..3.0) },
            };
            // Drafts are right for a while and wrong for a while, or wrong all the time.
            let (burst, p) = (rng.random_range(1..200), if rng.random_bool(0.3) { 0.0 } else { rng.random() });
            let p = |step: usize| if (step / burst).is_multiple_of(2) { 0.0 } else { p };
            let Balance { spent, saved, .. } = life.live(&mut rng, p);
            let allowed = saved + INCOME * life.n_steps as f64 + START;
            assert!(spent <= allowed + 1e-6, "{spent} of {allowed}");
        }
    }

    #[test]
    fn a_debt_is_paid_off_before_anything_is_drafted() {
        let mut allowance = Allowance::default();
        allowance.pay(START + 0.5);
        for _ in 0..25 {
            assert_eq!(allowance.n_drafts(0.01), 0);
            allowance.earn(0);
        }
        (0..2).for_each(|_| allowance.earn(0));
        assert!(allowance.n_drafts(0.01) > 0);
    }

    #[test]
    fn a_model_that_is_too_slow_is_probed_now_and_then() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        let life = Life { n_decoding: 1, n_steps: 10_000, wanted: 1, draft_step_time: 1.0 };
        let Balance { spent, saved, n_probes } = life.live(&mut rng, |_| 1.0);
        assert!(spent - saved <= 202.0, "right or not, it costs more than it saves: {spent} for {saved}");
        assert!((100..=1_000).contains(&n_probes), "{n_probes}");
    }

    #[test]
    fn what_is_accepted_is_never_held_back_for_long() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        let life = Life { n_decoding: 1, n_steps: 1_000, wanted: 7, draft_step_time: 0.0 };
        let saved = life.live(&mut rng, |_| 1.0).saved;
        assert!(saved >= 7.0 * 998.0, "{saved}");
        // After any text without a hit, a copy is found out within the steps that a row takes to be saved up.
        let life = Life { n_steps: 1_020, ..life };
        let saved = life.live(&mut rng, |step| if step < 1_000 { 0.0 } else { 1.0 }).saved;
        assert!(saved >= 7.0 * 5.0, "{saved}");
    }
}

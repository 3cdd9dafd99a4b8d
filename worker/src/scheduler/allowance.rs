//! An allowance: what a sequence may spend on drafts.
//!
//! A draft that is rejected has cost time, a draft that is accepted has saved a step. The unit of account is the time of
//! a step without drafts: each step earns [`INCOME`], drafts are paid for in advance, each accepted draft earns the step
//! that it saves. Drafts that hit thus pay for further ones; where nothing hits, one is made now and then to see whether
//! that is still so. Over any number of steps a sequence has thus lost at most their income and [`START`]: whatever it
//! says, it is not slowed down by more than one step and 2 % of all of them.
//!
//! What a drafted row takes is known; what a draft model takes is measured and comes as an argument. It may turn out
//! more than was expected, as when others of the step shared in less of it, and leave a debt. A draft model is not asked
//! before that is paid off; until then the loss may be larger by it. One that costs more than can be saved up is asked
//! on credit, to see whether that is still so.
//!
//! Copying does not wait for a draft model's debts: what is earned goes into a [`RESERVE`] first, of which only repeats are
//! paid.

use super::speculation::{MAX_ROWS, ROW_TIME, step_time};

/// What a step earns: the loss that drafts may cause in the long run.
const INCOME: f64 = 0.02;

/// At the beginning: the first guesses are free, so that a copy is quick from its first token on.
const START: f64 = 1.0;

/// What a draft model cannot spend: enough for a row, however many sequences decode, so that a copy is found out.
const RESERVE: f64 = 0.6;

/// The most that can be saved up beside it, so that what hit long ago does not pay for what misses now: a step full of drafts.
const MAX: f64 = 2.0;

/// See the module's documentation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    /// At most [`RESERVE`].
    reserve: f64,
    /// At most [`MAX`]. A debt, if it is negative.
    credit: f64,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { reserve: 0.0, credit: START }
    }
}

impl Allowance {
    /// Drafts at this price that a draft model may be asked for.
    pub(super) fn n_drafts(&self, price: f64) -> usize {
        // Debts cover none: the conversion ends at 0.
        let n_drafts = (self.credit / price) as usize;
        if n_drafts == 0 && self.credit >= MAX { 1 } else { n_drafts }
    }

    /// Repeated tokens at this price that may be drafted.
    pub(super) fn n_repeats(&self, price: f64) -> usize {
        ((self.reserve + self.credit.max(0.0)) / price) as usize
    }

    /// Pays for what a draft model has found.
    pub(super) fn pay(&mut self, price: f64) {
        self.credit -= price;
    }

    /// Pays for repeated tokens.
    pub(super) fn pay_for_repeats(&mut self, price: f64) {
        let from_credit = price.min(self.credit.max(0.0));
        self.credit -= from_credit;
        self.reserve -= price - from_credit;
    }

    /// A step has been made in which so many drafts were accepted.
    pub(super) fn earn(&mut self, n_accepted: usize) {
        let earned = INCOME + n_accepted as f64;
        let kept = earned.min(RESERVE - self.reserve);
        self.reserve += kept;
        self.credit = MAX.min(self.credit + earned - kept);
    }
}

/// What it costs the `n_decoding` sequences of a step together that it takes longer by `time`, in steps of one row: all
/// of them wait, and an accepted draft saves one of them a step.
pub(super) fn price(time: f64, n_decoding: usize) -> f64 {
    n_decoding as f64 * time / step_time(n_decoding)
}

const _: () = assert!(MAX >= (MAX_ROWS - 1) as f64 * ROW_TIME, "a step full of drafts can be paid for");
const _: () = assert!(RESERVE * (1.0 + (MAX_ROWS / 2 - 1) as f64 * ROW_TIME) >= (MAX_ROWS / 2) as f64 * ROW_TIME);

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng, seq::IndexedRandom};
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
        /// How often it is the sequence itself that is repeated instead.
        p_repeat: f64,
    }

    /// What drafts have come to, in steps without drafts.
    #[derive(Default, Debug)]
    struct Balance {
        /// Time that they took from all sequences.
        spent: f64,
        /// Time that accepted ones saved.
        saved: f64,
        /// What is still to be paid off.
        debt: f64,
        /// Steps that had any.
        n_probes: usize,
    }

    impl Life {
        /// Each draft is right with the probability `p` at this step, if the ones before it are.
        fn live(&self, rng: &mut impl rand::Rng, p: impl Fn(usize) -> f64) -> Balance {
            let mut allowance = Allowance::default();
            let mut balance = Balance::default();
            for step in 0..self.n_steps {
                let repeats = rng.random_bool(self.p_repeat);
                let each = price(ROW_TIME + if repeats { 0.0 } else { self.draft_step_time }, self.n_decoding);
                let n_paid_for = if repeats { allowance.n_repeats(each) } else { allowance.n_drafts(each) };
                let n_drafts = self.wanted.min(n_paid_for);
                let pay = if repeats { Allowance::pay_for_repeats } else { Allowance::pay };
                pay(&mut allowance, n_drafts as f64 * each);
                let n_accepted = (0..n_drafts).take_while(|_| rng.random_bool(p(step))).count();
                allowance.earn(n_accepted);
                balance.spent += n_drafts as f64 * each;
                balance.saved += n_accepted as f64;
                balance.n_probes += usize::from(n_drafts > 0);
            }
            balance.debt = (-allowance.credit).max(0.0);
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
                p_repeat: *[0.0, 0.5, 1.0].choose(&mut rng).unwrap(),
            };
            // Drafts are right for a while and wrong for a while, or wrong all the time.
            let (burst, p) = (rng.random_range(1..200), if rng.random_bool(0.3) { 0.0 } else { rng.random() });
            let p = |step: usize| if (step / burst).is_multiple_of(2) { 0.0 } else { p };
            let Balance { spent, saved, debt, .. } = life.live(&mut rng, p);
            let allowed = saved + INCOME * life.n_steps as f64 + START;
            assert!(spent <= allowed + debt + 1e-6, "{spent} of {allowed}, and {debt}");
            // That of one draft.
            assert!(debt <= price(ROW_TIME + life.draft_step_time, life.n_decoding), "{debt}");
        }
    }

    #[test]
    fn a_draft_model_pays_off_its_debt_before_it_is_asked() {
        let mut allowance = Allowance::default();
        allowance.pay(START + 0.5);
        // The reserve comes first.
        for _ in 0..54 {
            assert_eq!(allowance.n_drafts(0.01), 0);
            allowance.earn(0);
        }
        (0..3).for_each(|_| allowance.earn(0));
        assert!(allowance.n_drafts(0.01) > 0);
    }

    #[test]
    fn copying_does_not_wait_for_the_debt_of_a_draft_model() {
        let mut allowance = Allowance::default();
        allowance.pay(START + 10.0);
        assert_eq!(allowance.n_repeats(0.01), 0, "it has had the start");
        (0..31).for_each(|_| allowance.earn(0));
        let price = price(ROW_TIME, MAX_ROWS / 2);
        assert_eq!(allowance.n_repeats(price), 1);
        // What a copy saves comes back to it, and then pays off the debt.
        for _ in 0..2 {
            allowance.pay_for_repeats(price);
            allowance.earn(1);
            assert_eq!((allowance.n_repeats(price), allowance.n_drafts(0.01)), (1, 0));
        }
        for _ in 0..50 {
            let n_repeats = allowance.n_repeats(price).min(1);
            allowance.pay_for_repeats(n_repeats as f64 * price);
            allowance.earn(n_repeats);
        }
        assert!(allowance.n_drafts(0.01) > 0);
    }

    #[test]
    fn a_model_that_is_too_slow_is_probed_now_and_then() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        let life = Life { n_decoding: 1, n_steps: 10_000, wanted: 1, draft_step_time: 1.0, p_repeat: 0.0 };
        let Balance { spent, saved, n_probes, .. } = life.live(&mut rng, |_| 1.0);
        assert!(spent - saved <= 202.0, "right or not, it costs more than it saves: {spent} for {saved}");
        assert!((100..=1_000).contains(&n_probes), "{n_probes}");
        let Balance { n_probes, .. } = Life { draft_step_time: 3.0, ..life }.live(&mut rng, |_| 0.0);
        assert!((30..=100).contains(&n_probes), "so is one that costs more than can be saved up: {n_probes}");
    }

    #[test]
    fn what_is_accepted_is_never_held_back_for_long() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        let life = Life { n_decoding: 1, n_steps: 1_000, wanted: 7, draft_step_time: 0.0, p_repeat: 1.0 };
        let saved = life.live(&mut rng, |_| 1.0).saved;
        assert!(saved >= 7.0 * 998.0, "{saved}");
        // After any text without a hit, a copy is found out within the steps that a row takes to be saved up.
        let life = Life { n_steps: 1_020, ..life };
        let saved = life.live(&mut rng, |step| if step < 1_000 { 0.0 } else { 1.0 }).saved;
        assert!(saved >= 7.0 * 5.0, "{saved}");
    }
}

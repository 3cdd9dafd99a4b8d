//! A pace: how long steps take, of the model that is served and of the draft model, smoothed.

use std::time::Duration;

use crate::{
    engine::average::Average,
    scheduler::speculation::{MAX_ROWS, step_time},
};

/// See the module's documentation. Unit: seconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    /// Of a step of the draft model.
    draft_step: Average,
    /// Of the draft model's reading, for each step of one row that [`step_time`] has its rows come to.
    catch_up: Average,
    /// Of a step of the served model with one row.
    target_row: Average,
}

impl Pace {
    pub(super) fn note_draft_step(&mut self, took: Duration) {
        self.draft_step.note(took.as_secs_f64());
    }

    pub(super) fn note_catch_up(&mut self, n_rows: usize, took: Duration) {
        self.catch_up.note(took.as_secs_f64() / step_time(n_rows));
    }

    /// Steps with many rows say nothing of those that only decode.
    pub(super) fn note_target_step(&mut self, n_rows: usize, took: Duration) {
        if n_rows <= MAX_ROWS {
            self.target_row.note(took.as_secs_f64() / step_time(n_rows));
        }
    }

    /// How long a step of the draft model takes, in steps of one row of the served model. Nothing, as long as nothing is
    /// known.
    pub(super) fn draft_step_time(&self) -> f64 {
        self.in_target_rows(&self.draft_step)
    }

    /// How long the draft model takes to read so many rows, in the same unit.
    pub(super) fn catch_up_time(&self, n_rows: usize) -> f64 {
        self.in_target_rows(&self.catch_up) * step_time(n_rows)
    }

    fn in_target_rows(&self, average: &Average) -> f64 {
        match (average.get(), self.target_row.get()) {
            (Some(average), Some(target)) if target > 0.0 => average / target,
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn times_are_in_steps_of_one_row() {
        let mut pace = Pace::default();
        pace.note_draft_step(2 * MS);
        assert_eq!(pace.draft_step_time(), 0.0, "nothing to compare it with");
        pace.note_target_step(MAX_ROWS + 1, MS);
        assert_eq!(pace.draft_step_time(), 0.0, "a prefill");
        pace.note_target_step(1, 10 * MS);
        assert!((pace.draft_step_time() - 0.2).abs() < 1e-9, "{pace:?}");
        (0..100).for_each(|_| pace.note_target_step(5, 20 * MS));
        assert!((pace.draft_step_time() - 0.2).abs() < 1e-9, "five rows take as long as two steps: {pace:?}");
    }

    #[test]
    fn an_outlier_counts_little_and_a_change_is_followed() {
        let mut pace = Pace::default();
        pace.note_target_step(1, 10 * MS);
        pace.note_draft_step(MS);
        pace.note_draft_step(1_000 * MS);
        assert!(pace.draft_step_time() < 0.11, "{pace:?}");
        (0..100).for_each(|_| pace.note_draft_step(10 * MS));
        assert!((pace.draft_step_time() - 1.0).abs() < 0.1, "{pace:?}");
    }

    #[test]
    fn an_outlier_that_comes_first_is_forgotten_at_once() {
        let mut pace = Pace::default();
        pace.note_target_step(1, 10 * MS);
        pace.note_draft_step(1_000 * MS);
        pace.note_draft_step(MS);
        assert!(pace.draft_step_time() < 0.21, "{pace:?}");
    }

    #[test]
    fn reading_is_measured_by_itself() {
        let mut pace = Pace::default();
        pace.note_target_step(1, 10 * MS);
        pace.note_draft_step(MS);
        pace.note_catch_up(5, 4 * MS);
        assert!((pace.catch_up_time(5) - 0.4).abs() < 1e-9, "{pace:?}");
        assert!((pace.catch_up_time(13) - 0.8).abs() < 1e-9, "twice as many rows, in the model's measure: {pace:?}");
        assert!((pace.draft_step_time() - 0.1).abs() < 1e-9, "{pace:?}");
    }
}

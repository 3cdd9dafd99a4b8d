//! An average of what is measured lately: exponential, and not led astray by outliers.

/// The part of an average that a new value makes up: an average forgets in some tens of steps.
const WEIGHT: f64 = 1.0 / 16.0;

/// A value counts for at most so many times the average, and the average for at most so many times a value: it may be a
/// first value alone. A step in which the machine did something else may take a hundred times as long, and says nothing of
/// the next one.
const MAX_OUTLIER: f64 = 2.0;

/// See the module's documentation. In the unit of its values.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Average(Option<f64>);

impl Average {
    /// Takes a value in.
    pub(super) fn note(&mut self, value: f64) {
        let average = self.0.unwrap_or(value).min(MAX_OUTLIER * value);
        self.0 = Some(average + WEIGHT * (value.min(MAX_OUTLIER * average) - average));
    }

    /// The average; nothing before the first value.
    pub(super) fn get(self) -> Option<f64> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_with_the_first_value_and_follows_the_later_ones() {
        let mut average = Average::default();
        assert_eq!(average.get(), None);
        average.note(16.0);
        assert_eq!(average.get(), Some(16.0));
        average.note(32.0);
        assert_eq!(average.get(), Some(17.0));
        (0..200).for_each(|_| average.note(32.0));
        assert!(average.get().is_some_and(|average| average > 31.9), "{average:?}");
    }
}

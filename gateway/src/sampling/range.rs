//! A range is the set of values that the contract allows for a parameter.

use schemars::Schema;

/// Values between two ends. The upper end belongs to every range, the lower one to closed ranges alone. Subnormal numbers
/// are not above 0: to workers they are none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    low: f32,
    low_is_allowed: bool,
    high: f32,
}

pub(crate) const TEMPERATURE: Range = Range::closed(0.0, 100.0);
pub(crate) const TOP_P: Range = Range::above(0.0, 1.0);
pub(crate) const MIN_P: Range = Range::closed(0.0, 1.0);
pub(crate) const TYPICAL_P: Range = Range::above(0.0, 1.0);
pub(crate) const REPETITION_PENALTY: Range = Range::above(0.0, 100.0);
pub(crate) const PRESENCE_PENALTY: Range = Range::closed(-2.0, 2.0);
pub(crate) const FREQUENCY_PENALTY: Range = Range::closed(-2.0, 2.0);
pub(crate) const LOGIT_BIAS: Range = Range::closed(-100.0, 100.0);

// === impl Range ===

impl Range {
    const fn closed(low: f32, high: f32) -> Self {
        Self { low, low_is_allowed: true, high }
    }

    const fn above(low: f32, high: f32) -> Self {
        Self { low, low_is_allowed: false, high }
    }

    /// Says why a value is not in the range; none if it is. NaN is in no range.
    pub(crate) fn refuse(&self, value: f32) -> Option<String> {
        let above_low = if self.low_is_allowed {
            value >= self.low
        } else {
            value > self.low && value >= self.low + f32::MIN_POSITIVE
        };
        if above_low && value <= self.high {
            return None;
        }
        let bracket = if self.low_is_allowed { '[' } else { '(' };
        Some(format!("{value} is not in {bracket}{}, {}]", self.low, self.high))
    }

    /// States the range in the schema of a parameter.
    pub(crate) fn in_schema(self) -> impl Fn(&mut Schema) {
        let low = if self.low_is_allowed { "minimum" } else { "exclusiveMinimum" };
        move |schema| {
            schema.insert(low.to_owned(), self.low.into());
            schema.insert("maximum".to_owned(), self.high.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_belong_to_a_range_as_the_contract_says() {
        assert_eq!(TOP_P.refuse(1.0), None);
        assert_eq!(TOP_P.refuse(0.0).as_deref(), Some("0 is not in (0, 1]"));
        assert_eq!(TOP_P.refuse(f32::MIN_POSITIVE), None);
        assert!(TOP_P.refuse(f32::from_bits(1)).is_some_and(|message| message.ends_with("1 is not in (0, 1]")));
        assert_eq!(MIN_P.refuse(0.0), None);
        assert_eq!(TEMPERATURE.refuse(-0.5).as_deref(), Some("-0.5 is not in [0, 100]"));
    }

    #[test]
    fn what_is_no_number_is_in_no_range() {
        for range in [TEMPERATURE, TOP_P, MIN_P, TYPICAL_P, REPETITION_PENALTY, PRESENCE_PENALTY, LOGIT_BIAS] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(range.refuse(value).is_some(), "{range:?} {value}");
            }
        }
    }
}

//! A retry budget: how many retries the requests so far have earned.
//!
//! Every request earns a tenth of a retry, up to a purse that fills at the start. When groups fail one in a thousand
//! requests every retry is granted; when everything fails, retries add at most a tenth to the load (the idea of
//! Finagle's `RetryBudget`).

/// What a request earns, in hundredths of a retry.
const EARNED: u32 = 10;

/// What a retry costs, in the same unit.
const RETRY: u32 = 100;

/// The purse: bursts of up to 20 retries, as a group that dies drops what it runs all at once.
const PURSE: u32 = 20 * RETRY;

/// The budget of one gateway.
#[derive(Debug)]
pub struct RetryBudget {
    saved: u32,
}

// === impl RetryBudget ===

impl RetryBudget {
    /// A full purse.
    pub fn new() -> Self {
        Self { saved: PURSE }
    }

    /// A request came.
    pub fn earn(&mut self) {
        self.saved = (self.saved + EARNED).min(PURSE);
    }

    /// Whether one more retry is granted.
    pub fn spend(&mut self) -> bool {
        let left = self.saved.checked_sub(RETRY);
        self.saved = left.unwrap_or(self.saved);
        left.is_some()
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_tenth_of_requests_once_the_purse_is_empty() {
        let mut budget = RetryBudget::new();
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 20);
        let granted = (0..1_000)
            .filter(|_| {
                budget.earn();
                budget.spend()
            })
            .count();
        assert_eq!(granted, 100);
    }

    #[test]
    fn the_purse_does_not_grow_beyond_its_size() {
        let mut budget = RetryBudget::new();
        (0..10_000).for_each(|_| budget.earn());
        assert_eq!((0..100).filter(|_| budget.spend()).count(), 20);
    }
}

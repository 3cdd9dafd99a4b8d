//! A load: the tokens that a group has still to compute, as far as the gateway can know.
//!
//! It is what the group said last (which counts the work of every gateway) plus what this gateway sent since. A report
//! may cross a request on the way, so that one is counted twice or not at all until the next report, at most a second
//! later.

/// The load of one group. Unit: tokens.
#[derive(Debug, Clone, Default)]
pub struct Load {
    reported: u64,
    reports: u64,
    sent_since: u64,
    own: u64,
}

/// A request's part of a load; must be given back.
#[derive(Debug)]
#[must_use = "a share that is not given back stays in the load"]
pub struct Share {
    cost: u64,
    reports: u64,
}

// === impl Load ===

impl Load {
    /// Tokens still to be computed, at most.
    pub fn tokens(&self) -> u64 {
        self.reported.saturating_add(self.sent_since)
    }

    /// Tokens of this gateway's own requests that have not ended.
    pub fn own_tokens(&self) -> u64 {
        self.own
    }

    /// The group said what it has to do.
    pub fn report(&mut self, outstanding_tokens: u64) {
        self.reported = outstanding_tokens;
        self.reports += 1;
        self.sent_since = 0;
    }

    /// A request of at most `cost` tokens goes to the group.
    pub fn take(&mut self, cost: u64) -> Share {
        self.sent_since = self.sent_since.saturating_add(cost);
        self.own = self.own.saturating_add(cost);
        Share { cost, reports: self.reports }
    }

    /// The request has ended.
    pub fn give_back(&mut self, share: Share) {
        self.own = self.own.saturating_sub(share.cost);
        if share.reports == self.reports {
            self.sent_since = self.sent_since.saturating_sub(share.cost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_until_it_ends_or_the_group_counts_it_itself() {
        let mut load = Load::default();
        load.report(100);
        let (first, second) = (load.take(10), load.take(5));
        assert_eq!(load.tokens(), 115);
        load.give_back(first);
        assert_eq!(load.tokens(), 105);
        load.report(5);
        assert_eq!(load.tokens(), 5, "the report counts the second");
        load.give_back(second);
        assert_eq!((load.tokens(), load.own_tokens()), (5, 0));
    }

    #[test]
    fn lying_reports_do_not_overflow() {
        let mut load = Load::default();
        load.report(u64::MAX);
        let share = load.take(u64::MAX);
        assert_eq!(load.tokens(), u64::MAX);
        load.give_back(share);
        assert_eq!(load.own_tokens(), 0);
    }
}

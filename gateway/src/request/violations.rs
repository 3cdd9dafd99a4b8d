//! A violation is one rule that a request breaks, with the path of the field that breaks it.

use std::fmt;

/// Most violations that one error carries. A request with thousands of bad messages would otherwise be answered by an
/// error larger than what gRPC metadata may hold; the sender learns enough from the first ones.
const MAX_VIOLATIONS: usize = 32;

/// What sort of rule is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ViolationKind {
    /// The contract allows it, but this version cannot do it.
    Unimplemented,
    /// The contract allows it, but the operator's policy does not.
    OverPolicy,
    /// The contract does not allow it.
    Invalid,
}

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What sort of rule.
    pub kind: ViolationKind,
    /// The field, as in `conversation.messages[2].role`.
    pub path: String,
    /// What is wrong with it, with the value and the limit.
    pub message: String,
}

/// The violations of one request, gathered while it is read.
#[derive(Debug, Default)]
pub struct Violations {
    found: Vec<Violation>,
    n_left_out: usize,
}

/// A request that breaks at least one rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", summary(.violations, *.n_left_out))]
pub struct RequestError {
    violations: Vec<Violation>,
    n_left_out: usize,
}

// === impl Violations ===

impl Violations {
    /// Notes a value that the contract does not allow.
    pub fn invalid(&mut self, path: impl fmt::Display, message: impl Into<String>) {
        self.push(ViolationKind::Invalid, path, message.into());
    }

    /// Notes a value that the policy does not allow.
    pub fn over_policy(&mut self, path: impl fmt::Display, message: impl Into<String>) {
        self.push(ViolationKind::OverPolicy, path, message.into());
    }

    /// Notes a value that this version cannot honour.
    pub fn unimplemented(&mut self, path: impl fmt::Display, message: impl Into<String>) {
        self.push(ViolationKind::Unimplemented, path, message.into());
    }

    /// Succeeds if nothing was noted.
    ///
    /// # Errors
    ///
    /// All that was noted.
    pub fn into_result(self) -> Result<(), RequestError> {
        if self.found.is_empty() {
            return Ok(());
        }
        Err(RequestError { violations: self.found, n_left_out: self.n_left_out })
    }

    fn push(&mut self, kind: ViolationKind, path: impl fmt::Display, message: String) {
        if self.found.len() < MAX_VIOLATIONS {
            self.found.push(Violation { kind, path: path.to_string(), message });
        } else {
            self.n_left_out += 1;
        }
    }
}

// === impl RequestError ===

impl RequestError {
    /// A single value that the contract does not allow.
    pub fn invalid(path: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::single(ViolationKind::Invalid, path, message.into())
    }

    /// The same, of a field that is elsewhere: `from` at the beginning of a path becomes `to`.
    #[must_use]
    pub fn moved(mut self, from: &str, to: &str) -> Self {
        for violation in &mut self.violations {
            if let Some(rest) = violation.path.strip_prefix(from) {
                violation.path = format!("{to}{rest}");
            }
        }
        self
    }

    /// A single value that the policy does not allow.
    pub fn over_policy(path: impl fmt::Display, message: impl Into<String>) -> Self {
        Self::single(ViolationKind::OverPolicy, path, message.into())
    }

    /// The violations, in the order of the request's fields; never empty.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// The gravest kind among the violations, which decides the code of the answer: a request that is wrong in itself
    /// is wrong whatever the policy or the version.
    pub fn kind(&self) -> ViolationKind {
        self.violations.iter().map(|violation| violation.kind).max().unwrap_or(ViolationKind::Invalid)
    }

    fn single(kind: ViolationKind, path: impl fmt::Display, message: String) -> Self {
        Self { violations: vec![Violation { kind, path: path.to_string(), message }], n_left_out: 0 }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.path, self.message)
    }
}

fn summary(violations: &[Violation], n_left_out: usize) -> String {
    let mut summary = violations.iter().map(Violation::to_string).collect::<Vec<_>>().join("; ");
    if n_left_out > 0 {
        summary.push_str(&format!("; and {n_left_out} more"));
    }
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_noted_is_success() {
        assert_eq!(Violations::default().into_result(), Ok(()));
    }

    #[test]
    fn the_gravest_kind_decides() {
        let mut violations = Violations::default();
        violations.unimplemented("a", "later");
        violations.over_policy("b", "7 is over the cap of 4");
        let error = violations.into_result().unwrap_err();
        assert_eq!(error.kind(), ViolationKind::OverPolicy);
        assert_eq!(error.to_string(), "a: later; b: 7 is over the cap of 4");
    }

    #[test]
    fn an_error_stays_small_and_says_how_much_it_leaves_out() {
        let mut violations = Violations::default();
        for index in 0..100_000 {
            violations.invalid(format_args!("messages[{index}]"), "bad");
        }
        let error = violations.into_result().unwrap_err();
        assert_eq!(error.violations().len(), MAX_VIOLATIONS);
        assert!(error.to_string().ends_with("; and 99968 more"), "{error}");
    }
}

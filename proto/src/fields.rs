//! The fields of our own contract under the names that another protocol has for them, so that an error names what its
//! client wrote.

use crate::error::{Error, FieldViolation};

/// Names of our own, by their beginnings, and what the protocol has there instead. The first that fits counts.
pub type Names = [(&'static str, &'static str)];

/// A field's name, with what follows it, in the protocol.
pub fn name(names: &Names, path: &str) -> String {
    let renamed = names.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", path.strip_prefix(ours)?)));
    renamed.unwrap_or_else(|| path.to_owned())
}

/// An error with its fields renamed, and with what is wrong with each for its message.
pub fn rename(error: &Error, name: impl Fn(&str) -> String) -> Error {
    let violation = |found: &FieldViolation| FieldViolation { path: name(&found.path), message: found.message.clone() };
    let violations: Vec<_> = error.field_violations().iter().map(violation).collect();
    let message = match &violations[..] {
        [] => error.message().to_owned(),
        some => some.iter().map(violation_text).collect::<Vec<_>>().join("; "),
    };
    let renamed = Error::new(error.reason(), message).violations(violations);
    match error.retry_delay() {
        Some(delay) => renamed.retry_after(delay),
        None => renamed,
    }
}

fn violation_text(violation: &FieldViolation) -> String {
    let FieldViolation { path, message } = violation;
    if path.is_empty() || message.starts_with(path) { message.clone() } else { format!("{path}: {message}") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::error::Reason;

    use super::*;

    #[test]
    fn an_error_speaks_of_its_fields_as_the_protocol_does() {
        let names = |path: &str| name(&[("sampling.max_new_tokens", "max_tokens"), ("sampling.", "")], path);
        let error = Error::new(Reason::InvalidArgument, "sampling.top_p: 2 is not in (0, 1]; ...")
            .violation("sampling.top_p", "2 is not in (0, 1]")
            .violation("sampling.max_new_tokens", "0 is not in [1, 9]")
            .violation("model", "model: it is gone")
            .retry_after(Duration::from_secs(1));
        let renamed = rename(&error, names);
        assert_eq!(renamed.message(), "top_p: 2 is not in (0, 1]; max_tokens: 0 is not in [1, 9]; model: it is gone");
        let paths: Vec<_> = renamed.field_violations().iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!(paths, ["top_p", "max_tokens", "model"]);
        assert_eq!((renamed.reason(), renamed.retry_delay()), (Reason::InvalidArgument, Some(Duration::from_secs(1))));
    }

    #[test]
    fn an_error_without_fields_keeps_its_message() {
        let error = Error::new(Reason::GroupUnavailable, "no group is ready");
        assert_eq!(rename(&error, str::to_owned), error);
    }
}

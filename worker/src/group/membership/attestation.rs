//! An attestation: all that must be the same on every rank so that their results fit together.

use std::collections::BTreeMap;

/// Name to value: the weights' digest, the engine's version, the block size and whatever else decides the result of a
/// step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attestation {
    entries: BTreeMap<String, String>,
}

/// The first entry, in the order of names, that is not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its name.
    pub key: String,
    /// What the leader has; `None`: no such entry.
    pub leader: Option<String>,
    /// What the other rank has.
    pub other: Option<String>,
}

// === impl Attestation ===

impl Attestation {
    /// Its entries, in the order of names.
    pub fn entries(&self) -> &BTreeMap<String, String> {
        &self.entries
    }

    /// How `other` differs from this one, the leader's.
    pub fn difference(&self, other: &Self) -> Option<Difference> {
        let keys = self.entries.keys().chain(other.entries.keys());
        let key = keys.filter(|key| self.entries.get(*key) != other.entries.get(*key)).min()?;
        let (leader, other) = (self.entries.get(key).cloned(), other.entries.get(key).cloned());
        Some(Difference { key: key.clone(), leader, other })
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Attestation {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self { entries: entries.into_iter().map(|(key, value)| (key.into(), value.into())).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(leader: &[(&str, &str)], other: &[(&str, &str)], expected: Option<(&str, Option<&str>, Option<&str>)>) {
        let attestation = |entries: &[(&str, &str)]| entries.iter().copied().collect::<Attestation>();
        let found = attestation(leader).difference(&attestation(other));
        let found = found.as_ref().map(|found| (found.key.as_str(), found.leader.as_deref(), found.other.as_deref()));
        assert_eq!(found, expected);
    }

    #[test]
    fn the_first_difference_is_named_whoever_lacks_it() {
        check(&[("a", "1"), ("b", "2")], &[("b", "2"), ("a", "1")], None);
        check(&[("a", "1"), ("b", "2")], &[("b", "3"), ("a", "0")], Some(("a", Some("1"), Some("0"))));
        check(&[("b", "2")], &[("a", "1"), ("b", "3")], Some(("a", None, Some("1"))));
        check(&[("a", "1")], &[], Some(("a", Some("1"), None)));
    }
}

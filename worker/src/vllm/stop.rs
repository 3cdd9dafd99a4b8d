//! Stop strings, looked for in the bytes of tokens: a worker makes no text of them.

use std::sync::Arc;

/// Most stop strings of a request; more slow every token down.
pub(super) const MAX_STRINGS: usize = 16;
/// Longest stop string. Unit: bytes.
pub(super) const MAX_BYTES: usize = 1024;

/// Looks for stop strings in the output of one choice.
#[derive(Clone, Debug)]
pub(super) struct StopSearch {
    /// None is empty.
    strings: Arc<[String]>,
    /// The end of the output, in which a string may have begun.
    tail: Vec<u8>,
}

impl StopSearch {
    pub(super) fn new(strings: Arc<[String]>) -> Self {
        Self { strings, tail: Vec::new() }
    }

    /// Goes on by the bytes of a token. Returns the string that they complete, if they do: of several, the one that is
    /// complete first, and of these the longest.
    pub(super) fn advance(&mut self, token: &[u8]) -> Option<String> {
        let n_before = self.tail.len();
        self.tail.extend(token);
        for end in n_before + 1..=self.tail.len() {
            let complete = self.strings.iter().filter(|string| self.tail[..end].ends_with(string.as_bytes()));
            if let Some(string) = complete.max_by_key(|string| string.len()) {
                return Some(string.clone());
            }
        }
        let n_kept = self.strings.iter().map(|string| string.len() - 1).max().unwrap_or(0);
        self.tail.drain(..self.tail.len().saturating_sub(n_kept));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(strings: &[&str], tokens: &[&str], expected: Option<(usize, &str)>) {
        let mut search = StopSearch::new(strings.iter().map(|string| (*string).to_owned()).collect());
        let found = (0..).zip(tokens).find_map(|(idx, token)| Some((idx, search.advance(token.as_bytes())?)));
        assert_eq!(found, expected.map(|(idx, string)| (idx, string.to_owned())), "{tokens:?}");
    }

    #[test]
    fn a_string_is_found_wherever_tokens_part_it() {
        check(&["stop"], &["a st", "o", "", "p b"], Some((3, "stop")));
        check(&["stop"], &["sto", "sto", "p"], Some((2, "stop")));
        check(&["stop"], &["s", "t", "op"], Some((2, "stop")));
        check(&["stop"], &["sto", "st o", "p"], None);
        check(&["\n\n"], &["a\n", "b\n", "\nc"], Some((2, "\n\n")));
        check(&["é"], &["\u{e8}", "é"], Some((1, "é")));
        check(&[], &["a"], None);
    }

    #[test]
    fn the_string_that_is_complete_first_counts_and_of_these_the_longest() {
        check(&["cd", "b"], &["abcd"], Some((0, "b")));
        check(&["c", "bc", "xc"], &["ab", "c"], Some((1, "bc")));
    }
}

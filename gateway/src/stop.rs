//! A stop string ends a choice: the output stops before it, and it is not part of the output.
//!
//! Text arrives in pieces, and a stop string may span any number of them. The matcher holds back the longest end of
//! the text that may still become a stop string (at most one byte less than the longest of them) and releases the
//! rest at once.
//!
//! Of several matches the one that is *complete* first wins, so that nothing has to be generated to tell; of matches
//! that are complete at the same byte, the longest, so that the output ends before all of them. The outcome is a
//! function of the text alone, not of the pieces in which it came.

use std::sync::Arc;

/// The stop strings of one request, prepared for search and shared by its choices.
///
/// Search is Knuth, Morris and Pratt's, once for each string: with at most 16 strings it costs a few operations for
/// each byte, and unlike a joint automaton it says how much of each string the text's end matches.
#[derive(Clone, Debug)]
pub struct StopStrings {
    patterns: Arc<[Pattern]>,
}

#[derive(Debug)]
struct Pattern {
    text: String,
    /// For each length `l` of a matched beginning, `borders[l - 1]` is the length of the longest shorter beginning
    /// that also ends it.
    borders: Vec<usize>,
}

/// Searches the text of one choice.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: Arc<[Pattern]>,
    /// For each pattern, how many of its first bytes end the text so far.
    matched: Vec<usize>,
    /// The end of the text that may begin a stop string.
    held: String,
    /// Bytes released so far.
    n_released: usize,
    is_stopped: bool,
}

/// What a piece of text brought about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Text that belongs to the output whatever comes next.
    pub text: String,
    /// The stop string that ended the choice, if one did; the text ends before it.
    pub stop: Option<StopMatch>,
}

/// A stop string that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// The string.
    pub text: String,
    /// Where it starts, which is the length of the choice's output. Unit: bytes from the beginning of the choice.
    pub start: usize,
}

// === impl StopStrings ===

impl StopStrings {
    /// Prepares strings for search. Empty strings are ignored: requests cannot hold any.
    pub fn new(strings: &[String]) -> Self {
        let patterns = strings.iter().filter(|text| !text.is_empty()).map(|text| Pattern::new(text)).collect();
        Self { patterns }
    }

    /// A matcher at the beginning of a choice.
    pub fn matcher(&self) -> StopMatcher {
        StopMatcher {
            patterns: Arc::clone(&self.patterns),
            matched: vec![0; self.patterns.len()],
            held: String::new(),
            n_released: 0,
            is_stopped: false,
        }
    }
}

// === impl StopMatcher ===

impl StopMatcher {
    /// Reads the next piece of the choice's text. After a match every further piece is dropped.
    pub fn push(&mut self, piece: &str) -> Released {
        if self.is_stopped {
            return Released::default();
        }
        let found = piece.bytes().zip(1..).find_map(|(byte, n_read)| Some((self.step(byte)?, n_read)));
        let n_held = self.held.len();
        self.held.push_str(piece);
        match found {
            Some((text, n_read)) => {
                self.is_stopped = true;
                let output = self.release(n_held + n_read - text.len());
                self.held.clear();
                Released { text: output, stop: Some(StopMatch { text, start: self.n_released }) }
            }
            None => {
                let n_open = self.matched.iter().copied().max().unwrap_or(0);
                Released { text: self.release(self.held.len() - n_open), stop: None }
            }
        }
    }

    /// Ends the choice: what was held back is output after all.
    pub fn flush(&mut self) -> String {
        self.matched.fill(0);
        self.release(self.held.len())
    }

    /// Advances every search by one byte and returns the longest string that it completes.
    fn step(&mut self, byte: u8) -> Option<String> {
        let mut longest: Option<&Pattern> = None;
        for (pattern, matched) in self.patterns.iter().zip(&mut self.matched) {
            *matched = pattern.advance(*matched, byte);
            if *matched == pattern.text.len() && longest.is_none_or(|other| other.text.len() < pattern.text.len()) {
                longest = Some(pattern);
            }
        }
        longest.map(|pattern| pattern.text.clone())
    }

    /// Takes the first `n_bytes` of the held text. They end at a character's end: what stays behind, or was matched,
    /// starts with the first character of a stop string.
    fn release(&mut self, n_bytes: usize) -> String {
        let rest = self.held.split_off(n_bytes);
        self.n_released += n_bytes;
        std::mem::replace(&mut self.held, rest)
    }
}

// === impl Pattern ===

impl Pattern {
    fn new(text: &str) -> Self {
        let mut pattern = Self { text: text.to_owned(), borders: vec![0] };
        for byte in text.bytes().skip(1) {
            let border = pattern.advance(pattern.borders.last().copied().unwrap_or(0), byte);
            pattern.borders.push(border);
        }
        pattern
    }

    /// The length of the longest beginning of the pattern that ends a text, once `byte` follows a text that `matched`
    /// bytes of the pattern end. `matched` is less than the pattern's length.
    fn advance(&self, mut matched: usize, byte: u8) -> usize {
        let bytes = self.text.as_bytes();
        while bytes[matched] != byte {
            let Some(shorter) = matched.checked_sub(1) else { return 0 };
            matched = self.borders[shorter];
        }
        matched + 1
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// The rule of the module's documentation, applied to the whole text at once: output and stop string.
    fn search(stops: &[String], text: &str) -> (String, Option<StopMatch>) {
        let matches = stops.iter().flat_map(|stop| text.match_indices(stop.as_str()).map(move |(at, _)| (at, stop)));
        match matches.min_by_key(|&(start, stop)| (start + stop.len(), start)) {
            Some((start, stop)) => (text[..start].into(), Some(StopMatch { text: stop.clone(), start })),
            None => (text.into(), None),
        }
    }

    fn run<'a>(stops: &[String], pieces: impl IntoIterator<Item = &'a str>) -> (String, Option<StopMatch>) {
        let (mut matcher, mut output, mut stop) = (StopStrings::new(stops).matcher(), String::new(), None);
        for piece in pieces {
            let released = matcher.push(piece);
            output.push_str(&released.text);
            stop = stop.or(released.stop);
        }
        output.push_str(&matcher.flush());
        (output, stop)
    }

    fn check(stops: &[&str], pieces: &[&str], output: &str, stop: Option<&str>) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.into()).collect();
        let (found, stopped_by) = run(&stops, pieces.iter().copied());
        assert_eq!((found.as_str(), stopped_by.as_ref().map(|by| by.text.as_str())), (output, stop));
        assert_eq!((found, stopped_by), search(&stops, &pieces.concat()));
    }

    #[test]
    fn a_string_that_spans_pieces_is_found() {
        check(&["</answer>"], &["yes<", "/ans", "wer", "> and more"], "yes", Some("</answer>"));
    }

    #[test]
    fn text_that_only_looks_like_a_stop_string_is_released() {
        check(&["\n\nUser:"], &["a\n", "\nUse", "ful", "\n\n"], "a\n\nUseful\n\n", None);
    }

    #[test]
    fn the_match_that_is_complete_first_wins_and_the_longest_of_equals() {
        check(&["abcd", "bc"], &["xabcd"], "xa", Some("bc"));
        check(&["bc", "abc"], &["xa", "bc"], "x", Some("abc"));
    }

    #[test]
    fn characters_of_several_bytes_stay_whole() {
        check(&["é🦀"], &["caf", "é", "é", "🦀!"], "café", Some("é🦀"));
        check(&["🦀🦁"], &["🦀", "🦂"], "🦀🦂", None);
    }

    #[test]
    fn nothing_is_held_back_without_need() {
        let mut matcher = StopStrings::new(&["stop".into()]).matcher();
        assert_eq!(matcher.push("must").text, "mu");
        assert_eq!(matcher.push("er").text, "ster");
    }

    #[test]
    fn text_after_a_match_is_dropped() {
        let mut matcher = StopStrings::new(&["x".into()]).matcher();
        assert_eq!(matcher.push("axb").stop, Some(StopMatch { text: "x".into(), start: 1 }));
        assert_eq!((matcher.push("cx"), matcher.flush()), (Released::default(), String::new()));
    }

    #[test]
    fn every_chunking_of_random_texts_gives_the_outcome_of_a_search_of_the_whole() {
        let seed = getrandom::u64().unwrap();
        println!("seed {seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut n_stopped = 0;
        for _ in 0..20_000 {
            let mut random = |max: usize| -> String {
                let n_chars = rng.random_range(1..=max);
                (0..n_chars).map(|_| ['a', 'b', 'é', '🦀'][rng.random_range(0..4)]).collect()
            };
            let text = random(24);
            let stops: Vec<String> = (0..text.len() % 4).map(|_| random(4)).collect();
            let mut pieces = Vec::new();
            let mut rest = text.as_str();
            while !rest.is_empty() {
                let n_chars = rng.random_range(0..=rest.chars().count());
                let at = rest.char_indices().nth(n_chars).map_or(rest.len(), |(at, _)| at);
                pieces.push(&rest[..at]);
                rest = &rest[at..];
            }
            let expected = search(&stops, &text);
            n_stopped += usize::from(expected.1.is_some());
            assert_eq!(run(&stops, pieces.iter().copied()), expected, "{stops:?} in {pieces:?}");
        }
        assert!((1_000..19_000).contains(&n_stopped), "only {n_stopped} of the texts were stopped");
    }
}

//! Words: the stretches of a text that a byte-level model encodes one by one.
//!
//! The library cuts them out of strings that remember where each of their bytes came from, with a backtracking regex
//! engine. Here the usual pre-tokenizers cut plain text, with the linear engine that lies under that one. Its only
//! want is the look-ahead with which nearly all patterns end ([`ENDING`]); that is done by hand.

use std::{
    fmt,
    ops::Range,
    panic::{RefUnwindSafe, UnwindSafe},
    slice,
};

use regex_automata::{
    Anchored, Input,
    meta::{Cache, Regex},
    util::{pool::Pool, syntax},
};
use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        split::{Split, SplitPattern},
    },
};

/// Most steps of a pre-tokenizer. DeepSeek's have three.
const MAX_STEPS: usize = 16;

/// The words of GPT-2, which `ByteLevel` cuts if it is told to (`RE` in the library's `byte_level.rs`).
const GPT_2_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// How a pattern may end: blanks up to the last before a word, or all of them.
const ENDING: &str = r"|\s+(?!\S)|\s+";
const BLANKS: &str = r"\s+";

/// How a pre-tokenizer cuts words: step by step, each within the pieces of the one before.
#[derive(Debug)]
pub(super) struct Words(Vec<Step>);

/// One pre-tokenizer.
#[derive(Debug)]
enum Step {
    Pattern(Pattern),
    Digits { each: bool },
}

/// A pattern whose matches are words, and so is what lies between them.
struct Pattern {
    /// The pattern; or, if it has the [`ENDING`], what stands before that and, as pattern 1, [`BLANKS`].
    regex: Regex,
    /// States that the engine has built, to find the next match sooner: for each thread that searches at the time at most
    /// twice 2 MiB, the engine's default.
    caches: Pool<Cache, NewCache>,
}

type NewCache = Box<dyn Fn() -> Cache + Send + Sync + UnwindSafe + RefUnwindSafe>;

// === impl Words ===

impl Words {
    /// As a pre-tokenizer cuts them; `None` if it does anything that is not understood here.
    pub(super) fn of(pre_tokenizer: &PreTokenizerWrapper) -> Option<Self> {
        let steps = match pre_tokenizer {
            PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
            single => slice::from_ref(single),
        };
        let (last, before) = steps.split_last().filter(|_| steps.len() <= MAX_STEPS)?;
        let PreTokenizerWrapper::ByteLevel(ByteLevel { add_prefix_space: false, use_regex, .. }) = last else {
            return None;
        };
        let mut steps = before.iter().map(Step::of).collect::<Option<Vec<_>>>()?;
        if *use_regex {
            steps.push(Step::Pattern(Pattern::new(GPT_2_WORDS)?));
        }
        Some(Self(steps))
    }

    /// The words of a text, in order. Together they are the text.
    pub(super) fn cut<'t>(&self, text: &'t str) -> Vec<&'t str> {
        self.0.iter().fold(vec![text], |pieces, step| step.cut(&pieces))
    }
}

// === impl Step ===

impl Step {
    fn of(pre_tokenizer: &PreTokenizerWrapper) -> Option<Self> {
        match pre_tokenizer {
            &PreTokenizerWrapper::Digits(Digits { individual_digits: each, .. }) => Some(Self::Digits { each }),
            PreTokenizerWrapper::Split(Split {
                pattern: SplitPattern::Regex(pattern),
                behavior: SplitDelimiterBehavior::Isolated,
                invert: false,
                ..
            }) => Pattern::new(pattern).map(Self::Pattern),
            _ => None,
        }
    }

    fn cut<'t>(&self, pieces: &[&'t str]) -> Vec<&'t str> {
        match self {
            Self::Pattern(pattern) => pattern.cut(pieces),
            Self::Digits { each } => pieces.iter().flat_map(|piece| cut_digits(piece, *each)).collect(),
        }
    }
}

/// Cuts numbers off, or each of their digits.
fn cut_digits(piece: &str, each: bool) -> impl Iterator<Item = &str> {
    let mut rest = piece;
    std::iter::from_fn(move || {
        let first = rest.chars().next()?;
        let end = if each && first.is_numeric() {
            first.len_utf8()
        } else {
            rest.find(|character: char| character.is_numeric() != first.is_numeric()).unwrap_or(rest.len())
        };
        let (word, after) = rest.split_at(end);
        rest = after;
        Some(word)
    })
}

// === impl Pattern ===

impl Pattern {
    /// `None` if the pattern is not valid, has look-around elsewhere than in its ending, matches nothing at all, or means
    /// something else to the library's engine.
    fn new(pattern: &str) -> Option<Self> {
        if is_possessive(pattern) || sets_flags(pattern) {
            return None;
        }
        let patterns = match pattern.strip_suffix(ENDING) {
            Some(others) => vec![others, BLANKS],
            None => vec![pattern],
        };
        // That the rest is valid by itself says, too, that the ending was no part of a group or a class.
        let parsed = syntax::parse_many(&patterns).ok()?;
        if parsed.iter().any(|pattern| pattern.properties().minimum_len().unwrap_or(0) == 0) {
            return None;
        }
        let regex = Regex::builder().build_many_from_hir(&parsed).ok()?;
        let engine = regex.clone();
        let new_cache: NewCache = Box::new(move || engine.create_cache());
        Some(Self { regex, caches: Pool::new(new_cache) })
    }

    fn cut<'t>(&self, pieces: &[&'t str]) -> Vec<&'t str> {
        let mut cache = self.caches.get();
        let mut words = Vec::with_capacity(pieces.iter().map(|piece| piece.len()).sum::<usize>() / 4);
        for piece in pieces {
            let mut done = 0;
            while let Some(word) = self.find(&mut cache, piece, done) {
                words.extend(Some(&piece[done..word.start]).filter(|between| !between.is_empty()));
                done = word.end;
                words.push(&piece[word]);
            }
            words.extend(Some(&piece[done..]).filter(|rest| !rest.is_empty()));
        }
        words
    }

    /// The first match at or after `from`.
    fn find(&self, cache: &mut Cache, piece: &str, from: usize) -> Option<Range<usize>> {
        let anywhere = Input::new(piece).range(from..);
        // Mostly one word follows another, and to look there alone takes half the time.
        let here = anywhere.clone().anchored(Anchored::Yes);
        let found = self.regex.search_with(cache, &here).or_else(|| self.regex.search_with(cache, &anywhere))?;
        let mut word = found.range();
        // `\s+(?!\S)`: the last of several blanks is left to the word behind them.
        let is_blanks = found.pattern().as_usize() == 1;
        if is_blanks && word.end < piece.len() {
            let last = piece[word.clone()].chars().next_back().map_or(0, char::len_utf8);
            if last < word.len() {
                word.end -= last;
            }
        }
        Some(word)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pattern").field("regex", &self.regex).finish_non_exhaustive()
    }
}

/// Whether a repetition may be one that gives nothing back, such as `a?+`. The engine here takes it for one repetition
/// within another.
fn is_possessive(pattern: &str) -> bool {
    let counts = |before: &str| before.ends_with(|end: char| end.is_ascii_digit() || end == ',');
    ["?+", "*+", "++"].iter().any(|repetition| pattern.contains(repetition))
        || pattern.match_indices("}+").any(|(at, _)| counts(&pattern[..at]))
}

/// Whether a pattern sets flags for what follows, such as `(?i)`, where the engines differ on how far that is, or lets
/// blanks stand in itself (`x`), where they differ on which.
fn sets_flags(pattern: &str) -> bool {
    pattern.split("(?").skip(1).any(|group| {
        let after = group.trim_start_matches(|flag: char| flag.is_ascii_alphabetic() || flag == '-');
        let flags = &group[..group.len() - after.len()];
        after.starts_with(')') || after.starts_with(':') && flags.contains('x')
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn words(steps: Value) -> Option<Words> {
        let description = json!({"type": "Sequence", "pretokenizers": steps});
        Words::of(&serde_json::from_value(description).unwrap())
    }

    fn split(pattern: &str) -> Value {
        json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
    }

    fn byte_level(use_regex: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
    }

    #[track_caller]
    fn check(steps: Value, text: &str, expected: &[&str]) {
        assert_eq!(words(steps).unwrap().cut(text), expected);
    }

    #[test]
    fn the_last_of_several_blanks_belongs_to_the_word_after_them() {
        let steps = json!([byte_level(true)]);
        check(steps.clone(), "a   b", &["a", "  ", " b"]);
        check(steps.clone(), "a \u{3000}b", &["a", " ", "\u{3000}", "b"]);
        check(steps.clone(), "a\nb \n", &["a", "\n", "b", " \n"]);
        check(steps, "   ", &["   "]);
    }

    #[test]
    fn each_step_cuts_the_pieces_of_the_one_before() {
        let digits = |each: bool| json!({"type": "Digits", "individual_digits": each});
        check(json!([digits(true), byte_level(true)]), "ab 12٣ c", &["ab", " ", "1", "2", "٣", " c"]);
        check(json!([digits(false), byte_level(false)]), "ab 12٣ c", &["ab ", "12٣", " c"]);
        check(json!([split("[ab]+"), split("b"), byte_level(false)]), "xabba b", &["x", "a", "b", "b", "a", " ", "b"]);
        check(json!([byte_level(false)]), "a b", &["a b"]);
    }

    #[test]
    fn what_is_not_understood_is_left_to_the_library() {
        let with = |pattern: &str| words(json!([split(pattern), byte_level(false)]));
        for pattern in [r"\S+|\s+(?!\S)|\s+", r"(?i:'s)|[^\p{L}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"] {
            assert!(with(pattern).is_some(), "{pattern}");
        }
        let inside = [r"\S+(?!x)", r"(?<=a)b|\s+", r"\S+|\s+(?!\S)|\s+|x", r"(\S)\1", r"(?>a)b"];
        let possessive = [r"\d{1,3}+", r"a?+b|\s+(?!\S)|\s+", r"[^\s]++", r"a*+b", r"a{2,}+"];
        let flags = [r"(?x: a )b", r"((?i)a)b", r"(?i-x:a)(?sx: b)"];
        let endings = [r"(?x)a|\s+(?!\S)|\s+", r"a|(?s-m)b|\s+(?!\S)|\s+", r"a\|\s+(?!\S)|\s+"];
        let nothing = [r"a*", r"\b", r"a*|\s+(?!\S)|\s+", r"[^\s\S]"];
        for pattern in inside.iter().chain(&possessive).chain(&flags).chain(&endings).chain(&nothing) {
            assert!(with(pattern).is_none(), "{pattern}");
        }
        let mut removed = split("a");
        removed["behavior"] = json!("Removed");
        let mut inverted = split("a");
        inverted["invert"] = json!(true);
        let mut prefixed = byte_level(true);
        prefixed["add_prefix_space"] = json!(true);
        let string = json!({"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": false});
        let too_many = Value::Array((0..MAX_STEPS).map(|_| split("a")).chain([byte_level(true)]).collect());
        for steps in [
            json!([removed, byte_level(true)]),
            json!([inverted, byte_level(true)]),
            json!([string, byte_level(true)]),
            json!([{"type": "Whitespace"}, byte_level(true)]),
            json!([byte_level(true), split("a")]),
            json!([split("a")]),
            json!([prefixed]),
            json!([]),
            too_many,
        ] {
            assert!(words(steps.clone()).is_none(), "{steps}");
        }
    }
}

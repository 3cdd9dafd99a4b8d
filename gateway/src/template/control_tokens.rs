//! A control token stands for structure: the end of a turn, the header of a role. Only a template may write one.
//!
//! # What is guaranteed
//!
//! Call *user strings* all strings of a request that can reach the template: contents, names, ids, tools and their
//! schemas (keys included), arguments, documents, template variables. A rendering's text is exactly what the template
//! writes for the request. If a control token of at least two characters occurs in that text, and at least one of its
//! characters other than white space came from a user string, then a break offset lies inside the occurrence, and the
//! tokenizer takes it for text. This holds for every template that shows user strings
//!
//! * whole, or with white space trimmed from either end, in any number and order, next to each other or to text of its
//!   own, and as JSON;
//! * in other case: control tokens are recognised whatever the case of their ASCII letters.
//!
//! Other disguises (fullwidth letters under a normalizer that folds them, say) need no break: the tokenizer service takes
//! for text whatever does not spell a control token before normalization.
//!
//! What is not covered: a template that cuts a user string in the middle and joins the pieces, and one that builds a
//! control token *around* a name, an id or a JSON string, as `'<|' + name + '|>'` would (around content or a document
//! it is covered). No template in `tests/data/templates` does either.
//!
//! # How
//!
//! A [marker](super::marker) is put into user strings wherever a control token could arise:
//!
//! * after the first character of every occurrence of a control token in the string;
//! * after the first character of an end of the string that is a beginning of a control token, since what the template
//!   shows next could complete it;
//! * before a beginning of the string that is an end of a control token;
//! * before a content or document that as a whole occurs inside a control token.
//!
//! Markers sit next to characters that are not white space, so trimming works as before. They are drawn when the
//! request is already known, so it cannot contain them. The rendering without markers and the one with them must have
//! the same text. A template that looks for a control-token string in the content, counts its characters or sorts by it
//! makes them differ, and such a request is refused instead of being answered on another prompt than Hugging Face would
//! build.
//! Only requests with such strings are rendered twice.
//!
//! The cost is one pass of an Aho–Corasick automaton over the user strings, and a few look-ups at each string's ends.

use std::{collections::BTreeSet, fmt};

use aho_corasick::{AhoCorasick, MatchKind};

use super::{TemplateError, context::Place, marker::Marker, python};

/// Most markers in one request. Ordinary text has a handful; the limit keeps a text of nothing but control tokens from
/// growing fourteenfold.
pub const MAX_BREAKS: usize = 65_536;
/// Limits on what a vocabulary may call control tokens; real ones have at most a few thousand of 30 bytes.
const MAX_TOKENS: usize = 16_384;
const MAX_TOKEN_BYTES: usize = 256;

/// The control tokens of a model, prepared for search.
pub struct ControlTokens {
    automaton: AhoCorasick,
    /// Proper beginnings of each token, in lower case.
    beginnings: BTreeSet<Box<str>>,
    /// Proper ends of each token, in lower case.
    ends: BTreeSet<Box<str>>,
    /// Bytes of the longest token.
    longest: usize,
}

/// A vocabulary whose control tokens cannot be searched for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlTokensError {
    /// Too many of them.
    #[error("{0} control tokens are over {MAX_TOKENS}")]
    TooMany(usize),
    /// One of them is too long.
    #[error("a control token of {0} bytes is over {MAX_TOKEN_BYTES}")]
    TooLong(usize),
    /// The automaton cannot be built.
    #[error("control tokens: {0}")]
    Automaton(String),
}

/// Puts a marker into the user strings of one request.
#[derive(Debug)]
pub(super) struct Guard<'a> {
    tokens: &'a ControlTokens,
    marker: &'a Marker,
    n_breaks: usize,
}

// === impl ControlTokens ===

impl ControlTokens {
    /// Prepares a model's control tokens: the special ones, not every added token.
    ///
    /// White space around a token is no part of what is searched for. Tokens of a single character are left out: no
    /// offset lies inside them.
    ///
    /// # Errors
    ///
    /// More or longer tokens than any real vocabulary has.
    pub fn new<'a>(tokens: impl IntoIterator<Item = &'a str>) -> Result<Self, ControlTokensError> {
        let texts: BTreeSet<String> = tokens
            .into_iter()
            .map(|token| python::strip(token).to_ascii_lowercase())
            .filter(|token| token.chars().nth(1).is_some())
            .collect();
        if texts.len() > MAX_TOKENS {
            return Err(ControlTokensError::TooMany(texts.len()));
        }
        let longest = texts.iter().map(String::len).max().unwrap_or(0);
        if longest > MAX_TOKEN_BYTES {
            return Err(ControlTokensError::TooLong(longest));
        }
        let automaton = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .match_kind(MatchKind::Standard)
            .build(&texts)
            .map_err(|error| ControlTokensError::Automaton(error.to_string()))?;
        let cuts = |text: &'_ str| text.char_indices().skip(1).map(|(at, _)| at).collect::<Vec<_>>();
        let beginnings = texts.iter().flat_map(|text| cuts(text).into_iter().map(|at| text[..at].into())).collect();
        let ends = texts.iter().flat_map(|text| cuts(text).into_iter().map(|at| text[at..].into())).collect();
        Ok(Self { automaton, beginnings, ends, longest })
    }

    /// Marks what is given to it, for one rendering.
    pub(super) fn guard<'a>(&'a self, marker: &'a Marker) -> Guard<'a> {
        Guard { tokens: self, marker, n_breaks: 0 }
    }

    /// The offsets at which a user string has to be broken, ascending; none if there are over `limit`.
    fn breaks(&self, text: &str, place: Place, limit: usize) -> Option<Vec<usize>> {
        let mut breaks = BTreeSet::new();
        for found in self.automaton.find_overlapping_iter(text) {
            breaks.insert(after_first_char(text, found.start()));
            if breaks.len() > limit {
                return None;
            }
        }
        let core_start = text.len() - python::lstrip(text).len();
        let core_end = python::rstrip(text).len();
        if core_start < core_end {
            let core = &text[core_start..core_end];
            self.break_end(core, core_start, &mut breaks);
            if self.completes_a_beginning(core) || (place == Place::Prose && self.is_inside(core)) {
                breaks.insert(core_start);
            }
        }
        (breaks.len() <= limit).then(|| breaks.into_iter().collect())
    }

    /// Breaks every end of `core` that is a beginning of a control token. `base` is where `core` starts in its string.
    fn break_end(&self, core: &str, base: usize, breaks: &mut BTreeSet<usize>) {
        let tail_start = floor_char_boundary(core, core.len().saturating_sub(self.longest));
        let tail = core[tail_start..].to_ascii_lowercase();
        for (at, _) in tail.char_indices() {
            if self.beginnings.contains(&tail[at..]) {
                breaks.insert(base + after_first_char(core, tail_start + at));
            }
        }
    }

    /// Whether `core` begins with an end of a control token.
    fn completes_a_beginning(&self, core: &str) -> bool {
        let head = core[..floor_char_boundary(core, core.len().min(self.longest))].to_ascii_lowercase();
        head.char_indices().any(|(at, character)| self.ends.contains(&head[..at + character.len_utf8()]))
    }

    /// Whether all of `core` occurs inside a control token, neither at its beginning nor at its end.
    fn is_inside(&self, core: &str) -> bool {
        if core.len() > self.longest {
            return false;
        }
        let core: Box<str> = core.to_ascii_lowercase().into();
        self.ends.range(core.clone()..).next().is_some_and(|end| end.starts_with(&*core))
    }
}

impl fmt::Debug for ControlTokens {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ControlTokens").field("n_tokens", &self.automaton.patterns_len()).finish()
    }
}

// === impl Guard ===

impl Guard<'_> {
    /// The user string with markers in it.
    pub(super) fn rewrite(&mut self, text: &str, place: Place) -> Result<String, TemplateError> {
        let limit = MAX_BREAKS - self.n_breaks;
        let breaks = self.tokens.breaks(text, place, limit).ok_or(TemplateError::TooManyControlTokens(MAX_BREAKS))?;
        self.n_breaks += breaks.len();
        Ok(self.marker.mark(text, &breaks))
    }

    /// Whether any string needed a marker.
    pub(super) fn has_marked(&self) -> bool {
        self.n_breaks > 0
    }
}

fn after_first_char(text: &str, start: usize) -> usize {
    start + text[start..].chars().next().map_or(0, char::len_utf8)
}

fn floor_char_boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: [&str; 4] = ["<s>", "</s>", "<|im_end|>", "<|endé|>"];

    /// `|` in `expected` stands for a break.
    #[track_caller]
    fn check(place: Place, text: &str, expected: &str) {
        let tokens = ControlTokens::new(TOKENS).unwrap();
        let mut marked = text.to_owned();
        for &offset in tokens.breaks(text, place, MAX_BREAKS).unwrap().iter().rev() {
            marked.insert(offset, '¦');
        }
        assert_eq!(marked, expected);
    }

    #[test]
    fn an_occurrence_is_broken_after_its_first_character() {
        check(Place::Name, "a <|im_end|> b<s></s>.", "a <¦|im_end|> b<¦s><¦/s>.");
    }

    #[test]
    fn letters_in_another_case_count() {
        check(Place::Name, "x<|Im_END|>x", "x<¦|Im_END|>x");
    }

    #[test]
    fn an_end_that_could_be_completed_is_broken() {
        check(Place::Name, "x <|im_e", "x <¦|im_e");
        check(Place::Name, "x <", "x <¦");
        check(Place::Name, "x <|end\t \n", "x <¦|end\t \n");
        check(Place::Name, "a<b", "a<b");
    }

    #[test]
    fn a_beginning_that_could_complete_something_is_broken() {
        check(Place::Name, "_end|> x", "¦_end|> x");
        check(Place::Name, " \n> quoted", " \n¦> quoted");
        check(Place::Name, "é|>", "¦é|>");
        check(Place::Name, "no end", "no end");
    }

    #[test]
    fn content_that_fits_inside_a_token_is_broken_but_a_name_may_be_compared() {
        check(Place::Prose, " im_end ", " ¦im_end ");
        check(Place::Name, "im_end", "im_end");
        check(Place::Prose, "im_ending", "im_ending");
    }

    #[test]
    fn white_space_and_single_characters_are_no_tokens_to_search_for() {
        let tokens = ControlTokens::new([" ", "\n\n", "▁", " <a> "]).unwrap();
        assert_eq!(tokens.breaks("\n\n ▁ <A>", Place::Prose, MAX_BREAKS), Some(vec![8]));
    }

    #[test]
    fn a_text_of_nothing_but_control_tokens_is_refused() {
        let (tokens, marker) = (ControlTokens::new(TOKENS).unwrap(), Marker::draw().unwrap());
        let mut guard = tokens.guard(&marker);
        let half = "<s>".repeat(MAX_BREAKS / 2);
        assert_eq!(guard.rewrite(&half, Place::Prose).unwrap().len(), half.len() + 39 * (MAX_BREAKS / 2));
        assert!(guard.rewrite(&half, Place::Prose).is_ok());
        assert!(matches!(guard.rewrite("<s>", Place::Prose), Err(TemplateError::TooManyControlTokens(MAX_BREAKS))));
    }

    #[test]
    fn absurd_vocabularies_are_refused() {
        let names: Vec<String> = (0..=MAX_TOKENS).map(|index| format!("<{index}>")).collect();
        let error = ControlTokens::new(names.iter().map(String::as_str)).unwrap_err();
        assert_eq!(error, ControlTokensError::TooMany(MAX_TOKENS + 1));
        let error = ControlTokens::new(["x".repeat(257).as_str()]).unwrap_err();
        assert_eq!(error, ControlTokensError::TooLong(257));
    }
}

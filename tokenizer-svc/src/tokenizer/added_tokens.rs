//! Added tokens: strings that are found in a text before anything else looks at it, control tokens above all.
//!
//! The rules are those of the tokenizers library (`added_vocabulary.rs`, version 0.23): the leftmost match wins, then
//! the longest; tokens that are not normalized are looked for in the text as it came, the others afterwards in the
//! normalized pieces between. The library itself cannot leave a *certain* occurrence unmatched, which
//! [`Breaks`] ask for, so the search is here; what is done with the pieces remains the library's work. One rule is ours:
//! [`AddedTokens::may_stand`].

use std::{collections::HashMap, ops::Range, sync::LazyLock};

use regex::Regex;
use tokenizers::{AddedToken, NormalizedString, Token, normalizer};

use super::breaks::Breaks;
use crate::error::{LoadError, check_limit};

/// Longest string of an added token. Real ones stay below 100; each position of a text costs at most this many steps.
/// Unit: bytes.
const MAX_TOKEN_BYTES: usize = 1024;

/// All strings of added tokens together. Each byte may become a node of the trie. Unit: bytes.
const MAX_TOTAL_BYTES: usize = 8 << 20;

/// A stretch of a piece, and the added token found there if there is one.
pub(crate) type Found = (Option<u32>, Range<usize>);

/// A piece of the text with the token that it is, as `PreTokenizedString::split` takes it.
type Split = (NormalizedString, Option<Vec<Token>>);

/// The added tokens of one vocabulary, ready for the search.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    as_written: Trie,
    normalized: Trie,
    rules: HashMap<u32, Rule>,
    /// Of each control token what a text must spell for it to be one: its string without blanks around it, in lower
    /// case.
    controls: HashMap<u32, Box<str>>,
}

/// How one token is matched.
#[derive(Debug, Clone, Copy)]
struct Rule {
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
}

/// A byte trie over token strings.
#[derive(Debug, Default)]
struct Trie {
    /// The node that follows another by a byte; the root is 0.
    edges: HashMap<(u32, u8), u32>,
    /// The token that ends at a node.
    tokens: HashMap<u32, u32>,
    /// Whether any token starts with a byte: most positions of a text fail here.
    starts: Vec<bool>,
}

// === impl AddedTokens ===

impl AddedTokens {
    /// From tokens with their ids; each comes with the string to look for in the normalized text, which is used if the
    /// token is a normalized one.
    ///
    /// # Errors
    /// If a string, or all together, are over the limits above.
    pub(crate) fn new<'a>(tokens: impl Iterator<Item = (u32, &'a AddedToken, String)>) -> Result<Self, LoadError> {
        let (mut as_written, mut normalized) = (Trie::new(), Trie::new());
        let (mut rules, mut controls) = (HashMap::new(), HashMap::new());
        let mut total_bytes = 0;
        for (id, token, normalized_text) in tokens {
            let (trie, text) = if token.normalized {
                (&mut normalized, normalized_text.as_str())
            } else {
                (&mut as_written, token.content.as_str())
            };
            total_bytes += text.len();
            check_limit("the length of an added token (bytes)", text.len(), MAX_TOKEN_BYTES)?;
            check_limit("the length of all added tokens (bytes)", total_bytes, MAX_TOTAL_BYTES)?;
            trie.insert(text, id);
            let &AddedToken { single_word, lstrip, rstrip, special, .. } = token;
            rules.insert(id, Rule { single_word, lstrip, rstrip });
            if special {
                controls.insert(id, token.content.trim().to_ascii_lowercase().into());
            }
        }
        Ok(Self { as_written, normalized, rules, controls })
    }

    /// Splits a piece of the text as it came by the tokens that are looked for there.
    pub(crate) fn split_as_written(&self, piece: &NormalizedString, breaks: &Breaks) -> Vec<Split> {
        self.split(&self.as_written, piece, breaks)
    }

    /// Splits a normalized piece by the tokens that are looked for in normalized text.
    pub(crate) fn split_normalized(&self, piece: &NormalizedString, breaks: &Breaks) -> Vec<Split> {
        self.split(&self.normalized, piece, breaks)
    }

    /// Splits a text that no normalization changes by both kinds of tokens, the others in what the first leave over.
    pub(crate) fn split_unchanged(&self, text: &str, breaks: &Breaks) -> Vec<Found> {
        let split = |trie: &Trie, piece: Range<usize>| {
            let in_text = |range: &Range<usize>| piece.start + range.start..piece.start + range.end;
            let may_stand = |id, range: &Range<usize>| {
                let range = in_text(range);
                self.may_stand_for(id, &text[range.clone()], &range, breaks)
            };
            let found = self.find(trie, &text[piece.clone()], |id, range| !may_stand(id, range));
            found.into_iter().map(|(id, range)| (id, in_text(&range))).collect::<Vec<_>>()
        };
        let found = split(&self.as_written, 0..text.len());
        let found = found.into_iter().flat_map(|(id, range)| match id {
            Some(_) => vec![(id, range)],
            None => split(&self.normalized, range),
        });
        found.collect()
    }

    /// Whether a token is a control token.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.controls.contains_key(&id)
    }

    /// Whether a token may stand for a range of a piece, in bytes of its normalized form.
    ///
    /// A control token may only where the text as it came spells it, in whatever ASCII case, and no break lies inside.
    /// Whoever sets breaks looks for what is spelled; a control token that normalization alone yields (from fullwidth
    /// letters, or around a character that it drops) would pass unseen, and is text.
    pub(crate) fn may_stand(&self, id: u32, piece: &NormalizedString, range: &Range<usize>, breaks: &Breaks) -> bool {
        let written = || piece.get_range_original(normalizer::Range::Normalized(range.clone()));
        !self.is_special(id)
            || written().is_some_and(|written| self.may_stand_for(id, written, &range_in_text(piece, range), breaks))
    }

    /// The same of a range of the whole text, and what is written there.
    fn may_stand_for(&self, id: u32, written: &str, range_in_text: &Range<usize>, breaks: &Breaks) -> bool {
        let Some(control) = self.controls.get(&id) else { return true };
        written.to_ascii_lowercase().contains(&**control) && !breaks.cut(range_in_text)
    }

    fn split(&self, trie: &Trie, piece: &NormalizedString, breaks: &Breaks) -> Vec<Split> {
        let forbidden = |id, range: &Range<usize>| !self.may_stand(id, piece, range, breaks);
        let found = self.find(trie, piece.get(), forbidden);
        let split = found.into_iter().map(|(id, range)| {
            let slice = piece.slice(normalizer::Range::Normalized(range)).expect("matches start and end at characters");
            let tokens = id.map(|id| vec![Token::new(id, slice.get().to_owned(), (0, slice.get().len()))]);
            (slice, tokens)
        });
        split.collect()
    }

    /// Cuts `text` into tokens and the stretches between, in order.
    fn find(&self, trie: &Trie, text: &str, forbidden: impl Fn(u32, &Range<usize>) -> bool) -> Vec<Found> {
        let mut found = Vec::new();
        let (mut done, mut at) = (0, 0);
        while let Some((id, matched)) = trie.leftmost_longest(text.as_bytes(), at, &forbidden) {
            at = matched.end;
            let Some(taken) = self.extent(id, text, matched, done) else { continue };
            if done < taken.start {
                found.push((None, done..taken.start));
            }
            done = taken.end;
            found.push((Some(id), taken));
        }
        if done < text.len() {
            found.push((None, done..text.len()));
        }
        found
    }

    /// What a match takes of the text, with the blanks around it that it swallows down to `done`; `None` if it has to
    /// be a word of its own and is not.
    fn extent(&self, id: u32, text: &str, matched: Range<usize>, done: usize) -> Option<Range<usize>> {
        let rule = self.rules.get(&id)?;
        let (before, after) = (text.get(..matched.start)?, text.get(matched.end..)?);
        let inside_word =
            || before.chars().next_back().is_some_and(is_word) || after.chars().next().is_some_and(is_word);
        if rule.single_word && inside_word() {
            return None;
        }
        let start = if rule.lstrip { before.trim_end().len().max(done) } else { matched.start };
        let end = if rule.rstrip { text.len() - after.trim_start().len() } else { matched.end };
        Some(start..end)
    }
}

/// Where a range of a piece, in bytes of its normalized form, lies in the whole text as it came. The whole piece if the
/// normalization kept no trace: rather too wide, so that a break is never missed.
fn range_in_text(piece: &NormalizedString, range: &Range<usize>) -> Range<usize> {
    let (start, end) = piece.offsets_original();
    match piece.convert_offsets(normalizer::Range::Normalized(range.clone())) {
        Some(inside) => start + inside.start..start + inside.end,
        None => start..end,
    }
}

/// Whether a character is part of a word, as the regex `\w` says.
fn is_word(character: char) -> bool {
    static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^\w$").expect("a constant and valid pattern"));
    WORD.is_match(character.encode_utf8(&mut [0; 4]))
}

// === impl Trie ===

impl Trie {
    fn new() -> Self {
        Self { starts: vec![false; 256], ..Self::default() }
    }

    fn insert(&mut self, text: &str, id: u32) {
        let Some(&first) = text.as_bytes().first() else { return };
        self.starts[usize::from(first)] = true;
        let mut node = 0;
        for &byte in text.as_bytes() {
            let next = u32::try_from(self.edges.len() + 1).expect("MAX_TOTAL_BYTES bounds the number of nodes");
            node = *self.edges.entry((node, byte)).or_insert(next);
        }
        self.tokens.insert(node, id);
    }

    /// The first token at or after `from` that is not forbidden where it stands: of several at one place the longest.
    fn leftmost_longest(
        &self,
        text: &[u8],
        from: usize,
        forbidden: &impl Fn(u32, &Range<usize>) -> bool,
    ) -> Option<(u32, Range<usize>)> {
        (from..text.len()).filter(|&start| self.starts[usize::from(text[start])]).find_map(|start| {
            let mut longest = None;
            let mut node = 0;
            for (length, byte) in (1..).zip(&text[start..]) {
                let Some(&next) = self.edges.get(&(node, *byte)) else { break };
                node = next;
                let range = start..start + length;
                if let Some(&id) = self.tokens.get(&node).filter(|&&id| !forbidden(id, &range)) {
                    longest = Some((id, range));
                }
            }
            longest
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(content: &str) -> AddedToken {
        AddedToken { normalized: false, special: true, ..AddedToken::from(content, true) }
    }

    /// Splits `text` and shows each token in brackets.
    fn check(tokens: &[AddedToken], text: &str, offsets: &[u32], expected: &str) {
        let numbered = (0..).zip(tokens).map(|(id, token)| (id, token, token.content.clone()));
        let added = AddedTokens::new(numbered).unwrap();
        let breaks = Breaks::new(offsets.to_vec(), text.len()).unwrap();
        let splits = added.split_as_written(&NormalizedString::from(text), &breaks);
        let shown: String = splits
            .iter()
            .map(|(piece, tokens)| if tokens.is_some() { format!("[{}]", piece.get()) } else { piece.get().to_owned() })
            .collect();
        assert_eq!(shown, expected, "{text:?} with breaks {offsets:?}");
    }

    #[test]
    fn the_leftmost_and_then_the_longest_token_wins() {
        let tokens = [token("<a>"), token("<a>>"), token("a><")];
        check(&tokens, "x<a>y", &[], "x[<a>]y");
        check(&tokens, "<a>><a>", &[], "[<a>>][<a>]");
        check(&tokens, "a><a>", &[], "[a><]a>");
    }

    #[test]
    fn a_break_inside_leaves_the_next_best_match() {
        let tokens = [token("<a>"), token("<a>>"), token("a><")];
        check(&tokens, "<a>>", &[3], "[<a>]>");
        check(&tokens, "<a>>", &[2], "<a>>");
        check(&tokens, "<a><", &[1], "<[a><]");
        check(&tokens, "<a>", &[0, 3], "[<a>]");
    }

    #[test]
    fn a_break_binds_control_tokens_only() {
        let plain = AddedToken { special: false, ..token("<tool>") };
        check(&[plain], "<tool>", &[3], "[<tool>]");
    }

    #[test]
    fn blanks_and_words_beside_a_token_follow_its_rule() {
        check(&[token("<m>").lstrip(true)], "a \n<m> b", &[], "a[ \n<m>] b");
        check(&[token("<m>").rstrip(true)], "a <m> \u{3000}b", &[], "a [<m> \u{3000}]b");
        check(&[token("<m>").lstrip(true).rstrip(true)], "<m>  <m>", &[], "[<m>  ][<m>]");
        check(&[token("um").single_word(true)], "um, drum um_ um", &[], "[um], drum um_ [um]");
    }

    #[test]
    fn an_overlong_token_is_refused() {
        let long = token(&"x".repeat(MAX_TOKEN_BYTES + 1));
        let refusal = AddedTokens::new([(0, &long, String::new())].into_iter()).unwrap_err();
        assert_eq!(refusal.to_string(), "the length of an added token (bytes) is 1025, the limit is 1024");
    }
}

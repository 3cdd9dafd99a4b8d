//! A tokenizer: a vocabulary with the rules that turn a text into its ids and each id back into its bytes.
//!
//! Encoding is the tokenizers library's own pipeline (normalizer, pre-tokenizer, merges, template) with one stage of
//! ours, the search for added tokens, which also obeys [`Breaks`]. Most byte-level pipelines have a shorter way to the
//! same ids ([`WordEncoder`]). Decoding needs no pipeline: in the vocabularies that we accept, each id stands for fixed
//! bytes, which are tabulated once ([`TokenBytes`]).

use std::{io, ops::Range};

use lockstep_checkpoint::{Spelling, TokenBytes};
use sha2::{Digest as _, Sha256};
use tokenizers::{
    Encoding, Model as _, ModelWrapper, NormalizedString, Normalizer as _, OffsetType, PreTokenizedString,
    PreTokenizer as _, Token,
};

use self::{added_tokens::AddedTokens, word_encoder::WordEncoder};
use crate::error::{LoadError, TokenizeError, check_limit};

mod added_tokens;
mod breaks;
mod word_encoder;
mod words;

pub use breaks::Breaks;

/// Largest vocabulary. The largest of today's models have a quarter of it. Unit: ids.
pub const MAX_VOCAB_SIZE: usize = 1 << 20;

/// A text of what patterns treat in ways of their own.
const TRIAL: &str = "A trial: 1, 22, 1234567,\n\u{e9}\u{4e2d}. (\"don't DON'T!!it\")  \t\r\n\n  x\u{2003} --__ ";

/// Longest token. The longest of today's models have a sixteenth of it. Unit: bytes.
const MAX_TOKEN_BYTES: usize = 4_096;

/// All bytes of a vocabulary. The largest of today's models have a thirtieth of it. Unit: bytes.
const MAX_VOCABULARY_BYTES: usize = 64 << 20;

/// Most merges. The largest of today's models have an eighth of it.
pub(crate) const MAX_MERGES: usize = 1 << 22;

/// Most blanks in a row. The library's regex engine keeps a state for each while it looks for a word's end
/// (`\s+(?!\S)`), at most a million; past that it leaves the rest of the text one word, and says nothing.
/// Unit: characters.
pub const MAX_BLANK_RUN: usize = 1 << 19;

/// How often a word is encoded anew, in smaller parts, because the model spelled a control token over a break; after
/// that each character is a part. Keeps the work linear in the word whatever the merges are.
const MAX_CUTS: u32 = 4;

/// A token that stands for structure, not for text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its id.
    pub id: u32,
    /// The string that encodes to it.
    pub text: String,
}

/// A vocabulary with its rules. Cheap to share; what it answers never changes.
#[derive(Debug)]
pub struct Tokenizer {
    pipeline: tokenizers::Tokenizer,
    added: AddedTokens,
    word_encoder: Option<WordEncoder>,
    token_bytes: TokenBytes,
    strips_leading_space: bool,
    special: Vec<SpecialToken>,
    fingerprint: String,
}

// === impl Tokenizer ===

impl Tokenizer {
    /// Wraps a pipeline. `min_vocab_size` is the number of rows of the model's embedding as far as it is known: a model
    /// may have rows without a token, and their ids decode to nothing.
    ///
    /// # Errors
    /// If the pipeline is not byte-pair encoding, decodes by an unknown rule, or has too many or contradictory tokens.
    pub(crate) fn new(mut pipeline: tokenizers::Tokenizer, min_vocab_size: usize) -> Result<Self, LoadError> {
        let ModelWrapper::BPE(model) = pipeline.get_model() else {
            return Err(LoadError::Unsupported("a tokenizer model other than BPE".into()));
        };
        if model.dropout.is_some_and(|dropout| dropout > 0.0) {
            return Err(LoadError::Unsupported("BPE dropout, which encodes at random,".into()));
        }
        // Limits and padding of training runs: `transformers` switches both off before it encodes, and so do we.
        pipeline.with_truncation(None).map_err(|e| LoadError::Invalid(e.to_string()))?;
        pipeline.with_padding(None);

        let max_id = pipeline.get_vocab(true).into_values().max().unwrap_or(0);
        let vocab_size = min_vocab_size.max(max_id as usize + 1);
        check_limit("the vocabulary size (ids)", vocab_size, MAX_VOCAB_SIZE)?;

        let (added, special) = added_tokens(&pipeline)?;
        let spelling = spelling(&pipeline)?;
        let texts = (0..).take(vocab_size).map(|id| pipeline.id_to_token(id).unwrap_or_default());
        let token_bytes = TokenBytes::new(&spelling, texts);
        let fingerprint = fingerprint(&pipeline, vocab_size)?;
        let strips_leading_space = spelling.strips_leading_space();
        let word_encoder = WordEncoder::of(&pipeline);
        let mut tokenizer =
            Self { pipeline, added, word_encoder, token_bytes, strips_leading_space, special, fingerprint };
        let n_bytes = || tokenizer.all_bytes().map(<[u8]>::len);
        check_limit("the longest token (bytes)", n_bytes().max().unwrap_or(0), MAX_TOKEN_BYTES)?;
        check_limit("the vocabulary (bytes)", n_bytes().sum(), MAX_VOCABULARY_BYTES)?;
        // Some malformed descriptions load and panic at the first text: let that be now, while it is contained.
        let invalid = |e: TokenizeError| LoadError::Invalid(e.to_string());
        let by_words = tokenizer.encode(TRIAL, &Breaks::NONE, true).map_err(invalid)?;
        // The two ways are built to agree. Should a pattern mean different things to the two engines, the library's word
        // counts.
        if by_words != tokenizer.encode_by_library(TRIAL, &Breaks::NONE, true).map_err(invalid)? {
            tracing::warn!("words are cut otherwise than by the library, which encodes this model's texts therefore");
            tokenizer.word_encoder = None;
        }
        Ok(tokenizer)
    }

    /// The ids of `text`, exactly as Hugging Face's `encode` gives them, except that control-token strings across a
    /// break are text, and so is what only becomes one by normalization. `add_special_tokens` adds what the tokenizer
    /// adds around a text.
    ///
    /// # Errors
    /// [`TokenizeError::BlankRun`] if more than [`MAX_BLANK_RUN`] blanks follow one another, or
    /// [`TokenizeError::Pipeline`] if the library fails.
    pub fn encode(&self, text: &str, breaks: &Breaks, add_special_tokens: bool) -> Result<Vec<u32>, TokenizeError> {
        self.encode_by(text, add_special_tokens, || {
            let by_words = self.word_encoder.as_ref();
            let ids = by_words.map(|encoder| encoder.encode(&self.pipeline, &self.added, text, breaks)).transpose()?;
            ids.flatten().map_or_else(|| self.pipe(text, breaks), |ids| Ok(encoding_of_ids(ids)))
        })
    }

    /// The same through the library's pipeline alone: what [`Self::encode`] is tested against and measured beside.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_by_library(
        &self,
        text: &str,
        breaks: &Breaks,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TokenizeError> {
        self.encode_by(text, add_special_tokens, || self.pipe(text, breaks))
    }

    /// Checks a text, has it encoded, and adds what the tokenizer adds around it.
    fn encode_by(
        &self,
        text: &str,
        add_special_tokens: bool,
        encode: impl FnOnce() -> tokenizers::Result<Encoding>,
    ) -> Result<Vec<u32>, TokenizeError> {
        let mut runs_of_blanks = text.split(|character: char| !character.is_whitespace());
        if text.len() > MAX_BLANK_RUN && runs_of_blanks.any(is_overlong) {
            return Err(TokenizeError::BlankRun { limit: MAX_BLANK_RUN });
        }
        let complete = encode().and_then(|encoding| self.pipeline.post_process(encoding, None, add_special_tokens));
        Ok(complete.map_err(|e| TokenizeError::Pipeline(e.to_string()))?.get_ids().to_vec())
    }

    /// The library's pipeline, down to the ids of the text itself.
    fn pipe(&self, text: &str, breaks: &Breaks) -> tokenizers::Result<Encoding> {
        let mut pieces = PreTokenizedString::from(text);
        pieces.split(|_, piece| Ok(self.added.split_as_written(&piece, breaks)))?;
        pieces.split(|_, mut piece| {
            if let Some(normalizer) = self.pipeline.get_normalizer() {
                normalizer.normalize(&mut piece)?;
            }
            Ok(self.added.split_normalized(&piece, breaks))
        })?;
        if let Some(pre_tokenizer) = self.pipeline.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        pieces.tokenize(|word| self.merge(word, breaks))?;
        pieces.into_encoding(None, 0, OffsetType::None)
    }

    /// The bytes that an id stands for. Empty for ids of rows without a token.
    ///
    /// # Errors
    /// [`TokenizeError::TokenId`] if `id` is not below [`Self::vocab_size`]; `idx` says where it stood.
    pub(crate) fn token_bytes(&self, idx: usize, id: u32) -> Result<&[u8], TokenizeError> {
        self.token_bytes.get(id).ok_or(TokenizeError::TokenId { idx, id, vocab_size: self.vocab_size() })
    }

    /// The bytes of every id, from id 0 on.
    pub(crate) fn all_bytes(&self) -> impl Iterator<Item = &[u8]> {
        (0..).map_while(|id| self.token_bytes.get(id))
    }

    /// How many bytes ids stand for; those that are none of the vocabulary count nothing.
    pub(crate) fn n_bytes(&self, ids: &[u32]) -> usize {
        ids.iter().filter_map(|&id| self.token_bytes.get(id)).map(<[u8]>::len).sum()
    }

    /// What the library makes of ids.
    #[cfg(test)]
    pub(crate) fn decode_by_library(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        self.pipeline.decode(ids, skip_special_tokens).expect("a decoder that never fails")
    }

    /// Whether a decoded text loses the blank that it starts with, because encoding put one there.
    pub(crate) fn strips_leading_space(&self) -> bool {
        self.strips_leading_space
    }

    /// Whether an id is a control token's.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.added.is_special(id)
    }

    /// Every control token, ascending by id.
    #[must_use]
    pub fn special_tokens(&self) -> &[SpecialToken] {
        &self.special
    }

    /// The id of a token by its string, control token or not.
    #[must_use]
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.pipeline.token_to_id(text)
    }

    /// Ids are below this.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        u32::try_from(self.token_bytes.n_ids()).expect("MAX_VOCAB_SIZE fits")
    }

    /// SHA-256 over all that decides what encoding and decoding answer, in hexadecimal.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The tokens of one word. Merges may spell a control token out of plain text (a vocabulary holds them as ordinary
    /// strings, and some pipelines look words up whole). Where that may not stand, the word is cut inside it.
    fn merge(&self, word: &NormalizedString, breaks: &Breaks) -> tokenizers::Result<Vec<Token>> {
        let model = self.pipeline.get_model();
        let text = word.get();
        let mut parts = vec![(0..text.len(), 0)];
        let mut tokens = Vec::new();
        while let Some((part, n_cuts)) = parts.pop() {
            let part_tokens = model.tokenize(&text[part.clone()])?;
            let cuts = self.cuts(word, &part, &part_tokens, breaks);
            if cuts.is_empty() {
                tokens.extend(part_tokens);
            } else if n_cuts < MAX_CUTS {
                push_parts(&mut parts, part, cuts, n_cuts + 1);
            } else {
                let every_character = text[part.clone()].char_indices().skip(1).map(|(at, _)| part.start + at);
                let cuts = every_character.collect();
                push_parts(&mut parts, part, cuts, n_cuts);
            }
        }
        Ok(tokens)
    }

    /// Where a part of a word has to be cut: after the first character of each control token that may not stand.
    fn cuts(&self, word: &NormalizedString, part: &Range<usize>, tokens: &[Token], breaks: &Breaks) -> Vec<usize> {
        if breaks.is_empty() && self.pipeline.get_normalizer().is_none() {
            return Vec::new();
        }
        let cut = tokens.iter().filter(|token| self.is_special(token.id)).filter_map(|token| {
            let range = part.start + token.offsets.0..part.start + token.offsets.1;
            let text = word.get().get(range.clone())?;
            // The unknown token stands for text that it does not spell; there is nothing to guard against then.
            let first_bytes = text.chars().next()?.len_utf8();
            let spelled = text == token.value && first_bytes < text.len();
            (spelled && !self.added.may_stand(token.id, word, &range, breaks)).then_some(range.start + first_bytes)
        });
        cut.collect()
    }
}

/// An encoding without the tokens' texts and places, which nothing here reads.
fn encoding_of_ids(ids: Vec<u32>) -> Encoding {
    let (type_ids, texts, words, offsets, special, attention) = Default::default();
    Encoding::new(ids, type_ids, texts, words, offsets, special, attention, Vec::new(), Default::default())
}

/// Whether a run of blanks has more than [`MAX_BLANK_RUN`] characters.
fn is_overlong(blanks: &str) -> bool {
    blanks.len() > MAX_BLANK_RUN && blanks.chars().nth(MAX_BLANK_RUN).is_some()
}

/// Puts the parts between `cuts` (ascending, inside `part`) on the stack, the first on top.
fn push_parts(parts: &mut Vec<(Range<usize>, u32)>, part: Range<usize>, cuts: Vec<usize>, n_cuts: u32) {
    let mut end = part.end;
    for start in cuts.into_iter().rev() {
        parts.push((start..end, n_cuts));
        end = start;
    }
    parts.push((part.start..end, n_cuts));
}

/// How the vocabulary's texts spell bytes, as the pipeline's decoder says.
fn spelling(pipeline: &tokenizers::Tokenizer) -> Result<Spelling, LoadError> {
    let decoder = serde_json::to_value(pipeline.get_decoder()).map_err(|e| LoadError::Invalid(e.to_string()))?;
    Ok(Spelling::of_decoder(&decoder)?)
}

/// The pipeline's added tokens as we search for them, and the control tokens among them.
fn added_tokens(pipeline: &tokenizers::Tokenizer) -> Result<(AddedTokens, Vec<SpecialToken>), LoadError> {
    let tokens = pipeline.get_added_tokens_decoder();
    let vocabulary = pipeline.get_added_vocabulary();
    let normalized = |id, content: &str| vocabulary.simple_id_to_token(id).unwrap_or_else(|| content.to_owned());
    let added = AddedTokens::new(tokens.iter().map(|(&id, token)| (id, token, normalized(id, &token.content))))?;
    let special = tokens.iter().filter(|(_, token)| token.special);
    let mut special: Vec<_> = special.map(|(&id, token)| SpecialToken { id, text: token.content.clone() }).collect();
    special.sort_unstable_by_key(|token| token.id);
    Ok((added, special))
}

/// Digests the pipeline in the library's own serialized form, which is ordered and complete.
fn fingerprint(pipeline: &tokenizers::Tokenizer, vocab_size: usize) -> Result<String, LoadError> {
    struct Digesting(Sha256);
    impl io::Write for Digesting {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut digest = Digesting(Sha256::new());
    digest.0.update(format!("lockstep tokenizer 2, {vocab_size} ids\n"));
    let mut serialize = io::BufWriter::new(&mut digest);
    serde_json::to_writer(&mut serialize, pipeline).map_err(|e| LoadError::Invalid(e.to_string()))?;
    io::Write::flush(&mut serialize).map_err(|e| LoadError::Invalid(e.to_string()))?;
    drop(serialize);
    Ok(digest.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests;

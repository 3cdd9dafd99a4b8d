//! Byte-level BPE vocabularies (`tokenizer.ggml.model` = `gpt2`), with the pre-tokenizers that are known by name.

use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{Vocabulary, merging_model};
use crate::{error::LoadError, tokenizer::Tokenizer};

/// Llama 3's words: contractions, letters with one sign before them, up to three digits, signs, line ends, blanks.
const LLAMA_3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 2's words: as Llama 3's, but each digit is one.
const QWEN_2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What a name in `tokenizer.ggml.pre` stands for.
struct Rules {
    /// Composes characters first (Unicode's NFC).
    composes: bool,
    pre_tokenizer: PreTokenizerWrapper,
    /// A word that is a token as it stands is not put together by merges.
    looks_words_up: bool,
}

/// Builds the tokenizer of a byte-level vocabulary.
///
/// # Errors
/// If the pre-tokenizer is unknown, or the vocabulary contradicts itself.
pub(super) fn build(vocabulary: &Vocabulary<'_>, pre: &str) -> Result<Tokenizer, LoadError> {
    let rules = Rules::named(pre)?;
    let merges = vocabulary.merges.iter().map(|merge| pair(merge)).collect::<Result<_, _>>()?;
    let model = merging_model(vocabulary.ids()?, merges, |builder| builder.ignore_merges(rules.looks_words_up))?;

    let mut pipeline = tokenizers::Tokenizer::new(model);
    let normalizer = rules.composes.then_some(NormalizerWrapper::NFC(NFC));
    pipeline.with_normalizer(normalizer).map_err(|e| LoadError::Invalid(e.to_string()))?;
    pipeline.with_pre_tokenizer(Some(rules.pre_tokenizer));
    pipeline.with_decoder(Some(ByteLevel::new(false, false, false)));
    vocabulary.finish(pipeline)
}

// === impl Rules ===

impl Rules {
    fn named(pre: &str) -> Result<Self, LoadError> {
        let gpt_2_words = ByteLevel::new(false, true, true);
        Ok(match pre {
            "gpt-2" => Self { composes: false, pre_tokenizer: gpt_2_words.into(), looks_words_up: false },
            "smollm" => {
                let pre_tokenizer = Sequence::new(vec![Digits::new(true).into(), gpt_2_words.into()]).into();
                Self { composes: false, pre_tokenizer, looks_words_up: false }
            }
            "llama-bpe" | "llama3" | "llama-v3" => {
                Self { composes: false, pre_tokenizer: words(LLAMA_3_WORDS)?, looks_words_up: true }
            }
            "qwen2" => Self { composes: true, pre_tokenizer: words(QWEN_2_WORDS)?, looks_words_up: false },
            other => {
                let known = "gpt-2, smollm, llama-bpe and qwen2 are";
                return Err(LoadError::Unsupported(format!("tokenizer.ggml.pre {other:?} (but {known})")));
            }
        })
    }
}

/// A pre-tokenizer that takes each match of a pattern for a word.
fn words(pattern: &str) -> Result<PreTokenizerWrapper, LoadError> {
    let pattern = SplitPattern::Regex(pattern.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
    let split = split.map_err(|e| LoadError::Invalid(e.to_string()))?;
    Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
}

/// The two halves of a merge, `left right`.
fn pair(merge: &str) -> Result<(String, String), LoadError> {
    let halves = merge.split_once(' ').filter(|(left, right)| {
        let is_token = |half: &str| !half.is_empty() && !half.contains(' ');
        is_token(left) && is_token(right)
    });
    let (left, right) = halves.ok_or_else(|| LoadError::Invalid(format!("the merge {merge:?} is not two tokens")))?;
    Ok((left.to_owned(), right.to_owned()))
}

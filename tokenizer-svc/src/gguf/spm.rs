//! SentencePiece-style vocabularies (`tokenizer.ggml.model` = `llama`), as Llama 2, Mistral and Phi-3 have them.
//!
//! SentencePiece joins the two neighbours whose union has the best score. The file has no list of merges; like Hugging
//! Face's converter, which made the `tokenizer.json` of these models (`SentencePieceExtractor` in `transformers`),
//! we list every way to put a token together from two others and order the ways by the score of what they make.

use tokenizers::{
    DecoderWrapper, NormalizerWrapper,
    decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip},
    normalizers::{Prepend, Replace, Sequence as Normalizers},
};

use super::{Vocabulary, merging_model};
use crate::{
    error::{LoadError, check_limit},
    tokenizer::{MAX_MERGES, Tokenizer},
};

/// The character that stands for a blank, U+2581.
const BLANK: &str = "\u{2581}";

/// Longest token that is searched for merges. Unit: bytes. The real ones end at 48; the work is quadratic.
const MAX_MERGED_BYTES: usize = 256;

/// Builds the tokenizer of a SentencePiece-style vocabulary.
///
/// # Errors
/// If the vocabulary contradicts itself.
pub(super) fn build(vocabulary: &Vocabulary<'_>) -> Result<Tokenizer, LoadError> {
    let ids = vocabulary.ids()?;
    let merges = merges(vocabulary, &ids)?;
    let unknown = vocabulary.token(vocabulary.unknown_id.unwrap_or(0))?.to_owned();
    let model = merging_model(ids, merges, |builder| builder.unk_token(unknown).fuse_unk(true).byte_fallback(true))?;

    let invalid = |e: tokenizers::Error| LoadError::Invalid(e.to_string());
    let mut normalizers: Vec<NormalizerWrapper> = vec![Replace::new(" ", BLANK).map_err(invalid)?.into()];
    let blank = Replace::new(BLANK, " ").map_err(invalid)?;
    let mut decoders: Vec<DecoderWrapper> = vec![blank.into(), ByteFallback::new().into(), Fuse::new().into()];
    if vocabulary.prepends_space {
        normalizers.insert(0, Prepend::new(BLANK.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    let mut pipeline = tokenizers::Tokenizer::new(model);
    pipeline.with_normalizer(Some(Normalizers::new(normalizers))).map_err(invalid)?;
    pipeline.with_decoder(Some(Decoders::new(decoders)));
    vocabulary.finish(pipeline)
}

/// Every way to put a token together from two, the best first. Of two tokens with one score, and of two ways to one
/// token, the one with the lower ids is first: `tokenizer.json` files have that order, and it decides ids.
fn merges(vocabulary: &Vocabulary<'_>, ids: &ahash::AHashMap<String, u32>) -> Result<Vec<(String, String)>, LoadError> {
    let n_tokens = vocabulary.tokens.len();
    if vocabulary.scores.len() != n_tokens {
        let message = format!("tokenizer.ggml.scores has {} entries for {n_tokens} tokens", vocabulary.scores.len());
        return Err(LoadError::Invalid(message));
    }
    let mut ways = Vec::new();
    for ((id, text, _), &score) in vocabulary.texts().map(|token| (token, &vocabulary.scores[token.0 as usize])) {
        if score.is_nan() {
            return Err(LoadError::Invalid(format!("the score of token {id} is not a number")));
        }
        if text.len() > MAX_MERGED_BYTES {
            return Err(LoadError::Invalid(format!("token {id} is longer than {MAX_MERGED_BYTES} bytes")));
        }
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
                ways.push((score, id, left_id, right_id, left, right));
            }
        }
        check_limit("the number of merges", ways.len(), MAX_MERGES)?;
    }
    let by_score = |a: f32, b: f32| b.partial_cmp(&a).expect("scores are numbers, as checked above");
    ways.sort_by(|a, b| by_score(a.0, b.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    Ok(ways.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
}

//! The short way from text to ids, for pipelines as most byte-level models have them: words are cut out of the text as
//! it is ([`Words`]), and the ids of those that came before are remembered.
//!
//! It gives the ids that the library's pipeline gives, or none; then the library has to find them.

use std::{
    array,
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ahash::RandomState;
use lru::LruCache;
use tokenizers::{Model as _, NormalizerWrapper, Tokenizer};
use unicode_normalization_alignments::is_nfc;

use super::{added_tokens::AddedTokens, breaks::Breaks, words::Words};

/// Words that a shard remembers; all shards together remember 16,384, nearly all that one language uses often.
const SHARD_WORDS: NonZeroUsize = NonZeroUsize::new(512).expect("it is not 0");

/// Enough that threads seldom meet in one.
const N_SHARDS: usize = 32;

/// Longest word that is remembered. Longer ones seldom come twice. If all were as long, with an id for each byte, they
/// would take 4 MiB. Unit: bytes.
const MAX_KNOWN_BYTES: usize = 32;

/// Encodes word by word.
#[derive(Debug)]
pub(super) struct WordEncoder {
    words: Words,
    /// Whether the pipeline composes characters (NFC). Only composed text goes the short way then.
    composes: bool,
    /// The character by which the model's texts spell each byte.
    spelling: [char; 256],
    known: KnownWords,
}

/// Words that came before, with their ids.
#[derive(Debug)]
struct KnownWords {
    shards: [Mutex<Shard>; N_SHARDS],
    hasher: RandomState,
}

type Shard = LruCache<Box<str>, Box<[u32]>, RandomState>;

// === impl WordEncoder ===

impl WordEncoder {
    /// For a pipeline; `None` if it does anything that is not understood here.
    pub(super) fn of(pipeline: &Tokenizer) -> Option<Self> {
        let composes = match pipeline.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let words = Words::of(pipeline.get_pre_tokenizer()?)?;
        Some(Self { words, composes, spelling: byte_level_spelling(), known: KnownWords::new() })
    }

    /// The ids of a text, without those that the pipeline adds around it; `None` if the library has to find them.
    pub(super) fn encode(
        &self,
        pipeline: &Tokenizer,
        added: &AddedTokens,
        text: &str,
        breaks: &Breaks,
    ) -> tokenizers::Result<Option<Vec<u32>>> {
        if self.composes && !text.is_ascii() && !is_nfc(text) {
            return Ok(None);
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        for (token, range) in added.split_unchanged(text, breaks) {
            if let Some(id) = token {
                ids.push(id);
                continue;
            }
            for word in self.words.cut(&text[range]) {
                if self.known.append(word, &mut ids) {
                    continue;
                }
                let merged = self.merge(pipeline, word)?;
                // Where merges spell a control token, the word may have to be cut: `Tokenizer::merge` knows.
                if merged.iter().any(|&id| added.is_special(id)) {
                    return Ok(None);
                }
                ids.extend_from_slice(&merged);
                self.known.insert(word, merged);
            }
        }
        Ok(Some(ids))
    }

    /// The ids of a word, by the library's model.
    fn merge(&self, pipeline: &Tokenizer, word: &str) -> tokenizers::Result<Box<[u32]>> {
        let spelled: String = word.bytes().map(|byte| self.spelling[usize::from(byte)]).collect();
        let tokens = pipeline.get_model().tokenize(&spelled)?;
        Ok(tokens.iter().map(|token| token.id).collect())
    }
}

// === impl KnownWords ===

impl KnownWords {
    fn new() -> Self {
        let hasher = RandomState::new();
        let shard = |_| Mutex::new(LruCache::with_hasher(SHARD_WORDS, hasher.clone()));
        Self { shards: array::from_fn(shard), hasher }
    }

    /// Appends the ids of a word; whether it is known.
    fn append(&self, word: &str, ids: &mut Vec<u32>) -> bool {
        let mut shard = self.shard(word);
        let known = shard.get(word);
        ids.extend_from_slice(known.map_or(&[], |known| known));
        known.is_some()
    }

    fn insert(&self, word: &str, ids: Box<[u32]>) {
        if word.len() <= MAX_KNOWN_BYTES {
            self.shard(word).put(word.into(), ids);
        }
    }

    /// Where a word belongs. A panic under the lock would leave it as sound as it was.
    fn shard(&self, word: &str) -> MutexGuard<'_, Shard> {
        let shard_idx = (self.hasher.hash_one(word) >> 32) as usize % N_SHARDS;
        self.shards[shard_idx].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The character for each byte in byte-level vocabularies (`bytes_to_unicode` in GPT-2's `encoder.py`): itself if it is
/// printable in Latin-1, else the next from U+0100 on.
fn byte_level_spelling() -> [char; 256] {
    let mut others = '\u{100}'..;
    array::from_fn(|byte| match byte as u8 {
        byte @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..) => char::from(byte),
        _ => others.next().expect("there are more characters than bytes"),
    })
}

#[cfg(test)]
mod tests;

//! A GGUF file's own tokenizer: its metadata read as a vocabulary, and the pipeline built from it that encodes as the
//! model's `tokenizer.json` would.
//!
//! The keys are those of the GGUF specification (ggml `docs/gguf.md`, "Tokenizer"). The file says little about the
//! pipeline: `tokenizer.ggml.model` names the family and `tokenizer.ggml.pre` the pre-tokenizer; the rest is known from
//! the models that these names stand for.

use std::path::Path;

use lockstep_checkpoint::{Checkpoint, Metadata};
use serde_json::{Value, json};
use tokenizers::{AddedToken, PostProcessorWrapper, models::bpe::BPE};

use crate::{
    containment::contain,
    error::{LoadError, check_limit},
    profile::{Ending, Profile},
    tokenizer::{MAX_MERGES, MAX_VOCAB_SIZE, Tokenizer},
};

mod bpe;
mod spm;

/// Longest token. Runs of 128 blanks are the longest in real vocabularies; the limit keeps the search for the merges
/// of a SentencePiece-style vocabulary, which is quadratic in it, within seconds. Unit: bytes.
const MAX_TOKEN_BYTES: usize = 1024;

/// What a token is, as `tokenizer.ggml.token_type` numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// A vocabulary as a GGUF's metadata holds it, checked.
#[derive(Debug, Default)]
struct Vocabulary<'a> {
    tokens: &'a [String],
    /// One for each token.
    types: Vec<TokenType>,
    /// Of byte-level vocabularies: `left right`, best first.
    merges: &'a [String],
    /// Of SentencePiece-style vocabularies, one for each token: the higher, the sooner it is merged.
    scores: &'a [f32],
    unknown_id: Option<u32>,
    /// Put before a text, if special tokens are asked for.
    bos_id: Option<u32>,
    /// Put after it.
    eos_id: Option<u32>,
    /// Control tokens swallow the blanks after them, as Phi-3's do.
    strips_after_control: bool,
    /// Of SentencePiece-style vocabularies: a blank is put before each stretch of text.
    prepends_space: bool,
}

/// Reads the tokenizer of the GGUF file at `path`, and what the file says about prompts for the model.
///
/// # Errors
/// If the file is no GGUF, or its tokenizer is malformed or of a kind that is not supported.
pub(crate) fn load(path: &Path) -> Result<(Tokenizer, Profile), LoadError> {
    let checkpoint = Checkpoint::open(path)?;
    let metadata = checkpoint.metadata();
    let tokenizer = contain(|| {
        let vocabulary = Vocabulary::of(metadata)?;
        match metadata.str("tokenizer.ggml.model")? {
            "gpt2" => bpe::build(&vocabulary, metadata.str("tokenizer.ggml.pre")?),
            "llama" => spm::build(&vocabulary),
            other => Err(LoadError::Unsupported(format!("tokenizer.ggml.model {other:?} (but gpt2 and llama are)"))),
        }
    })?;
    let profile = profile(metadata, &tokenizer)?;
    Ok((tokenizer, profile))
}

/// What the metadata says about prompts.
fn profile(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Profile, LoadError> {
    let id = |name: &str| -> Result<Option<u32>, LoadError> {
        let id = metadata.opt_u32(&format!("tokenizer.ggml.{name}_token_id"))?;
        // Some converters write -1, which reads as 2^32 - 1, for a token that the model does not have.
        Ok(id.filter(|&id| id < tokenizer.vocab_size()))
    };
    let architecture = metadata.str("general.architecture")?;
    let ending = Ending { text: id("eos")?, others: [id("eot")?, id("eom")?].into_iter().flatten().collect() };
    Ok(Profile {
        context_length: metadata.opt_u32(&format!("{architecture}.context_length"))?.unwrap_or(0),
        bos_token_id: id("bos")?,
        eos_token_id: ending.text,
        eos_token_ids: ending.all(tokenizer),
        chat_template: metadata.opt_str("tokenizer.chat_template")?.unwrap_or_default().to_owned(),
        ..Profile::default()
    })
}

// === impl TokenType ===

impl TokenType {
    fn new(number: i32) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

// === impl Vocabulary ===

impl<'a> Vocabulary<'a> {
    fn of(metadata: &'a Metadata) -> Result<Self, LoadError> {
        let tokens = metadata.strings("tokenizer.ggml.tokens")?;
        let types = token_types(metadata.opt_i32s("tokenizer.ggml.token_type")?, tokens.len())?;
        let is_spm = metadata.str("tokenizer.ggml.model")? == "llama";
        let pre = metadata.opt_str("tokenizer.ggml.pre")?;
        let flag = |name: &str, default: bool| -> Result<bool, LoadError> {
            Ok(metadata.opt_bool(&format!("tokenizer.ggml.{name}"))?.unwrap_or(default))
        };
        let id = |name: &str| metadata.opt_u32(&format!("tokenizer.ggml.{name}_token_id"));
        if metadata.get("tokenizer.ggml.precompiled_charsmap").is_some() {
            return Err(LoadError::Unsupported("tokenizer.ggml.precompiled_charsmap".into()));
        }
        Ok(Self {
            tokens,
            types,
            merges: metadata.opt_strings("tokenizer.ggml.merges")?.unwrap_or_default(),
            scores: metadata.opt_f32s("tokenizer.ggml.scores")?.unwrap_or_default(),
            unknown_id: id("unknown")?,
            bos_id: if flag("add_bos_token", is_spm || pre == Some("llama-bpe"))? { id("bos")? } else { None },
            eos_id: if flag("add_eos_token", false)? { id("eos")? } else { None },
            strips_after_control: metadata.opt_str("general.architecture")? == Some("phi3"),
            prepends_space: flag("add_space_prefix", true)?,
        })
    }

    /// The token with an id.
    fn token(&self, id: u32) -> Result<&'a str, LoadError> {
        let token = self.tokens.get(id as usize).map(String::as_str);
        token.ok_or_else(|| LoadError::Invalid(format!("token id {id} is not below {} tokens", self.tokens.len())))
    }

    /// All tokens that have a text, with their ids and types. Converters fill rows of the embedding that have no token
    /// with `[PAD17]`, where 17 is the id; these stand for nothing, and some occur twice.
    fn texts(&self) -> impl Iterator<Item = (u32, &'a str, TokenType)> {
        let tokens = (0..).zip(self.tokens).zip(&self.types);
        tokens.map(|((id, text), &kind)| (id, text.as_str(), kind)).filter(|&(id, text, kind)| {
            let is_filler = kind != TokenType::Normal && text == format!("[PAD{id}]");
            !is_filler && !text.is_empty()
        })
    }

    /// From text to id.
    ///
    /// # Errors
    /// If two tokens have the same text, or one is too long, or there are too many.
    fn ids(&self) -> Result<ahash::AHashMap<String, u32>, LoadError> {
        check_limit("the number of tokens", self.tokens.len(), MAX_VOCAB_SIZE)?;
        let mut ids = ahash::AHashMap::with_capacity(self.tokens.len());
        for (id, text, _) in self.texts() {
            check_limit("the length of a token (bytes)", text.len(), MAX_TOKEN_BYTES)?;
            if let Some(other) = ids.insert(text.to_owned(), id) {
                return Err(LoadError::Invalid(format!("tokens {other} and {id} are both {text:?}")));
            }
        }
        Ok(ids)
    }

    /// Makes a tokenizer of a pipeline that lacks only the tokens which are looked for before all else, and the
    /// template that surrounds a text.
    fn finish(&self, mut pipeline: tokenizers::Tokenizer) -> Result<Tokenizer, LoadError> {
        let invalid = |e: tokenizers::Error| LoadError::Invalid(e.to_string());
        pipeline.add_tokens(self.added_tokens()).map_err(invalid)?;
        if self.bos_id.is_some() || self.eos_id.is_some() {
            pipeline.with_post_processor(Some(self.template()?));
        }
        Tokenizer::new(pipeline, self.tokens.len())
    }

    /// Control tokens, and those of the model's makers that are no control tokens.
    fn added_tokens(&self) -> Vec<AddedToken> {
        let added = self.texts().filter_map(|(id, text, kind)| {
            let special = match kind {
                TokenType::Control => true,
                TokenType::Unknown => self.unknown_id.is_none_or(|unknown_id| unknown_id == id),
                TokenType::UserDefined => false,
                TokenType::Normal | TokenType::Unused | TokenType::Byte => return None,
            };
            // In Phi-3's `tokenizer.json` these three keep the blanks after them.
            let rstrip = self.strips_after_control && !matches!(text, "<unk>" | "<s>" | "<|endoftext|>");
            Some(AddedToken { special, rstrip, normalized: false, ..AddedToken::from(text, special) })
        });
        added.collect()
    }

    /// The template that puts the beginning-of-text and end-of-text tokens around a text.
    fn template(&self) -> Result<PostProcessorWrapper, LoadError> {
        let mut known = serde_json::Map::new();
        let mut token = |id: Option<u32>| -> Result<Option<Value>, LoadError> {
            let Some(id) = id else { return Ok(None) };
            let text = self.token(id)?;
            known.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
            Ok(Some(json!({"SpecialToken": {"id": text, "type_id": 0}})))
        };
        let (before, after) = (token(self.bos_id)?, token(self.eos_id)?);
        let text = |id: &str| Some(json!({"Sequence": {"id": id, "type_id": 0}}));
        let around = |pieces: Vec<Option<Value>>| pieces.into_iter().flatten().collect::<Vec<_>>();
        let template = json!({
            "type": "TemplateProcessing",
            "single": around(vec![before.clone(), text("A"), after.clone()]),
            "pair": around(vec![before, text("A"), text("B"), after]),
            "special_tokens": known,
        });
        serde_json::from_value(template).map_err(|e| LoadError::Invalid(e.to_string()))
    }
}

/// The types of `n_tokens` tokens; a file that says nothing has normal ones only.
fn token_types(numbers: Option<&[i32]>, n_tokens: usize) -> Result<Vec<TokenType>, LoadError> {
    let Some(numbers) = numbers else { return Ok(vec![TokenType::Normal; n_tokens]) };
    if numbers.len() != n_tokens {
        let message = format!("tokenizer.ggml.token_type has {} entries for {n_tokens} tokens", numbers.len());
        return Err(LoadError::Invalid(message));
    }
    let types = numbers.iter().map(|&number| {
        TokenType::new(number)
            .ok_or_else(|| LoadError::Invalid(format!("tokenizer.ggml.token_type has the unknown type {number}")))
    });
    types.collect()
}

/// Builds the merging model, with the checks that the library leaves out.
fn merging_model(
    ids: ahash::AHashMap<String, u32>,
    merges: Vec<(String, String)>,
    configure: impl FnOnce(tokenizers::models::bpe::BpeBuilder) -> tokenizers::models::bpe::BpeBuilder,
) -> Result<BPE, LoadError> {
    check_limit("the number of merges", merges.len(), MAX_MERGES)?;
    let builder = configure(BPE::builder().vocab_and_merges(ids, merges));
    builder.build().map_err(|e| LoadError::Invalid(e.to_string()))
}

#[cfg(test)]
mod tests;

//! The facts of a model, as its tokenizer describes it, with what the gateway derives from them once.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    num::NonZeroUsize,
    sync::{Arc, Mutex},
};

use lockstep_proto::tokenizer::v1::{DecodedText, GetTokenizerResponse};
use lru::LruCache;

use super::lock;
use crate::template::{ChatTemplate, ControlTokens, TemplateTokens};

/// Token texts kept for each model: the ids that answers are mostly made of.
const MAX_TEXTS: NonZeroUsize = NonZeroUsize::new(16_384).expect("it is not zero");

/// Longest token text that is kept, so that the cache stays below about 4 MiB. Unit: bytes.
const MAX_TEXT_BYTES: usize = 128;

/// A token's text and its exact bytes.
pub type TokenText = DecodedText;

/// Why conversations with a model cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoTemplate {
    /// It comes without a chat template.
    #[error("it has no chat template; send it a raw prompt")]
    Missing,
    /// Its template is no use.
    #[error("its chat template cannot be used: {0}")]
    Unusable(String),
}

/// What is known of a model.
#[derive(Debug)]
pub struct Facts {
    model: String,
    description: GetTokenizerResponse,
    template: Result<ChatTemplate, NoTemplate>,
    control_tokens: HashSet<u32>,
    /// Locked for a look-up or an update at a time, never across an await.
    texts: Mutex<LruCache<u32, Arc<TokenText>>>,
}

// === impl Facts ===

impl Facts {
    /// The facts of `model`, its template compiled.
    pub(crate) fn new(model: &str, description: GetTokenizerResponse) -> Self {
        let template = compile(&description);
        if let Err(error @ NoTemplate::Unusable(_)) = &template {
            tracing::error!(model, %error, "a model cannot chat");
        }
        let control_tokens = description.special_tokens.iter().map(|token| token.id).collect();
        let texts = Mutex::new(LruCache::new(MAX_TEXTS));
        Self { model: model.to_owned(), description, template, control_tokens, texts }
    }

    /// The name that requests use.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Digest of all that decides how text and ids become each other.
    pub fn fingerprint(&self) -> &str {
        &self.description.fingerprint
    }

    /// What the tokenizer says.
    pub fn description(&self) -> &GetTokenizerResponse {
        &self.description
    }

    /// Whether a token stands for structure, not for text.
    pub fn is_control_token(&self, id: u32) -> bool {
        self.control_tokens.contains(&id)
    }

    /// The chat template.
    ///
    /// # Errors
    /// Why there is none.
    pub fn template(&self) -> Result<&ChatTemplate, &NoTemplate> {
        self.template.as_ref()
    }

    /// The texts that are known, and the ids whose texts are not.
    pub(super) fn known_texts(&self, ids: &BTreeSet<u32>) -> (HashMap<u32, Arc<TokenText>>, Vec<u32>) {
        let mut cache = lock(&self.texts);
        let mut unknown = Vec::new();
        let mut known = HashMap::with_capacity(ids.len());
        for &id in ids {
            match cache.get(&id) {
                Some(text) => drop(known.insert(id, Arc::clone(text))),
                None => unknown.push(id),
            }
        }
        (known, unknown)
    }

    /// Keeps texts for later, unless they are long.
    pub(super) fn learn_texts(&self, texts: impl Iterator<Item = (u32, DecodedText)>) -> Vec<(u32, Arc<TokenText>)> {
        let mut cache = lock(&self.texts);
        let learn = |(id, text): (u32, DecodedText)| {
            let (short, text) = (text.raw.len().max(text.text.len()) <= MAX_TEXT_BYTES, Arc::new(text));
            if short {
                cache.put(id, Arc::clone(&text));
            }
            (id, text)
        };
        texts.map(learn).collect()
    }
}

fn compile(description: &GetTokenizerResponse) -> Result<ChatTemplate, NoTemplate> {
    if description.chat_template.is_empty() {
        return Err(NoTemplate::Missing);
    }
    let special = &description.special_tokens;
    let text_of = |id: Option<u32>| special.iter().find(|token| Some(token.id) == id).map(|token| token.text.clone());
    let tokens = TemplateTokens { bos: text_of(description.bos_token_id), eos: text_of(description.eos_token_id) };
    let control_tokens = ControlTokens::new(special.iter().map(|token| token.text.as_str()))
        .map_err(|error| NoTemplate::Unusable(error.to_string()))?;
    ChatTemplate::compile(&description.chat_template, tokens, control_tokens)
        .map_err(|error| NoTemplate::Unusable(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(text: &str) -> DecodedText {
        DecodedText { text: text.into(), raw: text.into() }
    }

    #[test]
    fn short_texts_are_remembered_and_long_ones_are_not() {
        let facts = Facts::new("m", GetTokenizerResponse::default());
        let long = "x".repeat(MAX_TEXT_BYTES + 1);
        let learned = facts.learn_texts([(1, decoded("a")), (2, decoded(&long))].into_iter());
        assert_eq!(learned.len(), 2);
        let (known, unknown) = facts.known_texts(&BTreeSet::from([1, 2, 3]));
        assert_eq!(known[&1].text, "a");
        assert_eq!(unknown, [2, 3]);
    }

    #[test]
    fn memory_for_texts_is_bounded() {
        let facts = Facts::new("m", GetTokenizerResponse::default());
        facts.learn_texts((0..20_000).map(|id| (id, decoded("a"))));
        let (known, unknown) = facts.known_texts(&(0..20_000).collect());
        assert_eq!((known.len(), unknown.len()), (16_384, 20_000 - 16_384));
    }
}

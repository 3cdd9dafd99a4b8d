//! `tokenizer.json`: which texts the ids of a folder's model stand for. (How text becomes ids is not the business of this
//! crate.)

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::error::FolderError;
use crate::vocabulary::{Spelling, Token, Vocabulary};

/// Ids are below this; the largest vocabularies have some 256,000.
const IDS_MAX: u32 = 1 << 22;

/// The file, as far as it matters here.
#[derive(Default, Deserialize)]
pub(super) struct Tokenizer {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: Model,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Default, Deserialize)]
struct Model {
    vocab: Texts,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Texts {
    /// Of two texts that have one id, the last in this order is taken.
    Ids(BTreeMap<String, u32>),
    /// That of a unigram model, which no Llama has.
    Pieces(#[expect(dead_code, reason = "that it is a list is all that matters")] Vec<IgnoredAny>),
}

impl Default for Texts {
    fn default() -> Self {
        Self::Ids(BTreeMap::new())
    }
}

// === impl Tokenizer ===

impl Tokenizer {
    /// What it says; no tokens if they are not spelled out as those of a Llama are.
    pub(super) fn vocabulary(self) -> Result<Vocabulary, FolderError> {
        let spelling = Spelling::of_decoder(&self.decoder);
        Ok(Vocabulary { tokens: self.tokens()?, spelling })
    }

    fn tokens(self) -> Result<Vec<Token>, FolderError> {
        let Texts::Ids(ids) = self.model.vocab else { return Ok(Vec::new()) };
        let plain = ids.into_iter().map(|(text, id)| (id, Token { text, is_reserved: false }));
        let added = self.added_tokens.into_iter();
        // Added tokens come last: they may be in the vocabulary as well, and there they look like any other.
        let added = added.map(|token| (token.id, Token { text: token.content, is_reserved: token.special }));
        let mut tokens = Vec::new();
        for (id, token) in plain.chain(added) {
            if id >= IDS_MAX {
                return Err(FolderError::TokenId { id, limit: IDS_MAX });
            }
            if tokens.len() <= id as usize {
                // An id that nothing has is as good as one that is reserved.
                tokens.resize(id as usize + 1, Token { text: String::new(), is_reserved: true });
            }
            tokens[id as usize] = token;
        }
        Ok(tokens)
    }
}

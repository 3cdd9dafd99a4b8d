//! The special tokens that a folder's settings name, by their ids or by their texts.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{CONFIG, CONFIG_BYTES_MAX, has, parse, read};
use crate::error::FolderError;
use crate::special_tokens::Named;
use crate::vocabulary::Vocabulary;

const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// `config.json` and `generation_config.json`, as far as they matter here.
#[derive(Default, Deserialize)]
struct Ids {
    bos_token_id: Option<OneOrMany>,
    eos_token_id: Option<OneOrMany>,
}

/// `tokenizer_config.json`, likewise.
#[derive(Default, Deserialize)]
struct Texts {
    eos_token: Option<Text>,
}

/// An id or several. Some have -1 for a token that the model does not have.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

/// A token's text, alone or among what else is said of it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Plain(String),
    Described { content: String },
}

/// What the settings in `folder` name.
pub(super) fn named(folder: &Path, vocabulary: &Vocabulary) -> Result<Named, FolderError> {
    let config: Ids = settings(folder, CONFIG)?;
    let generation: Ids = settings(folder, GENERATION_CONFIG)?;
    let texts: Texts = settings(folder, TOKENIZER_CONFIG)?;
    let ids = |ids: Option<OneOrMany>| {
        let ids = match ids {
            None => Vec::new(),
            Some(OneOrMany::One(id)) => vec![id],
            Some(OneOrMany::Many(ids)) => ids,
        };
        ids.into_iter().filter_map(|id| u32::try_from(id).ok()).collect::<Vec<_>>()
    };
    let text = texts.eos_token.map(|(Text::Plain(text) | Text::Described { content: text })| text);
    let by_text = (0..).zip(&vocabulary.tokens).filter(|(_, token)| Some(&token.text) == text.as_ref());
    let end = ids(config.eos_token_id).into_iter().chain(ids(generation.eos_token_id));
    let begin = ids(config.bos_token_id).first().copied();
    Ok(Named { begin, end: end.chain(by_text.map(|(id, _)| id)).collect() })
}

/// What a file says; nothing if it is not there.
fn settings<T: Default + DeserializeOwned>(folder: &Path, file: &'static str) -> Result<T, FolderError> {
    if has(folder, file) { parse(file, &read(folder, file, CONFIG_BYTES_MAX)?) } else { Ok(T::default()) }
}

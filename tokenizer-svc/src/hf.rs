//! A Hugging Face folder: `tokenizer.json`, and around it what the model's files say about prompts and sampling.
//!
//! Only `tokenizer.json` must be there. `tokenizer_config.json` adds the names of special tokens and the chat template
//! (which may also be a file of its own), `generation_config.json` the sampling defaults and ending tokens, and
//! `config.json` the context length and the rows of the embedding.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use lockstep_proto::tokenizer::v1::GenerationDefaults;
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    containment::contain,
    error::{LoadError, check_limit},
    profile::{Ending, Profile},
    tokenizer::{MAX_VOCAB_SIZE, Tokenizer},
};

mod outline;

/// Largest `tokenizer.json`. Those of 256 k-token vocabularies have 33 MB. Unit: bytes.
const MAX_TOKENIZER_BYTES: usize = 128 << 20;

/// Largest file of any other kind. Mistral Nemo's `tokenizer_config.json`, with a thousand tokens, has 180 kB.
/// Unit: bytes.
const MAX_CONFIG_BYTES: usize = 8 << 20;

/// `model_max_length` where nobody knew better: `transformers` writes 10^30.
const MAX_CONTEXT_LENGTH: f64 = 1e9;

/// `tokenizer_config.json`, as far as it matters here.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    chat_template: Option<ChatTemplate>,
    model_max_length: Option<f64>,
}

/// A token by its text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Described { content: String },
}

/// One chat template, or several by name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ChatTemplate {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// `config.json`, as far as it matters here.
#[derive(Debug, Default, Deserialize)]
struct ModelConfig {
    max_position_embeddings: Option<u32>,
    vocab_size: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

/// `generation_config.json`, as far as it matters here.
#[derive(Debug, Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<OneOrMany>,
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<u32>,
}

/// An id or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

/// Reads the tokenizer in `folder`, and what the files beside it say.
///
/// # Errors
/// If `tokenizer.json` is missing, or any of the files is malformed, too large or asks for something unsupported.
pub(crate) fn load(folder: &Path) -> Result<(Tokenizer, Profile), LoadError> {
    let path = folder.join("tokenizer.json");
    let config: TokenizerConfig = read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let model: ModelConfig = read_json(&folder.join("config.json"))?.unwrap_or_default();
    let generation: GenerationConfig = read_json(&folder.join("generation_config.json"))?.unwrap_or_default();
    let description = read(&path, MAX_TOKENIZER_BYTES)?
        .ok_or_else(|| LoadError::Read { path: path.clone(), source: io::ErrorKind::NotFound.into() })?;

    let min_vocab_size = model.vocab_size.unwrap_or(0) as usize;
    check_limit("vocab_size in config.json (ids)", min_vocab_size, MAX_VOCAB_SIZE)?;
    let tokenizer = contain(|| {
        outline::check(&description).map_err(|message| LoadError::Parse { path: path.clone(), message })?;
        let pipeline = tokenizers::Tokenizer::from_bytes(&description);
        let pipeline = pipeline.map_err(|e| LoadError::Parse { path: path.clone(), message: e.to_string() })?;
        Tokenizer::new(pipeline, min_vocab_size)
    })?;

    let chat_template = match read(&folder.join("chat_template.jinja"), MAX_CONFIG_BYTES)? {
        Some(template) => String::from_utf8(template)
            .map_err(|e| LoadError::Parse { path: folder.join("chat_template.jinja"), message: e.to_string() })?,
        None => config.chat_template.as_ref().and_then(ChatTemplate::default).unwrap_or_default().to_owned(),
    };
    let profile = profile(&tokenizer, &config, &model, &generation, chat_template);
    Ok((tokenizer, profile))
}

fn profile(
    tokenizer: &Tokenizer,
    config: &TokenizerConfig,
    model: &ModelConfig,
    generation: &GenerationConfig,
    chat_template: String,
) -> Profile {
    let id = |name: &Option<TokenName>| name.as_ref().and_then(|name| tokenizer.token_id(name.text()));
    let configured = config.model_max_length.filter(|length| (1.0..MAX_CONTEXT_LENGTH).contains(length));
    let named = [&model.eos_token_id, &generation.eos_token_id].into_iter().flatten().flat_map(OneOrMany::ids);
    let ending = Ending { text: id(&config.eos_token), others: named.copied().collect() };
    Profile {
        context_length: model.max_position_embeddings.or(configured.map(|length| length as u32)).unwrap_or(0),
        bos_token_id: id(&config.bos_token),
        eos_token_id: ending.text,
        eos_token_ids: ending.all(tokenizer),
        chat_template,
        generation: generation.defaults(),
    }
}

/// Reads a file of at most `limit` bytes; `None` if there is none.
fn read(path: &Path, limit: usize) -> Result<Option<Vec<u8>>, LoadError> {
    let failed = |source| LoadError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > limit {
        let message = format!("the file is larger than {limit} bytes");
        return Err(LoadError::Parse { path: path.to_owned(), message });
    }
    Ok(Some(bytes))
}

/// Reads a JSON file; `None` if there is none.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LoadError> {
    let Some(bytes) = read(path, MAX_CONFIG_BYTES)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes);
    value.map(Some).map_err(|e| LoadError::Parse { path: path.to_owned(), message: e.to_string() })
}

// === impl TokenName ===

impl TokenName {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Described { content: text } => text,
        }
    }
}

// === impl ChatTemplate ===

impl ChatTemplate {
    /// The template for plain conversations.
    fn default(&self) -> Option<&str> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(templates) => {
                templates.iter().find(|named| named.name == "default").map(|named| named.template.as_str())
            }
        }
    }
}

// === impl OneOrMany ===

impl OneOrMany {
    fn ids(&self) -> &[u32] {
        match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Many(ids) => ids,
        }
    }
}

// === impl GenerationConfig ===

impl GenerationConfig {
    fn defaults(&self) -> GenerationDefaults {
        GenerationDefaults {
            do_sample: self.do_sample,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            max_new_tokens: self.max_new_tokens,
        }
    }
}

#[cfg(test)]
mod tests;

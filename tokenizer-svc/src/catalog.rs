//! The catalog: the models that this service encodes for, by name.

use std::{path::Path, sync::Arc};

use crate::{config::ModelEntry, error::LoadError, gguf, hf, profile::Profile, tokenizer::Tokenizer};

/// One model's tokenizer, with what its files say about prompts.
#[derive(Debug)]
pub struct Model {
    /// The name that requests use.
    pub name: String,
    /// Its vocabulary and rules.
    pub tokenizer: Tokenizer,
    /// What its files say besides.
    pub profile: Profile,
}

/// The models of one service. Loaded once, never changes.
#[derive(Debug)]
pub struct Catalog {
    models: Vec<Arc<Model>>,
}

/// A model that cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[error("model {name:?} at {path}: {source}")]
pub struct CatalogError {
    /// The model's name.
    pub name: String,
    /// Where its files are.
    pub path: String,
    /// What is wrong with them.
    pub source: Box<LoadError>,
}

// === impl Model ===

impl Model {
    /// Loads the tokenizer of a model: from a Hugging Face folder, or from a GGUF file.
    ///
    /// # Errors
    /// If the files are missing, malformed, too large, or ask for something unsupported.
    pub fn open(name: &str, path: &Path) -> Result<Self, LoadError> {
        let (tokenizer, profile) = if path.is_dir() { hf::load(path)? } else { gguf::load(path)? };
        Ok(Self { name: name.to_owned(), tokenizer, profile })
    }
}

// === impl Catalog ===

impl Catalog {
    /// Loads all models.
    ///
    /// # Errors
    /// The first that cannot be loaded.
    pub fn open(entries: &[ModelEntry]) -> Result<Self, CatalogError> {
        let open = |entry: &ModelEntry| {
            let model = Model::open(&entry.name, Path::new(&entry.path));
            model.map(Arc::new).map_err(|source| CatalogError {
                name: entry.name.clone(),
                path: entry.path.clone(),
                source: Box::new(source),
            })
        };
        Ok(Self { models: entries.iter().map(open).collect::<Result<_, _>>()? })
    }

    /// The model of that name; with an empty name the only one, if there is only one.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&Arc<Model>> {
        match self.models.as_slice() {
            [only] if name.is_empty() => Some(only),
            models => models.iter().find(|model| model.name == name),
        }
    }

    /// All models, in the order of the settings.
    pub fn models(&self) -> impl Iterator<Item = &Model> {
        self.models.iter().map(AsRef::as_ref)
    }
}

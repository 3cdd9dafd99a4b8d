//! Fixtures: real tokenizers for this crate's own tests, as `tests/fetch_tokenizers.py` leaves them.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex},
};

use crate::catalog::Model;

/// The tokenizers with control tokens that tests attack: byte-level and SentencePiece-style, both sources.
pub(crate) const NAMES: [&str; 6] = [
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "tokenizers/llama3",
    "tokenizers/qwen2_5",
    "tokenizers/mistral_v1",
    "tokenizers/mistral_nemo",
    "tokenizers/gguf/phi-3.gguf",
];

/// One of `models/`. Loaded once for all tests of the process, which takes most of their time.
pub(crate) fn open(name: &str) -> Arc<Model> {
    static LOADED: LazyLock<Mutex<HashMap<String, Arc<Model>>>> = LazyLock::new(Mutex::default);
    let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let load = || {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models").join(name);
        assert!(path.exists(), "{} is missing: run tests/fetch_tokenizers.py", path.display());
        Arc::new(Model::open("test", &path).unwrap())
    };
    Arc::clone(loaded.entry(name.to_owned()).or_insert_with(load))
}

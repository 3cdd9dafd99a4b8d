//! Fixtures: real tokenizers for this crate's own tests, as `tests/fetch_tokenizers.py` leaves them.

use std::path::PathBuf;

use crate::catalog::Model;

/// The tokenizers with control tokens that tests attack and stream: byte-level and SentencePiece-style, both sources.
pub(crate) const NAMES: [&str; 6] = [
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "tokenizers/llama3",
    "tokenizers/qwen2_5",
    "tokenizers/mistral_v1",
    "tokenizers/mistral_nemo",
    "tokenizers/gguf/phi-3.gguf",
];

/// Opens one of `models/`.
pub(crate) fn open(path: &str) -> Model {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models").join(path);
    assert!(path.exists(), "{} is missing: run tests/fetch_tokenizers.py", path.display());
    Model::open("test", &path).unwrap()
}

//! A vocabulary: what token ids stand for, as far as a model's own files spell it out.

use std::ops::Range;

use crate::error::CheckpointError;
use crate::metadata::Metadata;

mod spelling;

pub use spelling::{Spelling, UnknownDecoder};

/// What `tokenizer.ggml.token_type` says of ordinary tokens.
const NORMAL: i32 = 1;
/// What it says of the unknown token, of control tokens, and of unused ones.
const RESERVED: [i32; 3] = [2, 3, 5];

/// The tokens of a model.
#[derive(Debug)]
pub struct Vocabulary {
    /// By id; empty if the model's files do not spell them out.
    pub tokens: Vec<Token>,
    /// How their texts spell bytes.
    pub spelling: Result<Spelling, UnknownDecoder>,
}

/// An entry of a vocabulary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its text, in the tokenizer's own spelling of bytes and spaces.
    pub text: String,
    /// Unknown, control or unused: no text is made of it.
    pub is_reserved: bool,
}

/// The bytes of every id of a vocabulary, tabulated once.
#[derive(Debug)]
pub struct TokenBytes {
    /// All bytes, one token after another.
    bytes: Vec<u8>,
    /// Where each id's bytes end in `bytes`.
    ends: Vec<usize>,
}

/// The vocabulary of a GGUF file.
pub(crate) fn of_gguf(metadata: &Metadata) -> Result<Vocabulary, CheckpointError> {
    let texts = metadata.opt_strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    let types = metadata.opt_i32s("tokenizer.ggml.token_type")?.unwrap_or_default();
    let tokens = (0..).zip(texts).map(|(id, text): (usize, &String)| {
        let kind = types.get(id).copied().unwrap_or(NORMAL);
        // So converters fill rows of the embedding that have no token.
        let is_filler = kind != NORMAL && *text == format!("[PAD{id}]");
        Token { text: text.clone(), is_reserved: is_filler || RESERVED.contains(&kind) }
    });
    let tokens = tokens.collect();
    let prepends_space = metadata.opt_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spelling = match metadata.opt_str("tokenizer.ggml.model")? {
        Some("gpt2") => Ok(Spelling::ByteLevel),
        Some("llama") => Ok(Spelling::sentence_piece(prepends_space)),
        other => Err(UnknownDecoder(format!("tokenizer.ggml.model {:?}", other.unwrap_or_default()))),
    };
    Ok(Vocabulary { tokens, spelling })
}

// === impl TokenBytes ===

impl TokenBytes {
    /// Tabulates the bytes that texts spell; the first text is that of id 0.
    pub fn new(spelling: &Spelling, texts: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for text in texts {
            spelling.append(text.as_ref(), &mut bytes);
            ends.push(bytes.len());
        }
        Self { bytes, ends }
    }

    /// The bytes of an id; `None` if it is not below [`n_ids`](Self::n_ids).
    pub fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)?;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.bytes[Range { start, end }])
    }

    /// Ids are below this.
    pub fn n_ids(&self) -> usize {
        self.ends.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{self, writer::GgufHeader};

    fn read(model: &str, tokens: &[(&str, i32)]) -> Vocabulary {
        let mut header = GgufHeader::default();
        header.string("tokenizer.ggml.model", model);
        header.strings("tokenizer.ggml.tokens", tokens.iter().map(|(text, _)| *text));
        header.i32s("tokenizer.ggml.token_type", tokens.iter().map(|(_, kind)| *kind));
        let mut file = Vec::new();
        header.write(&mut file).unwrap();
        of_gguf(&gguf::parse(&file).unwrap().metadata).unwrap()
    }

    #[test]
    fn a_gguf_file_says_what_is_text_and_how_it_is_spelled() {
        let tokens = [("<unk>", 2), ("</s>", 3), ("a", 1), ("<tool>", 4), ("[PAD4]", 4), ("[PAD5]", 1), ("<0x0A>", 6)];
        let vocabulary = read("llama", &tokens);
        assert_eq!(vocabulary.spelling, Ok(Spelling::sentence_piece(true)));
        let reserved = vocabulary.tokens.iter().map(|token| token.is_reserved);
        assert!(reserved.eq([true, true, false, false, true, false, false]), "{:?}", vocabulary.tokens);
        assert_eq!(read("gpt2", &tokens).spelling, Ok(Spelling::ByteLevel));
        let unknown = read("bert", &tokens).spelling.unwrap_err().to_string();
        assert_eq!(unknown, "the tokenizer's decoder (tokenizer.ggml.model \"bert\") is not supported");
    }

    #[test]
    fn the_bytes_of_an_id_are_those_that_its_text_spells() {
        let bytes = TokenBytes::new(&Spelling::ByteLevel, ["a", "", "Ġb"]);
        assert_eq!((0..4).map(|id| bytes.get(id)).collect::<Vec<_>>(), [Some(&b"a"[..]), Some(b""), Some(b" b"), None]);
        assert_eq!(bytes.n_ids(), 3);
    }
}

//! Decoding: the bytes of every token, tabulated once, so that a stream decodes in bounded work for each id.
//!
//! Two families of vocabularies spell bytes: byte-level ones map each byte to a printable character (GPT-2's
//! `encoder.py`, `bytes_to_unicode`), SentencePiece-style ones are plain text with U+2581 for the blank and `<0x0A>`
//! for single bytes. Which one it is, the pipeline's decoder says.

use std::{collections::HashMap, ops::Range};

use serde::Deserialize;

use crate::error::LoadError;

/// The bytes of every id of a vocabulary.
#[derive(Debug)]
pub(crate) struct TokenBytes {
    /// All bytes, one token after another.
    bytes: Vec<u8>,
    /// Where each id's bytes end in `bytes`.
    ends: Vec<usize>,
    strips_leading_space: bool,
}

/// How a vocabulary's strings spell bytes.
#[derive(Debug, PartialEq, Eq)]
enum Spelling {
    /// One character for each byte; a string with any other character means itself.
    ByteLevel,
    /// Plain text after the replacements, in order; with `byte_fallback`, `<0x41>` is the byte 0x41.
    Plain { replacements: Vec<(String, String)>, byte_fallback: bool, strips_leading_space: bool },
}

/// A decoder as `tokenizer.json` writes it: those that Llama-family models use. Any other is an error that names it.
#[derive(Debug, Deserialize)]
#[serde(tag = "type")]
enum Decoder {
    ByteLevel,
    ByteFallback,
    Fuse,
    Replace { pattern: Pattern, content: String },
    Strip { content: char, start: usize, stop: usize },
    Sequence { decoders: Vec<Decoder> },
}

/// What a `Replace` looks for.
#[derive(Debug, Deserialize)]
enum Pattern {
    String(String),
}

// === impl TokenBytes ===

impl TokenBytes {
    /// Tabulates the ids below `vocab_size`.
    ///
    /// # Errors
    /// If the pipeline decodes by a rule under which an id does not stand for fixed bytes.
    pub(crate) fn new(pipeline: &tokenizers::Tokenizer, vocab_size: usize) -> Result<Self, LoadError> {
        let spelling = Spelling::of(pipeline)?;
        let byte_level = byte_of_character();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(vocab_size));
        for id in (0..).take(vocab_size) {
            if let Some(token) = pipeline.id_to_token(id) {
                spelling.append(&token, &byte_level, &mut bytes);
            }
            ends.push(bytes.len());
        }
        let strips_leading_space = matches!(spelling, Spelling::Plain { strips_leading_space: true, .. });
        Ok(Self { bytes, ends, strips_leading_space })
    }

    /// The bytes of an id; `None` if it is not below the vocabulary size.
    pub(crate) fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)?;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.bytes[Range { start, end }])
    }

    /// See [`super::Tokenizer::strips_leading_space`].
    pub(crate) fn strips_leading_space(&self) -> bool {
        self.strips_leading_space
    }

    /// Ids are below this.
    pub(crate) fn vocab_size(&self) -> u32 {
        u32::try_from(self.ends.len()).expect("MAX_VOCAB_SIZE fits")
    }
}

// === impl Spelling ===

impl Spelling {
    fn of(pipeline: &tokenizers::Tokenizer) -> Result<Self, LoadError> {
        let Some(decoder) = pipeline.get_decoder() else {
            return Err(LoadError::Unsupported("a tokenizer without a decoder".into()));
        };
        let unsupported = |what: String| LoadError::Unsupported(format!("the tokenizer's decoder ({what})"));
        let written = serde_json::to_value(decoder).map_err(|e| unsupported(e.to_string()))?;
        let decoder: Decoder = serde_json::from_value(written.clone()).map_err(|e| unsupported(e.to_string()))?;
        match decoder {
            Decoder::ByteLevel => Some(Self::ByteLevel),
            Decoder::Sequence { decoders } => Self::of_sequence(decoders),
            single => Self::of_sequence(vec![single]),
        }
        .ok_or_else(|| unsupported(written.to_string()))
    }

    /// Reads the steps in their order: replacements, byte fallback, fusing, and, of the fused text, the first blank.
    fn of_sequence(decoders: Vec<Decoder>) -> Option<Self> {
        let mut steps = decoders.into_iter().peekable();
        if steps.next_if(|step| matches!(step, Decoder::ByteLevel)).is_some() {
            return steps.next().is_none().then_some(Self::ByteLevel);
        }
        let mut replacements = Vec::new();
        while let Some(Decoder::Replace { .. }) = steps.peek() {
            let Some(Decoder::Replace { pattern: Pattern::String(pattern), content }) = steps.next() else { break };
            replacements.push((pattern, content));
        }
        let byte_fallback = steps.next_if(|step| matches!(step, Decoder::ByteFallback)).is_some();
        let fused = steps.next_if(|step| matches!(step, Decoder::Fuse)).is_some();
        let strips_leading_space =
            fused && steps.next_if(|step| matches!(step, Decoder::Strip { content: ' ', start: 1, stop: 0 })).is_some();
        steps.next().is_none().then_some(Self::Plain { replacements, byte_fallback, strips_leading_space })
    }

    /// Appends the bytes that `token` spells.
    fn append(&self, token: &str, byte_level: &HashMap<char, u8>, bytes: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = bytes.len();
                for character in token.chars() {
                    let Some(&byte) = byte_level.get(&character) else {
                        bytes.truncate(start);
                        bytes.extend_from_slice(token.as_bytes());
                        return;
                    };
                    bytes.push(byte);
                }
            }
            Self::Plain { replacements, byte_fallback, .. } => {
                let replace = |text: String, (from, to): &(String, String)| text.replace(from, to);
                let text = replacements.iter().fold(token.to_owned(), replace);
                match byte_escape(&text).filter(|_| *byte_fallback) {
                    Some(byte) => bytes.push(byte),
                    None => bytes.extend_from_slice(text.as_bytes()),
                }
            }
        }
    }
}

/// The byte that `<0x0A>` spells.
fn byte_escape(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// GPT-2's map from printable characters to bytes: those printable in Latin-1 mean themselves, the other bytes are
/// U+0100 and up, in order.
fn byte_of_character() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=u8::MAX).filter(|&byte| !printable(byte));
    let plain = (0..=u8::MAX).filter(|&byte| printable(byte)).map(|byte| (char::from(byte), byte));
    plain.chain(('\u{100}'..).zip(others)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokenizers::{Decoder as _, DecoderWrapper, models::bpe::BPE, pre_tokenizers::byte_level::ByteLevel};

    use super::*;

    fn pipeline(decoder: serde_json::Value) -> tokenizers::Tokenizer {
        let mut pipeline = tokenizers::Tokenizer::new(BPE::default());
        pipeline.with_decoder(Some(serde_json::from_value::<DecoderWrapper>(decoder).unwrap()));
        pipeline
    }

    #[test]
    fn byte_level_characters_spell_the_bytes_that_the_library_gives_them() {
        let map = byte_of_character();
        assert_eq!(map.len(), 256);
        for character in ByteLevel::alphabet() {
            let byte = map[&character];
            let decoded = ByteLevel::default().decode_chain(vec![character.to_string()]).unwrap().concat();
            assert_eq!(decoded, String::from_utf8_lossy(&[byte]), "{character}");
        }
    }

    #[test]
    fn a_byte_level_string_with_a_foreign_character_means_itself() {
        let (map, mut bytes) = (byte_of_character(), Vec::new());
        Spelling::ByteLevel.append("Ġé", &map, &mut bytes);
        assert_eq!(bytes, b" \xe9");
        Spelling::ByteLevel.append("é｜", &map, &mut bytes);
        assert_eq!(&bytes[2..], "é｜".as_bytes());
    }

    #[test]
    fn plain_strings_spell_blanks_and_bytes() {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        let spelling = Spelling::of(&pipeline(decoder)).unwrap();
        let check = |token: &str, expected: &[u8]| {
            let mut bytes = Vec::new();
            spelling.append(token, &HashMap::new(), &mut bytes);
            assert_eq!(bytes, expected, "{token}");
        };
        check("▁▁x▁", b"  x ");
        check("<0xE9>", b"\xe9");
        check("<0xE>", b"<0xE>");
        assert!(matches!(spelling, Spelling::Plain { strips_leading_space: true, .. }));
    }

    #[test]
    fn a_decoder_of_another_kind_is_refused_by_name() {
        let check = |decoder: serde_json::Value, named: &str| {
            let refusal = Spelling::of(&pipeline(decoder)).unwrap_err().to_string();
            assert!(refusal.contains(named), "{refusal}");
        };
        check(json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "WordPiece");
        check(json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}), "ByteFallback");
        let strip_two = json!({"type": "Strip", "content": " ", "start": 2, "stop": 0});
        check(json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, strip_two]}), "Strip");
    }
}

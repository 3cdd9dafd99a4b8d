//! A spelling: how the texts of a vocabulary stand for bytes.
//!
//! There are two families: byte-level vocabularies map each byte to a printable character (GPT-2's `encoder.py`,
//! `bytes_to_unicode`), SentencePiece-style ones are plain text with U+2581 for the blank and `<0x0A>` for single bytes.
//! Which one it is, and what it replaces, the decoder in `tokenizer.json` says.

use serde::Deserialize;
use serde_json::Value;

/// The character that stands for a blank in SentencePiece-style vocabularies.
const BLANK: &str = "\u{2581}";

/// How a vocabulary's texts spell bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// One character for each byte; a text with any other character means itself.
    ByteLevel,
    /// Plain text.
    Plain {
        /// What is replaced by what, in order.
        replacements: Vec<(String, String)>,
        /// `<0x41>` is the byte 0x41.
        byte_fallback: bool,
        /// A whole text loses the blank that it starts with, because encoding put one there.
        strips_leading_space: bool,
    },
}

/// A decoder by which an id does not stand for fixed bytes, as far as is known here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tokenizer's decoder ({0}) is not supported")]
pub struct UnknownDecoder(pub(super) String);

/// A decoder as `tokenizer.json` writes it: those that Llama-family models use.
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

// === impl Spelling ===

impl Spelling {
    /// The spelling that a decoder of `tokenizer.json` undoes.
    ///
    /// # Errors
    /// If it is another decoder than those of Llama-family models.
    pub fn of_decoder(written: &Value) -> Result<Self, UnknownDecoder> {
        let unknown = || UnknownDecoder(written.to_string());
        match Decoder::deserialize(written).map_err(|_| unknown())? {
            Decoder::ByteLevel => Some(Self::ByteLevel),
            Decoder::Sequence { decoders } => Self::of_sequence(decoders),
            single => Self::of_sequence(vec![single]),
        }
        .ok_or_else(unknown)
    }

    /// That of a SentencePiece-style vocabulary.
    pub(super) fn sentence_piece(strips_leading_space: bool) -> Self {
        let replacements = vec![(BLANK.to_owned(), " ".to_owned())];
        Self::Plain { replacements, byte_fallback: true, strips_leading_space }
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

    /// Whether a whole text loses the blank that it starts with.
    pub fn strips_leading_space(&self) -> bool {
        matches!(self, Self::Plain { strips_leading_space: true, .. })
    }

    /// Appends the bytes that `text` spells.
    pub fn append(&self, text: &str, bytes: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = bytes.len();
                for character in text.chars() {
                    let Some(byte) = byte_of(character) else {
                        bytes.truncate(start);
                        bytes.extend_from_slice(text.as_bytes());
                        return;
                    };
                    bytes.push(byte);
                }
            }
            Self::Plain { replacements, byte_fallback, .. } => {
                let replace = |text: String, (from, to): &(String, String)| text.replace(from, to);
                let text = replacements.iter().fold(text.to_owned(), replace);
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

/// The byte that a character stands for in GPT-2's map: bytes printable in Latin-1 are themselves, the others are U+0100
/// and up, in order.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    let byte = match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(spelling: &Spelling, token: &str, expected: &[u8]) {
        let mut bytes = b"before".to_vec();
        spelling.append(token, &mut bytes);
        assert_eq!(&bytes[6..], expected, "{token}");
    }

    #[test]
    fn byte_level_characters_are_all_bytes_once_and_in_order_where_they_are_not_printable() {
        let mut bytes: Vec<_> =
            ('\0'..='\u{200}').filter_map(|character| Some((byte_of(character)?, character))).collect();
        bytes.sort_unstable();
        assert!(bytes.iter().map(|(byte, _)| *byte).eq(0..=u8::MAX));
        let moved: Vec<_> =
            bytes.iter().map(|(_, character)| *character).filter(|character| *character > 'ÿ').collect();
        assert!(moved.into_iter().eq('\u{100}'..='\u{143}'));
    }

    #[test]
    fn a_byte_level_string_with_a_foreign_character_means_itself() {
        check(&Spelling::ByteLevel, "Ġé", b" \xe9");
        check(&Spelling::ByteLevel, "é｜", "é｜".as_bytes());
    }

    #[test]
    fn plain_strings_spell_blanks_and_bytes() {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        let spelling = Spelling::of_decoder(&decoder).unwrap();
        assert_eq!(spelling, Spelling::sentence_piece(true));
        assert!(spelling.strips_leading_space());
        check(&spelling, "▁▁x▁", b"  x ");
        check(&spelling, "<0xE9>", b"\xe9");
        check(&spelling, "<0xE>", b"<0xE>");
    }

    #[test]
    fn a_decoder_of_another_kind_is_refused_by_name() {
        let check = |decoder: Value, named: &str| {
            let refusal = Spelling::of_decoder(&decoder).unwrap_err().to_string();
            assert!(refusal.contains(named), "{refusal}");
        };
        check(json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "WordPiece");
        check(json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}), "ByteFallback");
        let strip_two = json!({"type": "Strip", "content": " ", "start": 2, "stop": 0});
        check(json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, strip_two]}), "Strip");
        check(Value::Null, "null");
    }
}

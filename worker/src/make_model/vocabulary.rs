//! A vocabulary: byte-level BPE in the form of GPT-2, complete but small.
//!
//! ```text
//! ids  0..3  control tokens, as in SmolLM2    3..259  the bytes    259..  one token a merge
//! ```
//!
//! The merges are a space with each letter, then every pair of letters, then every pair with a third letter, every three
//! with a fourth, until the vocabulary is full. So any text can be encoded, merges chain, and most ids decode to readable ASCII while single
//! bytes can still split a character.

use lockstep_checkpoint::GgufHeader;

/// Kinds in `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

const CONTROL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const END_OF_TEXT: u32 = 0;
const IM_START: u32 = 1;
const IM_END: u32 = 2;

/// Tokens by id, and the merges that make the last of them.
#[derive(Debug)]
pub struct Vocabulary {
    tokens: Vec<String>,
    merges: Vec<String>,
}

// === impl Vocabulary ===

impl Vocabulary {
    /// Control tokens and bytes, no merges.
    pub const SIZE_MIN: usize = CONTROL_TOKENS.len() + 256;
    /// All merges: a space with a letter, two letters, three, four.
    pub const SIZE_MAX: usize = Self::SIZE_MIN + 26 + 26 * 26 + 26 * 26 * 26 + 26 * 26 * 26 * 26;

    /// A vocabulary of `size` tokens, within `SIZE_MIN..=SIZE_MAX`.
    ///
    /// # Panics
    /// If it is smaller than that.
    pub fn new(size: usize) -> Self {
        let mut tokens: Vec<String> = CONTROL_TOKENS.map(str::to_owned).to_vec();
        tokens.extend((0..=u8::MAX).map(|byte| byte_char(byte).to_string()));
        let space = byte_char(b' ');
        let singles = || letters().map(|letter| letter.to_string());
        let pairs = || singles().flat_map(with_each_letter);
        let triples = || pairs().flat_map(with_each_letter);
        let merges: Vec<(String, char)> = letters()
            .map(|letter| (space.to_string(), letter))
            .chain(
                singles()
                    .chain(pairs())
                    .chain(triples())
                    .flat_map(|prefix| letters().map(move |letter| (prefix.clone(), letter))),
            )
            .take(size - tokens.len())
            .collect();
        tokens.extend(merges.iter().map(|(prefix, letter)| format!("{prefix}{letter}")));
        Vocabulary { tokens, merges: merges.iter().map(|(prefix, letter)| format!("{prefix} {letter}")).collect() }
    }

    /// Texts by id; the first three are control tokens.
    pub fn tokens(&self) -> &[String] {
        &self.tokens
    }

    /// Pairs of texts, joined by a space, that make a token, the first before the others.
    pub fn merges(&self) -> &[String] {
        &self.merges
    }

    /// Adds the vocabulary.
    pub fn write(&self, header: &mut GgufHeader) {
        let kind = |id: usize| if id < CONTROL_TOKENS.len() { CONTROL } else { NORMAL };
        header.string("tokenizer.ggml.model", "gpt2");
        header.string("tokenizer.ggml.pre", "smollm");
        header.strings("tokenizer.ggml.tokens", self.tokens.iter().map(String::as_str));
        header.i32s("tokenizer.ggml.token_type", (0..self.tokens.len()).map(kind));
        header.strings("tokenizer.ggml.merges", self.merges.iter().map(String::as_str));
        header.u32("tokenizer.ggml.bos_token_id", IM_START);
        header.u32("tokenizer.ggml.eos_token_id", IM_END);
        header.u32("tokenizer.ggml.unknown_token_id", END_OF_TEXT);
        header.u32("tokenizer.ggml.padding_token_id", IM_END);
        header.bool("tokenizer.ggml.add_bos_token", false);
        header.bool("tokenizer.ggml.add_space_prefix", false);
    }
}

fn letters() -> impl Iterator<Item = char> + Clone {
    'a'..='z'
}

fn with_each_letter(prefix: String) -> impl Iterator<Item = String> {
    letters().map(move |letter| format!("{prefix}{letter}"))
}

/// GPT-2's printable stand-in for a byte: itself where it prints in Latin-1, else the next character from U+0100 on.
fn byte_char(byte: u8) -> char {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if prints(byte) {
        return char::from(byte);
    }
    let n_before = (0..byte).filter(|&byte| !prints(byte)).count() as u32;
    char::from_u32(0x100 + n_before).expect("there are 68 stand-ins, all of them characters")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{Vocabulary, byte_char};

    #[test]
    fn every_merge_joins_two_tokens_into_a_third() {
        for size in [Vocabulary::SIZE_MIN, 384, 1000, Vocabulary::SIZE_MAX] {
            let vocabulary = Vocabulary::new(size);
            let tokens: HashSet<&str> = vocabulary.tokens.iter().map(String::as_str).collect();
            assert_eq!((tokens.len(), vocabulary.tokens.len()), (size, size), "tokens are distinct");
            for merge in &vocabulary.merges {
                let (left, right) = merge.split_once(' ').unwrap();
                assert!(tokens.contains(left) && tokens.contains(right), "{merge}");
                assert!(tokens.contains(format!("{left}{right}").as_str()), "{merge}");
            }
            assert_eq!(vocabulary.merges.len(), size - Vocabulary::SIZE_MIN);
        }
    }

    #[test]
    fn bytes_have_the_stand_ins_of_gpt2() {
        for (byte, stand_in) in
            [(b' ', 'Ġ'), (b'\n', 'Ċ'), (b'\t', 'ĉ'), (0, 'Ā'), (b'a', 'a'), (0x7F, 'ġ'), (0xAD, 'Ń'), (0xE9, 'é')]
        {
            assert_eq!(byte_char(byte), stand_in, "{byte:#x}");
        }
    }
}

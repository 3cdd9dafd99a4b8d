//! A vocabulary: the bytes that each id stands for.

use lockstep_proto::tokenizer::v1::GetVocabularyResponse;

/// Longest token, by the contract: what one id can add to a text. Unit: bytes.
const MAX_TOKEN_BYTES: u32 = 4_096;

/// The bytes of every id.
#[derive(Debug, Default)]
pub struct Vocabulary {
    /// Of all ids, one after the other.
    raw: Vec<u8>,
    /// Where each id's bytes end in `raw`: ascending, the last at its end.
    ends: Vec<u32>,
    strips_leading_space: bool,
}

/// A vocabulary that is not as its contract has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VocabularyError {
    /// It has more or fewer ids than the tokenizer's description says.
    #[error("its vocabulary has {got} ids instead of {expected}")]
    Size {
        /// By the description.
        expected: u32,
        /// In the vocabulary.
        got: usize,
    },
    /// The bytes of an id are not within the vocabulary's, or too many.
    #[error("the bytes of id {0} in its vocabulary are out of place, or over 4,096")]
    Ends(usize),
}

/// An id that no token has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("token id {id} is not below the vocabulary's {n_ids}")]
pub struct UnknownToken {
    /// The id.
    pub id: u32,
    /// Ids are below this.
    pub n_ids: usize,
}

// === impl Vocabulary ===

impl Vocabulary {
    /// A vocabulary of `n_ids` ids, as the tokenizer service sends it.
    ///
    /// # Errors
    /// When it has more or fewer ids, or its parts do not fit one another.
    pub fn new(response: GetVocabularyResponse, n_ids: u32) -> Result<Self, VocabularyError> {
        let GetVocabularyResponse { raw, ends, strips_leading_space, fingerprint: _ } = response;
        if u32::try_from(ends.len()) != Ok(n_ids) {
            return Err(VocabularyError::Size { expected: n_ids, got: ends.len() });
        }
        let mut before = 0;
        for (id, &end) in ends.iter().enumerate() {
            let is_long = end.saturating_sub(before) > MAX_TOKEN_BYTES;
            if end < before || is_long || end as usize > raw.len() {
                return Err(VocabularyError::Ends(id));
            }
            before = end;
        }
        Ok(Self { raw, ends, strips_leading_space })
    }

    /// The bytes of an id; none if the id has no token.
    ///
    /// # Errors
    /// When the id is none of the vocabulary.
    pub fn bytes(&self, id: u32) -> Result<&[u8], UnknownToken> {
        let unknown = UnknownToken { id, n_ids: self.ends.len() };
        let index = id as usize;
        let end = *self.ends.get(index).ok_or(unknown)?;
        let from = index.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.raw.get(from as usize..end as usize).ok_or(unknown)
    }

    /// Whether the first byte of a text is left out if it is a blank: encoding has put it there.
    pub fn strips_leading_space(&self) -> bool {
        self.strips_leading_space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(raw: &[u8], ends: &[u32]) -> GetVocabularyResponse {
        GetVocabularyResponse { raw: raw.to_vec(), ends: ends.to_vec(), ..GetVocabularyResponse::default() }
    }

    #[test]
    fn each_id_has_its_bytes() {
        let vocabulary = Vocabulary::new(response(b"abc", &[1, 1, 3]), 3).unwrap();
        let bytes: Vec<_> = (0..3).map(|id| vocabulary.bytes(id).unwrap()).collect();
        assert_eq!(bytes, [b"a".as_slice(), b"", b"bc"]);
        assert_eq!(vocabulary.bytes(3), Err(UnknownToken { id: 3, n_ids: 3 }));
        assert_eq!(vocabulary.bytes(u32::MAX), Err(UnknownToken { id: u32::MAX, n_ids: 3 }));
    }

    #[test]
    fn a_vocabulary_that_does_not_fit_is_refused() {
        let check = |ends: &[u32], expected| {
            assert_eq!(Vocabulary::new(response(b"abc", ends), 2).unwrap_err(), expected, "{ends:?}");
        };
        check(&[1], VocabularyError::Size { expected: 2, got: 1 });
        check(&[1, 2, 3], VocabularyError::Size { expected: 2, got: 3 });
        check(&[2, 1], VocabularyError::Ends(1));
        check(&[1, 4], VocabularyError::Ends(1));
        check(&[u32::MAX, 3], VocabularyError::Ends(0));
        let long = Vocabulary::new(response(&[b'a'; 4_098], &[1, 4_098]), 2);
        assert_eq!(long.unwrap_err(), VocabularyError::Ends(1));
        assert!(Vocabulary::new(response(&[b'a'; 4_097], &[1, 4_097]), 2).is_ok());
    }
}

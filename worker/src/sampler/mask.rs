//! A mask says which tokens may be chosen, where not every one may.

/// One bit for each token.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenMask {
    /// Token `id` is bit `id % 32` of word `id / 32`; tokens beyond the last word may not be chosen.
    words: Vec<u32>,
}

impl TokenMask {
    /// A mask of these words.
    pub fn new(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// Lets a token be chosen, or no longer. One beyond the last word is left as it is.
    pub fn set(&mut self, token_id: u32, is_allowed: bool) {
        let bit = 1 << (token_id % u32::BITS);
        if let Some(word) = self.words.get_mut((token_id / u32::BITS) as usize) {
            *word = if is_allowed { *word | bit } else { *word & !bit };
        }
    }

    /// Whether a token may be chosen.
    pub fn allows(&self, token_id: u32) -> bool {
        let word = self.words.get((token_id / u32::BITS) as usize).copied().unwrap_or(0);
        word >> (token_id % u32::BITS) & 1 == 1
    }

    /// Whether no token may.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Makes what may not be chosen impossible.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        let words = self.words.iter().copied().chain(std::iter::repeat(0));
        for (word, logits) in words.zip(logits.chunks_mut(u32::BITS as usize)) {
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_allowed_becomes_impossible() {
        let mut mask = TokenMask::new(vec![u32::MAX, 0]);
        mask.set(3, false);
        mask.set(40, true);
        mask.set(64, true);
        let mut logits = vec![1.0; 70];
        mask.apply(&mut logits);
        for (id, logit) in (0..).zip(&logits) {
            let is_allowed = (id < 32 && id != 3) || id == 40;
            assert_eq!(mask.allows(id), is_allowed, "{id}");
            assert_eq!(*logit, if is_allowed { 1.0 } else { f32::NEG_INFINITY }, "{id}");
        }
        assert!(!mask.is_empty() && TokenMask::new(vec![0, 0]).is_empty());
    }
}

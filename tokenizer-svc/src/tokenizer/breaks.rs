//! Break offsets: places in a text across which no control token is recognised.

use std::ops::Range;

use crate::error::TokenizeError;

/// Byte offsets into a text, ascending. A control-token string that starts before one and ends after it is plain text.
#[derive(Debug, Clone, Default)]
pub struct Breaks(Vec<u32>);

// === impl Breaks ===

impl Breaks {
    /// No breaks: the text encodes as Hugging Face encodes it.
    pub const NONE: Self = Self(Vec::new());

    /// Offsets into a text of `text_bytes` bytes. Repeated offsets, and offsets inside a character, are allowed.
    ///
    /// # Errors
    /// [`TokenizeError::BreakOffset`] if they do not ascend or lie outside the text.
    pub fn new(offsets: Vec<u32>, text_bytes: usize) -> Result<Self, TokenizeError> {
        let mut at_least = 0;
        for (idx, &offset) in offsets.iter().enumerate() {
            if offset < at_least || offset as usize > text_bytes {
                return Err(TokenizeError::BreakOffset { idx, offset, at_least, at_most: text_bytes });
            }
            at_least = offset;
        }
        Ok(Self(offsets))
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an offset lies inside `range`, not at its ends.
    pub(crate) fn cut(&self, range: &Range<usize>) -> bool {
        let first_inside = self.0.partition_point(|&offset| offset as usize <= range.start);
        self.0.get(first_inside).is_some_and(|&offset| (offset as usize) < range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_offset_strictly_inside_cuts() {
        let breaks = Breaks::new(vec![0, 4, 4, 9], 12).unwrap();
        for (range, cut) in [(0..4, false), (4..9, false), (3..5, true), (0..12, true), (9..12, false), (4..4, false)] {
            assert_eq!(breaks.cut(&range), cut, "{range:?}");
        }
        assert!(!Breaks::NONE.cut(&(0..12)));
    }

    #[test]
    fn offsets_that_descend_or_leave_the_text_are_refused() {
        let check = |offsets: &[u32], idx, offset, at_least| {
            let refusal = Breaks::new(offsets.to_vec(), 8).unwrap_err();
            assert_eq!(refusal, TokenizeError::BreakOffset { idx, offset, at_least, at_most: 8 });
        };
        check(&[9], 0, 9, 0);
        check(&[3, 2], 1, 2, 3);
        assert!(Breaks::new(vec![8, 8], 8).is_ok());
    }
}

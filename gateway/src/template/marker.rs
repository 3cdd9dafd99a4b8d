//! A marker is a string that no request can contain, because it is drawn at random once the request is known.
//!
//! It is 39 decimal digits that stand for 128 random bits. Digits survive what templates do to text: trimming, change
//! of case, JSON.

use super::{Rendered, control_tokens::MAX_BREAKS};

/// Digits of the largest 128-bit number.
const N_DIGITS: usize = 39;
/// What the markers of one request may add to its rendering. A template may show a string twice.
pub(super) const MAX_MARKED_BYTES: usize = 2 * MAX_BREAKS * N_DIGITS;

/// Digits that are found nowhere in a request.
#[derive(Debug)]
pub(super) struct Marker {
    digits: String,
}

// === impl Marker ===

impl Marker {
    /// Draws a marker from the operating system's randomness.
    ///
    /// The request is fixed before the marker is drawn, so the chance that any of its 2^22 bytes begins those digits
    /// is below 2^-100, and no sender can better it.
    pub(super) fn draw() -> Result<Self, getrandom::Error> {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits)?;
        Ok(Self { digits: format!("{:0N_DIGITS$}", u128::from_ne_bytes(bits)) })
    }

    pub(super) fn digits(&self) -> &str {
        &self.digits
    }

    /// Puts the marker into a text at each of `offsets`, which are ascending and lie between characters.
    pub(super) fn mark(&self, text: &str, offsets: &[usize]) -> String {
        let mut marked = String::with_capacity(text.len() + offsets.len() * N_DIGITS);
        let mut start = 0;
        for &offset in offsets {
            marked.push_str(&text[start..offset]);
            marked.push_str(&self.digits);
            start = offset;
        }
        marked.push_str(&text[start..]);
        marked
    }

    /// Takes every marker out of a rendering, and says where they were. Offsets at the very ends say nothing.
    pub(super) fn cut(&self, marked: &str) -> Rendered {
        let mut text = String::with_capacity(marked.len());
        let mut break_offsets: Vec<u32> = Vec::new();
        for piece in marked.split(self.digits()) {
            if let Ok(offset) = u32::try_from(text.len())
                && break_offsets.last() != Some(&offset)
            {
                break_offsets.push(offset);
            }
            text.push_str(piece);
        }
        break_offsets.retain(|&offset| offset > 0 && (offset as usize) < text.len());
        Rendered { text, break_offsets }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_marked_is_cut_out_at_the_same_places() {
        let marker = Marker::draw().unwrap();
        let marked = marker.mark("a<é>b", &[2, 4]);
        assert_eq!(marked.len(), 6 + 2 * N_DIGITS);
        assert_eq!(marker.cut(&marked), Rendered { text: "a<é>b".into(), break_offsets: vec![2, 4] });
    }

    #[test]
    fn breaks_at_the_ends_and_doubles_are_left_out() {
        let marker = Marker::draw().unwrap();
        let digits = marker.digits();
        let marked = format!("{digits}a{digits}{digits}b{digits}");
        assert_eq!(marker.cut(&marked), Rendered { text: "ab".into(), break_offsets: vec![1] });
    }

    #[test]
    fn two_markers_differ() {
        assert_ne!(Marker::draw().unwrap().digits(), Marker::draw().unwrap().digits());
    }
}

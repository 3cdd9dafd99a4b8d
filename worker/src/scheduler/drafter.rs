//! A drafter: guesses how a sequence goes on, from what it has said before.
//!
//! Text that is edited, quoted or summarised repeats its prompt, and code repeats itself. So the guess is what followed
//! the latest earlier occurrence of the sequence's last [`GRAM_LEN`] tokens ("prompt lookup"). It costs no model, and
//! nothing but time if it is wrong: a draft counts only where it is the token that is sampled anyway.
//!
//! Occurrences are found as LZ4 finds matches: a table of fixed size keeps the latest place of each hash. Two grams of
//! one hash forget the older one, and what a lookup finds is compared token by token, so nothing depends on hashes but
//! which drafts are made.

/// Tokens that must agree for a guess. Two agree by chance in any prose; four come too late where copies are short.
const GRAM_LEN: usize = 3;

/// Entries of the table, as a power of two: 64 KiB for each sequence that drafts. A longer text forgets its older grams.
const TABLE_BITS: u32 = 14;

/// See the module's documentation. Serves one sequence, whose tokens are only ever appended to.
#[derive(Clone, Default, Debug)]
pub(super) struct Drafter {
    /// By a gram's hash: the position of the token that followed it last. Empty before the first call.
    latest: Vec<u32>,
    /// Tokens that the table has seen as followers.
    n_indexed: usize,
}

impl Drafter {
    /// The likely continuation of `token_ids`, at most `max_drafts` tokens of it. The longer two places have agreed, the
    /// longer they go on to: there are no more drafts than tokens that agree. Takes time for the tokens that are new
    /// since the last call.
    pub(super) fn propose(&mut self, token_ids: &[u32], max_drafts: usize) -> Vec<u32> {
        self.index(token_ids);
        let Some(gram) = token_ids.last_chunk() else { return Vec::new() };
        let follower = self.latest[hash(gram)] as usize;
        let pairs = token_ids[..follower].iter().rev().zip(token_ids.iter().rev());
        let n_agree = pairs.take(max_drafts.max(GRAM_LEN)).take_while(|(a, b)| a == b).count();
        if n_agree < GRAM_LEN {
            return Vec::new();
        }
        let mut drafts: Vec<u32> = Vec::with_capacity(n_agree.min(max_drafts));
        for position in (follower..).take(n_agree.min(max_drafts)) {
            // A copy of what is near the end runs into its own drafts, and goes round.
            let copied = token_ids.get(position).copied();
            drafts.push(copied.unwrap_or_else(|| drafts[position - token_ids.len()]));
        }
        drafts
    }

    fn index(&mut self, token_ids: &[u32]) {
        self.latest.resize(1 << TABLE_BITS, 0);
        for follower in self.n_indexed..token_ids.len() {
            if let Some(gram) = token_ids[..follower].last_chunk() {
                // Below the context's length, which is a u32.
                self.latest[hash(gram)] = follower as u32;
            }
        }
        self.n_indexed = token_ids.len();
    }
}

/// FNV-1a over whole tokens, and Knuth's multiplication to bring its best bits down.
fn hash(gram: &[u32; GRAM_LEN]) -> usize {
    let mixed = gram.iter().fold(0x811C_9DC5, |hash: u32, token_id| (hash ^ token_id).wrapping_mul(0x0100_0193));
    (mixed.wrapping_mul(0x9E37_79B1) >> (u32::BITS - TABLE_BITS)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(token_ids: &[u32], max_drafts: usize, expected: &[u32]) {
        assert_eq!(Drafter::default().propose(token_ids, max_drafts), expected);
        let mut drafter = Drafter::default();
        let drafts = (0..=token_ids.len()).map(|n| drafter.propose(&token_ids[..n], max_drafts)).next_back();
        assert_eq!(drafts.as_deref(), Some(expected), "token by token");
    }

    #[test]
    fn goes_on_as_the_last_three_tokens_did() {
        check(&[1, 2, 3, 4, 5, 6, 1, 2, 3], 9, &[4, 5, 6]);
        check(&[1, 2, 3, 4, 5, 6, 1, 2, 3], 2, &[4, 5]);
        check(&[1, 2, 3, 4, 5, 6, 1, 2, 3], 0, &[]);
    }

    #[test]
    fn two_tokens_are_too_few() {
        check(&[9, 2, 3, 4, 5, 6, 1, 2, 3], 9, &[]);
        check(&[], 9, &[]);
        check(&[1, 1], 9, &[]);
    }

    #[test]
    fn the_latest_occurrence_counts() {
        check(&[1, 2, 3, 4, 8, 1, 2, 3, 5, 8, 1, 2, 3], 1, &[5]);
    }

    #[test]
    fn drafts_are_as_many_as_tokens_agree() {
        let text = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19];
        check(&[&text[..], &[0], &text[..3]].concat(), 9, &text[3..6]);
        check(&[&text[..], &[0], &text[..5]].concat(), 9, &text[5..10]);
        check(&[&[7], &text[..], &[0], &text[..4]].concat(), 9, &text[4..8]);
    }

    #[test]
    fn a_loop_goes_round() {
        check(&[5; 4], 9, &[5; 3]);
        check(&[1, 2, 1, 2, 1, 2, 1, 2, 1], 6, &[2, 1, 2, 1, 2, 1]);
    }

    #[test]
    fn a_longer_text_than_the_table_forgets_and_never_errs() {
        let text: Vec<u32> = (0..100_000).collect();
        check(&[&text[..], &text[99_000..99_007]].concat(), 7, &text[99_007..99_014]);
        check(&[&text[..], &[100_000, 100_001]].concat(), 7, &[]);
    }
}

//! Speculation: a decoding sequence computes the rows of tokens that it has not sampled yet.
//!
//! *Drafts* are guesses at the next tokens ([`drafter`](super::drafter)). The rows of a sequence that drafts are its last
//! token and then the drafts, and all of them have logits. Rank 0 *verifies* them from the first on: it samples from a
//! row as it would have without drafts, and *accepts* the draft that follows if it is the token that it sampled. The first
//! draft that is not ends it. By the lockstep rule the rows up to there are those that plain decoding would have computed,
//! so tokens, log-probabilities and the end are the same, bit for bit; only steps are saved.
//!
//! Rejected drafts leave keys and values behind, at positions from the sequence's `n_computed` on. Nobody ever sees them: a
//! row attends to its own position and those before it, and the sequence's next step begins at `n_computed`, so that
//! each of these positions is written anew in the step, or a later one, that first attends to it. The prefix cache
//! gets blocks of computed, accepted tokens alone.
//!
//! # Nobody else pays
//!
//! Drafts come last: every other row of the step has been planned, and they take rows that are left. They take a block
//! only while nobody waits and every running sequence could have one, too; it is then part of a table that was to grow
//! into it. They pass neither the sequence's length nor the context. What they cost everybody is time, and that is
//! bounded: by [`MAX_ROWS`], and in the long run by each sequence's [`allowance`](super::allowance).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Scheduler;
use super::plan::SeqId;
use super::sequence::{Chunk, Room};

/// Sequences that draft have so many rows of a step together at most, last tokens included, in equal shares: one alone
/// has 7 drafts, two have 3 each, four have 1, and more have none. Each row beyond would slow down all sequences of a
/// busy step for the sake of one, and the kernels compute four rows at a time.
pub(super) const MAX_ROWS: usize = 8;

/// Whether, and from what, tokens are drafted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speculation {
    /// One token of a sequence in a step.
    Off,
    /// What followed the sequence's last tokens when they occurred before.
    #[default]
    Ngram,
}

impl Scheduler {
    /// Adds drafts to the chunks of decoding sequences, after everything else has its place in the step.
    pub(super) fn draft(&mut self, chunks: &mut BTreeMap<SeqId, Chunk>, room: &mut Room) {
        if self.config.speculation == Speculation::Off {
            return;
        }
        let n_running = self.running.len();
        let n_decoding = chunks.keys().filter(|id| self.running[*id].decodes()).count();
        if n_decoding == 0 || 2 * n_decoding > MAX_ROWS {
            return;
        }
        let share = MAX_ROWS / n_decoding - 1;
        for (id, chunk) in chunks {
            let sequence = self.running.get_mut(id).expect("who is in the plan runs");
            if !sequence.decodes() {
                continue;
            }
            let mut drafts = sequence.draft(room.rows.min(share), n_decoding);
            while sequence.n_missing_blocks(drafts.len()) > 0
                && self.waiting.is_empty()
                && self.kv.n_available() > n_running
            {
                sequence.push_block(self.kv.allocate().expect("one is available"));
            }
            drafts.truncate(sequence.n_free_slots());
            sequence.pay(drafts.len(), n_decoding);
            room.rows -= drafts.len();
            chunk.drafts = drafts;
        }
    }
}

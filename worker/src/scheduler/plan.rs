//! A step plan: what one forward pass computes, row by row.
//!
//! Rank 0 makes it and every rank of the group carries out the same one, so that a follower's result is a function of
//! its weights, its KV storage and the plans that it has received. Block tables never travel: a plan carries what is
//! appended to them, and a rank that applies the plans of an epoch in order holds the same tables as the leader.
//!
//! A rank applies a plan in this order: drop the tables of [`StepPlan::released`], append every
//! [`SequenceStep::new_blocks`] (a sequence that it has no table for starts an empty one), then compute the rows. A
//! sequence that was preempted is released and comes back later under the same id with a new table.

/// Names a sequence. Never used twice in the life of a scheduler.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SeqId(pub u64);

/// Index of a block in the KV storage, the same on every rank. Range: below the number of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlockId(pub u32);

/// What the rows of a sequence give, beside keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RowResults {
    /// Nothing: a prefill chunk after which tokens of the sequence are still to be computed.
    None,
    /// Logits of the last row alone, which the next token is sampled from.
    LastLogits,
    /// Logits of every row: for the log-probabilities of the prompt, where the next token is sampled from the last one if
    /// the chunk ends the prompt; or of a decoding sequence whose rows but the first are drafts.
    AllLogits,
    /// The hidden state of the last row: the end of a prompt that is embedded by it.
    LastHidden,
    /// Hidden states of every row: part of a prompt that is embedded by all of them.
    AllHidden,
}

/// The part of a step that belongs to one sequence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SequenceStep {
    /// The sequence; at most one part of a step is its.
    pub id: SeqId,
    /// Position of the first row. Keys and values of all positions before it are in the sequence's blocks.
    pub start_position: u32,
    /// One row each, at consecutive positions. Never empty. [`PENDING`](super::ahead::PENDING) is the token that the step
    /// before chooses for the sequence; it then is the only one.
    pub token_ids: Vec<u32>,
    /// Blocks to append to the sequence's block table before the step. The table then covers every row. Blocks that
    /// lie wholly before `start_position` are shared, and are not written by this or any later step of the sequence.
    pub new_blocks: Vec<BlockId>,
    /// What the rows give.
    pub results: RowResults,
}

/// One forward pass.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct StepPlan {
    /// Counts the plans since the scheduler was made or reset, from 0, without a gap.
    pub step_id: u64,
    /// Sequences whose block tables are dropped before the step. One of them may be in `sequences` again.
    pub released: Vec<SeqId>,
    /// The rows, in order. Never empty in a plan that the scheduler made.
    pub sequences: Vec<SequenceStep>,
    /// Whether tokens are chosen where the logits are, one for each row of them, and no logits leave the device. Every rank
    /// then knows them when the next step says that it means them.
    pub chooses: bool,
}

impl SequenceStep {
    /// Rows of logits that the step gives for this sequence.
    pub fn n_logits_rows(&self) -> usize {
        match self.results {
            RowResults::LastLogits => 1,
            RowResults::AllLogits => self.token_ids.len(),
            RowResults::None | RowResults::LastHidden | RowResults::AllHidden => 0,
        }
    }

    /// Hidden states that the step gives for this sequence.
    pub fn n_hidden_rows(&self) -> usize {
        match self.results {
            RowResults::LastHidden => 1,
            RowResults::AllHidden => self.token_ids.len(),
            RowResults::None | RowResults::LastLogits | RowResults::AllLogits => 0,
        }
    }
}

impl StepPlan {
    /// The number of rows in all.
    pub fn n_rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.token_ids.len()).sum()
    }

    /// Rows of logits in all.
    pub fn n_logits_rows(&self) -> usize {
        self.sequences.iter().map(SequenceStep::n_logits_rows).sum()
    }

    /// Hidden states in all.
    pub fn n_hidden_rows(&self) -> usize {
        self.sequences.iter().map(SequenceStep::n_hidden_rows).sum()
    }
}

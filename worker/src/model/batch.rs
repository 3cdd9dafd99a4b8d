//! A batch: the rows of one step, as the layers see them.

use lockstep_kernels::{AttentionRow, cuda::ChoiceRule};

/// The token of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Its id, below the vocabulary's size.
    Known(u32),
    /// The one that the step before chooses for this row of its logits.
    Chosen(u32),
}

/// The rows of one step. Row `i` is one token of one sequence.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// `[n_rows]`
    pub tokens: Vec<Token>,
    /// `[n_rows]`: each token's place in its sequence.
    pub positions: Vec<u32>,
    /// `[n_rows]`: where its keys and values go, `block * block_size + offset`.
    pub slots: Vec<u32>,
    /// `[n_rows]`: what each row attends to.
    pub attention: Vec<AttentionRow>,
    /// Block tables that `attention` points into: one for each sequence of the step.
    pub block_tables: Vec<Vec<u32>>,
    /// Rows that need logits, ascending.
    pub logits_rows: Vec<u32>,
    /// `[n_logits_rows]`: what each of them attends to.
    pub logits_attention: Vec<AttentionRow>,
    /// Whether a token is chosen from each row of logits, where they are.
    pub chooses: bool,
    /// `[n_logits_rows]`: how, on rank 0.
    pub rules: Vec<ChoiceRule>,
}

/// Some of a step's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// All of them.
    All,
    /// Those that need logits.
    Logits,
}

impl Batch {
    /// Rows in the step.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// The ids of all rows. `None` if some are still to be chosen.
    pub fn token_ids(&self) -> Option<Vec<u32>> {
        let id = |token: &Token| match token {
            Token::Known(id) => Some(*id),
            Token::Chosen(_) => None,
        };
        self.tokens.iter().map(id).collect()
    }

    /// What each of `rows` attends to.
    pub fn attention(&self, rows: Rows) -> &[AttentionRow] {
        match rows {
            Rows::All => &self.attention,
            Rows::Logits => &self.logits_attention,
        }
    }
}

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
    /// Rows that give a result: those that give logits, then those that give hidden states, both ascending.
    pub result_rows: Vec<u32>,
    /// `[n_result_rows]`: what each of them attends to.
    pub result_attention: Vec<AttentionRow>,
    /// How many of them give logits.
    pub n_logits_rows: usize,
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
    /// Those that give a result.
    Results,
}

impl Batch {
    /// Rows in the step.
    pub fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows that give hidden states.
    pub fn n_hidden_rows(&self) -> usize {
        self.result_rows.len() - self.n_logits_rows
    }

    /// Whether all rows give a result, in the order in which they are.
    pub fn is_all_results(&self) -> bool {
        let in_order = self.result_rows.iter().copied().eq(0..self.result_rows.len() as u32);
        in_order && self.result_rows.len() == self.n_rows()
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
            Rows::Results => &self.result_attention,
        }
    }
}

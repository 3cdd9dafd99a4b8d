//! What a step gives.

use std::time::Duration;

/// The results of one step, on rank 0; on other ranks they are void. Kept from step to step, so that their pages are.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// Of the rows that give logits, in the plan's order, `[n_logits_rows, vocab_size]`. Empty if tokens were chosen instead.
    pub logits: Vec<f32>,
    /// The tokens that were chosen for these rows, `[n_logits_rows]`. Empty if the plan does not have them chosen.
    pub token_ids: Vec<u32>,
    /// The hidden states of the rows that give them, in the plan's order, `[n_hidden_rows, hidden_dim]`: after the last
    /// layer, normalized as logits are made from them.
    pub hidden: Vec<f32>,
    /// The time that the device took, if it works by itself.
    pub device_time: Option<Duration>,
    /// Room for every rank's logits, one rank after the other.
    pub(super) shards: Vec<f32>,
}

impl StepOutput {
    /// Nothing, until a step gives something.
    pub fn clear(&mut self) {
        self.logits.clear();
        self.token_ids.clear();
        self.hidden.clear();
        self.device_time = None;
    }
}

//! A sequence: one stream of tokens, from its prompt to its last sampled token.
//!
//! Its positions fall into three regions:
//!
//! ```text
//! [0, n_computed)            keys and values are in its blocks (beyond, rejected drafts may have left theirs)
//! [n_computed, n_known)      tokens known, still to be computed
//! [n_known, max_len)         tokens that may yet be sampled
//! ```
//!
//! A waiting sequence has no blocks and `n_computed` is 0. One that is preempted goes back to that, and keeps its
//! tokens: what it had sampled is then computed as if it were prompt.

use std::time::Instant;

use super::Pooling;
use super::allowance::Allowance;
use super::drafter::Drafter;
use super::plan::{BlockId, RowResults, SeqId};
use crate::kv::prefix_cache::{BlockKey, Content};

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    /// Prompt, then what was sampled.
    token_ids: Vec<u32>,
    /// Tokens of the prompt.
    n_prompt: usize,
    /// Ends at this many tokens. Above `n_prompt`, unless it is an embedding: its prompt is all that it has.
    max_len: usize,
    /// Set for an embedding: nothing is sampled, and it ends when its prompt is computed.
    pooling: Option<Pooling>,
    /// When it ends with what it has.
    pub(super) deadline: Option<Instant>,
    /// Whose prompt logits it waits for.
    pub(super) after: Option<SeqId>,
    /// Whether it never has drafts.
    pub(super) no_drafts: bool,
    /// Of every full block of `token_ids`, computed or not.
    keys: Vec<BlockKey>,
    /// Positions of the prompt whose results have been delivered, or are not asked for.
    n_prompt_rows_delivered: usize,
    /// Positions that the prefix cache held when the sequence first ran. Unset until then.
    n_cached: Option<usize>,
    /// The block table.
    blocks: Vec<BlockId>,
    /// Blocks of the table that a plan has carried.
    n_planned_blocks: usize,
    n_computed: usize,
    block_size: usize,
    drafter: Drafter,
    /// What it may spend on drafts.
    pub(super) allowance: Allowance,
}

/// What one step computes of a sequence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Chunk {
    /// Rows of known tokens.
    pub(super) n_rows: usize,
    /// What they give.
    pub(super) results: RowResults,
    /// Whether the last row's logits decide the sequence's next token.
    pub(super) samples: bool,
    /// Rows after them, all of which need logits: guesses at the next tokens. None unless the chunk samples.
    pub(super) drafts: Vec<u32>,
}

/// What is left of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) rows: usize,
    /// Rows of [`RowResults::AllLogits`].
    pub(super) prompt_logits_rows: usize,
}

// === impl Room ===

impl Room {
    /// The part of it that one sequence may take.
    pub(super) fn within(self, max_rows: usize) -> Self {
        Self { rows: self.rows.min(max_rows), ..self }
    }

    pub(super) fn take(&mut self, chunk: &Chunk) {
        self.rows -= chunk.n_rows;
        if chunk.results == RowResults::AllLogits {
            self.prompt_logits_rows -= chunk.n_rows;
        }
    }
}

// === impl Sequence ===

impl Sequence {
    /// A waiting sequence that ends with `max_len` tokens, more than its prompt has.
    pub(super) fn new(prompt: Vec<u32>, max_len: usize, block_size: usize) -> Self {
        assert!(prompt.len() < max_len, "{} tokens of {max_len}", prompt.len());
        Self::waiting(prompt, max_len, block_size)
    }

    /// A waiting sequence that ends when its prompt is computed.
    pub(super) fn embedding(prompt: Vec<u32>, pooling: Pooling, block_size: usize) -> Self {
        let n_prompt = prompt.len();
        let sequence = Self { pooling: Some(pooling), ..Self::waiting(prompt, n_prompt, block_size) };
        match pooling {
            Pooling::Mean => sequence.with_prompt_results(),
            Pooling::Last => sequence,
        }
    }

    fn waiting(prompt: Vec<u32>, max_len: usize, block_size: usize) -> Self {
        assert!(!prompt.is_empty(), "a prompt");
        let mut sequence = Self {
            n_prompt: prompt.len(),
            n_prompt_rows_delivered: prompt.len(),
            token_ids: prompt,
            max_len,
            pooling: None,
            deadline: None,
            after: None,
            no_drafts: false,
            keys: Vec::new(),
            n_cached: None,
            blocks: Vec::new(),
            n_planned_blocks: 0,
            n_computed: 0,
            block_size,
            drafter: Drafter::default(),
            allowance: Allowance::default(),
        };
        sequence.extend_keys();
        sequence
    }

    /// Asks for a result of every prompt position, once: logits, or the hidden states of an embedding.
    pub(super) fn with_prompt_results(mut self) -> Self {
        self.n_prompt_rows_delivered = 0;
        self
    }

    // === tokens ===

    pub(super) fn n_known(&self) -> usize {
        self.token_ids.len()
    }

    pub(super) fn n_computed(&self) -> usize {
        self.n_computed
    }

    /// Rows to compute before the next token can be sampled, or the embedding is there. Never 0 between two calls of the
    /// scheduler.
    pub(super) fn n_remaining(&self) -> usize {
        self.token_ids.len() - self.n_computed
    }

    /// Whether results of all of its prompt were asked for and have not all been delivered.
    fn owes_prompt_results(&self) -> bool {
        self.n_prompt_rows_delivered < self.n_prompt
    }

    /// Whether these are logits, of which a step has few.
    pub(super) fn owes_prompt_logits(&self) -> bool {
        self.owes_prompt_results() && !self.is_embedding()
    }

    /// Whether it needs one row, to sample from.
    pub(super) fn decodes(&self) -> bool {
        self.n_remaining() == 1 && !self.owes_prompt_results() && !self.is_embedding()
    }

    /// Whether nothing is sampled.
    pub(super) fn is_embedding(&self) -> bool {
        self.pooling.is_some()
    }

    /// Whether it is an embedding, and all of it is computed.
    pub(super) fn is_embedded(&self) -> bool {
        self.is_embedding() && self.n_remaining() == 0
    }

    /// Tokens to compute or to sample, at most, until it ends.
    pub(super) fn n_outstanding(&self) -> usize {
        self.max_len - self.n_computed
    }

    /// Whether it has all the tokens that it may have.
    pub(super) fn is_at_max_len(&self) -> bool {
        self.token_ids.len() >= self.max_len
    }

    /// Whether its next token is its last one, if none ends it before.
    pub(super) fn ends_with_next(&self) -> bool {
        self.token_ids.len() + 1 >= self.max_len
    }

    /// Adds a sampled token.
    pub(super) fn push(&mut self, token_id: u32) {
        assert!(!self.is_at_max_len(), "more than {} tokens", self.max_len);
        self.token_ids.push(token_id);
        self.extend_keys();
    }

    pub(super) fn n_cached(&self) -> usize {
        self.n_cached.unwrap_or(0)
    }

    fn extend_keys(&mut self) {
        for block in self.token_ids.chunks_exact(self.block_size).skip(self.keys.len()) {
            self.keys.push(BlockKey::new(self.keys.last(), block));
        }
    }

    // === blocks ===

    pub(super) fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Blocks that the known tokens and so many drafts need beyond the table.
    pub(super) fn n_missing_blocks(&self, n_drafts: usize) -> usize {
        (self.n_known() + n_drafts).div_ceil(self.block_size).saturating_sub(self.blocks.len())
    }

    /// Drafts that the table has room for.
    pub(super) fn n_free_slots(&self) -> usize {
        self.blocks.len() * self.block_size - self.n_known()
    }

    /// The keys of the blocks that may come from the prefix cache: full ones before the last known token, whose result
    /// is needed, and before every prompt position whose results were asked for and have not been delivered.
    pub(super) fn shareable_keys(&self) -> &[BlockKey] {
        let n_positions = if self.owes_prompt_results() { self.n_prompt_rows_delivered } else { self.n_known() - 1 };
        &self.keys[..n_positions / self.block_size]
    }

    /// Whether a later step of this running sequence will have computed the block with this key, its `block_idx`-th.
    pub(super) fn will_compute(&self, block_idx: usize, key: &BlockKey) -> bool {
        let is_computed = (block_idx + 1) * self.block_size <= self.n_computed;
        !is_computed && self.keys.get(block_idx) == Some(key)
    }

    /// Starts to run on `shared`, blocks that hold its first positions.
    pub(super) fn start(&mut self, shared: Vec<BlockId>) {
        assert!(self.blocks.is_empty(), "it runs already");
        self.n_computed = shared.len() * self.block_size;
        self.n_cached.get_or_insert(self.n_computed);
        self.blocks = shared;
    }

    /// Appends a block of its own to the table.
    pub(super) fn push_block(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    /// Gives the block table up, and with it all that was computed.
    pub(super) fn stop(&mut self) -> Vec<BlockId> {
        self.drafter = Drafter::default();
        self.n_computed = 0;
        self.n_planned_blocks = 0;
        std::mem::take(&mut self.blocks)
    }

    // === steps ===

    /// What a step computes of it. None: there is no room.
    pub(super) fn next_chunk(&self, room: Room) -> Option<Chunk> {
        let n_repeated = self.n_prompt_rows_delivered.saturating_sub(self.n_computed);
        let (max_rows, gives_prompt_results) = match (self.owes_prompt_results(), n_repeated) {
            (false, _) => (room.rows, false),
            (true, 0) if self.owes_prompt_logits() => (room.rows.min(room.prompt_logits_rows), true),
            (true, 0) => (room.rows, true),
            // Computed again after a preemption: their results were delivered, so they are no part of a chunk that gives some.
            (true, n_repeated) => (room.rows.min(n_repeated), false),
        };
        let n_rows = self.n_remaining().min(max_rows);
        let is_last = n_rows == self.n_remaining();
        let results = match (gives_prompt_results, is_last, self.pooling) {
            (true, _, None) => RowResults::AllLogits,
            (false, true, None) => RowResults::LastLogits,
            (true, _, Some(_)) => RowResults::AllHidden,
            (false, true, Some(_)) => RowResults::LastHidden,
            (false, false, _) => RowResults::None,
        };
        let samples = is_last && !self.is_embedding();
        (n_rows > 0).then_some(Chunk { n_rows, results, samples, drafts: Vec::new() })
    }

    /// Drafts that it may have: a token is sampled after the last one, too.
    pub(super) fn max_drafts(&self) -> usize {
        if self.no_drafts { 0 } else { self.max_len - self.n_known() - 1 }
    }

    /// Drafts what followed its last tokens when they occurred before, at most `max_drafts` tokens.
    pub(super) fn repeat(&mut self, max_drafts: usize) -> Vec<u32> {
        self.drafter.propose(&self.token_ids, max_drafts)
    }

    /// The known tokens of a chunk.
    pub(super) fn rows(&self, chunk: &Chunk) -> Vec<u32> {
        self.token_ids[self.n_computed..self.n_computed + chunk.n_rows].to_vec()
    }

    /// The blocks of the table that no plan has carried yet; the caller puts them into one.
    pub(super) fn take_new_blocks(&mut self) -> Vec<BlockId> {
        let new = self.blocks[self.n_planned_blocks..].to_vec();
        self.n_planned_blocks = self.blocks.len();
        new
    }

    /// The chunk's known tokens have been computed. Returns the blocks that they filled, each with its content.
    pub(super) fn advance(&mut self, chunk: &Chunk) -> impl Iterator<Item = (Content, BlockId)> {
        if matches!(chunk.results, RowResults::AllLogits | RowResults::AllHidden) {
            self.n_prompt_rows_delivered = self.n_computed + chunk.n_rows;
        }
        self.count_computed(chunk.n_rows)
    }

    /// The first `n_accepted` drafts of the chunk have been computed and sampled. Returns the blocks that they filled,
    /// each with its content.
    pub(super) fn accept(&mut self, n_accepted: usize) -> impl Iterator<Item = (Content, BlockId)> {
        self.allowance.earn(n_accepted);
        self.count_computed(n_accepted)
    }

    fn count_computed(&mut self, n_rows: usize) -> impl Iterator<Item = (Content, BlockId)> {
        let n_full_before = self.n_computed / self.block_size;
        self.n_computed += n_rows;
        let filled = n_full_before..self.n_computed / self.block_size;
        filled.map(|block_idx| (self.content(block_idx), self.blocks[block_idx]))
    }

    /// What its `block_idx`-th block holds, once it is full.
    fn content(&self, block_idx: usize) -> Content {
        let parent = block_idx.checked_sub(1).map(|before| self.keys[before]);
        let token_ids = self.token_ids[block_idx * self.block_size..][..self.block_size].into();
        Content { key: self.keys[block_idx], parent, block_idx, token_ids }
    }
}

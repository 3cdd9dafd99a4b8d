//! Shadows: what the draft model holds of the sequences that it has drafted for.
//!
//! A shadow follows its sequence at a distance. It holds the keys and values of tokens, drafts among them, in blocks of
//! the draft model's own pool:
//!
//! ```text
//! [0, n_held)           keys and values are in its blocks
//! [n_held, n_known)     tokens of the sequence that are still to be computed
//! ```
//!
//! Whenever the sequence is followed, what has turned out otherwise than it was drafted is forgotten, so that what is held
//! are tokens of the sequence. A shadow goes with its sequence; one that finds no blocks stays behind, and nobody waits
//! for it.

use std::collections::HashMap;

use crate::{
    kv::prefix_cache::{BlockKey, Content, PrefixCache},
    scheduler::plan::{BlockId, RowResults, SeqId, SequenceStep, StepPlan},
};

/// All shadows, and the blocks that they share.
#[derive(Debug)]
pub(super) struct Shadows {
    kv: PrefixCache,
    block_size: usize,
    by_id: HashMap<SeqId, Shadow>,
    /// For the next plan: sequences that have no shadow any more.
    released: Vec<SeqId>,
    next_step_id: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
struct Shadow {
    held: Vec<u32>,
    /// Of the full blocks that hold tokens of the sequence.
    keys: Vec<BlockKey>,
    blocks: Vec<BlockId>,
    /// Blocks that a plan has carried.
    n_planned_blocks: usize,
}

/// Tokens to compute for one sequence, after those that are held.
#[derive(Debug)]
pub(super) struct Rows<'a> {
    pub(super) id: SeqId,
    pub(super) token_ids: &'a [u32],
}

impl Shadows {
    /// None yet, over `n_blocks` blocks.
    pub(super) fn new(n_blocks: u32, block_size: usize) -> Self {
        let kv = PrefixCache::new(n_blocks);
        Self { kv, block_size, by_id: HashMap::new(), released: Vec::new(), next_step_id: 0 }
    }

    /// Sequences that have ended, or have been preempted.
    pub(super) fn release(&mut self, ids: &[SeqId]) {
        for id in ids {
            if let Some(shadow) = self.by_id.remove(id) {
                self.kv.release(&shadow.blocks);
                self.released.push(*id);
            }
        }
    }

    /// Follows a sequence to `known`, all of its tokens, and sees to blocks for `n_drafts` more. Returns how many tokens
    /// are held, which is fewer than are known; none if there are too few blocks.
    pub(super) fn follow(&mut self, id: SeqId, known: &[u32], n_drafts: usize) -> Option<usize> {
        // The last known token has to be computed in any case, for its logits.
        let before = &known[..known.len() - 1];
        let Self { kv, block_size, by_id, .. } = self;
        if kv.n_available() == 0 && by_id.get(&id).is_none_or(|shadow| shadow.blocks.is_empty()) {
            // It would need one at least. Found out before its whole text is hashed, as it is every turn.
            return None;
        }
        let shadow = by_id.entry(id).or_default();
        if shadow.blocks.is_empty() {
            let mut keys: Vec<BlockKey> = Vec::new();
            for block in before.chunks_exact(*block_size) {
                keys.push(BlockKey::new(keys.last(), block));
            }
            shadow.blocks = kv.acquire(&keys);
            keys.truncate(shadow.blocks.len());
            shadow.keys = keys;
            shadow.held = before[..shadow.blocks.len() * *block_size].to_vec();
        }
        let n_right = shadow.held.iter().zip(before).take_while(|(held, known)| held == known).count();
        shadow.held.truncate(n_right);
        for block_idx in shadow.keys.len()..n_right / *block_size {
            let token_ids = &known[block_idx * *block_size..][..*block_size];
            let parent = shadow.keys.last().copied();
            let key = BlockKey::new(parent.as_ref(), token_ids);
            kv.insert(Content { key, parent, block_idx, token_ids: token_ids.into() }, shadow.blocks[block_idx]);
            shadow.keys.push(key);
        }
        let n_missing = (known.len() + n_drafts).div_ceil(*block_size).saturating_sub(shadow.blocks.len());
        if n_missing > kv.n_available() {
            return None;
        }
        shadow.blocks.extend((0..n_missing).map_while(|_| kv.allocate()));
        Some(n_right)
    }

    /// A step that computes `rows`, which are then held. Each sequence must have been followed, with room for them.
    pub(super) fn plan(&mut self, rows: &[Rows<'_>], results: RowResults) -> StepPlan {
        let mut sequences = Vec::with_capacity(rows.len());
        for Rows { id, token_ids } in rows {
            let shadow = self.by_id.get_mut(id).expect("it has been followed");
            sequences.push(SequenceStep {
                id: *id,
                // Below the context's length, which is a u32.
                start_position: shadow.held.len() as u32,
                token_ids: token_ids.to_vec(),
                new_blocks: shadow.blocks[shadow.n_planned_blocks..].to_vec(),
                results,
            });
            shadow.n_planned_blocks = shadow.blocks.len();
            shadow.held.extend(*token_ids);
        }
        self.next_step_id += 1;
        StepPlan { step_id: self.next_step_id, released: std::mem::take(&mut self.released), sequences, chooses: false }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::test_seed::seed;

    const BLOCK_SIZE: usize = 4;

    fn shadows(n_blocks: u32) -> Shadows {
        Shadows::new(n_blocks, BLOCK_SIZE)
    }

    /// Follows and computes all but the last known token, then that one with `drafts` behind it.
    fn draft(shadows: &mut Shadows, id: u64, known: &[u32], drafts: &[u32]) -> Option<usize> {
        let n_held = shadows.follow(SeqId(id), known, drafts.len())?;
        let token_ids = [&known[n_held..], drafts].concat();
        shadows.plan(&[Rows { id: SeqId(id), token_ids: &token_ids }], RowResults::LastLogits);
        shadows.kv.check_integrity();
        Some(n_held)
    }

    #[test]
    fn what_was_drafted_wrongly_is_computed_again() {
        let mut shadows = shadows(8);
        assert_eq!(draft(&mut shadows, 0, &[1, 2, 3], &[4, 5, 6]), Some(0));
        assert_eq!(draft(&mut shadows, 0, &[1, 2, 3, 4, 9], &[7]), Some(4), "5 and 6 were wrong");
        assert_eq!(draft(&mut shadows, 0, &[1, 2, 3, 4, 9, 7, 8], &[]), Some(6), "all were right");
        assert_eq!(draft(&mut shadows, 0, &[1, 2, 3, 4, 9, 7, 8, 1, 2, 3], &[]), Some(7), "others drafted meanwhile");
    }

    #[test]
    fn who_finds_no_blocks_is_not_followed_until_others_are_gone() {
        let mut shadows = shadows(3);
        assert_eq!(draft(&mut shadows, 0, &[1; 5], &[2; 3]), Some(0));
        assert_eq!(draft(&mut shadows, 1, &[3; 5], &[2; 3]), None);
        assert_eq!(draft(&mut shadows, 1, &[3; 3], &[2]), Some(0), "one block is left");
        assert_eq!(draft(&mut shadows, 1, &[3; 5], &[2; 3]), None, "and cannot grow");
        shadows.release(&[SeqId(0), SeqId(7)]);
        assert_eq!(draft(&mut shadows, 1, &[3; 5], &[2; 3]), Some(3));
        assert_eq!(shadows.kv.counts().referenced, 2);
    }

    #[test]
    fn whoever_goes_on_from_the_same_text_starts_where_it_ends() {
        let mut shadows = shadows(8);
        draft(&mut shadows, 0, &[1, 2, 3, 4, 5, 6, 7, 8, 9], &[1]);
        draft(&mut shadows, 0, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 2], &[1]);
        shadows.release(&[SeqId(0)]);
        assert_eq!(draft(&mut shadows, 1, &[1, 2, 3, 4, 5, 6, 7, 8, 3], &[1]), Some(8));
        assert_eq!(draft(&mut shadows, 2, &[1, 2, 3, 4, 5, 6, 7, 8], &[1]), Some(4), "the last one has no logits");
    }

    #[test]
    fn who_cannot_have_a_block_takes_no_part_in_anything() {
        let mut shadows = shadows(2);
        draft(&mut shadows, 0, &[1, 2, 3, 4, 5], &[1]);
        draft(&mut shadows, 0, &[1, 2, 3, 4, 5, 6], &[1]);
        assert_eq!(draft(&mut shadows, 1, &[1, 2, 3, 4, 7], &[1]), None);
        assert!(!shadows.by_id.contains_key(&SeqId(1)), "nor has it looked for its text");
    }

    /// A model that keeps its tokens in slots, as others keep keys and values, sees each sequence's tokens there.
    #[test]
    fn slots_hold_what_is_said_to_be_held_in_a_long_random_life() {
        let mut rng = ChaCha8Rng::seed_from_u64(seed());
        let mut shadows = shadows(12);
        let mut tables: HashMap<SeqId, Vec<BlockId>> = HashMap::new();
        let mut slots: HashMap<(BlockId, usize), u32> = HashMap::new();
        let mut texts: HashMap<SeqId, Vec<u32>> = HashMap::new();
        let (mut n_followed, mut n_refused, mut n_shared) = (0, 0, 0);
        for _ in 0..50_000 {
            let id = SeqId(rng.random_range(0..4));
            if rng.random_bool(0.1) {
                shadows.release(&[id]);
                texts.remove(&id);
                continue;
            }
            let is_new = !shadows.by_id.contains_key(&id);
            let text = texts.entry(id).or_insert_with(|| vec![1; rng.random_range(1..10)]);
            let n_drafts = rng.random_range(0..4);
            let Some(n_held) = shadows.follow(id, text, n_drafts) else {
                n_refused += 1;
                continue;
            };
            n_followed += 1;
            n_shared += usize::from(is_new && n_held > 0);
            let drafts: Vec<u32> = (0..n_drafts).map(|_| rng.random_range(0..2)).collect();
            let token_ids = [&text[n_held..], &drafts].concat();
            let plan = shadows.plan(&[Rows { id, token_ids: &token_ids }], RowResults::LastLogits);
            shadows.kv.check_integrity();
            plan.released.iter().for_each(|id| drop(tables.remove(id)));
            let [step] = &plan.sequences[..] else { panic!("{plan:?}") };
            let table = tables.entry(id).or_default();
            table.extend(&step.new_blocks);
            let slot = |position: usize| (table[position / BLOCK_SIZE], position % BLOCK_SIZE);
            slots.extend((step.start_position as usize..).map(slot).zip(step.token_ids.iter().copied()));
            for (position, token_id) in text.iter().chain(&drafts).enumerate() {
                assert_eq!(slots[&slot(position)], *token_id, "{id:?} at {position}");
            }
            text.extend(drafts.iter().take(rng.random_range(0..=n_drafts)));
            text.push(rng.random_range(0..2));
            if text.len() > 30 {
                texts.remove(&id);
                shadows.release(&[id]);
            }
        }
        assert!(n_followed > 1_000 && n_refused > 100 && n_shared > 100, "{n_followed} {n_refused} {n_shared}");
    }
}

//! Admission: when a waiting sequence gets blocks and starts to run.

use std::collections::BTreeMap;

use super::Scheduler;
use super::plan::SeqId;
use super::sequence::{Chunk, Room, Sequence};

/// Sequences that wait for another's prefill and are passed in one step, at most. Each costs a look at every running
/// sequence; more would hardly find one to admit, as each of those passed takes up blocks soon.
pub(super) const MAX_PASSED: usize = 64;

/// What stands between a waiting sequence and its first step.
enum Verdict {
    /// Nothing: it has its blocks.
    Admitted,
    /// Another's prefill: a block of it that it can share, its logits, or the room that they take.
    PrefillUnderWay,
    /// Too few blocks are available.
    NoBlocks,
}

impl Scheduler {
    /// Admits waiting sequences, oldest first, while a step has rows and the group has places and blocks.
    pub(super) fn admit(&mut self, chunks: &mut BTreeMap<SeqId, Chunk>, room: &mut Room) {
        self.lacks_blocks = false;
        let mut n_passed = 0;
        let mut after = None;
        while room.rows > 0 && self.running.len() < self.config.max_running && n_passed < MAX_PASSED {
            let Some(id) = self.next_waiting(after) else { break };
            after = Some(id);
            let mut sequence = self.waiting.remove(&id).expect("it waits");
            match self.try_start(&mut sequence, room) {
                Verdict::Admitted => {
                    let chunk = sequence.next_chunk(room.within(self.config.max_prefill_chunk));
                    let chunk = chunk.expect("there is room for one row of each kind that it needs");
                    room.take(&chunk);
                    chunks.insert(id, chunk);
                    self.running.insert(id, sequence);
                }
                Verdict::PrefillUnderWay => {
                    n_passed += 1;
                    self.waiting.insert(id, sequence);
                }
                Verdict::NoBlocks => {
                    // Nobody younger may take the blocks that this one waits for.
                    self.waiting.insert(id, sequence);
                    self.lacks_blocks = true;
                    break;
                }
            }
        }
    }

    /// The oldest waiting sequence younger than `after`.
    fn next_waiting(&self, after: Option<SeqId>) -> Option<SeqId> {
        let mut younger = match after {
            Some(id) => self.waiting.range((std::ops::Bound::Excluded(id), std::ops::Bound::Unbounded)),
            None => self.waiting.range(..),
        };
        younger.next().map(|(id, _)| *id)
    }

    /// Gives a sequence the blocks of all its known tokens, if that leaves one for every running sequence: with less,
    /// the next decodes would preempt it again.
    fn try_start(&mut self, sequence: &mut Sequence, room: &Room) -> Verdict {
        let lacks_room = sequence.owes_prompt_logits() && room.prompt_logits_rows == 0;
        if lacks_room || self.is_told_to_wait(sequence) || self.prefix_is_under_way(sequence) {
            return Verdict::PrefillUnderWay;
        }
        let shared = self.kv.acquire(sequence.shareable_keys());
        let n_missing = sequence.n_missing_blocks(0) - shared.len();
        if self.kv.n_available() < n_missing + self.running.len() {
            self.kv.release(&shared);
            return Verdict::NoBlocks;
        }
        sequence.start(shared);
        for _ in 0..n_missing {
            sequence.push_block(self.kv.allocate().expect("as many are available"));
        }
        Verdict::Admitted
    }

    /// Whether it is to start after one that still owes the logits of its prompt.
    fn is_told_to_wait(&self, sequence: &Sequence) -> bool {
        let before = sequence.after.and_then(|id| self.running.get(&id).or_else(|| self.waiting.get(&id)));
        before.is_some_and(Sequence::owes_prompt_logits)
    }

    /// Whether the first block that the prefix cache lacks is being computed.
    fn prefix_is_under_way(&self, sequence: &Sequence) -> bool {
        let keys = sequence.shareable_keys();
        let n_cached = self.kv.n_cached(keys);
        keys.get(n_cached).is_some_and(|key| self.running.values().any(|other| other.will_compute(n_cached, key)))
    }
}

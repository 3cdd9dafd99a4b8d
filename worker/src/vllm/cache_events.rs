//! Cache events: what the prefix cache holds, as routers keep a copy of it.
//!
//! A stream begins with a snapshot, in as many batches as it takes; every further batch is what changed in one step. It is
//! numbered without a gap, and nothing is kept to go on from later: who loses a stream begins anew.

use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::{Stream, StreamExt as _, stream};
use lockstep_proto::smg::grpc::common::{
    KvBlock, KvBlocksRemoved, KvBlocksStored, KvCacheCleared, KvCacheEvent, KvEventBatch, KvSnapshotChunk,
    kv_cache_event::Data,
};
use tonic::Status;

use crate::{
    engine::cache_watchers::CacheWatch,
    kv::prefix_cache::{BlockKey, Change, Content},
    status,
};

/// Blocks in a batch of a snapshot. Some 100 bytes each.
const SNAPSHOT_BLOCKS: usize = 1024;

/// What a stream has sent.
struct Sent {
    batches: u64,
    events: u64,
}

/// Everything that a watcher learns, in batches.
pub(super) fn batches(mut watch: CacheWatch) -> impl Stream<Item = Result<KvEventBatch, Status>> + Send {
    let held = std::mem::take(&mut watch.held);
    let snapshot = snapshot(held);
    let sent = Sent { batches: snapshot.len() as u64, events: 0 };
    let changes = stream::unfold(Some((watch, sent)), |watching| async {
        let (mut watch, mut sent) = watching?;
        match watch.changes().await {
            Ok(changes) => Some((Ok(sent.batch(&changes)), Some((watch, sent)))),
            Err(error) => Some((Err(status::engine(&error)), None)),
        }
    });
    stream::iter(snapshot.into_iter().map(Ok)).chain(changes)
}

fn snapshot(held: Vec<Content>) -> Vec<KvEventBatch> {
    let n_blocks = held.len();
    let mut parts: Vec<&[Content]> = held.chunks(SNAPSHOT_BLOCKS).collect();
    if parts.is_empty() {
        parts.push(&[]);
    }
    let count = parts.len() as u32;
    let batch = |(index, part): (u32, &&[Content])| {
        let cleared = (index == 0).then_some(Data::Cleared(KvCacheCleared::default()));
        let data = cleared.into_iter().chain(part.iter().map(stored));
        let events = data.map(|data| KvCacheEvent { event_id: 0, data: Some(data) }).collect();
        let snapshot = KvSnapshotChunk { index, count, blocks: n_blocks as u64, unknown_before: 0 };
        KvEventBatch { snapshot: Some(snapshot), ..numbered(u64::from(index) + 1, events) }
    };
    (0..).zip(&parts).map(batch).collect()
}

impl Sent {
    fn batch(&mut self, changes: &[Change]) -> KvEventBatch {
        let mut events = Vec::with_capacity(changes.len());
        for change in changes {
            self.events += 1;
            let data = match change {
                Change::Stored(content) => stored(content),
                Change::Removed(key) => {
                    Data::Removed(KvBlocksRemoved { block_hashes: vec![hash(key)], ..KvBlocksRemoved::default() })
                }
                Change::Cleared => Data::Cleared(KvCacheCleared::default()),
            };
            events.push(KvCacheEvent { event_id: self.events, data: Some(data) });
        }
        self.batches += 1;
        numbered(self.batches, events)
    }
}

fn numbered(sequence_number: u64, events: Vec<KvCacheEvent>) -> KvEventBatch {
    let timestamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    KvEventBatch { sequence_number, timestamp, events, dp_rank: Some(0), ..KvEventBatch::default() }
}

fn stored(content: &Content) -> Data {
    let block = KvBlock {
        block_hash: hash(&content.key),
        token_ids: content.token_ids.to_vec(),
        block_size: content.token_ids.len() as i32,
        ..KvBlock::default()
    };
    let parent_block_hash = content.parent.as_ref().map(hash);
    Data::Stored(KvBlocksStored { blocks: vec![block], parent_block_hash, ..KvBlocksStored::default() })
}

fn hash(key: &BlockKey) -> i64 {
    i64::from_be_bytes(key.prefix())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(n_blocks: usize) -> Vec<Content> {
        let mut contents: Vec<Content> = Vec::new();
        for block_idx in 0..n_blocks {
            let token_ids = [block_idx as u32, 7];
            let parent = contents.last().map(|content| content.key);
            let key = BlockKey::new(parent.as_ref(), &token_ids);
            contents.push(Content { key, parent, block_idx, token_ids: token_ids.into() });
        }
        contents
    }

    #[test]
    fn a_snapshot_takes_as_many_batches_as_it_needs() {
        for (n_blocks, n_batches) in [(0, 1), (1, 1), (1024, 1), (1025, 2), (2049, 3)] {
            let batches = snapshot(chain(n_blocks));
            assert_eq!(batches.len(), n_batches, "{n_blocks}");
            for (index, batch) in (0..).zip(&batches) {
                assert_eq!(batch.sequence_number, u64::from(index) + 1);
                let part =
                    KvSnapshotChunk { index, count: n_batches as u32, blocks: n_blocks as u64, unknown_before: 0 };
                assert_eq!(batch.snapshot, Some(part));
                let is_cleared =
                    matches!(batch.events.first(), Some(event) if matches!(event.data, Some(Data::Cleared(_))));
                assert_eq!(is_cleared, index == 0);
            }
            assert_eq!(batches.iter().map(|batch| batch.events.len()).sum::<usize>(), n_blocks + 1);
        }
    }

    #[test]
    fn changes_go_on_where_the_snapshot_ended() {
        let contents = chain(2);
        let mut sent = Sent { batches: 3, events: 0 };
        let batch = sent.batch(&[Change::Stored(contents[1].clone()), Change::Removed(contents[0].key)]);
        let (first, second) = (hash(&contents[0].key), hash(&contents[1].key));
        assert_eq!((batch.sequence_number, batch.snapshot, batch.dp_rank), (4, None, Some(0)));
        assert_eq!(batch.events.iter().map(|event| event.event_id).collect::<Vec<_>>(), [1, 2]);
        let [Some(Data::Stored(stored)), Some(Data::Removed(removed))] = [0, 1].map(|at| batch.events[at].data.clone())
        else {
            panic!("{batch:?}")
        };
        assert_eq!((stored.parent_block_hash, stored.blocks[0].block_hash), (Some(first), second));
        assert_eq!((&stored.blocks[0].token_ids[..], stored.blocks[0].block_size), (&[1, 7][..], 2));
        assert_eq!(removed.block_hashes, [first]);
        let batch = sent.batch(&[Change::Cleared]);
        assert_eq!((batch.sequence_number, batch.events[0].event_id), (5, 3));
    }
}

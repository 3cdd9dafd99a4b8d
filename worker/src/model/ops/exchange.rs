//! What ranks exchange through host memory.

use std::ops::Range;

use lockstep_collectives::Collective;

use super::StepResults;
use crate::model::{StepError, output::StepOutput, shard::Reduction};

/// Gathers every rank's partial planes, `[n_planes, plane]` in all, of which this rank's are there.
pub(super) fn gather_planes(
    planes: &mut [f32],
    plane: usize,
    reduction: &Reduction,
    collective: &mut dyn Collective,
) -> Result<(), StepError> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    Ok(collective.all_gather(&reduction.lengths(plane), planes)?)
}

/// Results of a step that are in host memory.
pub(super) type HostResults = StepResults<Vec<f32>, Vec<f32>>;

/// Hands a step's results, if it has any, over to `out`, on rank 0 with the logits of all ranks. Returns the memory that
/// these take the place of.
pub(super) fn hand_over(
    results: HostResults,
    vocab: &[Range<usize>],
    collective: &mut dyn Collective,
    out: &mut StepOutput,
) -> Result<Option<Vec<f32>>, StepError> {
    out.clear();
    let StepResults { logits, hidden } = results;
    out.hidden.extend(hidden.into_iter().flatten());
    let Some(logits) = logits else { return Ok(None) };
    let before = std::mem::replace(&mut out.logits, logits);
    gather_logits(vocab, collective, out)?;
    Ok(Some(before))
}

/// Brings every rank's columns of the logits together on rank 0, `[n_rows, vocab_size]`. `out.logits` are this rank's,
/// `[n_rows, vocab[rank].len()]`.
pub(super) fn gather_logits(
    vocab: &[Range<usize>],
    collective: &mut dyn Collective,
    out: &mut StepOutput,
) -> Result<(), StepError> {
    if collective.world_size() == 1 {
        return Ok(());
    }
    let n_rows = out.logits.len() / vocab[collective.rank()].len();
    let lengths: Vec<usize> = vocab.iter().map(|range| range.len() * n_rows).collect();
    let StepOutput { logits, shards, .. } = out;
    if collective.rank() != 0 {
        return Ok(collective.gather(0, logits, &lengths, None)?);
    }
    let vocab_size = vocab.last().map_or(0, |range| range.end);
    shards.resize(n_rows * vocab_size, 0.0);
    collective.gather(0, logits, &lengths, Some(shards))?;
    logits.resize(n_rows * vocab_size, 0.0);
    let mut shard = shards.as_slice();
    for range in vocab {
        let (rows, rest) = shard.split_at(range.len() * n_rows);
        for (row, values) in rows.chunks_exact(range.len()).enumerate() {
            logits[row * vocab_size..][range.clone()].copy_from_slice(values);
        }
        shard = rest;
    }
    Ok(())
}

//! The wire form of a group's messages, and the checks on what comes in it.
//!
//! A peer has attested what it is, but not that it is right: a plan that it garbled must not reach the engine, nor may
//! it make this rank allocate more than a plan can hold.

use lockstep_proto::worker::v1 as pb;
use thiserror::Error;

use super::membership::{Contact, Join};
use crate::scheduler::plan::{BlockId, RowResults, SeqId, SequenceStep, StepPlan};

/// Most sequences of a step, and most released before one. The scheduler's batches are far smaller.
const SEQUENCES_MAX: usize = 65_536;

/// Most rows of a step in all, and most new blocks: eight times the longest context in sight, 131,072 tokens.
const ROWS_MAX: usize = 1 << 20;

/// Most entries of an attestation, as the contract has it.
const ATTESTATION_ENTRIES_MAX: usize = 64;

/// Longest name or value in an attestation, and longest address or device, in bytes.
const TEXT_BYTES_MAX: usize = 256;

/// Longest request id, as the contract has it.
const REQUEST_ID_BYTES_MAX: usize = 64;

/// What is wrong with a peer's message.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// A part that must be there is not.
    #[error("{what} is missing")]
    Missing {
        /// The part.
        what: &'static str,
    },
    /// There is more of something than there may be.
    #[error("{found} {what}, at most {max} are allowed")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How much there is.
        found: usize,
        /// How much there may be.
        max: usize,
    },
    /// A sequence of a plan makes no sense.
    #[error("sequence {sequence} of step {step}: {problem}")]
    Sequence {
        /// The step.
        step: u64,
        /// The sequence's id.
        sequence: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// A plan as it travels.
pub fn plan_to_proto(plan: &StepPlan) -> pb::StepPlan {
    let sequence = |sequence: &SequenceStep| pb::SequenceStep {
        sequence_id: sequence.id.0,
        start_position: sequence.start_position,
        token_ids: sequence.token_ids.clone(),
        new_blocks: sequence.new_blocks.iter().map(|block| block.0).collect(),
        results: match sequence.results {
            RowResults::None => pb::RowResults::None,
            RowResults::LastLogits => pb::RowResults::LastLogits,
            RowResults::AllLogits => pb::RowResults::AllLogits,
            RowResults::LastHidden => pb::RowResults::LastHidden,
            RowResults::AllHidden => pb::RowResults::AllHidden,
        }
        .into(),
    };
    pb::StepPlan {
        step_id: plan.step_id,
        released: plan.released.iter().map(|id| id.0).collect(),
        sequences: plan.sequences.iter().map(sequence).collect(),
        chooses: plan.chooses,
    }
}

/// A plan that has travelled.
///
/// # Errors
///
/// If it breaks the contract or a limit.
pub fn plan_from_proto(plan: pb::StepPlan) -> Result<StepPlan, WireError> {
    let step = plan.step_id;
    at_most(SEQUENCES_MAX, plan.sequences.len(), "sequences in a step")?;
    at_most(SEQUENCES_MAX, plan.released.len(), "released sequences in a step")?;
    let n_rows = plan.sequences.iter().map(|sequence| sequence.token_ids.len()).sum();
    at_most(ROWS_MAX, n_rows, "rows in a step")?;
    let n_blocks = plan.sequences.iter().map(|sequence| sequence.new_blocks.len()).sum();
    at_most(ROWS_MAX, n_blocks, "new blocks in a step")?;
    let mut ids: Vec<u64> = plan.sequences.iter().map(|sequence| sequence.sequence_id).collect();
    ids.sort_unstable();
    if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(WireError::Sequence { step, sequence: twice[0], problem: "is there twice" });
    }
    Ok(StepPlan {
        step_id: step,
        released: plan.released.into_iter().map(SeqId).collect(),
        sequences: plan
            .sequences
            .into_iter()
            .map(|sequence| sequence_from_proto(step, sequence))
            .collect::<Result<_, _>>()?,
        chooses: plan.chooses,
    })
}

fn sequence_from_proto(step: u64, sequence: pb::SequenceStep) -> Result<SequenceStep, WireError> {
    let results = sequence.results();
    let wrong = |problem| Err(WireError::Sequence { step, sequence: sequence.sequence_id, problem });
    if sequence.token_ids.is_empty() {
        return wrong("has no rows");
    }
    // Fits: there are at most `ROWS_MAX` rows.
    if sequence.start_position.checked_add(sequence.token_ids.len() as u32).is_none() {
        return wrong("has positions beyond 32 bits");
    }
    let results = match results {
        pb::RowResults::None => RowResults::None,
        pb::RowResults::LastLogits => RowResults::LastLogits,
        pb::RowResults::AllLogits => RowResults::AllLogits,
        pb::RowResults::LastHidden => RowResults::LastHidden,
        pb::RowResults::AllHidden => RowResults::AllHidden,
        // So is a value that this version does not know.
        pb::RowResults::Unspecified => return wrong("does not say what its rows give"),
    };
    Ok(SequenceStep {
        id: SeqId(sequence.sequence_id),
        start_position: sequence.start_position,
        token_ids: sequence.token_ids,
        new_blocks: sequence.new_blocks.into_iter().map(BlockId).collect(),
        results,
    })
}

/// Request ids of sequences as they travel.
pub fn requests_to_proto(requests: Vec<(SeqId, String)>) -> Vec<pb::SequenceRequest> {
    let request = |(id, request_id): (SeqId, String)| pb::SequenceRequest { sequence_id: id.0, request_id };
    requests.into_iter().map(request).collect()
}

/// Checks request ids that have travelled.
///
/// # Errors
///
/// If they break a limit.
pub fn check_requests(requests: &[pb::SequenceRequest]) -> Result<(), WireError> {
    at_most(SEQUENCES_MAX, requests.len(), "request ids in a step")?;
    requests
        .iter()
        .try_for_each(|request| at_most(REQUEST_ID_BYTES_MAX, request.request_id.len(), "bytes in a request id"))
}

/// A request to join as it travels.
pub fn join_to_proto(join: &Join) -> pb::JoinRequest {
    pb::JoinRequest {
        rank: join.rank as u32,
        attestation: Some(pb::Attestation { entries: join.attestation.entries().clone().into_iter().collect() }),
        collective_address: join.contact.address.clone(),
        device_id: join.contact.device_id.clone(),
    }
}

/// A request to join that has travelled.
///
/// # Errors
///
/// If it breaks the contract or a limit.
pub fn join_from_proto(join: pb::JoinRequest) -> Result<Join, WireError> {
    let attestation = join.attestation.ok_or(WireError::Missing { what: "attestation" })?;
    at_most(ATTESTATION_ENTRIES_MAX, attestation.entries.len(), "entries in an attestation")?;
    let entries = attestation.entries.iter().flat_map(|(key, value)| [key, value]);
    for text in entries.chain([&join.collective_address, &join.device_id]) {
        at_most(TEXT_BYTES_MAX, text.len(), "bytes in a name, value, address or device")?;
    }
    Ok(Join {
        rank: join.rank as usize,
        attestation: attestation.entries.into_iter().collect(),
        contact: Contact { address: join.collective_address, device_id: join.device_id },
    })
}

fn at_most(max: usize, found: usize, what: &'static str) -> Result<(), WireError> {
    if found > max { Err(WireError::TooMany { what, found, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(id: u64, results: RowResults) -> SequenceStep {
        SequenceStep {
            id: SeqId(id),
            start_position: 16,
            token_ids: vec![1, 0, u32::MAX],
            new_blocks: vec![BlockId(3), BlockId(0)],
            results,
        }
    }

    fn plan() -> StepPlan {
        use RowResults::{AllHidden, AllLogits, LastHidden, LastLogits};
        let sequences = [RowResults::None, LastLogits, AllLogits, LastHidden, AllHidden];
        let sequences = sequences.into_iter().zip(1..).map(|(results, id)| sequence(id, results)).collect();
        StepPlan { step_id: 5, released: vec![SeqId(9), SeqId(u64::MAX)], sequences, chooses: true }
    }

    /// A plan that `break_it` has broken is refused, for `reason`.
    fn check(break_it: impl FnOnce(&mut pb::StepPlan), reason: &str) {
        let mut plan = plan_to_proto(&plan());
        break_it(&mut plan);
        assert_eq!(plan_from_proto(plan).unwrap_err().to_string(), reason);
    }

    #[test]
    fn request_ids_arrive_within_their_limit() {
        let sent = requests_to_proto(vec![(SeqId(7), "a".repeat(64))]);
        assert_eq!((sent[0].sequence_id, sent[0].request_id.len()), (7, 64));
        assert_eq!(check_requests(&sent), Ok(()));
        let error = check_requests(&requests_to_proto(vec![(SeqId(7), "a".repeat(65))])).unwrap_err();
        assert_eq!(error.to_string(), "65 bytes in a request id, at most 64 are allowed");
    }

    #[test]
    fn a_plan_arrives_as_it_was_sent() {
        assert_eq!(plan_from_proto(plan_to_proto(&plan())), Ok(plan()));
        assert_eq!(plan_from_proto(plan_to_proto(&StepPlan::default())), Ok(StepPlan::default()));
    }

    #[test]
    fn a_plan_that_breaks_the_contract_is_refused() {
        check(|plan| plan.sequences[1].token_ids.clear(), "sequence 2 of step 5: has no rows");
        check(|plan| plan.sequences[2].sequence_id = 1, "sequence 1 of step 5: is there twice");
        let unknown = "sequence 1 of step 5: does not say what its rows give";
        check(|plan| plan.sequences[0].results = 0, unknown);
        check(|plan| plan.sequences[0].results = 77, unknown);
        let position = "sequence 1 of step 5: has positions beyond 32 bits";
        check(|plan| plan.sequences[0].start_position = u32::MAX - 2, position);
        let sequences = "65537 released sequences in a step, at most 65536 are allowed";
        check(|plan| plan.released = vec![0; SEQUENCES_MAX + 1], sequences);
        let rows = "1048589 rows in a step, at most 1048576 are allowed";
        check(|plan| plan.sequences[0].token_ids = vec![0; ROWS_MAX + 1], rows);
    }

    #[test]
    fn an_oversized_attestation_is_refused() {
        let contact = Contact { address: "a:1".into(), device_id: "GPU-1".into() };
        let join = Join { rank: 1, attestation: [("weights_digest", "ab12")].into_iter().collect(), contact };
        let sent = join_to_proto(&join);
        assert_eq!(join_from_proto(sent.clone()), Ok(join));
        let none = pb::JoinRequest { attestation: None, ..sent.clone() };
        assert_eq!(join_from_proto(none), Err(WireError::Missing { what: "attestation" }));
        let long = pb::JoinRequest { collective_address: "a".repeat(257), ..sent.clone() };
        assert!(matches!(join_from_proto(long), Err(WireError::TooMany { found: 257, .. })));
        let long = pb::JoinRequest { device_id: "a".repeat(257), ..sent.clone() };
        assert!(matches!(join_from_proto(long), Err(WireError::TooMany { found: 257, .. })));
        let many = pb::Attestation { entries: (0..65).map(|i| (i.to_string(), String::new())).collect() };
        let many = pb::JoinRequest { attestation: Some(many), ..sent };
        assert!(matches!(join_from_proto(many), Err(WireError::TooMany { found: 65, .. })));
    }
}

//! `/cluster`: every group, as this gateway sees it.

use axum::{extract::Request, response::Response};
use http::StatusCode;
use lockstep_proto::worker::v1;
use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    groups::Snapshot,
    http::{Front, json_response},
    openapi::Operation,
    router::GroupState,
    status::Failure,
};

/// The cluster.
#[derive(Debug, Serialize, JsonSchema)]
struct Cluster {
    /// The gateway's version.
    version: &'static str,
    /// Every group that is configured, in that order.
    groups: Vec<Group>,
}

/// The ranks of one replica.
#[derive(Debug, Serialize, JsonSchema)]
struct Group {
    /// Of its leader.
    address: String,
    /// `ready`; `forming`: not all ranks are there, or it warms up; `draining`: it takes no further work; `lost`: its
    /// reports have stopped; `unknown`: it has never reported.
    state: &'static str,
    /// `closed`; `open`: it is left alone after failures; `half_open`: one request tries whether it works again.
    breaker: &'static str,
    /// Tokens at most, of prompts and outputs, of this gateway's requests that it has not finished.
    own_tokens: u64,
    /// What it said last, also if it is lost. Null: nothing yet.
    report: Option<Report>,
}

/// What a group says of itself.
#[derive(Debug, Serialize, JsonSchema)]
struct Report {
    /// The model's name.
    model: String,
    /// SHA-256 of the model's file and the settings that decide its logits, in hexadecimal.
    model_digest: String,
    /// The worker's version.
    engine_version: String,
    /// What every rank computes on: `cpu`, `reference`, or `cuda` and the GPU's architecture.
    device: String,
    /// How often the group has formed.
    epoch: u64,
    /// Ranks of the group.
    world_size: u32,
    /// Sequences that wait.
    waiting_sequences: u32,
    /// Sequences that run.
    running_sequences: u32,
    /// Tokens at most that are still to be computed or generated for all of them.
    outstanding_tokens: u64,
    /// Time of a step that only decodes: an exponential mean, in which a step weighs 1/16 and one that takes long counts for
    /// twice the mean. Unit: milliseconds. Null: there was none yet.
    decode_step_ms: Option<f32>,
    /// Tokens generated since the leader started.
    generated_tokens: u64,
    /// The KV cache.
    kv_blocks: KvBlocks,
    /// Every rank, by number.
    ranks: Vec<Rank>,
}

/// The blocks of a KV cache. Those that are neither free nor cached are in use.
#[derive(Debug, Serialize, JsonSchema)]
struct KvBlocks {
    /// All of them.
    total: u32,
    /// Hold nothing.
    free: u32,
    /// Hold a prefix that nobody uses now.
    cached: u32,
    /// Positions in a block.
    size: u32,
}

/// One rank of a group.
#[derive(Debug, Serialize, JsonSchema)]
struct Rank {
    /// Its number.
    rank: u32,
    /// `joined`; `waiting`: it waits for the others; `missing`: it is gone, or has not come yet.
    state: &'static str,
    /// Since the leader last heard of it. Unit: whole seconds. Null: it never has.
    silent_s: Option<u32>,
}

pub(super) fn operation() -> Operation {
    Operation::call("Every group of the cluster, as this gateway sees it.").answers::<Cluster>()
}

/// The state, for a caller whom the gate knows.
pub(super) async fn get(front: &Front, request: Request) -> Result<Response, Failure> {
    front.read(request).await?;
    let groups = front.pipeline.backends.groups.snapshots().into_iter().map(Group::from).collect();
    Ok(json_response(StatusCode::OK, &Cluster { version: env!("CARGO_PKG_VERSION"), groups }))
}

impl From<Snapshot> for Group {
    fn from(snapshot: Snapshot) -> Self {
        let Snapshot { address, state, breaker, own_tokens, status } = snapshot;
        let state = match state {
            GroupState::Unknown => "unknown",
            GroupState::Forming => "forming",
            GroupState::Ready => "ready",
            GroupState::Draining => "draining",
            GroupState::Lost => "lost",
        };
        Self { address, state, breaker, own_tokens, report: status.map(Report::from) }
    }
}

impl From<v1::Status> for Report {
    fn from(status: v1::Status) -> Self {
        Self {
            model: status.model,
            model_digest: status.model_digest,
            engine_version: status.engine_version,
            device: status.device,
            epoch: status.epoch,
            world_size: status.world_size,
            waiting_sequences: status.waiting_sequences,
            running_sequences: status.running_sequences,
            outstanding_tokens: status.outstanding_tokens,
            decode_step_ms: status.decode_step_ms,
            generated_tokens: status.generated_tokens,
            kv_blocks: KvBlocks {
                total: status.total_blocks,
                free: status.free_blocks,
                cached: status.cached_blocks,
                size: status.block_size,
            },
            ranks: status.ranks.into_iter().map(Rank::from).collect(),
        }
    }
}

impl From<v1::RankStatus> for Rank {
    fn from(status: v1::RankStatus) -> Self {
        let state = match status.state() {
            v1::RankState::Joined => "joined",
            v1::RankState::Waiting => "waiting",
            v1::RankState::Missing | v1::RankState::Unspecified => "missing",
        };
        Self { rank: status.rank, state, silent_s: status.silent_s }
    }
}

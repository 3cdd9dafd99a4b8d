//! The leader's answers to its followers' calls.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use lockstep_proto::{
    error::{Error, Reason},
    worker::v1::{
        HeartbeatRequest, HeartbeatResponse, JoinRequest, JoinResponse, StepsRequest, StepsResponse,
        group_service_server::GroupService,
    },
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::Shared;
use crate::group::{
    membership::{Beat, Ticket},
    wire,
};

/// Answers the followers: the leader's `GroupService`.
#[derive(Clone, Debug)]
pub struct GroupRpc {
    shared: Arc<Shared>,
}

/// The plans of an epoch on their way to one rank. Dropped when the rank's connection ends.
#[derive(Debug)]
pub struct Plans {
    plans: mpsc::Receiver<Result<StepsResponse, Status>>,
    rank: usize,
    epoch: u64,
    shared: Arc<Shared>,
}

/// A call that waits for the group to form. Dropped when the caller goes away.
struct Waiting {
    ticket: Ticket,
    shared: Arc<Shared>,
}

// === impl GroupRpc ===

impl GroupRpc {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[tonic::async_trait]
impl GroupService for GroupRpc {
    type StepsStream = Plans;

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let join = wire::join_from_proto(request.into_inner());
        let join = join.map_err(|error| Error::new(Reason::InvalidArgument, error.to_string()))?;
        let (ticket, answer) = self.shared.join(join);
        let _waiting = Waiting { ticket, shared: Arc::clone(&self.shared) };
        match answer.await {
            Ok(answer) => Ok(Response::new(answer?)),
            Err(_dropped) => Err(Error::new(Reason::Draining, "the leader shuts down").into()),
        }
    }

    async fn steps(&self, request: Request<StepsRequest>) -> Result<Response<Plans>, Status> {
        let StepsRequest { rank, epoch } = request.into_inner();
        let rank = rank as usize;
        match self.shared.attach(rank, epoch) {
            Some(plans) => Ok(Response::new(Plans { plans, rank, epoch, shared: Arc::clone(&self.shared) })),
            None => {
                let message = format!("rank {rank} cannot have the plans of epoch {epoch}: join again");
                Err(Error::new(Reason::EpochEnded, message).into())
            }
        }
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        let HeartbeatRequest { rank, epoch, progress, leaving } = request.into_inner();
        let epoch_alive = self.shared.heartbeat(rank as usize, epoch, Beat { progress, leaving });
        Ok(Response::new(HeartbeatResponse { epoch_alive }))
    }
}

// === impl Plans ===

impl Stream for Plans {
    type Item = Result<StepsResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.plans.poll_recv(context)
    }
}

impl Drop for Plans {
    fn drop(&mut self) {
        self.shared.lost(self.rank, self.epoch);
    }
}

// === impl Waiting ===

impl Drop for Waiting {
    fn drop(&mut self) {
        self.shared.withdraw(self.ticket);
    }
}

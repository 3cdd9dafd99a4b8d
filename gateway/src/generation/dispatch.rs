//! Dispatch: finds a group that takes a request, and stays until the group's first event; for an embedding that is all.
//!
//! Until then nothing has been shown to the client, so the request can go elsewhere: once, if a group is full; as
//! often as the retry budget and the number of groups allow, if groups are away. Afterwards a failure is the client's
//! to see.

use std::{sync::Arc, time::Instant};

use lockstep_proto::{
    error::{Error, Reason},
    worker::v1::{GenerateRequest, GenerateResponse, Started, generate_response::Event},
};
use tonic::{Code, Request, Status, Streaming};

use crate::{
    groups::{Groups, Placement},
    router::Ask,
    status::{self, Failure, reason_of_absence},
    tokenizer::Caller,
};

use super::{choice::Breach, deadline::Deadline};

/// A request that a group works on.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) placement: Placement,
    pub(super) started: Started,
    /// What follows the start.
    pub(super) events: Streaming<GenerateResponse>,
}

/// What a request is dispatched by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Order<'a> {
    pub(crate) model: &'a str,
    pub(crate) prompt_token_ids: &'a [u32],
    /// Tokens to compute at most.
    pub(crate) cost: u64,
    pub(crate) deadline: Deadline,
    pub(crate) caller: Caller<'a>,
}

/// Asks one group after another until one takes the request: what `ask` makes of its answer. An error in that is the
/// group's, and says whether another may do better.
pub(crate) async fn dispatch<T, Asked>(
    groups: &Arc<Groups>,
    order: Order<'_>,
    ask: impl Fn(Placement) -> Asked,
) -> Result<T, Failure>
where
    Asked: Future<Output = Result<Result<T, Error>, Failure>>,
{
    let prefix = groups.prefix(order.model, order.prompt_token_ids);
    let mut tried = Vec::new();
    let mut refused_before = false;
    let mut failure = None;
    groups.arrived();
    loop {
        let wanted = Ask { model: order.model, prefix: &prefix, cost: order.cost, tried: &tried };
        let placement = match groups.choose(&wanted, Instant::now()) {
            Ok(placement) => placement,
            Err(none) => return Err(failure.unwrap_or(none.into())),
        };
        let group = placement.group();
        let error = match ask(placement).await? {
            Ok(taken) => return Ok(taken),
            Err(error) => error,
        };
        let may_go_on = match error.reason() {
            Reason::Overloaded => !std::mem::replace(&mut refused_before, true),
            reason => reason_of_absence(reason) && groups.may_retry(),
        };
        tracing::warn!(group = groups.address(group), %error, retry = may_go_on, "a group did not take the request");
        let refusal = Failure::Group { address: groups.address(group).to_owned(), error: Box::new(error) };
        if !may_go_on {
            return Err(refusal);
        }
        tried.push(group);
        failure = Some(refusal);
    }
}

/// Asks one group to generate, and waits for its first event.
pub(super) async fn begin(
    mut placement: Placement,
    order: Order<'_>,
    message: GenerateRequest,
) -> Result<Result<Running, Error>, Failure> {
    let request = order.request(|budget_ms| GenerateRequest { budget_ms, ..message })?;
    let first_event = async {
        let mut events = placement.client().generate(request).await?.into_inner();
        let first = events.message().await?.ok_or_else(status::ended_unasked)?;
        Ok((events, first))
    };
    match first_event.await {
        Ok((events, GenerateResponse { event: Some(Event::Started(started)) })) => {
            placement.worked();
            Ok(Ok(Running { placement, started, events }))
        }
        Ok(_) => {
            placement.failed();
            Err(Failure::Breach { peer: format!("group {}", placement.address()), breach: Breach::Start })
        }
        Err(status) => Ok(Err(judge(&mut placement, &status))),
    }
}

/// Reads a group's error, and tells the router what it says about the group.
pub(crate) fn judge(placement: &mut Placement, status: &Status) -> Error {
    let error = Error::from_status(status);
    match status.code() {
        // tonic's own word for a connection that broke in the middle of a call.
        Code::Unknown => {
            placement.failed();
            Error::new(Reason::Unavailable, error.message())
        }
        Code::Unavailable if error.reason() == Reason::Draining => {
            placement.worked();
            error
        }
        Code::Unavailable | Code::Internal | Code::DataLoss | Code::Cancelled => {
            placement.failed();
            error
        }
        // The budget ran out, which says nothing about the group.
        Code::DeadlineExceeded => error,
        _ => {
            placement.worked();
            error
        }
    }
}

// === impl Order ===

impl Order<'_> {
    /// A call to a group, whose message says what is left of the time.
    ///
    /// # Errors
    /// When nothing is.
    pub(crate) fn request<T>(&self, message: impl FnOnce(Option<u32>) -> T) -> Result<Request<T>, Failure> {
        let now = Instant::now();
        let budget_ms = self.deadline.worker_budget_ms(now).ok_or(Failure::Deadline)?;
        Ok(self.caller.request(message(Some(budget_ms)), self.deadline.client().saturating_duration_since(now)))
    }
}

//! Dispatch: finds a group that takes a request, and stays until the group's first event.
//!
//! Until then nothing has been shown to the client, so the request can go elsewhere: once, if a group is full; as
//! often as the retry budget and the number of groups allow, if groups are away. Afterwards a failure is the client's
//! to see.

use std::{sync::Arc, time::Instant};

use lockstep_proto::{
    error::{Error, Reason},
    worker::v1::{GenerateRequest, GenerateResponse, Started, generate_response::Event},
};
use tonic::{Code, Status, Streaming};

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
#[derive(Debug)]
pub(super) struct Order<'a> {
    pub(super) model: &'a str,
    pub(super) request: GenerateRequest,
    pub(super) deadline: Deadline,
    pub(super) caller: Caller<'a>,
}

/// Sends the request to one group after another until one gives its first event.
pub(super) async fn dispatch(groups: &Arc<Groups>, order: &Order<'_>) -> Result<Running, Failure> {
    let prefix = groups.prefix(order.model, &order.request.prompt_token_ids);
    let mut tried = Vec::new();
    let mut refused_before = false;
    let mut failure = None;
    groups.arrived();
    loop {
        let ask = Ask { model: order.model, prefix: &prefix, cost: order.cost(), tried: &tried };
        let placement = match groups.choose(&ask, Instant::now()) {
            Ok(placement) => placement,
            Err(none) => return Err(failure.unwrap_or(none.into())),
        };
        let group = placement.group();
        let error = match begin(placement, order).await? {
            Ok(running) => return Ok(running),
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

/// Asks one group, and waits for its first event.
async fn begin(mut placement: Placement, order: &Order<'_>) -> Result<Result<Running, Error>, Failure> {
    let now = Instant::now();
    let budget_ms = order.deadline.worker_budget_ms(now).ok_or(Failure::Deadline)?;
    let message = GenerateRequest { budget_ms: Some(budget_ms), ..order.request.clone() };
    let request = order.caller.request(message, order.deadline.client().saturating_duration_since(now));
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
pub(super) fn judge(placement: &mut Placement, status: &Status) -> Error {
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
    /// Tokens to compute at most.
    fn cost(&self) -> u64 {
        let sampling = self.request.sampling.as_ref();
        let output = sampling.map_or(0, |sampling| u64::from(sampling.max_new_tokens));
        let prompt = u64::try_from(self.request.prompt_token_ids.len()).unwrap_or(u64::MAX);
        prompt.saturating_add(output.saturating_mul(u64::from(self.request.n)))
    }
}

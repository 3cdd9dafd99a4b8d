//! A [`Load`] is a number of requests put on a cluster: by so many clients that each send the next when one ends, or at
//! random times with a given rate (a Poisson process), with no more than so many in flight.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::{error::Error, v1::inference_service_client::InferenceServiceClient};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::{sync::Semaphore, task::JoinSet};
use tonic::{Request, Status, Streaming, transport::Channel};

use super::prompts::{Call, Prompts};
use crate::{events::Event, failure::Failure, target::Target};

/// Requests that share a connection: well below the streams that a gateway allows on one.
const REQUESTS_PER_CONNECTION: u32 = 128;

/// The load to put on a cluster.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) model: String,
    pub(super) requests: u32,
    pub(super) concurrency: u32,
    pub(super) prompts: Prompts,
    pub(super) max_new_tokens: u32,
    /// Arrivals a second. `None`: a request follows as soon as one has ended.
    pub(super) rate: Option<f64>,
    /// Decides arrival times.
    pub(super) seed: u64,
}

/// The load, connected.
#[derive(Debug)]
pub(super) struct Load {
    plan: Plan,
    target: Target,
    clients: Vec<InferenceServiceClient<Channel>>,
}

/// What came of one request. Times are seconds.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// From sending to the first token.
    pub(super) first_token: Option<f64>,
    /// Between tokens; a chunk of several counts as so many equal gaps.
    pub(super) gaps: Vec<f64>,
    /// From sending to the end.
    pub(super) total: f64,
    /// Tokens of the prompt, as the cluster counted them.
    pub(super) prompt_tokens: u32,
    /// Tokens generated.
    pub(super) tokens: u32,
    /// Why it failed, if it did.
    pub(super) error: Option<Error>,
}

/// What came of all, in the order in which they ended.
#[derive(Debug)]
pub(super) struct Outcomes {
    pub(super) each: Vec<Outcome>,
    /// From the first request to the last end. Unit: seconds.
    pub(super) wall: f64,
}

// === impl Load ===

impl Load {
    pub(super) fn new(plan: Plan, target: Target) -> Result<Self, Failure> {
        let connections = plan.concurrency.div_ceil(REQUESTS_PER_CONNECTION);
        let clients = (0..connections).map(|_| target.inference()).collect::<Result<_, _>>()?;
        Ok(Self { plan, target, clients })
    }

    /// Sends everything and waits for every end, telling `progress` about each.
    pub(super) async fn run(self, mut progress: impl FnMut(&Outcome)) -> Outcomes {
        let slots = Arc::new(Semaphore::new(self.plan.concurrency as usize));
        let mut arrivals = ChaCha8Rng::seed_from_u64(self.plan.seed);
        let mut running = JoinSet::new();
        let mut each = Vec::new();
        let started = Instant::now();
        let mut due = Duration::ZERO;
        for (index, mut client) in (0..self.plan.requests).zip(self.clients.iter().cloned().cycle()) {
            if let Some(rate) = self.plan.rate {
                due += pause(rate, &mut arrivals);
                tokio::time::sleep_until((started + due).into()).await;
            }
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { break };
            let call = self.plan.prompts.call(index, &self.plan.model, self.plan.max_new_tokens);
            let target = self.target.clone();
            running.spawn(async move {
                let outcome = send(&mut client, &target, call).await;
                drop(slot);
                outcome
            });
            while let Some(ended) = running.try_join_next() {
                each.extend(ended.inspect(&mut progress));
            }
        }
        while let Some(ended) = running.join_next().await {
            each.extend(ended.inspect(&mut progress));
        }
        Outcomes { each, wall: started.elapsed().as_secs_f64() }
    }
}

/// Time to the next arrival of a Poisson process.
fn pause(rate: f64, random: &mut impl rand::Rng) -> Duration {
    let uniform: f64 = random.random();
    Duration::from_secs_f64(-(1.0 - uniform).ln() / rate)
}

async fn send(client: &mut InferenceServiceClient<Channel>, target: &Target, call: Call) -> Outcome {
    let started = Instant::now();
    let mut outcome = Outcome::default();
    if let Err(status) = ask(client, target, call, started, &mut outcome).await {
        outcome.error = Some(Error::from_status(&status));
    }
    outcome.total = started.elapsed().as_secs_f64();
    outcome
}

async fn ask(
    client: &mut InferenceServiceClient<Channel>,
    target: &Target,
    call: Call,
    started: Instant,
    outcome: &mut Outcome,
) -> Result<(), Status> {
    match call {
        Call::Generate(message) => {
            let answer = client.stream_generate(request(target, message)?).await?;
            follow(answer.into_inner(), started, outcome).await
        }
        Call::Chat(message) => {
            let answer = client.stream_chat(request(target, message)?).await?;
            follow(answer.into_inner(), started, outcome).await
        }
    }
}

fn request<T>(target: &Target, message: T) -> Result<Request<T>, Status> {
    target.request(message).map_err(|failure| Status::invalid_argument(failure.to_string()))
}

/// Reads a stream to its end, noting when tokens come.
async fn follow<T>(mut stream: Streaming<T>, started: Instant, outcome: &mut Outcome) -> Result<(), Status>
where
    Event: TryFrom<T>,
{
    let mut last = started;
    let mut finished = false;
    while let Some(message) = stream.message().await? {
        match Event::try_from(message) {
            Ok(Event::Chunk(chunk)) => last = outcome.note(chunk.token_ids.len(), started, last),
            Ok(Event::Finish(finish)) => {
                finished = true;
                outcome.prompt_tokens = finish.usage.map_or(0, |usage| usage.prompt_tokens);
            }
            Ok(Event::Start) | Err(_) => {}
        }
    }
    if finished { Ok(()) } else { Err(Status::internal("the stream ended without a finish")) }
}

// === impl Outcome ===

impl Outcome {
    /// Counts tokens that came now; returns when the last ones came.
    fn note(&mut self, tokens: usize, started: Instant, last: Instant) -> Instant {
        if tokens == 0 {
            return last;
        }
        let now = Instant::now();
        self.tokens = self.tokens.saturating_add(u32::try_from(tokens).unwrap_or(u32::MAX));
        if self.first_token.is_none() {
            self.first_token = Some((now - started).as_secs_f64());
        } else {
            let gap = (now - last).as_secs_f64() / tokens as f64;
            self.gaps.extend(std::iter::repeat_n(gap, tokens));
        }
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_keep_the_rate_on_average() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let total: f64 = (0..20_000).map(|_| pause(50.0, &mut random).as_secs_f64()).sum();
        assert!((total / 20_000.0 - 0.02).abs() < 0.001, "{total}");
    }
}

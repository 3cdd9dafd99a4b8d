//! The leader: rank 0's side of the group.
//!
//! [`LeaderGroup`] is for the engine's thread, [`GroupRpc`] answers the followers on the runtime, and a task turns the
//! failure detector. The three share the group's state under one std mutex: each only holds it for a state transition
//! that neither waits nor does IO, and the engine needs a condition variable to block on.

mod rpc;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lockstep_collectives::{AbortHandle, CollectiveError, DeviceStream, Member, Progress};
use lockstep_proto::{
    error::{Error, Reason},
    worker::v1::{JoinResponse, StepsResponse},
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::MissedTickBehavior,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::Status;

pub use self::rpc::GroupRpc;
use super::{
    Epoch, GroupConfig, GroupError, StopHandle,
    failure_detector::{FailureDetector, Suspicion},
    membership::{
        Action, Attestation, Beat, BreakReason, Join, Joiner, LEADER, Membership, Phase, Presence, Refusal, Ticket,
    },
    rendezvous::{Place, Rendezvous},
    wire,
};
use crate::scheduler::plan::{SeqId, StepPlan};

/// Rank 0's end of the group, for the engine's thread.
#[derive(Debug)]
pub struct LeaderGroup {
    config: GroupConfig,
    rendezvous: Rendezvous,
    shared: Arc<Shared>,
    _detector: Option<AbortOnDropHandle<()>>,
}

/// Tells which ranks are there, from any thread.
#[derive(Clone, Debug)]
pub struct Roster(Arc<Shared>);

/// What the engine, the followers' calls and the failure detector share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Notified whenever an epoch has begun, may run or has ended, and at the stop.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    membership: Membership,
    next_ticket: u64,
    /// Calls that wait for an answer.
    answers: HashMap<Ticket, oneshot::Sender<Answer>>,
    /// An epoch that has begun and whose ranks have had no answer.
    started: Option<Started>,
    /// The plan streams of the epoch that lives.
    streams: BTreeMap<usize, mpsc::Sender<Result<StepsResponse, Status>>>,
    /// Of the epoch that lives.
    abort: AbortHandle,
    /// Of this rank in the epoch that lives.
    progress: Progress,
    /// Cancelled once this rank itself was found to hang.
    hung: CancellationToken,
    stopped: bool,
}

type Answer = Result<JoinResponse, Error>;

#[derive(Debug)]
struct Started {
    epoch: u64,
    joiners: BTreeMap<usize, Joiner>,
}

/// How long the ranks of a new epoch have to ask for its plans: they do so as soon as they have their answer.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

// === impl LeaderGroup ===

impl LeaderGroup {
    /// The group that `config` describes, which must be valid, and what answers its followers. `attestation` is what
    /// all of them must be, too. `stream` is where this rank computes, if that is on a GPU.
    ///
    /// # Errors
    ///
    /// [`GroupError::Transport`] if the rank's address cannot be had.
    pub fn new(
        config: GroupConfig,
        attestation: Attestation,
        stream: Option<DeviceStream>,
        runtime: &Handle,
    ) -> Result<(Self, GroupRpc), GroupError> {
        let rendezvous = Rendezvous::new(&config, stream)?;
        let detector = FailureDetector::new(config.detector_limits());
        let membership = Membership::new(config.world_size, attestation, detector, ATTACH_TIMEOUT);
        let shared = Arc::new(Shared::new(membership));
        let task = (config.world_size > 1)
            .then(|| AbortOnDropHandle::new(runtime.spawn(detect(Arc::clone(&shared), config.heartbeat_interval()))));
        let rpc = GroupRpc::new(Arc::clone(&shared));
        Ok((Self { config, rendezvous, shared, _detector: task }, rpc))
    }

    /// Begins an epoch: blocks until all ranks have joined, met in the transport and asked for their plans. An epoch
    /// that still lives ends.
    ///
    /// # Errors
    ///
    /// [`GroupError::Missing`] after `join_timeout_ms`, [`GroupError::Ended`] if the epoch ended as it began; in both
    /// cases the leader may try again. [`GroupError::Transport`], [`GroupError::Stopped`].
    pub fn form(&mut self) -> Result<Epoch, GroupError> {
        let (abort, progress) = (AbortHandle::new(), Progress::new());
        let Started { epoch, joiners } = self.shared.begin(&abort, &progress, self.config.join_timeout())?;
        let member = Member {
            epoch,
            rank: LEADER,
            world_size: self.config.world_size,
            timeout: self.config.collective_timeout(),
            abort,
            progress,
        };
        let contacts = joiners.values().map(|joiner| joiner.contact.clone()).collect();
        let hosted = self.rendezvous.host(member, contacts).map_err(|error| {
            self.shared.answer(&joiners, &Err(epoch_ended(&error.to_string())));
            self.shared.give_up(epoch, error)
        })?;
        let deadline = Instant::now() + hosted.place().timeout();
        let Place { name, addresses, nccl_id } = hosted.place().clone();
        let answer =
            JoinResponse { epoch, collective_name: name, collective_addresses: addresses, nccl_unique_id: nccl_id };
        self.shared.answer(&joiners, &Ok(answer));
        let collective = hosted.meet(deadline).map_err(|error| self.shared.give_up(epoch, error))?;
        self.shared.await_running(epoch, deadline)?;
        tracing::info!(epoch, world_size = self.config.world_size, "the group has formed");
        Ok(Epoch { number: epoch, collective })
    }

    /// Sends a plan to all followers, with the request ids of the sequences that are new to them. Never blocks: a
    /// follower that has not taken [`PLAN_QUEUE`](super::PLAN_QUEUE) plans ends the epoch.
    ///
    /// # Errors
    ///
    /// [`GroupError::Ended`] if the epoch has; [`GroupError::Stopped`].
    pub fn send_plan(&mut self, plan: &StepPlan, requests: Vec<(SeqId, String)>) -> Result<(), GroupError> {
        let message =
            StepsResponse { plan: Some(wire::plan_to_proto(plan)), requests: wire::requests_to_proto(requests) };
        self.shared.broadcast(&message)
    }

    /// Why no epoch lives; `None` while one does.
    pub fn is_broken(&self) -> Option<GroupError> {
        self.shared.lock().ended().err()
    }

    /// The first rank that shuts down and waits for the epoch's end: the engine is to begin nothing new, and to call
    /// [`idle`](Self::idle) once nothing is left.
    pub fn leaving(&self) -> Option<usize> {
        self.shared.lock().membership.leaving()
    }

    /// Nothing runs: lets go of the ranks that shut down, which ends the epoch.
    pub fn idle(&mut self) {
        self.shared.update(|state| {
            let ended = state.membership.idle(Instant::now());
            state.apply(ended);
        });
    }

    /// Gives the epoch up, if one lives: the engine has failed, for the reason `cause`. Followers learn it at once.
    pub fn give_up(&mut self, cause: &str) {
        self.shared.update(|state| {
            let actions = state.membership.end(cause, Instant::now());
            state.apply(actions);
        });
    }

    /// Is cancelled when this rank's own engine is found to hang.
    pub fn hung(&self) -> CancellationToken {
        self.shared.lock().hung.clone()
    }

    /// Tells which ranks are there.
    pub fn roster(&self) -> Roster {
        Roster(Arc::clone(&self.shared))
    }

    /// Ends the leader's part in the group from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        let shared = Arc::clone(&self.shared);
        StopHandle::new(move || shared.stop())
    }
}

impl Drop for LeaderGroup {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

/// Turns the failure detector.
async fn detect(shared: Arc<Shared>, interval: Duration) {
    let mut turns = tokio::time::interval(interval);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        shared.update(|state| {
            let actions = state.membership.tick(state.progress.calls(), Instant::now());
            state.apply(actions);
        });
    }
}

// === impl Roster ===

impl Roster {
    /// Every rank, by number, as the leader sees it now.
    pub fn ranks(&self) -> Vec<Presence> {
        self.0.lock().membership.ranks(Instant::now())
    }
}

// === impl Shared ===

impl Shared {
    fn new(membership: Membership) -> Self {
        let state = State {
            membership,
            next_ticket: 0,
            answers: HashMap::new(),
            started: None,
            streams: BTreeMap::new(),
            abort: AbortHandle::new(),
            progress: Progress::new(),
            hung: CancellationToken::new(),
            stopped: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked in a transition has left a state that was valid between any two of its statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and tells the engine.
    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    /// Waits until all ranks have joined a new epoch, which `abort` will end and in which `progress` tells how far this
    /// rank is.
    fn begin(&self, abort: &AbortHandle, progress: &Progress, timeout: Duration) -> Result<Started, GroupError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        // Ends the epoch before, with its own abort handle.
        let ended = state.membership.end("the leader forms the group anew", Instant::now());
        state.apply(ended);
        state.abort = abort.clone();
        state.progress = progress.clone();
        let begun = state.membership.form(Instant::now());
        state.apply(begun);
        loop {
            if state.stopped {
                return Err(GroupError::Stopped);
            }
            if let Some(started) = state.started.take() {
                return Ok(started);
            }
            // It may have begun and ended while this thread was about to wake.
            state.not_broken()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.membership.withdraw_leader();
                return Err(GroupError::Missing { ranks: state.membership.missing(), waited_ms: timeout.as_millis() });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Answers the ranks of a new epoch.
    fn answer(&self, joiners: &BTreeMap<usize, Joiner>, answer: &Answer) {
        let mut state = self.lock();
        for joiner in joiners.values() {
            state.answer(joiner.ticket, answer.clone());
        }
    }

    /// Waits until all ranks have their plan streams, or the epoch has ended.
    fn await_running(&self, epoch: u64, deadline: Instant) -> Result<(), GroupError> {
        let mut state = self.lock();
        loop {
            state.ended()?;
            if state.membership.epoch() == epoch && *state.membership.phase() == Phase::Running {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let ended = state.membership.end("not all ranks have asked for the plans in time", Instant::now());
                state.apply(ended);
                continue;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn broadcast(&self, message: &StepsResponse) -> Result<(), GroupError> {
        self.update(|state| {
            state.ended()?;
            let epoch = state.membership.epoch();
            let failed = state
                .streams
                .iter()
                .find_map(|(&rank, stream)| stream.try_send(Ok(message.clone())).err().map(|error| (rank, error)));
            let ended = match failed {
                None => return Ok(()),
                Some((rank, mpsc::error::TrySendError::Full(_))) => {
                    state.membership.behind(rank, epoch, Instant::now())
                }
                Some((rank, mpsc::error::TrySendError::Closed(_))) => {
                    state.membership.lost(rank, epoch, Instant::now())
                }
            };
            state.apply(ended);
            state.ended()
        })
    }

    /// Ends `epoch` because the leader failed in it; returns why it ended, which may be something earlier.
    fn give_up(&self, epoch: u64, error: CollectiveError) -> GroupError {
        self.update(|state| {
            if state.membership.epoch() == epoch {
                let ended = state.membership.end(&error.to_string(), Instant::now());
                state.apply(ended);
            }
            state.ended().err().unwrap_or(GroupError::Transport(error))
        })
    }

    fn stop(&self) {
        self.update(|state| {
            state.stopped = true;
            let ended = state.membership.end("the leader shuts down", Instant::now());
            state.apply(ended);
            // Those who wait are told by the loss of their answer.
            state.answers.clear();
        });
    }

    /// A rank asks to join; the answer comes through the channel.
    fn join(&self, join: Join) -> (Ticket, oneshot::Receiver<Answer>) {
        let (sender, receiver) = oneshot::channel();
        self.update(|state| {
            let ticket = Ticket(state.next_ticket);
            state.next_ticket += 1;
            if !state.stopped {
                state.answers.insert(ticket, sender);
                let actions = state.membership.join(ticket, join, Instant::now());
                state.apply(actions);
            }
            (ticket, receiver)
        })
    }

    /// A rank has gone away while it waited.
    fn withdraw(&self, ticket: Ticket) {
        let mut state = self.lock();
        state.answers.remove(&ticket);
        state.membership.withdraw(ticket);
    }

    /// A rank asks for the plans of an epoch. `None`: the epoch does not live.
    fn attach(&self, rank: usize, epoch: u64) -> Option<mpsc::Receiver<Result<StepsResponse, Status>>> {
        let (sender, receiver) = mpsc::channel(super::PLAN_QUEUE);
        self.update(|state| {
            let actions = state.membership.attach(rank, epoch)?;
            state.streams.insert(rank, sender);
            state.apply(actions);
            Some(receiver)
        })
    }

    /// A rank's plan stream has ended.
    fn lost(&self, rank: usize, epoch: u64) {
        self.update(|state| {
            let ended = state.membership.lost(rank, epoch, Instant::now());
            state.apply(ended);
        });
    }

    fn heartbeat(&self, rank: usize, epoch: u64, beat: Beat) -> bool {
        self.lock().membership.heartbeat(rank, epoch, beat, Instant::now())
    }
}

// === impl State ===

impl State {
    /// Why no epoch lives.
    fn ended(&self) -> Result<(), GroupError> {
        self.not_broken()?;
        match self.membership.phase() {
            Phase::Forming { .. } => {
                Err(GroupError::Ended { epoch: self.membership.epoch(), reason: "the group is forming".to_owned() })
            }
            _ => Ok(()),
        }
    }

    /// Why the newest epoch has ended, if it has.
    fn not_broken(&self) -> Result<(), GroupError> {
        if self.stopped {
            return Err(GroupError::Stopped);
        }
        match self.membership.phase() {
            Phase::Broken { reason, .. } => {
                Err(GroupError::Ended { epoch: self.membership.epoch(), reason: reason.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// Does what the membership says.
    fn apply(&mut self, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            match action {
                Action::Start { epoch, joiners } => self.started = Some(Started { epoch, joiners }),
                Action::Refuse { ticket, refusal } => {
                    tracing::warn!(%refusal, "refused a rank");
                    let reason = match refusal {
                        Refusal::Differs { .. } => Reason::AttestationMismatch,
                        Refusal::NoSuchRank { .. } | Refusal::Superseded { .. } => Reason::InvalidArgument,
                    };
                    self.answer(ticket, Err(Error::new(reason, refusal.to_string())));
                }
                Action::Run { .. } => {}
                Action::Break { epoch, reason } => {
                    match &reason {
                        BreakReason::GivenUp { .. } if self.stopped => {
                            tracing::info!(epoch, %reason, "the epoch has ended");
                        }
                        _ => tracing::warn!(epoch, %reason, "the epoch has ended"),
                    }
                    if matches!(reason, BreakReason::Suspected(Suspicion { rank: LEADER, .. })) {
                        self.hung.cancel();
                    }
                    self.end(&reason.to_string());
                }
            }
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        if let Some(waiting) = self.answers.remove(&ticket) {
            // A rank that has gone away meanwhile needs no answer.
            let _gone = waiting.send(answer);
        }
    }

    /// Ends all that belongs to the epoch, telling the ranks why.
    fn end(&mut self, reason: &str) {
        self.abort.abort();
        for stream in std::mem::take(&mut self.streams).into_values() {
            // A full or closed stream ends without the reason.
            let _untold = stream.try_send(Err(epoch_ended(reason).into()));
        }
        let unanswered = self.started.take().map(|started| started.joiners).unwrap_or_default();
        for joiner in unanswered.into_values() {
            self.answer(joiner.ticket, Err(epoch_ended(reason)));
        }
    }
}

fn epoch_ended(reason: &str) -> Error {
    Error::new(Reason::EpochEnded, reason)
}

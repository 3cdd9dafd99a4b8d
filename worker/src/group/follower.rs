//! A follower: the side of the group that every rank but 0 has.
//!
//! [`FollowerGroup`] is for the engine's thread. While the rank is in an epoch, one task of the runtime takes its plans
//! and another says that it lives; when either finds that the epoch has ended, it aborts the collective, so that an
//! engine that waits there returns, and the next plan that the engine asks for is the reason.
//!
//! A rank that is to [leave](FollowerGroup::leave_handle) tells the leader at once and follows until the epoch ends; it
//! joins no further one.

use std::{
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use lockstep_collectives::{AbortHandle, DeviceStream, Member, Progress};
use lockstep_proto::{
    client::{self, ClientLimits},
    error::{Error, Reason},
    worker::v1::{
        HeartbeatRequest, JoinResponse, SequenceRequest, StepsRequest, StepsResponse,
        group_service_client::GroupServiceClient,
    },
};
use tokio::{runtime::Handle, sync::mpsc, time::MissedTickBehavior};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Status, Streaming, transport::Channel};

use super::{
    Epoch, GroupConfig, GroupError, PLAN_QUEUE, StopHandle,
    failure_detector::FailureDetector,
    membership::{Attestation, Join, LEADER},
    rendezvous::{Place, Rendezvous},
    wire::{self, WireError},
};
use crate::scheduler::plan::StepPlan;

/// A follower's end of the group, for the engine's thread.
#[derive(Debug)]
pub struct FollowerGroup {
    config: GroupConfig,
    leader: String,
    attestation: Attestation,
    rendezvous: Rendezvous,
    client: GroupServiceClient<Channel>,
    runtime: Handle,
    /// Ends the rank's part at once.
    stop: CancellationToken,
    /// Ends it with the epoch; a child of `stop`.
    leave: CancellationToken,
    /// Cancelled once the engine was found to hang.
    hung: CancellationToken,
    enrolled: Option<Enrolled>,
    /// When the newest epoch began.
    began: Option<Instant>,
}

/// The rank's part in one epoch. Dropping it leaves the epoch, upon which the leader ends it.
#[derive(Debug)]
struct Enrolled {
    epoch: u64,
    plans: mpsc::Receiver<StepPlan>,
    end: Arc<End>,
    _task: AbortOnDropHandle<()>,
}

/// The end of an epoch, declared once.
#[derive(Debug)]
struct End {
    reason: OnceLock<String>,
    abort: AbortHandle,
    /// To be cancelled if the engine does not leave the epoch then.
    hung: CancellationToken,
}

/// What says that the rank lives in an epoch.
struct Heart {
    client: GroupServiceClient<Channel>,
    config: GroupConfig,
    epoch: u64,
    progress: Progress,
    leave: CancellationToken,
}

/// Why an attempt to join failed.
enum Attempt {
    /// It is pointless to try again.
    Refused(String),
    Failed(String),
}

/// First and longest pause between two attempts to join; each is twice the one before.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How long the leader has to begin the plan stream.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

// === impl FollowerGroup ===

impl FollowerGroup {
    /// The group that `config` describes, which must be valid and have a leader. `attestation` is compared with the
    /// leader's. `stream` is where this rank computes, if that is on a GPU.
    ///
    /// # Errors
    ///
    /// [`GroupError::NotJoined`] if the leader's address is none, [`GroupError::Transport`] if this rank's cannot be
    /// had.
    pub fn new(
        config: GroupConfig,
        attestation: Attestation,
        stream: Option<DeviceStream>,
        limits: &ClientLimits,
        runtime: &Handle,
    ) -> Result<Self, GroupError> {
        let leader = config.leader.clone().unwrap_or_default();
        let _context = runtime.enter();
        let channel = client::connect_lazy(&leader, limits)
            .map_err(|error| GroupError::NotJoined { leader: leader.clone(), reason: error.to_string() })?;
        let stop = CancellationToken::new();
        Ok(Self {
            rendezvous: Rendezvous::new(&config, stream)?,
            client: GroupServiceClient::new(channel).max_decoding_message_size(limits.max_message_bytes()),
            config,
            leader,
            attestation,
            runtime: runtime.clone(),
            leave: stop.child_token(),
            stop,
            hung: CancellationToken::new(),
            enrolled: None,
            began: None,
        })
    }

    /// Leaves the epoch before, if there is one, and joins the next: blocks until all ranks have joined and met.
    ///
    /// # Errors
    ///
    /// [`GroupError::Refused`]; [`GroupError::NotJoined`] if the group has not formed within `join_timeout_ms`;
    /// [`GroupError::Ended`] if the epoch ended as it began. After the latter two the rank may try again.
    /// [`GroupError::Stopped`], also if the rank is to leave.
    ///
    /// # Panics
    ///
    /// When called on a thread of the runtime.
    pub fn join(&mut self) -> Result<Epoch, GroupError> {
        self.enrolled = None;
        // An epoch that ended as it began may do so again: the ranks must not spin through the numbers.
        if self.began.is_some_and(|began| began.elapsed() < BACKOFF.1) {
            self.runtime.block_on(self.pause(BACKOFF.1))?;
        }
        let (answer, stream) = self.runtime.block_on(self.enroll())?;
        self.began = Some(Instant::now());
        let JoinResponse { epoch, collective_name: name, collective_addresses: addresses, nccl_unique_id: nccl_id } =
            answer;
        let member = Member {
            epoch,
            rank: self.config.rank,
            world_size: self.config.world_size,
            timeout: self.config.collective_timeout(),
            abort: AbortHandle::new(),
            progress: Progress::new(),
        };
        let enrolled = self.enrolled.insert(Enrolled::spawn(
            &self.runtime,
            stream,
            Heart {
                client: self.client.clone(),
                config: self.config.clone(),
                epoch,
                progress: member.progress.clone(),
                leave: self.leave.clone(),
            },
            End { reason: OnceLock::new(), abort: member.abort.clone(), hung: self.hung.clone() },
            self.stop.clone(),
        ));
        let place = Place { name, addresses, nccl_id };
        match self.rendezvous.meet(member, &place, Instant::now() + place.timeout()) {
            Ok(collective) => {
                tracing::info!(epoch, rank = self.config.rank, "joined the group");
                Ok(Epoch { number: epoch, collective })
            }
            Err(error) => {
                enrolled.end.declare(error.to_string());
                Err(self.ended())
            }
        }
    }

    /// The next plan; blocks until it has come.
    ///
    /// # Errors
    ///
    /// [`GroupError::Ended`] once the epoch has ended, or before the first; [`GroupError::Stopped`].
    ///
    /// # Panics
    ///
    /// When called on a thread of the runtime.
    pub fn next_plan(&mut self) -> Result<StepPlan, GroupError> {
        let plan = self.enrolled.as_mut().and_then(|enrolled| enrolled.plans.blocking_recv());
        // Plans that were still queued when the epoch ended will never be carried out by all.
        plan.filter(|_| self.is_alive()).ok_or_else(|| self.ended())
    }

    /// As [`FollowerGroup::next_plan`]; `None` if there is none within `patience`.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn next_plan_within(&mut self, patience: Duration) -> Result<Option<StepPlan>, GroupError> {
        let Some(enrolled) = &mut self.enrolled else { return Err(self.ended()) };
        match self.runtime.block_on(async { tokio::time::timeout(patience, enrolled.plans.recv()).await }) {
            Err(_) => Ok(None),
            Ok(plan) => plan.filter(|_| self.is_alive()).map(Some).ok_or_else(|| self.ended()),
        }
    }

    /// Why no epoch lives; `None` while one does.
    pub fn is_broken(&self) -> Option<GroupError> {
        (!self.is_alive()).then(|| self.ended())
    }

    /// Is cancelled when this rank's engine is found to hang: it has not left an epoch `collective_timeout_ms` after its
    /// end.
    pub fn hung(&self) -> CancellationToken {
        self.hung.clone()
    }

    /// Ends this rank's part in the group from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        let stop = self.stop.clone();
        StopHandle::new(move || stop.cancel())
    }

    /// Ends this rank's part with the epoch, from another thread: the leader is told at once, and ends the epoch when
    /// nothing runs any more.
    pub fn leave_handle(&self) -> StopHandle {
        let leave = self.leave.clone();
        StopHandle::new(move || leave.cancel())
    }

    fn is_alive(&self) -> bool {
        self.enrolled.as_ref().is_some_and(|enrolled| enrolled.end.reason.get().is_none())
    }

    fn ended(&self) -> GroupError {
        if self.leave.is_cancelled() {
            return GroupError::Stopped;
        }
        let end = |enrolled: &Enrolled| (enrolled.epoch, enrolled.end.reason.get().cloned());
        let (epoch, reason) = self.enrolled.as_ref().map_or((0, None), end);
        GroupError::Ended { epoch, reason: reason.unwrap_or_else(|| "this rank is in no epoch".to_owned()) }
    }

    /// Asks the leader until it answers, and asks for the plans of the epoch then.
    async fn enroll(&self) -> Result<(JoinResponse, Streaming<StepsResponse>), GroupError> {
        let deadline = Instant::now() + self.config.join_timeout();
        let mut pause = BACKOFF.0;
        loop {
            let attempt = self.leave.run_until_cancelled(self.attempt(deadline)).await.ok_or(GroupError::Stopped)?;
            let reason = match attempt {
                Ok(enrolled) => return Ok(enrolled),
                Err(Attempt::Refused(reason)) => return Err(GroupError::Refused { reason }),
                Err(Attempt::Failed(reason)) => reason,
            };
            if Instant::now() >= deadline {
                return Err(GroupError::NotJoined { leader: self.leader.clone(), reason });
            }
            tracing::debug!(%reason, "not joined yet");
            self.pause(pause).await?;
            pause = BACKOFF.1.min(pause * 2);
        }
    }

    /// Waits for between half of `limit` and all of it, so that ranks that lost their leader together don't come back
    /// together.
    async fn pause(&self, limit: Duration) -> Result<(), GroupError> {
        let random = RandomState::new().hash_one(Instant::now()) as u32;
        let pause = limit.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX));
        self.leave.run_until_cancelled(tokio::time::sleep(pause)).await.ok_or(GroupError::Stopped)
    }

    /// One attempt to join.
    async fn attempt(&self, deadline: Instant) -> Result<(JoinResponse, Streaming<StepsResponse>), Attempt> {
        let join = wire::join_to_proto(&Join {
            rank: self.config.rank,
            attestation: self.attestation.clone(),
            contact: self.rendezvous.contact(),
        });
        let mut client = self.client.clone();
        let left = deadline.saturating_duration_since(Instant::now());
        let answer = client.join(client::with_deadline(join, left)).await?.into_inner();
        let steps = client.steps(StepsRequest { rank: self.config.rank as u32, epoch: answer.epoch });
        let stream = tokio::time::timeout(ATTACH_TIMEOUT, steps).await;
        let stream = stream.map_err(|_late| Attempt::Failed("the leader does not begin the plans".to_owned()))??;
        Ok((answer, stream.into_inner()))
    }
}

// === impl Attempt ===

impl From<Status> for Attempt {
    fn from(status: Status) -> Self {
        let error = Error::from_status(&status);
        match error.reason() {
            Reason::AttestationMismatch | Reason::InvalidArgument => Self::Refused(error.message().to_owned()),
            _ => Self::Failed(error.message().to_owned()),
        }
    }
}

// === impl Enrolled ===

impl Enrolled {
    /// Begins to take plans and to send heartbeats.
    fn spawn(
        runtime: &Handle,
        stream: Streaming<StepsResponse>,
        heart: Heart,
        end: End,
        stop: CancellationToken,
    ) -> Self {
        let (sender, plans) = mpsc::channel(PLAN_QUEUE);
        let end = Arc::new(end);
        let (epoch, patience) = (heart.epoch, heart.config.collective_timeout());
        let leave = heart.leave.clone();
        let declared = Arc::clone(&end);
        let task = runtime.spawn(async move {
            let reason = tokio::select! {
                reason = take_plans(stream, &sender) => reason,
                reason = heart.beat() => reason,
                () = stop.cancelled() => "this rank shuts down".to_owned(),
            };
            // A rank that is told to end outlives no epoch, however that ends.
            match leave.is_cancelled() {
                true => tracing::info!(epoch, %reason, "the epoch has ended"),
                false => tracing::warn!(epoch, %reason, "the epoch has ended"),
            }
            // Before the queue ends with its sender, so that who finds it ended finds the reason.
            declared.declare(reason);
            drop(sender);
            // An engine that is alive leaves long before, and ends this task with that.
            tokio::time::sleep(patience).await;
            declared.hung.cancel();
        });
        Self { epoch, plans, end, _task: AbortOnDropHandle::new(task) }
    }
}

/// Hands an epoch's plans to the engine until there are no more, and returns why.
async fn take_plans(mut stream: Streaming<StepsResponse>, plans: &mpsc::Sender<StepPlan>) -> String {
    for step_id in 0.. {
        let message = match stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(status) => return why_ended(&status),
        };
        let StepsResponse { plan, requests } = message;
        let plan = plan.ok_or(WireError::Missing { what: "plan" }).and_then(wire::plan_from_proto);
        let plan = match plan.and_then(|plan| wire::check_requests(&requests).map(|()| plan)) {
            Ok(plan) if plan.step_id == step_id => plan,
            Ok(plan) => return format!("the leader sent step {} where step {step_id} was due", plan.step_id),
            Err(error) => return format!("the leader sent a broken plan: {error}"),
        };
        for SequenceRequest { sequence_id, request_id } in requests {
            tracing::debug!(request_id, sequence_id, step_id, "computes its shard of a request");
        }
        if plans.send(plan).await.is_err() {
            return "this rank's engine has left it".to_owned();
        }
    }
    "the leader has closed the plans".to_owned()
}

fn why_ended(status: &Status) -> String {
    let error = Error::from_status(status);
    match error.reason() {
        Reason::EpochEnded => error.message().to_owned(),
        _ => format!("the connection to the leader has ended: {}", error.message()),
    }
}

// === impl Heart ===

impl Heart {
    /// Says that the rank lives until the leader says, or its silence does, that the epoch does not; returns which.
    async fn beat(&self) -> String {
        let interval = self.config.heartbeat_interval();
        let detector = FailureDetector::new(self.config.detector_limits());
        // Shared by the two below, which run by turns; never held across an await.
        let detector = Mutex::new(detector);
        lock(&detector).watch(LEADER, Instant::now());
        tokio::select! {
            () = self.send(&detector) => "the leader has ended it".to_owned(),
            silence = listen(&detector, interval) => format!("the leader is silent for {} ms", silence.as_millis()),
        }
    }

    /// Sends heartbeats until one is answered by the epoch's end.
    async fn send(&self, detector: &Mutex<FailureDetector>) {
        let mut client = self.client.clone();
        let mut turns = turns(self.config.heartbeat_interval());
        let mut leaving = false;
        loop {
            tokio::select! {
                _ = turns.tick() => {}
                () = self.leave.cancelled(), if !leaving => leaving = true,
            }
            let beat = HeartbeatRequest {
                rank: self.config.rank as u32,
                epoch: self.epoch,
                progress: self.progress.calls(),
                leaving,
            };
            // One that fails is a silence, which the detector judges.
            let Ok(answer) = client.heartbeat(client::with_deadline(beat, self.config.suspect_after())).await else {
                continue;
            };
            if !answer.into_inner().epoch_alive {
                // The plan stream ends, too, and says why: it goes first.
                turns.tick().await;
                return;
            }
            // How far the leader is, it judges itself: it lives, or it would not answer.
            lock(detector).heard(LEADER, 0, Instant::now());
        }
    }
}

/// Turns the detector until it suspects the leader, and returns for how long that has been silent.
async fn listen(detector: &Mutex<FailureDetector>, interval: Duration) -> Duration {
    let mut turns = turns(interval);
    loop {
        turns.tick().await;
        if let Some(suspicion) = lock(detector).tick(Instant::now()) {
            return suspicion.lasted;
        }
    }
}

fn lock(detector: &Mutex<FailureDetector>) -> MutexGuard<'_, FailureDetector> {
    detector.lock().unwrap_or_else(PoisonError::into_inner)
}

fn turns(interval: Duration) -> tokio::time::Interval {
    let mut turns = tokio::time::interval(interval);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    turns
}

// === impl End ===

impl End {
    fn declare(&self, reason: String) {
        // The first reason stays: what follows are its consequences.
        let _later = self.reason.set(reason);
        self.abort.abort();
    }
}

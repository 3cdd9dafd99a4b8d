//! The groups: the router with a client for each group, shared by all requests.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use lockstep_proto::{
    client::ClientLimits,
    worker::v1::{Status, worker_service_client::WorkerServiceClient},
};
use tokio::sync::watch;
use tonic::transport::Channel;

use crate::router::{
    Ask, GroupId, GroupState, Lease, NoGroup, Outcome, Router, RouterSettings, ServedModel,
    affinity::{Prefix, PrefixHasher},
};

/// Every group that is configured.
#[derive(Debug)]
pub struct Groups {
    endpoints: Vec<Endpoint>,
    /// Locked for a decision or a report at a time, never across an await: both are short and neither does IO.
    router: Mutex<Router>,
    hasher: PrefixHasher,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Endpoint {
    address: String,
    client: WorkerServiceClient<Channel>,
}

/// A request's place in a group. Dropping it gives the place back, and tells the router what the request learned.
#[derive(Debug)]
pub struct Placement {
    groups: Arc<Groups>,
    lease: Option<Lease>,
    group: GroupId,
    outcome: Outcome,
}

/// A group as it is now.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The leader's address.
    pub address: String,
    /// What it is to this gateway.
    pub state: GroupState,
    /// The name of its breaker's state.
    pub breaker: &'static str,
    /// Tokens that this gateway has given it and that have not ended.
    pub own_tokens: u64,
    /// Its last report, also of one that is lost.
    pub status: Option<Status>,
}

// === impl Groups ===

impl Groups {
    /// Groups by address and channel to their leaders.
    pub fn new(settings: RouterSettings, leaders: Vec<(String, Channel)>, limits: &ClientLimits) -> Self {
        let router = Mutex::new(Router::new(settings, leaders.len()));
        let endpoints = leaders
            .into_iter()
            .map(|(address, channel)| {
                let client = WorkerServiceClient::new(channel);
                Endpoint { address, client: client.max_decoding_message_size(limits.max_message_bytes()) }
            })
            .collect();
        Self { endpoints, router, hasher: PrefixHasher::default(), changed: watch::Sender::new(()) }
    }

    /// What affinity knows a prompt by.
    pub fn prefix(&self, model: &str, ids: &[u32]) -> Prefix {
        self.hasher.prefix(model, ids)
    }

    /// Chooses a group; see [`Router::choose`].
    ///
    /// # Errors
    /// When no group can take the request.
    pub fn choose(self: &Arc<Self>, ask: &Ask<'_>, now: Instant) -> Result<Placement, NoGroup> {
        let lease = self.router().choose(ask, now)?;
        let group = lease.group();
        Ok(Placement { groups: Arc::clone(self), lease: Some(lease), group, outcome: Outcome::Unknown })
    }

    /// Takes note of a new request.
    pub fn arrived(&self) {
        self.router().arrived();
    }

    /// Whether the retry budget grants another attempt.
    pub fn may_retry(&self) -> bool {
        self.router().may_retry()
    }

    /// Every group with its address.
    pub fn iter(&self) -> impl Iterator<Item = (GroupId, &str)> {
        self.router().groups().zip(self.endpoints.iter().map(|endpoint| endpoint.address.as_str()))
    }

    /// Every group as it is now.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        let router = self.router();
        let snapshot = |(group, endpoint): (GroupId, &Endpoint)| Snapshot {
            address: endpoint.address.clone(),
            state: router.state(group),
            breaker: router.breaker(group).name(),
            own_tokens: router.own_tokens(group),
            status: router.status(group).cloned(),
        };
        router.groups().zip(&self.endpoints).map(snapshot).collect()
    }

    /// The leader's client.
    pub fn client(&self, group: GroupId) -> WorkerServiceClient<Channel> {
        self.endpoints[group.index()].client.clone()
    }

    /// The leader's address.
    pub fn address(&self, group: GroupId) -> &str {
        &self.endpoints[group.index()].address
    }

    /// Every model that some group has reported, by name.
    pub fn models(&self) -> BTreeMap<String, ServedModel> {
        self.router().models()
    }

    /// Tokens that this gateway has given the group and that have not ended.
    pub fn own_tokens(&self, group: GroupId) -> u64 {
        self.router().own_tokens(group)
    }

    /// Whether the group can take work.
    pub fn ready(&self, group: GroupId) -> bool {
        self.router().ready(group)
    }

    /// Resolves whenever a group reports or is lost.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(crate) fn report(&self, group: GroupId, status: Status) {
        self.router().report(group, status);
        self.changed.send_replace(());
    }

    pub(crate) fn lost(&self, group: GroupId) {
        self.router().lost(group);
        self.changed.send_replace(());
    }

    fn router(&self) -> MutexGuard<'_, Router> {
        // A panic while it was locked is a bug that its request reports; the router itself is whole between calls.
        self.router.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Placement ===

impl Placement {
    /// The group.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// The leader's address.
    pub fn address(&self) -> &str {
        self.groups.address(self.group)
    }

    /// The leader's client.
    pub fn client(&self) -> WorkerServiceClient<Channel> {
        self.groups.client(self.group)
    }

    /// The digest of the model's weights and settings, and the worker's version, as the group reported them last.
    pub fn identity(&self) -> (String, String) {
        let router = self.groups.router();
        let status = router.status(self.group);
        status.map(|status| (status.model_digest.clone(), status.engine_version.clone())).unwrap_or_default()
    }

    /// The group has given tokens, or refused in good order.
    pub fn worked(&mut self) {
        self.outcome = Outcome::Worked;
        if let Some(lease) = &self.lease {
            self.groups.router().worked(lease);
        }
    }

    /// The group has broken the request.
    pub fn failed(&mut self) {
        self.outcome = Outcome::Failed;
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            self.groups.router().end(lease, self.outcome, Instant::now());
        }
    }
}

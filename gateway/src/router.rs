//! The router: decides which group takes a request. A pure state machine: it is told what groups report and how
//! requests end, takes the time as an argument, and does no IO.
//!
//! A group can take a request if its last report says that it is ready, not draining and serves the model, if the
//! stream of its reports is alive, and if its [`breaker`] lets the request pass. Of these the one with the least
//! [`load`] takes it, unless the one that served the same beginning before ([`affinity`]) has at most
//! `affinity_slack_tokens` more. Waiting in line is the groups' own business: there is no queue here. A group that
//! refuses, or fails before its first token, may be left out when the request asks again; failures are retried only
//! as far as the [`retry_budget`] goes.

use std::{collections::BTreeMap, time::Instant};

use lockstep_proto::worker::v1::Status;

pub mod affinity;
pub mod breaker;
pub mod discovery;
pub mod load;
pub mod retry_budget;

use affinity::{Affinity, Prefix};
use breaker::{Breaker, BreakerSettings, Pass};
use load::{Load, Share};
use retry_budget::RetryBudget;

/// Names a group: its place in the configured list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(usize);

/// How the router decides.
#[derive(Debug, Clone, Copy)]
pub struct RouterSettings {
    /// How much more a group may have to do than the least loaded one and still be preferred for its cache. Unit: tokens.
    pub affinity_slack_tokens: u64,
    /// When groups that fail are left alone.
    pub breaker: BreakerSettings,
}

/// What a request asks of the router.
#[derive(Debug)]
pub struct Ask<'a> {
    /// The model's name.
    pub model: &'a str,
    /// The beginnings of its prompt.
    pub prefix: &'a Prefix,
    /// Tokens to compute at most: prompt and output of every choice.
    pub cost: u64,
    /// Groups that have refused or failed it.
    pub tried: &'a [GroupId],
}

/// Why no group takes a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoGroup {
    /// Some group serves the model, but none can take work now.
    #[error("no group is ready to serve the model")]
    NoneReady,
    /// No group has ever reported the model.
    #[error("no group serves the model")]
    UnknownModel,
}

/// A request's place in a group; must be ended.
#[derive(Debug)]
#[must_use = "a lease that is not ended stays in the group's load"]
pub struct Lease {
    group: GroupId,
    pass: Pass,
    share: Share,
}

/// How a request ended, as a fact about its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The group worked: it gave tokens, or refused in good order.
    Worked,
    /// The group broke the request.
    Failed,
    /// The request ended before either could be known.
    Unknown,
}

/// A model, as the groups that serve it describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedModel {
    /// SHA-256 of its weights and settings, in hexadecimal.
    pub digest: String,
    /// Longest prompt and output together that every group takes. Unit: tokens.
    pub context_length: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Values of an embedding.
    pub embedding_size: u32,
    /// Groups that can take work now.
    pub ready_replicas: u32,
    /// Groups that serve it when they are well.
    pub replicas: u32,
}

/// What a group is to this gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    /// It has never reported.
    Unknown,
    /// Its reports come, and it is not ready: it forms, or warms up.
    Forming,
    /// It can take work.
    Ready,
    /// It takes no further work.
    Draining,
    /// Its reports have stopped.
    Lost,
}

/// All that the gateway knows of its groups.
#[derive(Debug)]
pub struct Router {
    settings: RouterSettings,
    groups: Vec<Group>,
    affinity: Affinity,
    budget: RetryBudget,
    choices: u64,
}

#[derive(Debug)]
struct Group {
    /// The last report, kept when the group is lost: it still says what the group serves.
    status: Option<Status>,
    /// Whether its reports come.
    watched: bool,
    breaker: Breaker,
    load: Load,
    last_chosen: u64,
}

// === impl GroupId ===

impl GroupId {
    /// Its place in the configured list.
    pub fn index(self) -> usize {
        self.0
    }
}

// === impl Lease ===

impl Lease {
    /// The group that takes the request.
    pub fn group(&self) -> GroupId {
        self.group
    }
}

// === impl Group ===

impl Group {
    fn new(breaker: BreakerSettings) -> Self {
        Self { status: None, watched: false, breaker: Breaker::new(breaker), load: Load::default(), last_chosen: 0 }
    }

    fn serves(&self, model: &str) -> bool {
        self.status.as_ref().is_some_and(|status| status.model == model)
    }

    fn state(&self) -> GroupState {
        match &self.status {
            None => GroupState::Unknown,
            Some(_) if !self.watched => GroupState::Lost,
            Some(status) if status.draining => GroupState::Draining,
            Some(status) if status.ready => GroupState::Ready,
            Some(_) => GroupState::Forming,
        }
    }

    fn ready(&self) -> bool {
        self.state() == GroupState::Ready
    }

    fn epoch(&self) -> u64 {
        self.status.as_ref().map_or(0, |status| status.epoch)
    }
}

// === impl Router ===

impl Router {
    /// A router over `n_groups` groups, of which nothing is known yet.
    pub fn new(settings: RouterSettings, n_groups: usize) -> Self {
        let groups = (0..n_groups).map(|_| Group::new(settings.breaker)).collect();
        Self { settings, groups, affinity: Affinity::new(), budget: RetryBudget::new(), choices: 0 }
    }

    /// Every group.
    pub fn groups(&self) -> impl Iterator<Item = GroupId> + use<> {
        (0..self.groups.len()).map(GroupId)
    }

    /// A group reports.
    pub fn report(&mut self, group: GroupId, status: Status) {
        let group = &mut self.groups[group.0];
        group.load.report(status.outstanding_tokens);
        group.status = Some(status);
        group.watched = true;
    }

    /// A group's reports have stopped.
    pub fn lost(&mut self, group: GroupId) {
        self.groups[group.0].watched = false;
    }

    /// The group's last report, also of one that is lost.
    pub fn status(&self, group: GroupId) -> Option<&Status> {
        self.groups[group.0].status.as_ref()
    }

    /// Tokens of this gateway's own requests that the group has not finished.
    pub fn own_tokens(&self, group: GroupId) -> u64 {
        self.groups[group.0].load.own_tokens()
    }

    /// Whether the group says that it can take work, and its reports come.
    pub fn ready(&self, group: GroupId) -> bool {
        self.groups[group.0].ready()
    }

    /// What the group is to this gateway.
    pub fn state(&self, group: GroupId) -> GroupState {
        self.groups[group.0].state()
    }

    /// Whether the group is left alone after failures.
    pub fn breaker(&self, group: GroupId) -> &Breaker {
        &self.groups[group.0].breaker
    }

    /// Takes note of a new request, which earns a part of a retry.
    pub fn arrived(&mut self) {
        self.budget.earn();
    }

    /// Whether a request that a group failed may try another one.
    pub fn may_retry(&mut self) -> bool {
        self.budget.spend()
    }

    /// Chooses the group that takes a request.
    ///
    /// # Errors
    /// When no group can: see [`NoGroup`].
    pub fn choose(&mut self, ask: &Ask<'_>, now: Instant) -> Result<Lease, NoGroup> {
        let least = self.least_loaded(ask, now).ok_or_else(|| self.refusal(ask.model))?;
        let bound = self.load(least).saturating_add(self.settings.affinity_slack_tokens);
        let group = self
            .affinity
            .find(ask.prefix, |group| self.groups[group.0].epoch())
            .filter(|&group| self.takes(group, ask, now) && self.load(group) <= bound)
            .unwrap_or(least);
        self.choices += 1;
        let chosen = &mut self.groups[group.0];
        let pass = chosen.breaker.enter(now).ok_or(NoGroup::NoneReady)?;
        chosen.last_chosen = self.choices;
        self.affinity.record(ask.prefix, group, chosen.epoch());
        Ok(Lease { group, pass, share: chosen.load.take(ask.cost) })
    }

    /// The group of a lease has begun to work: the breaker need not wait for the end.
    pub fn worked(&mut self, lease: &Lease) {
        self.groups[lease.group.0].breaker.success(lease.pass);
    }

    /// A request has ended.
    pub fn end(&mut self, lease: Lease, outcome: Outcome, now: Instant) {
        let group = &mut self.groups[lease.group.0];
        group.load.give_back(lease.share);
        match outcome {
            Outcome::Worked => group.breaker.success(lease.pass),
            Outcome::Failed => group.breaker.failure(lease.pass, now),
            Outcome::Unknown => group.breaker.unknown(lease.pass, now),
        }
    }

    /// Every model that some group has reported, by name.
    pub fn models(&self) -> BTreeMap<String, ServedModel> {
        let mut models: BTreeMap<String, ServedModel> = BTreeMap::new();
        for group in &self.groups {
            let Some(status) = &group.status else { continue };
            let seen = models.entry(status.model.clone()).or_insert_with(|| ServedModel {
                digest: status.model_digest.clone(),
                context_length: status.context_length,
                vocab_size: status.vocab_size,
                embedding_size: status.embedding_size,
                ready_replicas: 0,
                replicas: 0,
            });
            seen.context_length = seen.context_length.min(status.context_length);
            seen.vocab_size = seen.vocab_size.min(status.vocab_size);
            seen.embedding_size = seen.embedding_size.min(status.embedding_size);
            seen.replicas += 1;
            seen.ready_replicas += u32::from(group.ready());
        }
        models
    }

    /// Of equals the one that was chosen least recently, so that idle groups take turns.
    fn least_loaded(&self, ask: &Ask<'_>, now: Instant) -> Option<GroupId> {
        self.groups()
            .filter(|&group| self.takes(group, ask, now))
            .min_by_key(|&group| (self.load(group), self.groups[group.0].last_chosen))
    }

    fn takes(&self, id: GroupId, ask: &Ask<'_>, now: Instant) -> bool {
        let group = &self.groups[id.0];
        group.ready() && group.serves(ask.model) && group.breaker.check(now).is_some() && !ask.tried.contains(&id)
    }

    fn load(&self, group: GroupId) -> u64 {
        self.groups[group.0].load.tokens()
    }

    fn refusal(&self, model: &str) -> NoGroup {
        let known = self.groups.iter().any(|group| group.serves(model));
        if known { NoGroup::NoneReady } else { NoGroup::UnknownModel }
    }
}

#[cfg(test)]
mod tests;

//! The backends: the services behind the gateway, with the tasks that keep what is known of them fresh.

use std::{sync::Arc, time::Duration};

use lockstep_proto::{
    client::{AddressError, ClientLimits, connect_lazy},
    server::Readiness,
};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::{config::GatewaySettings, groups::Groups, router::discovery, tokenizer::Tokenizers};

/// Everything that a request needs from other services.
#[derive(Debug)]
pub struct Backends {
    /// The worker groups.
    pub groups: Arc<Groups>,
    /// The tokenizer service.
    pub tokenizers: Arc<Tokenizers>,
    /// How long a client may leave an event unread.
    pub patience: Duration,
    /// Silence after which a group counts as lost.
    status_timeout: Duration,
}

// === impl Backends ===

impl Backends {
    /// Clients for every address; none is connected yet. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// Names the address that is none.
    pub fn new(settings: &GatewaySettings) -> Result<Self, AddressError> {
        let limits = settings.limits.client();
        let groups = Groups::new(settings.router.settings(), channels(&settings.groups, &limits)?, &limits);
        let timeout = Duration::from_millis(settings.tokenizer_timeout_ms);
        let tokenizers = Tokenizers::new(channels(&settings.tokenizers, &limits)?, timeout);
        Ok(Self {
            groups: Arc::new(groups),
            tokenizers: Arc::new(tokenizers),
            patience: settings.requests.patience(),
            status_timeout: settings.router.status_timeout(),
        })
    }

    /// Starts the tasks that watch groups and tokenizers and keep `readiness` true to them. They end with the set.
    pub fn watch(self: &Arc<Self>, readiness: Readiness, models: Vec<String>) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        let ids: Vec<_> = self.groups.iter().map(|(id, _)| id).collect();
        for group in ids {
            tasks.spawn(discovery::watch(Arc::clone(&self.groups), group, self.status_timeout));
        }
        for n_th in 0..self.tokenizers.n_instances() {
            tasks.spawn(Arc::clone(&self.tokenizers).probe(n_th, Arc::clone(&self.groups)));
        }
        tasks.spawn(Arc::clone(self).keep_ready(readiness, models));
        tasks
    }

    /// The gateway is ready when one of its models has a group that is ready and a tokenizer that answers.
    async fn keep_ready(self: Arc<Self>, readiness: Readiness, models: Vec<String>) {
        let (mut groups, mut tokenizers) = (self.groups.changes(), self.tokenizers.changes());
        loop {
            let served = self.groups.models();
            let wanted = served.iter().filter(|(name, _)| models.is_empty() || models.contains(name));
            let mut able = wanted.filter(|(name, model)| model.ready_replicas > 0 && self.tokenizers.ready(name));
            readiness.set_ready(able.next().is_some());
            // The senders live as long as `self`, so that neither wait can fail.
            tokio::select! {
                _ = groups.changed() => {}
                _ = tokenizers.changed() => {}
            }
        }
    }
}

fn channels(addresses: &[String], limits: &ClientLimits) -> Result<Vec<(String, Channel)>, AddressError> {
    addresses.iter().map(|address| Ok((address.clone(), connect_lazy(address, limits)?))).collect()
}

//! A probe: one task per instance that keeps what the gateway knows of it fresh.
//!
//! It asks for every model that the groups report: at once when a model is new or a call to the instance failed, and
//! otherwise now and then, so that an instance that was upgraded is noticed although no call failed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::trace::Trace;
use tokio::{sync::watch, time::sleep};

use super::{Caller, Instance, Tokenizers, does_not_answer, lock};
use crate::{backoff::Backoff, groups::Groups};

/// Time between two probes of an instance that is well.
const INTERVAL: Duration = Duration::from_secs(5);

// === impl Tokenizers ===

impl Tokenizers {
    /// How many instances are configured.
    pub fn n_instances(&self) -> usize {
        self.instances.len()
    }

    /// Keeps one instance's facts fresh, for ever. Dropping the future ends it.
    pub async fn probe(self: Arc<Self>, n_th: usize, groups: Arc<Groups>) {
        let Some(instance) = self.instances.get(n_th) else { return };
        let mut changes = groups.changes();
        let mut backoff = Backoff::new();
        loop {
            let well = self.probe_once(instance, &groups).await;
            let wait = if well { INTERVAL } else { backoff.wait(fastrand::f64()) };
            if well {
                backoff.reset();
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = instance.failed.notified(), if well => {}
                () = new_model(instance, &groups, &mut changes), if well => {}
            }
        }
    }

    /// Asks for every model; answers whether the instance answered.
    async fn probe_once(&self, instance: &Instance, groups: &Groups) -> bool {
        let tokenizer = &instance.address;
        for model in groups.models().keys() {
            let trace = Trace::start();
            let caller = Caller { trace: &trace, until: Instant::now() + self.timeout };
            if let Err(status) = self.describe(instance, model, caller, self.timeout).await {
                let cause = status.message();
                if does_not_answer(&status) {
                    tracing::warn!(tokenizer, cause, "a tokenizer does not answer");
                    self.heard(instance, false);
                    return false;
                }
                tracing::warn!(tokenizer, model, cause, "a tokenizer lacks a model");
                lock(&instance.state).forget(model);
            }
            self.heard(instance, true);
        }
        true
    }
}

/// Resolves when the groups report a model that the instance was not asked for.
async fn new_model(instance: &Instance, groups: &Groups, changes: &mut watch::Receiver<()>) {
    loop {
        // The sender lives as long as the groups, which the caller holds.
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
        let models = groups.models();
        if models.keys().any(|model| !lock(&instance.state).was_asked(model)) {
            return;
        }
    }
}

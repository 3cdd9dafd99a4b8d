//! The models that the gateway serves: what the groups report, narrowed to the configured names.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::{trace::Trace, v1::Model};

use crate::{
    backends::Backends,
    request::{ModelFacts, Rules},
    router::{NoGroup, ServedModel},
    sampling::{self, ModelPolicy},
    status::Failure,
    tokenizer::Caller,
};

/// Longest wait for a tokenizer that has not described a model yet.
const FACTS_TIMEOUT: Duration = Duration::from_secs(2);

/// The models by name.
#[derive(Debug)]
pub struct Models {
    backends: Arc<Backends>,
    /// Names that may be served; empty: all.
    configured: Vec<String>,
}

// === impl Models ===

impl Models {
    /// The models of these backends with a configured name; all of them if no name is configured.
    pub fn new(backends: Arc<Backends>, configured: Vec<String>) -> Self {
        Self { backends, configured }
    }

    /// The models that some group has reported.
    pub fn list(&self) -> BTreeMap<String, ServedModel> {
        let mut models = self.backends.groups.models();
        models.retain(|name, _| self.configured.is_empty() || self.configured.contains(name));
        models
    }

    /// The model that a request names; the only one served if it names none.
    ///
    /// # Errors
    /// When there is no such model, none yet, or no name and several models.
    pub fn resolve(&self, name: &str) -> Result<(String, ServedModel), Failure> {
        let mut models = self.list();
        if models.is_empty() || (!models.contains_key(name) && self.configured.iter().any(|known| known == name)) {
            return Err(NoGroup::NoneReady.into());
        }
        if name.is_empty() && models.len() > 1 {
            let names: Vec<_> = models.keys().map(|name| format!("`{name}`")).collect();
            return Err(Failure::AmbiguousModel(names.join(", ")));
        }
        let found = if name.is_empty() { models.pop_first() } else { models.remove_entry(name) };
        found.ok_or_else(|| Failure::UnknownModel(name.to_owned()))
    }

    /// Whether the model that a request would name so can take work: a group serves it, and a tokenizer answers for it.
    pub fn ready(&self, name: &str) -> bool {
        self.resolve(name)
            .is_ok_and(|(name, served)| served.ready_replicas > 0 && self.backends.tokenizers.ready(&name))
    }

    /// What clients are told about a model that is served under a policy.
    ///
    /// # Errors
    /// When no tokenizer knows it.
    pub async fn describe(
        &self,
        name: String,
        served: ServedModel,
        policy: &ModelPolicy,
        trace: &Trace,
    ) -> Result<Model, Failure> {
        let caller = Caller { trace, until: Instant::now() + FACTS_TIMEOUT };
        let facts = self.backends.tokenizers.facts(&name, caller).await?;
        // A model whose files contradict themselves is listed nevertheless; requests are told what is wrong.
        let rules = ModelFacts::new(facts.description(), served.context_length).ok();
        Ok(Model {
            sampling_defaults: rules.map(|facts| sampling::defaults(Rules { facts: &facts, policy })),
            has_chat_template: facts.template().is_ok(),
            name,
            digest: served.digest,
            context_length: served.context_length,
            vocab_size: served.vocab_size,
            embedding_size: served.embedding_size,
            ready_replicas: served.ready_replicas,
            replicas: served.replicas,
        })
    }
}

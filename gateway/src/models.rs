//! The models that the gateway serves: what the groups report, narrowed to the configured names, and `ModelService`,
//! which shows them.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use lockstep_proto::{
    trace::Trace,
    v1::{
        GetModelRequest, GetModelResponse, ListModelsRequest, ListModelsResponse, Model,
        model_service_server::ModelService,
    },
};
use tonic::{Request, Response, Status};

use crate::{
    admission::Admission,
    backends::Backends,
    router::{NoGroup, ServedModel},
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

/// `ModelService`.
#[derive(Debug)]
pub struct ModelServer {
    models: Arc<Models>,
    admission: Arc<Admission>,
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

    async fn describe(&self, name: String, served: ServedModel, trace: &Trace) -> Result<Model, Failure> {
        let caller = Caller { trace, until: Instant::now() + FACTS_TIMEOUT };
        let facts = self.backends.tokenizers.facts(&name, caller).await?;
        Ok(Model {
            has_chat_template: facts.template().is_ok(),
            name,
            digest: served.digest,
            context_length: served.context_length,
            vocab_size: served.vocab_size,
            ready_replicas: served.ready_replicas,
            replicas: served.replicas,
        })
    }
}

// === impl ModelServer ===

impl ModelServer {
    /// The service over these models, for the callers that are let in.
    pub fn new(models: Arc<Models>, admission: Arc<Admission>) -> Self {
        Self { models, admission }
    }

    async fn list(&self, request: &Request<ListModelsRequest>) -> Result<ListModelsResponse, Failure> {
        self.admission.authenticate(request.metadata())?;
        let trace = Trace::of(request);
        let mut models = Vec::new();
        for (name, served) in self.models.list() {
            models.push(self.models.describe(name, served, &trace).await?);
        }
        Ok(ListModelsResponse { models })
    }

    async fn get(&self, request: &Request<GetModelRequest>) -> Result<GetModelResponse, Failure> {
        self.admission.authenticate(request.metadata())?;
        let (name, served) = self.models.resolve(&request.get_ref().name)?;
        let model = self.models.describe(name, served, &Trace::of(request)).await?;
        Ok(GetModelResponse { model: Some(model) })
    }
}

#[tonic::async_trait]
impl ModelService for ModelServer {
    async fn list_models(&self, request: Request<ListModelsRequest>) -> Result<Response<ListModelsResponse>, Status> {
        Ok(Response::new(self.list(&request).await?))
    }

    async fn get_model(&self, request: Request<GetModelRequest>) -> Result<Response<GetModelResponse>, Status> {
        Ok(Response::new(self.get(&request).await?))
    }
}

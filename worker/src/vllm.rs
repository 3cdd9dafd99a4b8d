//! The front for routers that speak to vLLM: `vllm.grpc.engine.VllmEngine`, which the Shepherd Model Gateway and llm-d's
//! router call on rank 0.
//!
//! It only translates: requests become those of `lockstep.worker.v1`, so that checks, constraints, admission, deadlines and
//! the end with the client are those of [`service`](crate::service); events become the interface's own. What the interface
//! has and a worker has not is refused by its name there.
//!
//! * [`request`] reads requests, [`response`] writes what comes of them, [`stop`] looks for stop strings;
//! * [`aborts`] knows which requests run, so that they can be ended by their names;
//! * [`cache_events`] says what the prefix cache holds;
//! * [`files`]: what the model's own files say, and an archive of them.

mod aborts;
mod cache_events;
mod files;
mod request;
mod response;
mod stop;

use std::{
    pin::Pin,
    sync::Arc,
    time::{Instant, SystemTime},
};

use lockstep_checkpoint::Checkpoint;
use lockstep_proto::{
    client::deadline_of,
    server::Readiness,
    smg::grpc::common::{
        FlushCacheRequest, FlushCacheResponse, GetTokenizerChunk, GetTokenizerRequest, KvEventBatch, ProfileResponse,
        StartProfileRequest, StopProfileRequest, SubscribeKvEventsRequest,
    },
    vllm::grpc::engine::{
        AbortRequest, AbortResponse, EmbedRequest, EmbedResponse, GenerateRequest, GenerateResponse, GetLoadsRequest,
        GetLoadsResponse, GetModelInfoRequest, GetModelInfoResponse, GetServerInfoRequest, GetServerInfoResponse,
        HealthCheckRequest, HealthCheckResponse, SchedulerLoad, vllm_engine_server::VllmEngine,
    },
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use self::{aborts::Aborts, files::Files, response::Answer};
use crate::{VERSION, scheduler::Stats, service::Service, status};

/// The service, as health and reflection name it.
pub const NAME: &str = "vllm.grpc.engine.VllmEngine";

/// Calls that a drain leaves alone: those by which running work ends sooner, and questions about the state.
pub const BACKGROUND_CALLS: [&str; 7] = [
    "/vllm.grpc.engine.VllmEngine/Abort",
    "/vllm.grpc.engine.VllmEngine/HealthCheck",
    "/vllm.grpc.engine.VllmEngine/GetModelInfo",
    "/vllm.grpc.engine.VllmEngine/GetServerInfo",
    "/vllm.grpc.engine.VllmEngine/GetLoads",
    "/vllm.grpc.engine.VllmEngine/GetTokenizer",
    "/vllm.grpc.engine.VllmEngine/SubscribeKvEvents",
];

/// Calls that routers repeat every few seconds.
pub const PROBES: [&str; 2] = ["/vllm.grpc.engine.VllmEngine/HealthCheck", "/vllm.grpc.engine.VllmEngine/GetLoads"];

/// What a worker says about its engine here and nowhere else.
#[derive(Clone, Debug)]
pub struct Description {
    /// Tokens that fit into the KV cache.
    pub cache_tokens: usize,
    /// Sequences that run at a time.
    pub max_running: usize,
    /// How keys and values are stored.
    pub kv_cache_encoding: String,
}

/// The gRPC service.
#[derive(Debug)]
pub struct Front {
    service: Arc<Service>,
    files: Files,
    description: Description,
    readiness: Readiness,
    aborts: Aborts,
    since: Instant,
}

type EventStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

// === impl Front ===

impl Front {
    /// A front of `service`, whose model `checkpoint` holds.
    pub fn new(
        service: Arc<Service>,
        checkpoint: Arc<Checkpoint>,
        description: Description,
        readiness: Readiness,
    ) -> Self {
        let files = Files::new(checkpoint);
        Self { service, files, description, readiness, aborts: Aborts::default(), since: Instant::now() }
    }

    /// Longest prompt and output together: what the model knows and the cache holds. Unit: tokens.
    fn longest(&self) -> usize {
        self.service.identity().limits.context_length.min(self.description.cache_tokens)
    }

    /// How full the KV cache is. A prefix that nobody uses now counts as free.
    fn load(&self, stats: &Stats) -> SchedulerLoad {
        let block_size = i64::from(self.service.identity().block_size);
        let tokens = |n_blocks: usize| to_i32(n_blocks as i64 * block_size);
        SchedulerLoad {
            num_running_reqs: to_i32(stats.running as i64),
            num_waiting_reqs: to_i32(stats.waiting as i64),
            num_total_reqs: to_i32((stats.running + stats.waiting) as i64),
            num_used_tokens: tokens(stats.blocks.referenced),
            max_total_num_tokens: tokens(stats.blocks.total),
            token_usage: stats.blocks.usage(),
            utilization: stats.blocks.usage(),
            max_running_requests: to_i32(self.description.max_running as i64),
            ..SchedulerLoad::default()
        }
    }
}

/// The interface has no larger integers.
fn to_i32(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

#[tonic::async_trait]
impl VllmEngine for Front {
    type GenerateStream = EventStream<GenerateResponse>;
    type GetTokenizerStream = EventStream<GetTokenizerChunk>;
    type SubscribeKvEventsStream = EventStream<KvEventBatch>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let deadline = deadline_of(&request);
        let request = request.into_inner();
        let invalid = |violations| status::renamed(&status::invalid(violations), str::to_owned);
        request::check_bounds(&request).map_err(invalid)?;
        let running = self.aborts.enter(&request.request_id);
        let facts = self.files.facts().await?;
        let (request, asked) = request::generation(request, facts, self.longest(), deadline).map_err(invalid)?;
        let names = asked.names;
        // Whoever is aborted before it has a place never gets one.
        let started = running.unless_aborted(self.service.start(request)).await;
        let events = started.transpose().map_err(|status| status::renamed(&status, |path| names.name(path)))?;
        let answer = Answer::new(asked, events, running, self.service.engine().clone());
        let stream = futures_util::stream::unfold(answer, |mut answer| async move {
            let response = answer.next().await?;
            Some((response, answer))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn embed(&self, request: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        let deadline = deadline_of(&request);
        let (request, names) = request::embedding(request.into_inner(), deadline);
        let prompt_tokens = request.prompt_token_ids.len() as u32;
        let values = self.service.embedding(request).await;
        let values = values.map_err(|status| status::renamed(&status, |path| names.name(path)))?;
        let embedding = response::scaled(values);
        let embedding_dim = embedding.len() as u32;
        Ok(Response::new(EmbedResponse { embedding, prompt_tokens, embedding_dim }))
    }

    async fn health_check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let (ready, draining) = {
            let status = self.service.engine().status();
            let status = status.borrow();
            (status.ready, status.draining)
        };
        let message = match (ready, draining, self.readiness.is_ready()) {
            (_, true, _) => "the group is draining",
            (false, ..) => "the group is not together",
            // Or it has just come together.
            (true, false, false) => "the step loop stands still",
            (true, false, true) => "",
        };
        Ok(Response::new(HealthCheckResponse { healthy: message.is_empty(), message: message.to_owned() }))
    }

    async fn flush_cache(&self, _: Request<FlushCacheRequest>) -> Result<Response<FlushCacheResponse>, Status> {
        Err(status::unimplemented("FlushCache: what is cached here is never wrong"))
    }

    async fn start_profile(&self, _: Request<StartProfileRequest>) -> Result<Response<ProfileResponse>, Status> {
        Err(status::unimplemented("StartProfile: `lockstep-worker bench engine --profile` says where time goes"))
    }

    async fn stop_profile(&self, _: Request<StopProfileRequest>) -> Result<Response<ProfileResponse>, Status> {
        Err(status::unimplemented("StopProfile: nothing can be started"))
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        for id in request.into_inner().request_ids {
            self.aborts.abort(&id);
        }
        Ok(Response::new(AbortResponse {}))
    }

    async fn get_model_info(&self, _: Request<GetModelInfoRequest>) -> Result<Response<GetModelInfoResponse>, Status> {
        let identity = self.service.identity();
        let special = &self.files.facts().await?.special;
        let folder = self.files.folder().map(|folder| folder.display().to_string()).unwrap_or_default();
        Ok(Response::new(GetModelInfoResponse {
            model_path: folder.clone(),
            is_generation: true,
            max_context_length: self.longest() as u32,
            vocab_size: identity.limits.vocab_size as u32,
            served_model_name: identity.model.clone(),
            tokenizer_path: folder,
            model_type: "llama".to_owned(),
            architectures: vec!["LlamaForCausalLM".to_owned()],
            eos_token_ids: special.end.iter().map(|id| to_i32((*id).into())).collect(),
            bos_token_id: to_i32(special.begin.unwrap_or(0).into()),
            max_req_input_len: to_i32(self.longest() as i64 - 1),
            ..GetModelInfoResponse::default()
        }))
    }

    async fn get_server_info(
        &self,
        _: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        let status = self.service.engine().status().borrow().clone();
        Ok(Response::new(GetServerInfoResponse {
            active_requests: (status.stats.running + status.stats.waiting) as u32,
            is_paused: status.draining,
            uptime_seconds: self.since.elapsed().as_secs_f64(),
            server_type: "lockstep".to_owned(),
            data_parallel_size: 1,
            kv_cache_dtype: self.description.kv_cache_encoding.clone(),
            block_size: to_i32(self.service.identity().block_size.into()),
            max_num_seqs: to_i32(self.description.max_running as i64),
            constrained_decoding_start: "first_token".to_owned(),
            ..GetServerInfoResponse::default()
        }))
    }

    async fn get_loads(&self, request: Request<GetLoadsRequest>) -> Result<Response<GetLoadsResponse>, Status> {
        let is_asked = request.into_inner().dp_rank.unwrap_or(0) == 0;
        let stats = self.service.engine().status().borrow().stats;
        let loads: Vec<_> = is_asked.then(|| self.load(&stats)).into_iter().collect();
        Ok(Response::new(GetLoadsResponse {
            timestamp: prost_types::Timestamp::from(SystemTime::now()).to_string(),
            version: VERSION.to_owned(),
            dp_rank_count: loads.len() as i32,
            loads,
        }))
    }

    async fn get_tokenizer(
        &self,
        _: Request<GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        let chunks = self.files.archive().await?.chunks();
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks.map(Ok)))))
    }

    async fn subscribe_kv_events(
        &self,
        request: Request<SubscribeKvEventsRequest>,
    ) -> Result<Response<Self::SubscribeKvEventsStream>, Status> {
        let start = request.into_inner().start_sequence_number;
        if start != 0 {
            let message = format!("start_sequence_number: {start} is not 0, and what was sent is not kept; begin anew");
            return Err(status::no_history(&message));
        }
        let watch = self.service.engine().watch_cache().await.map_err(|error| status::engine(&error))?;
        Ok(Response::new(Box::pin(cache_events::batches(watch))))
    }
}

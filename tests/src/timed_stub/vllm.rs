//! The stub as the Shepherd Model Gateway sees it.

use futures_util::{StreamExt as _, stream};
use lockstep_proto::{
    smg::grpc::common::{
        FlushCacheRequest, FlushCacheResponse, GetTokenizerChunk, GetTokenizerRequest, KvEventBatch, ProfileResponse,
        StartProfileRequest, StopProfileRequest, SubscribeKvEventsRequest,
    },
    vllm::grpc::engine::{
        AbortRequest, AbortResponse, EmbedRequest, EmbedResponse, GenerateComplete, GenerateRequest, GenerateResponse,
        GenerateStreamChunk, GetLoadsRequest, GetLoadsResponse, GetModelInfoRequest, GetModelInfoResponse,
        GetServerInfoRequest, GetServerInfoResponse, HealthCheckRequest, HealthCheckResponse, generate_request::Input,
        generate_response::Response as Said, vllm_engine_server::VllmEngine,
    },
};
use tonic::{Request, Response, Status, codegen::BoxStream};

use super::{CONTEXT_LENGTH, MODEL, TimedStub, VOCAB_SIZE};

#[tonic::async_trait]
impl VllmEngine for TimedStub {
    type GenerateStream = BoxStream<GenerateResponse>;
    type GetTokenizerStream = BoxStream<GetTokenizerChunk>;
    type SubscribeKvEventsStream = BoxStream<KvEventBatch>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let GenerateRequest { input, sampling_params, .. } = request.into_inner();
        let Some(Input::Tokenized(prompt)) = input else { return Err(Status::invalid_argument("no token ids")) };
        let n_tokens = sampling_params.and_then(|params| params.max_tokens).unwrap_or(1);
        let prompt_tokens = prompt.input_ids.len() as u32;
        let chunks = self.tokens(&prompt.input_ids, n_tokens).map(move |(position, token)| {
            let completion_tokens = position + 1;
            let token_ids = vec![token];
            Said::Chunk(GenerateStreamChunk {
                token_ids,
                prompt_tokens,
                completion_tokens,
                ..GenerateStreamChunk::default()
            })
        });
        let complete = Said::Complete(GenerateComplete {
            finish_reason: "length".into(),
            prompt_tokens,
            completion_tokens: n_tokens,
            ..GenerateComplete::default()
        });
        let said = chunks.chain(stream::iter([complete]));
        Ok(Response::new(Box::pin(said.map(|said| Ok(GenerateResponse { response: Some(said) })))))
    }

    async fn health_check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(HealthCheckResponse { healthy: true, message: String::new() }))
    }

    async fn get_model_info(&self, _: Request<GetModelInfoRequest>) -> Result<Response<GetModelInfoResponse>, Status> {
        Ok(Response::new(GetModelInfoResponse {
            served_model_name: MODEL.into(),
            is_generation: true,
            max_context_length: CONTEXT_LENGTH,
            vocab_size: VOCAB_SIZE,
            ..GetModelInfoResponse::default()
        }))
    }

    async fn get_server_info(
        &self,
        _: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        let server_type = "vllm-grpc".into();
        Ok(Response::new(GetServerInfoResponse { server_type, ..GetServerInfoResponse::default() }))
    }

    async fn get_loads(&self, _: Request<GetLoadsRequest>) -> Result<Response<GetLoadsResponse>, Status> {
        Ok(Response::new(GetLoadsResponse::default()))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        Ok(Response::new(AbortResponse {}))
    }

    async fn embed(&self, _: Request<EmbedRequest>) -> Result<Response<EmbedResponse>, Status> {
        Err(not_here())
    }

    async fn flush_cache(&self, _: Request<FlushCacheRequest>) -> Result<Response<FlushCacheResponse>, Status> {
        Err(not_here())
    }

    async fn start_profile(&self, _: Request<StartProfileRequest>) -> Result<Response<ProfileResponse>, Status> {
        Err(not_here())
    }

    async fn stop_profile(&self, _: Request<StopProfileRequest>) -> Result<Response<ProfileResponse>, Status> {
        Err(not_here())
    }

    async fn get_tokenizer(
        &self,
        _: Request<GetTokenizerRequest>,
    ) -> Result<Response<Self::GetTokenizerStream>, Status> {
        Err(not_here())
    }

    async fn subscribe_kv_events(
        &self,
        _: Request<SubscribeKvEventsRequest>,
    ) -> Result<Response<Self::SubscribeKvEventsStream>, Status> {
        Err(not_here())
    }
}

fn not_here() -> Status {
    Status::unimplemented("not on a stub")
}

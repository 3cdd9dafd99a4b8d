//! A [`Target`] is the gateway that a command talks to.

use std::time::Duration;

use clap::Args;
use lockstep_proto::{
    client::{ClientLimits, connect_lazy, with_deadline},
    error::Error,
    trace::Trace,
    v1::{inference_service_client::InferenceServiceClient, model_service_client::ModelServiceClient},
};
use tonic::{Request, Status, transport::Channel};

use crate::failure::Failure;

/// Where a cluster answers unless said otherwise: the gateway's own default.
pub(crate) const DEFAULT_TARGET: &str = "127.0.0.1:50051";

/// The gateway that a command talks to.
#[derive(Debug, Clone, Args)]
pub(crate) struct Target {
    /// Address of the gateway
    #[arg(long, value_name = "ADDR", env = "LOCKSTEP_TARGET", default_value = DEFAULT_TARGET)]
    pub(crate) target: String,
    /// Key to show, if the gateway asks for one
    #[arg(long, value_name = "KEY", env = "LOCKSTEP_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Deadline of each call, which the cluster honours too
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
}

// === impl Target ===

impl Target {
    pub(crate) fn channel(&self) -> Result<Channel, Failure> {
        connect_lazy(&self.target, &ClientLimits::default()).map_err(|error| Failure::Usage(error.to_string()))
    }

    pub(crate) fn inference(&self) -> Result<InferenceServiceClient<Channel>, Failure> {
        let limit = ClientLimits::default().max_message_bytes();
        Ok(InferenceServiceClient::new(self.channel()?).max_decoding_message_size(limit))
    }

    pub(crate) fn models(&self) -> Result<ModelServiceClient<Channel>, Failure> {
        Ok(ModelServiceClient::new(self.channel()?))
    }

    /// A request with key, deadline and a trace of its own.
    pub(crate) fn request<T>(&self, message: T) -> Result<Request<T>, Failure> {
        let mut request = with_deadline(message, Duration::from_secs(self.timeout.into()));
        Trace::start().inject(request.metadata_mut());
        if let Some(key) = &self.api_key {
            let value = format!("Bearer {key}").parse();
            let value = value.map_err(|_| Failure::Usage("--api-key holds more than visible ASCII".into()))?;
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }

    /// What this target answered instead of a result.
    pub(crate) fn failure(&self, status: &Status) -> Failure {
        Failure::from_answer(&Error::from_status(status), &self.target)
    }
}

//! An embedding request's life, from a valid request to its answer.
//!
//! 1. Encode the inputs.
//! 2. Each is a request of its own to the groups, and finds its way as a generation does ([`dispatch`]): the first alone, as
//!    it may be the one by which the router tries a group that has failed before and passes no other meanwhile; then some
//!    at a time.
//! 3. Cut and scale what comes back.
//!
//! All of it is one future: a client that goes away drops it, and with it the calls that are under way.

use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use lockstep_proto::{
    error::Error,
    trace::Trace,
    v1,
    worker::v1::{EmbedRequest, EmbedResponse},
};

use crate::{
    backends::Backends,
    generation::{
        Breach, Deadline, Prompt, Source,
        dispatch::{Order, dispatch, judge},
    },
    groups::Placement,
    request::{ValidEmbed, ValidPrompt},
    status::Failure,
    tokenizer::{Caller, Facts},
};

/// Inputs of one request that are encoded, or computed, at a time. More would hardly be faster, as a group's step is full with
/// few of them, and would leave fewer of its places to others.
const MAX_AT_ONCE: usize = 16;

/// A valid request.
#[derive(Debug)]
pub struct Job<'a> {
    /// Everything that it needs from other services.
    pub backends: &'a Backends,
    /// Names the client call.
    pub trace: &'a Trace,
    /// When it must have been answered.
    pub deadline: Deadline,
    /// The model's facts.
    pub facts: &'a Arc<Facts>,
    /// Longest prompt. Unit: tokens.
    pub context_length: u32,
    /// Values of the model's embeddings.
    pub embedding_size: u32,
    /// What is asked.
    pub request: &'a ValidEmbed,
}

/// What a group made of one input.
#[derive(Debug)]
struct Embedded {
    values: Vec<f32>,
    model_digest: String,
}

// === impl Job ===

impl Job<'_> {
    /// Embeds all inputs.
    ///
    /// # Errors
    /// The first thing that goes wrong with one of them.
    pub async fn run(&self) -> Result<v1::EmbedResponse, Failure> {
        let until = tokio::time::Instant::from_std(self.deadline.tokens());
        tokio::time::timeout_at(until, self.embed()).await.map_err(|_| Failure::Deadline)?
    }

    async fn embed(&self) -> Result<v1::EmbedResponse, Failure> {
        let inputs = self.request.inputs();
        let encoding = stream::iter((0..inputs.len()).map(|index| self.encode(index, &inputs[index])));
        let prompts: Vec<Prompt> = encoding.buffered(MAX_AT_ONCE).try_collect().await?;
        let mut embedded = vec![self.compute(&prompts[0]).await?];
        let computing = stream::iter((1..prompts.len()).map(|index| self.compute(&prompts[index])));
        embedded.extend(computing.buffered(MAX_AT_ONCE).try_collect::<Vec<_>>().await?);
        let model_digest = one_digest(&embedded)?;
        let embeddings = embedded.into_iter().zip(&prompts).map(|(embedded, prompt)| v1::Embedding {
            values: self.finish(embedded.values),
            prompt_tokens: prompt.n_tokens(),
        });
        Ok(v1::EmbedResponse {
            request_id: self.trace.request_id().to_owned(),
            model: self.facts.model().to_owned(),
            embeddings: embeddings.collect(),
            prompt_tokens: prompts.iter().map(Prompt::n_tokens).fold(0, u32::saturating_add),
            model_digest,
        })
    }

    async fn encode(&self, index: usize, input: &ValidPrompt) -> Result<Prompt, Failure> {
        let source = Source::Raw(input.clone());
        let prompt = source.prompt(&self.backends.tokenizers, self.facts, self.caller()).await;
        let prompt = prompt.map_err(|failure| match failure {
            Failure::Request(error) => error.moved("prompt", &format!("inputs[{index}]")).into(),
            other => other,
        })?;
        let (n_tokens, limit) = (prompt.n_tokens(), self.context_length);
        if n_tokens > limit { Err(Failure::InputTooLong { index, n_tokens, limit }) } else { Ok(prompt) }
    }

    async fn compute(&self, prompt: &Prompt) -> Result<Embedded, Failure> {
        let order = Order {
            model: self.facts.model(),
            prompt_token_ids: &prompt.ids,
            cost: prompt.n_tokens().into(),
            deadline: self.deadline,
            caller: self.caller(),
        };
        dispatch(&self.backends.groups, order, |placement| self.ask(placement, order)).await
    }

    /// Asks one group.
    async fn ask(&self, mut placement: Placement, order: Order<'_>) -> Result<Result<Embedded, Error>, Failure> {
        let request = order.request(|budget_ms| EmbedRequest {
            request_id: self.trace.request_id().to_owned(),
            prompt_token_ids: order.prompt_token_ids.to_vec(),
            pooling: self.request.pooling().into(),
            budget_ms,
        })?;
        let EmbedResponse { values } = match placement.client().embed(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return Ok(Err(judge(&mut placement, &status))),
        };
        let (expected, got) = (self.embedding_size as usize, values.len());
        if got != expected {
            placement.failed();
            let peer = format!("group {}", placement.address());
            return Err(Failure::Breach { peer, breach: Breach::Embedding { expected, got } });
        }
        placement.worked();
        Ok(Ok(Embedded { values, model_digest: placement.identity().0 }))
    }

    /// The embedding in the form that was asked for.
    fn finish(&self, mut values: Vec<f32>) -> Vec<f32> {
        values.truncate(self.request.dimensions());
        if self.request.normalize() {
            normalize(&mut values);
        }
        values
    }

    fn caller(&self) -> Caller<'_> {
        Caller { trace: self.trace, until: self.deadline.tokens() }
    }
}

/// Divides by the L2 norm, unless that is 0.
fn normalize(values: &mut [f32]) {
    let norm = values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    if norm > 0.0 {
        values.iter_mut().for_each(|value| *value = (f64::from(*value) / norm) as f32);
    }
}

/// The digest of the model that made all of them: those of different models are not to be compared.
fn one_digest(embedded: &[Embedded]) -> Result<String, Failure> {
    let digest = embedded.first().map(|first| first.model_digest.clone()).unwrap_or_default();
    if embedded.iter().any(|other| other.model_digest != digest) {
        return Err(Failure::ModelChanged);
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normalized_vector_has_norm_1_and_zeros_stay() {
        let mut values = [3.0, 0.0, -4.0];
        normalize(&mut values);
        assert_eq!(values, [0.6, 0.0, -0.8]);
        let mut tiny = [1e-30, 1e-30];
        normalize(&mut tiny);
        assert!((tiny[0] - 0.5f32.sqrt()).abs() < 1e-6, "{tiny:?}");
        let mut zeros = [0.0; 2];
        normalize(&mut zeros);
        assert_eq!(zeros, [0.0; 2]);
    }
}

//! The service: `lockstep.tokenizer.v1.TokenizerService` over a [`Catalog`].

use std::{sync::Arc, time::Instant};

use lockstep_proto::{
    client::deadline_of,
    error::{Error, Reason},
    tokenizer::v1::{
        DecodeRequest, DecodeResponse, DecodedText, EncodeRequest, EncodeResponse, GetTokenizerRequest,
        GetTokenizerResponse, GetVocabularyRequest, GetVocabularyResponse, SpecialToken, TokenIds,
        tokenizer_service_server::TokenizerService,
    },
};
use tonic::{Request, Response, Status};

use crate::{
    catalog::{Catalog, Model},
    config::WorkLimits,
    detokenizer::decode,
    metrics::Metrics,
    request::{ValidDecode, ValidInput, invalid, tokenize_error},
    status,
    tokenizer::Tokenizer,
    workers::Workers,
};

/// Longest text of all answers of one `Decode`. Unit: bytes. Ids stand for up to hundreds of bytes each, so a small
/// request could otherwise ask for an answer of any size.
const MAX_DECODED_BYTES: usize = 32 << 20;

/// A single text up to this size is encoded where its request is. Unit: bytes.
const SHORT_BYTES: usize = 2 << 10;

/// Answers for the models of one catalog. Clones share it.
#[derive(Debug, Clone)]
pub struct TokenizerServer {
    catalog: Arc<Catalog>,
    workers: Workers,
    metrics: Metrics,
}

// === impl TokenizerServer ===

impl TokenizerServer {
    /// A service over a catalog that works on so much at a time.
    #[must_use]
    pub fn new(catalog: Catalog, limits: WorkLimits, metrics: Metrics) -> Self {
        let workers = Workers::new(limits, metrics.jobs());
        Self { catalog: Arc::new(catalog), workers, metrics }
    }

    async fn vocabulary(&self, model: &str, deadline: Option<Instant>) -> Result<GetVocabularyResponse, Error> {
        let model = Arc::clone(find(&self.catalog, model)?);
        self.workers.run(deadline, move || Ok(vocabulary(&model.tokenizer))).await
    }

    async fn encode_all(&self, request: EncodeRequest, deadline: Option<Instant>) -> Result<EncodeResponse, Error> {
        let model = Arc::clone(find(&self.catalog, &request.model)?);
        let inputs = ValidInput::all(request)?;
        let is_short = matches!(inputs.as_slice(), [only] if only.text().len() <= SHORT_BYTES);
        let metrics = self.metrics.clone();
        let work = move || {
            let encode = |(idx, input): (usize, &ValidInput)| {
                let ids = model.tokenizer.encode(input.text(), input.breaks(), input.add_special_tokens());
                let ids = ids.map_err(|e| tokenize_error(&format!("inputs[{idx}]"), &e))?;
                metrics.encoded(input.text().len(), ids.len());
                Ok(TokenIds { ids })
            };
            Ok(EncodeResponse { outputs: inputs.iter().enumerate().map(encode).collect::<Result<_, Error>>()? })
        };
        if is_short { Workers::run_here(deadline, work) } else { self.workers.run(deadline, work).await }
    }

    async fn decode_all(&self, request: DecodeRequest, deadline: Option<Instant>) -> Result<DecodeResponse, Error> {
        let model = Arc::clone(find(&self.catalog, &request.model)?);
        let request = ValidDecode::new(request)?;
        let metrics = self.metrics.clone();
        let work = move || {
            let mut outputs = Vec::with_capacity(request.lists().len());
            let mut total_bytes = 0;
            for (idx, ids) in request.lists().iter().enumerate() {
                total_bytes += model.tokenizer.n_bytes(ids);
                if total_bytes > MAX_DECODED_BYTES {
                    return Err(invalid("inputs", format!("they stand for more than {MAX_DECODED_BYTES} bytes")));
                }
                let decoded = decode(&model.tokenizer, ids, request.skip_special_tokens());
                let decoded = decoded.map_err(|e| tokenize_error(&format!("inputs[{idx}].ids"), &e))?;
                metrics.decoded(ids.len());
                outputs.push(DecodedText { text: decoded.text, raw: decoded.raw });
            }
            Ok(DecodeResponse { outputs })
        };
        self.workers.run(deadline, work).await
    }
}

#[tonic::async_trait]
impl TokenizerService for TokenizerServer {
    async fn get_tokenizer(
        &self,
        request: Request<GetTokenizerRequest>,
    ) -> Result<Response<GetTokenizerResponse>, Status> {
        let arrived = Instant::now();
        let answer = find(&self.catalog, &request.get_ref().model).map(|model| describe(model));
        self.metrics.ended("GetTokenizer", arrived, &answer);
        answer.map(Response::new).map_err(status::of)
    }

    async fn get_vocabulary(
        &self,
        request: Request<GetVocabularyRequest>,
    ) -> Result<Response<GetVocabularyResponse>, Status> {
        let (arrived, deadline) = (Instant::now(), deadline_of(&request));
        let answer = self.vocabulary(&request.get_ref().model, deadline).await;
        self.metrics.ended("GetVocabulary", arrived, &answer);
        answer.map(Response::new).map_err(status::of)
    }

    async fn encode(&self, request: Request<EncodeRequest>) -> Result<Response<EncodeResponse>, Status> {
        let (arrived, deadline) = (Instant::now(), deadline_of(&request));
        let answer = self.encode_all(request.into_inner(), deadline).await;
        self.metrics.ended("Encode", arrived, &answer);
        answer.map(Response::new).map_err(status::of)
    }

    async fn decode(&self, request: Request<DecodeRequest>) -> Result<Response<DecodeResponse>, Status> {
        let (arrived, deadline) = (Instant::now(), deadline_of(&request));
        let answer = self.decode_all(request.into_inner(), deadline).await;
        self.metrics.ended("Decode", arrived, &answer);
        answer.map(Response::new).map_err(status::of)
    }
}

/// The model of that name; with an empty name the only one.
pub(crate) fn find<'a>(catalog: &'a Catalog, name: &str) -> Result<&'a Arc<Model>, Error> {
    catalog.find(name).ok_or_else(|| {
        let known = catalog.models().map(|model| model.name.as_str()).collect::<Vec<_>>().join(", ");
        let what = if name.is_empty() { "name a model".to_owned() } else { format!("no model {name:?}") };
        Error::new(Reason::ModelNotFound, format!("{what}; the catalog has: {known}"))
    })
}

fn describe(model: &Model) -> GetTokenizerResponse {
    let Model { name, tokenizer, profile } = model;
    let special = tokenizer.special_tokens().iter();
    GetTokenizerResponse {
        model: name.clone(),
        fingerprint: tokenizer.fingerprint().to_owned(),
        vocab_size: tokenizer.vocab_size(),
        context_length: profile.context_length,
        special_tokens: special.map(|token| SpecialToken { id: token.id, text: token.text.clone() }).collect(),
        bos_token_id: profile.bos_token_id,
        eos_token_ids: profile.eos_token_ids.clone(),
        chat_template: profile.chat_template.clone(),
        generation_defaults: Some(profile.generation),
        eos_token_id: profile.eos_token_id,
    }
}

fn vocabulary(tokenizer: &Tokenizer) -> GetVocabularyResponse {
    let (mut raw, mut ends) = (Vec::new(), Vec::new());
    for bytes in tokenizer.all_bytes() {
        raw.extend_from_slice(bytes);
        ends.push(u32::try_from(raw.len()).expect("MAX_VOCABULARY_BYTES fits"));
    }
    let strips_leading_space = tokenizer.strips_leading_space();
    GetVocabularyResponse { fingerprint: tokenizer.fingerprint().to_owned(), raw, ends, strips_leading_space }
}

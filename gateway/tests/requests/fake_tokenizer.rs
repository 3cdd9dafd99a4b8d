//! A tokenizer service whose tokens are bytes: ids below 256 are themselves, those above are control tokens.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use lockstep_proto::tokenizer::v1::{
    DecodeRequest, DecodeResponse, DecodedText, EncodeInput, EncodeRequest, EncodeResponse, GetTokenizerRequest,
    GetTokenizerResponse, GetVocabularyRequest, GetVocabularyResponse, SpecialToken, TokenIds,
    tokenizer_service_server::TokenizerService,
};
use tonic::{Request, Response, Status};

/// Control tokens, from id 256 on.
pub(crate) const CONTROL: [&str; 3] = ["<|bos|>", "<|end|>", "<|user|>"];
pub(crate) const BOS: u32 = 256;
pub(crate) const END: u32 = 257;
pub(crate) const VOCAB_SIZE: u32 = 259;

pub(crate) const TEMPLATE: &str = "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}\
                            {% if add_generation_prompt %}>{% endif %}";

/// The service; clones share everything.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeTokenizer {
    /// Every call is answered UNAVAILABLE.
    pub(crate) is_down: Arc<AtomicBool>,
    /// Texts are refused so.
    pub(crate) refusal: Arc<Mutex<Option<Status>>>,
    /// The fingerprint that it answers.
    pub(crate) fingerprint: Arc<Mutex<String>>,
    /// The traces of its calls.
    pub(crate) request_ids: Arc<Mutex<Vec<String>>>,
    /// What this byte stands for in answers of `Decode`, instead of itself.
    pub(crate) stands_for: Arc<Mutex<Option<(u8, String)>>>,
    /// What its vocabulary says to be the fingerprint, instead of that.
    pub(crate) fingerprint_of_vocabulary: Arc<Mutex<Option<String>>>,
    /// Its vocabulary is empty.
    pub(crate) has_no_vocabulary: Arc<AtomicBool>,
    /// Has no chat template.
    pub(crate) has_no_template: Arc<AtomicBool>,
}

impl FakeTokenizer {
    fn answer<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let id = request.metadata().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        self.request_ids.lock().unwrap().push(id.to_owned());
        if self.is_down.load(Ordering::SeqCst) { Err(Status::unavailable("it is down")) } else { Ok(()) }
    }
}

/// Bytes, and control tokens unless a break lies within them.
pub(crate) fn encode(input: &EncodeInput) -> Vec<u32> {
    let mut ids = if input.add_special_tokens { vec![BOS] } else { Vec::new() };
    let mut at = 0;
    while let Some(rest) = input.text.get(at..).or_else(|| input.text.as_bytes().get(at).map(|_| "")) {
        let control = (BOS..).zip(CONTROL).find(|(_, token)| {
            let inside = |offset: &u32| (at + 1..at + token.len()).contains(&(*offset as usize));
            rest.starts_with(token) && !input.break_offsets.iter().any(inside)
        });
        match (control, input.text.as_bytes().get(at)) {
            (Some((id, token)), _) => {
                ids.push(id);
                at += token.len();
            }
            (None, Some(&byte)) => {
                ids.push(byte.into());
                at += 1;
            }
            (None, None) => break,
        }
    }
    ids
}

fn bytes(ids: &[u32], skip: bool) -> Vec<u8> {
    ids.iter().flat_map(|&id| token_bytes(id, skip)).collect()
}

fn token_bytes(id: u32, skip: bool) -> Vec<u8> {
    match u8::try_from(id) {
        Ok(byte) => vec![byte],
        Err(_) if skip => Vec::new(),
        Err(_) => CONTROL[(id - BOS) as usize].as_bytes().to_vec(),
    }
}

#[tonic::async_trait]
impl TokenizerService for FakeTokenizer {
    async fn get_tokenizer(
        &self,
        request: Request<GetTokenizerRequest>,
    ) -> Result<Response<GetTokenizerResponse>, Status> {
        self.answer(&request)?;
        let special = (BOS..).zip(CONTROL).map(|(id, text)| SpecialToken { id, text: text.into() });
        let template = if self.has_no_template.load(Ordering::SeqCst) { "" } else { TEMPLATE };
        Ok(Response::new(GetTokenizerResponse {
            model: request.into_inner().model,
            fingerprint: self.fingerprint.lock().unwrap().clone(),
            vocab_size: VOCAB_SIZE,
            special_tokens: special.collect(),
            bos_token_id: Some(BOS),
            eos_token_ids: vec![END],
            chat_template: template.into(),
            ..GetTokenizerResponse::default()
        }))
    }

    async fn get_vocabulary(
        &self,
        request: Request<GetVocabularyRequest>,
    ) -> Result<Response<GetVocabularyResponse>, Status> {
        self.answer(&request)?;
        let vocab_size = if self.has_no_vocabulary.load(Ordering::SeqCst) { 0 } else { VOCAB_SIZE };
        let (mut raw, mut ends) = (Vec::new(), Vec::new());
        for id in 0..vocab_size {
            raw.extend(token_bytes(id, false));
            ends.push(u32::try_from(raw.len()).unwrap());
        }
        let other = self.fingerprint_of_vocabulary.lock().unwrap().clone();
        let fingerprint = other.unwrap_or_else(|| self.fingerprint.lock().unwrap().clone());
        Ok(Response::new(GetVocabularyResponse { fingerprint, raw, ends, strips_leading_space: false }))
    }

    async fn encode(&self, request: Request<EncodeRequest>) -> Result<Response<EncodeResponse>, Status> {
        self.answer(&request)?;
        if let Some(refusal) = self.refusal.lock().unwrap().clone() {
            return Err(refusal);
        }
        let outputs = request.into_inner().inputs.iter().map(|input| TokenIds { ids: encode(input) }).collect();
        Ok(Response::new(EncodeResponse { outputs }))
    }

    async fn decode(&self, request: Request<DecodeRequest>) -> Result<Response<DecodeResponse>, Status> {
        self.answer(&request)?;
        let request = request.into_inner();
        let stands_for = self.stands_for.lock().unwrap().clone();
        let outputs = request.inputs.iter().map(|list| {
            let raw = match &stands_for {
                Some((byte, text)) if list.ids == [u32::from(*byte)] => text.clone().into_bytes(),
                _ => bytes(&list.ids, request.skip_special_tokens),
            };
            DecodedText { text: String::from_utf8_lossy(&raw).into_owned(), raw }
        });
        Ok(Response::new(DecodeResponse { outputs: outputs.collect() }))
    }
}

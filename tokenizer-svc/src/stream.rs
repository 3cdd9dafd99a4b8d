//! One `StreamDecode`: its messages turned into answers, one for each that carries ids.
//!
//! The first message opens the stream and has no answer. Each choice has a [`Detokenizer`] of its own and ends once.

use std::sync::Arc;

use lockstep_proto::{
    error::{Error, Reason},
    tokenizer::v1::{DecodeIds, StreamDecodeRequest, StreamDecodeResponse, stream_decode_request},
};

use crate::{
    catalog::{Catalog, Model},
    detokenizer::Detokenizer,
    metrics::Metrics,
    request::{ValidOpen, invalid, tokenize_error},
    service::find,
};

/// Longest text of one answer. Unit: bytes. Ids stand for up to hundreds of bytes each, so a small message could
/// otherwise ask for an answer of any size.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// The state of one stream.
#[derive(Debug)]
pub(crate) struct DecodeSession {
    catalog: Arc<Catalog>,
    metrics: Metrics,
    opened: Option<Opened>,
}

/// An open stream's model, and the state of each choice until it ends.
#[derive(Debug)]
struct Opened {
    model: Arc<Model>,
    choices: Vec<Option<Detokenizer>>,
}

// === impl DecodeSession ===

impl DecodeSession {
    pub(crate) fn new(catalog: Arc<Catalog>, metrics: Metrics) -> Self {
        Self { catalog, metrics, opened: None }
    }

    /// The answer to one message; none to the one that opens the stream.
    ///
    /// # Errors
    /// If the message breaks the contract; the stream ends with that.
    pub(crate) fn answer(&mut self, message: StreamDecodeRequest) -> Result<Option<StreamDecodeResponse>, Error> {
        use stream_decode_request::Request::{Ids, Open};
        match (message.request, &mut self.opened) {
            (None, _) => Err(invalid("request", "is neither open nor ids")),
            (Some(Open(_)), Some(_)) => Err(invalid("open", "came twice")),
            (Some(Ids(_)), None) => Err(invalid("ids", "came before open")),
            (Some(Open(open)), None) => {
                let model = Arc::clone(find(&self.catalog, &open.model)?);
                self.opened = Some(Opened::new(model, &ValidOpen::new(open)?)?);
                Ok(None)
            }
            (Some(Ids(ids)), Some(opened)) => {
                self.metrics.decoded(ids.token_ids.len());
                opened.push(ids).map(Some)
            }
        }
    }
}

// === impl Opened ===

impl Opened {
    fn new(model: Arc<Model>, open: &ValidOpen) -> Result<Self, Error> {
        let stream = Detokenizer::resume(&model.tokenizer, open.skip_special_tokens(), open.context());
        let stream = stream.map_err(|e| tokenize_error("open.context_token_ids", &e))?;
        Ok(Self { model, choices: vec![Some(stream); open.choices() as usize] })
    }

    fn push(&mut self, ids: DecodeIds) -> Result<StreamDecodeResponse, Error> {
        let DecodeIds { choice, token_ids, end } = ids;
        let n_choices = self.choices.len();
        let state = self.choices.get_mut(choice as usize);
        let state = state.ok_or_else(|| invalid("ids.choice", format!("{choice} is not below {n_choices}")))?;
        let stream = state.as_mut().ok_or_else(|| invalid("ids.choice", format!("{choice} has ended before")))?;

        let mut text = String::new();
        let mut ends = Vec::with_capacity(token_ids.len());
        for (idx, &id) in token_ids.iter().enumerate() {
            let pushed = stream.push(&self.model.tokenizer, idx, id, &mut text);
            pushed.map_err(|e| tokenize_error("ids.token_ids", &e))?;
            if text.len() > MAX_TEXT_BYTES {
                let message = format!("they stand for more than {MAX_TEXT_BYTES} bytes; send fewer at a time");
                return Err(invalid("ids.token_ids", message));
            }
            ends.push(u32::try_from(text.len()).map_err(|e| Error::new(Reason::Internal, e.to_string()))?);
        }
        if end && let Some(stream) = state.take() {
            stream.finish(&mut text);
        }
        Ok(StreamDecodeResponse { choice, text, ends })
    }
}

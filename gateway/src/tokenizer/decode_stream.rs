//! A decode stream: ids of one request go in, their text comes out, in order.

use std::time::Duration;

use lockstep_proto::tokenizer::v1::{
    DecodeIds, DecodeOpen, StreamDecodeRequest, StreamDecodeResponse, stream_decode_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Caller, Client, TokenizerError};

/// Messages on their way to the tokenizer. The caller keeps fewer unanswered ones than this, so that there is always
/// room for the next; see [`MAX_UNANSWERED`].
const CAPACITY: usize = 512;

/// Unanswered messages, beside the last one of each choice (at most 128), that a caller may have.
pub const MAX_UNANSWERED: usize = CAPACITY / 2;

/// How long the tokenizer has to end a call that was closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// An open `StreamDecode`. Dropping it cancels the call.
#[derive(Debug)]
pub struct DecodeStream {
    address: String,
    ids: mpsc::Sender<StreamDecodeRequest>,
    texts: Streaming<StreamDecodeResponse>,
}

// === impl DecodeStream ===

impl DecodeStream {
    /// Opens a stream at one instance. `limit` bounds the wait for its answer; the stream itself ends with the caller.
    pub(super) async fn open(
        mut client: Client,
        address: String,
        open: DecodeOpen,
        caller: Caller<'_>,
        limit: Duration,
    ) -> Result<Self, Status> {
        let (ids, requests) = mpsc::channel(CAPACITY);
        let open = StreamDecodeRequest { request: Some(stream_decode_request::Request::Open(open)) };
        ids.try_send(open).expect("the channel is new and has room");
        let mut request = tonic::Request::new(ReceiverStream::new(requests));
        caller.trace.inject(request.metadata_mut());
        let answer = tokio::time::timeout(limit, client.stream_decode(request)).await;
        let answer = answer.map_err(|_| Status::deadline_exceeded("it did not answer in time"))?;
        Ok(Self { address, ids, texts: answer?.into_inner() })
    }

    /// Asks for the text of further ids.
    ///
    /// # Errors
    /// When the call has ended.
    pub fn ask(&self, ids: DecodeIds) -> Result<(), TokenizerError> {
        let request = StreamDecodeRequest { request: Some(stream_decode_request::Request::Ids(ids)) };
        self.ids.try_send(request).map_err(|_| self.ended())
    }

    /// The next answer. Cancel safe.
    ///
    /// # Errors
    /// When the tokenizer fails or ends the call.
    pub async fn answer(&mut self) -> Result<StreamDecodeResponse, TokenizerError> {
        match self.texts.message().await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(self.ended()),
            Err(status) => {
                Err(TokenizerError::Lost { address: self.address.clone(), cause: status.message().to_owned() })
            }
        }
    }

    /// Ends the call as one that was good: there are no more ids.
    pub async fn close(self) {
        let Self { ids, mut texts, .. } = self;
        drop(ids);
        // What is answered meanwhile is past a stop string.
        let rest = async { while let Ok(Some(_past)) = texts.message().await {} };
        let _cancelled_then = tokio::time::timeout(CLOSE_TIMEOUT, rest).await;
    }

    /// The instance that decodes.
    pub fn address(&self) -> &str {
        &self.address
    }

    fn ended(&self) -> TokenizerError {
        TokenizerError::Lost { address: self.address.clone(), cause: "it ended the stream".to_owned() }
    }
}

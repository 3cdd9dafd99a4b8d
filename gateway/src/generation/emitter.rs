//! An emitter: puts what happens to a request into the order that clients are promised, which is one `Start`, chunks
//! that count from 0 without a gap, one `Finish`.
//!
//! The `Start` waits for the first event that follows it, so that a request which comes to nothing is a plain error
//! and no broken stream.

use std::time::Instant;

use lockstep_proto::v1;

use super::outbox::{Event, Outbox};
use crate::{metrics::Meter, status::Failure};

#[derive(Debug)]
pub(super) struct Emitter<'a> {
    outbox: &'a Outbox,
    meter: &'a Meter,
    /// `None` once it is sent.
    start: Option<v1::Start>,
    prompt_text: Option<String>,
    seq: u64,
    first_token_at: Option<Instant>,
    /// By choice, when its last chunk with tokens was ready.
    last_tokens_at: Vec<Option<Instant>>,
}

// === impl Emitter ===

impl<'a> Emitter<'a> {
    pub(super) fn new(
        outbox: &'a Outbox,
        meter: &'a Meter,
        start: v1::Start,
        prompt_text: Option<String>,
        n: u32,
    ) -> Self {
        let n = usize::try_from(n).unwrap_or(usize::MAX);
        let last_tokens_at = vec![None; n];
        Self { outbox, meter, start: Some(start), prompt_text, seq: 0, first_token_at: None, last_tokens_at }
    }

    /// Adds the log-probabilities of the prompt to the `Start`, if it is not sent yet.
    pub(super) fn set_prompt_logprobs(&mut self, logprobs: Vec<v1::TokenLogprob>) {
        if let Some(start) = &mut self.start {
            start.prompt_logprobs = logprobs;
        }
    }

    /// The worker's first token has come.
    pub(super) fn tokens_came(&mut self) {
        if self.first_token_at.is_none() {
            let now = Instant::now();
            self.first_token_at = Some(now);
            self.meter.first_token(now);
        }
    }

    /// When the first token came.
    pub(super) fn first_token_at(&self) -> Option<Instant> {
        self.first_token_at
    }

    /// Emits a piece of a choice; its `seq` is set here. An empty piece is no event.
    pub(super) async fn chunk(&mut self, chunk: v1::Chunk) -> Result<(), Failure> {
        if chunk.token_ids.is_empty() && chunk.text.is_empty() && chunk.tool_calls.is_empty() {
            return Ok(());
        }
        self.begin().await?;
        if !chunk.token_ids.is_empty() {
            self.time(chunk.choice);
        }
        self.put(chunk).await
    }

    /// Emits the end.
    pub(super) async fn finish(&mut self, finish: v1::Finish) -> Result<(), Failure> {
        self.begin().await?;
        self.outbox.send(Event::Finish(finish)).await
    }

    async fn begin(&mut self) -> Result<(), Failure> {
        let Some(start) = self.start.take() else { return Ok(()) };
        self.outbox.send(Event::Start(start)).await?;
        if let Some(text) = self.prompt_text.take() {
            for choice in (0..).take(self.last_tokens_at.len()) {
                self.put(v1::Chunk { choice, text: text.clone(), ..v1::Chunk::default() }).await?;
            }
        }
        Ok(())
    }

    async fn put(&mut self, chunk: v1::Chunk) -> Result<(), Failure> {
        let seq = self.seq;
        self.seq += 1;
        self.outbox.send(Event::Chunk(v1::Chunk { seq, ..chunk })).await
    }

    fn time(&mut self, choice: u32) {
        let now = Instant::now();
        let last = usize::try_from(choice).ok().and_then(|choice| self.last_tokens_at.get_mut(choice));
        if let Some(before) = last.and_then(|last| last.replace(now)) {
            self.meter.next_tokens(now - before);
        }
    }
}

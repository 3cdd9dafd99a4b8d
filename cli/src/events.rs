//! An [`Event`] is one message of a generated stream, whether a chat or a raw prompt made it.

use std::io::Write;

use lockstep_proto::v1::{
    Chunk, Finish, FinishReason, StreamChatResponse, StreamGenerateResponse, stream_chat_response,
    stream_generate_response,
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use crate::{failure::Failure, target::Target};

/// One message of a stream.
#[derive(Debug)]
pub(crate) enum Event {
    /// The beginning.
    Start,
    /// A piece of a choice.
    Chunk(Chunk),
    /// The end; a stream without it was cut off.
    Finish(Finish),
}

/// A message that is no event, which only a newer or a broken server sends.
#[derive(Debug)]
pub(crate) struct Unknown;

/// What has come of a stream.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// The text of choice 0.
    pub(crate) text: String,
    /// The end; `None` if the stream was left before.
    pub(crate) finish: Option<Finish>,
}

// === impl Event ===

impl TryFrom<StreamChatResponse> for Event {
    type Error = Unknown;

    fn try_from(response: StreamChatResponse) -> Result<Self, Unknown> {
        match response.event.ok_or(Unknown)? {
            stream_chat_response::Event::Start(_) => Ok(Self::Start),
            stream_chat_response::Event::Chunk(chunk) => Ok(Self::Chunk(chunk)),
            stream_chat_response::Event::Finish(finish) => Ok(Self::Finish(finish)),
        }
    }
}

impl TryFrom<StreamGenerateResponse> for Event {
    type Error = Unknown;

    fn try_from(response: StreamGenerateResponse) -> Result<Self, Unknown> {
        match response.event.ok_or(Unknown)? {
            stream_generate_response::Event::Start(_) => Ok(Self::Start),
            stream_generate_response::Event::Chunk(chunk) => Ok(Self::Chunk(chunk)),
            stream_generate_response::Event::Finish(finish) => Ok(Self::Finish(finish)),
        }
    }
}

// === impl Answer ===

impl Answer {
    /// Writes choice 0 as it comes, adding to `self`, so that what has come is known even if the caller stops waiting.
    pub(crate) async fn print<T>(
        &mut self,
        mut stream: impl Stream<Item = Result<T, Status>> + Unpin,
        out: &mut impl Write,
        target: &Target,
    ) -> Result<(), Failure>
    where
        Event: TryFrom<T>,
    {
        while let Some(message) = stream.next().await {
            match Event::try_from(message.map_err(|status| target.failure(&status))?) {
                Ok(Event::Chunk(chunk)) if chunk.choice == 0 => {
                    self.text.push_str(&chunk.text);
                    out.write_all(chunk.text.as_bytes())?;
                    out.flush()?;
                }
                Ok(Event::Finish(finish)) => self.finish = Some(finish),
                Ok(Event::Start | Event::Chunk(_)) | Err(_) => {}
            }
        }
        match self.finish {
            Some(_) => Ok(()),
            None => Err(Failure::Failed("the answer was cut off: its stream ended without a finish".into())),
        }
    }

    /// What a reader should know about the end, where the text alone does not tell.
    pub(crate) fn note(&self) -> Option<&'static str> {
        match self.finish.as_ref()?.choices.first()?.reason() {
            FinishReason::Length => Some("ended at max_new_tokens or the end of the context"),
            FinishReason::Deadline => Some("ended at the deadline"),
            FinishReason::ToolCalls => Some("ended with calls of tools"),
            FinishReason::Stop | FinishReason::Unspecified => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use lockstep_proto::v1::{ChoiceFinish, Start};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        target: Target,
    }

    fn chat(event: stream_chat_response::Event) -> Result<StreamChatResponse, Status> {
        Ok(StreamChatResponse { event: Some(event) })
    }

    fn chunk(choice: u32, text: &str) -> Result<StreamChatResponse, Status> {
        let chunk = Chunk { choice, text: text.into(), ..Chunk::default() };
        chat(stream_chat_response::Event::Chunk(chunk))
    }

    async fn print(messages: Vec<Result<StreamChatResponse, Status>>) -> (Answer, String, Result<(), Failure>) {
        let (mut answer, mut out) = (Answer::default(), Vec::new());
        let target = Line::parse_from(["lockstep"]).target;
        let result = answer.print(tokio_stream::iter(messages), &mut out, &target).await;
        (answer, String::from_utf8(out).unwrap(), result)
    }

    #[tokio::test]
    async fn first_choice_is_printed_as_it_comes() {
        let mut choice = ChoiceFinish::default();
        choice.set_reason(FinishReason::Length);
        let finish = Finish { choices: vec![choice], ..Finish::default() };
        let messages = vec![
            chat(stream_chat_response::Event::Start(Start::default())),
            chunk(0, "Hel"),
            chunk(1, "other"),
            chunk(0, "lo"),
            chat(stream_chat_response::Event::Finish(finish)),
        ];
        let (answer, printed, result) = print(messages).await;
        result.unwrap();
        assert_eq!((answer.text.as_str(), printed.as_str()), ("Hello", "Hello"));
        assert!(answer.note().unwrap().contains("max_new_tokens"));
    }

    #[tokio::test]
    async fn stream_without_an_end_is_a_failure_that_keeps_what_came() {
        let (answer, _, result) = print(vec![chunk(0, "Hel")]).await;
        assert_eq!(answer.text, "Hel");
        assert!(result.unwrap_err().to_string().contains("cut off"));
        let (_, _, result) = print(vec![chunk(0, "Hel"), Err(Status::internal("broken"))]).await;
        assert_eq!(result.unwrap_err().to_string(), "INTERNAL: broken");
    }
}

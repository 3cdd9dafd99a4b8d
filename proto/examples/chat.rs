//! A streamed answer, as a client of the crate's feature `client` alone asks for it:
//! `cargo run -p lockstep-proto --features client --example chat`, with the address in `LOCKSTEP_GRPC`.

use std::{
    env, error,
    io::{self, Write as _},
    time::Duration,
};

use lockstep_proto::{
    client::{self, ClientLimits},
    error::Error,
    v1::{
        ContentPart, Conversation, Message, Role, SamplingParams, StreamChatRequest, content_part::Part,
        inference_service_client::InferenceServiceClient, stream_chat_response::Event,
    },
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn error::Error>> {
    let address = env::var("LOCKSTEP_GRPC").unwrap_or_else(|_| "127.0.0.1:50051".into());
    let limits = ClientLimits::default();
    let channel = client::connect_lazy(&address, &limits)?;
    let mut inference = InferenceServiceClient::new(channel).max_decoding_message_size(limits.max_message_bytes());

    let question = Message {
        role: Role::User.into(),
        content: vec![ContentPart {
            part: Some(Part::Text("What is the capital of France? Answer in one sentence.".into())),
        }],
        ..Message::default()
    };
    let request = StreamChatRequest {
        conversation: Some(Conversation { messages: vec![question], ..Conversation::default() }),
        sampling: Some(SamplingParams { max_new_tokens: Some(32), ..SamplingParams::default() }),
        ..StreamChatRequest::default()
    };
    // The deadline travels to the engine. Dropping the stream cancels the call and frees its place there.
    let call = inference.stream_chat(client::with_deadline(request, Duration::from_secs(60))).await;
    let mut stream = call.map_err(|status| Error::from_status(&status))?.into_inner();
    while let Some(response) = stream.message().await.map_err(|status| Error::from_status(&status))? {
        match response.event {
            Some(Event::Chunk(chunk)) => {
                print!("{}", chunk.text);
                io::stdout().flush()?;
            }
            Some(Event::Finish(finish)) => {
                println!("\n{} tokens", finish.usage.unwrap_or_default().completion_tokens);
                return Ok(());
            }
            Some(Event::Start(_)) | None => {}
        }
    }
    Err("the stream was cut off".into())
}

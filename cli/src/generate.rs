//! `lockstep generate`: one prompt continued, streamed to stdout.

use std::{
    io::{self, Read as _, Write as _},
    process::ExitCode,
};

use clap::Args;
use lockstep_proto::v1::{RawPrompt, StreamGenerateRequest, raw_prompt};

use crate::{
    events::Answer,
    failure::{Done, Failure},
    sampling,
    target::Target,
};

/// Longest prompt that is read from stdin: the contract's limit. Unit: bytes.
const MAX_PROMPT_BYTES: u64 = 4 << 20;

/// What `lockstep generate` takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The prompt, used as it stands; `-` reads it from stdin
    prompt: String,
    /// Name of the model; the only one served may be left out
    #[arg(long, default_value = "")]
    model: String,
    /// Most tokens to generate
    #[arg(long, short = 'n', value_name = "TOKENS")]
    max_new_tokens: Option<u32>,
    /// A sampling parameter, such as temperature=0.2; may be repeated
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = sampling::parse_pair)]
    settings: Vec<(String, String)>,
    #[command(flatten)]
    target: Target,
}

/// Continues the prompt.
pub(crate) async fn run(options: Options) -> Done {
    let prompt = if options.prompt == "-" { read_stdin()? } else { options.prompt };
    let mut sampling = sampling::from_pairs(&options.settings).map_err(Failure::Usage)?;
    sampling.max_new_tokens = options.max_new_tokens.or(sampling.max_new_tokens);
    let request = options.target.request(StreamGenerateRequest {
        model: options.model,
        prompt: Some(RawPrompt { prompt: Some(raw_prompt::Prompt::Text(prompt)) }),
        sampling: Some(sampling),
        output: None,
    })?;
    let stream = options.target.inference()?.stream_generate(request).await;
    let stream = stream.map_err(|status| options.target.failure(&status))?.into_inner();
    let (mut answer, mut out) = (Answer::default(), io::stdout());
    let result = answer.print(stream, &mut out, &options.target).await;
    writeln!(out)?;
    result?;
    if let Some(note) = answer.note() {
        eprintln!("({note})");
    }
    Ok(ExitCode::SUCCESS)
}

fn read_stdin() -> Result<String, Failure> {
    let mut text = Vec::new();
    io::stdin().lock().take(MAX_PROMPT_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_PROMPT_BYTES {
        return Err(Failure::Usage(format!("the prompt on stdin is longer than {MAX_PROMPT_BYTES} bytes")));
    }
    String::from_utf8(text).map_err(|error| {
        Failure::Usage(format!("the prompt on stdin is not UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
    })
}

//! `lockstep embed`: texts become vectors, one line of JSON each.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Args, ValueEnum};
use lockstep_proto::v1::{self, EmbedRequest, Embedding, RawPrompt, raw_prompt};
use serde_json::json;

use crate::{failure::Done, target::Target};

/// What `lockstep embed` takes.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Texts, used as they stand
    #[arg(required = true)]
    texts: Vec<String>,
    /// Name of the model; the only one served may be left out
    #[arg(long, default_value = "")]
    model: String,
    /// How the states of a text's tokens become one
    #[arg(long, value_enum, default_value_t = Pooling::Mean)]
    pooling: Pooling,
    /// Keep so many values of each vector; the model's own width if left out
    #[arg(long, value_name = "VALUES")]
    dimensions: Option<u32>,
    /// Leave vectors as long as they are, instead of scaling them to length 1
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Pooling {
    Mean,
    Last,
}

/// Embeds the texts.
pub(crate) async fn run(options: Options) -> Done {
    let pooling = match options.pooling {
        Pooling::Mean => v1::Pooling::Mean,
        Pooling::Last => v1::Pooling::Last,
    };
    let input = |text| RawPrompt { prompt: Some(raw_prompt::Prompt::Text(text)) };
    let request = options.target.request(EmbedRequest {
        model: options.model,
        inputs: options.texts.into_iter().map(input).collect(),
        pooling: pooling.into(),
        normalize: Some(!options.raw),
        dimensions: options.dimensions,
    })?;
    let response = options.target.inference()?.embed(request).await;
    let response = response.map_err(|status| options.target.failure(&status))?.into_inner();
    let mut out = io::stdout().lock();
    for (index, Embedding { values, prompt_tokens }) in response.embeddings.iter().enumerate() {
        writeln!(out, "{}", json!({ "index": index, "prompt_tokens": prompt_tokens, "values": values }))?;
    }
    Ok(ExitCode::SUCCESS)
}

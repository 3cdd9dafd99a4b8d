//! A prompt: what a request says before the model does, as text and as ids.

use std::{sync::Arc, time::Instant};

use chrono::{NaiveDateTime, Utc};
use lockstep_proto::tokenizer::v1::EncodeInput;

use crate::{
    request::{RequestError, ValidConversation, ValidPrompt},
    status::Failure,
    template::{ChatTemplate, Rendered},
    tokenizer::{Caller, Facts, NoTemplate, Tokenizers},
};

/// Where a prompt comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A conversation, which the model's template renders.
    Conversation(ValidConversation),
    /// A raw prompt.
    Raw(ValidPrompt),
}

/// An encoded prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Its ids; at least one.
    pub ids: Vec<u32>,
    /// Its text, unless it was given as ids.
    pub text: Option<String>,
}

// === impl Source ===

impl Source {
    /// Renders and encodes the prompt, by the caller's time.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses it, no tokenizer answers, or the time is up.
    pub async fn prompt(
        self,
        tokenizers: &Tokenizers,
        facts: &Arc<Facts>,
        caller: Caller<'_>,
    ) -> Result<Prompt, Failure> {
        let encoded = async {
            let (rendered, add_special_tokens) = match self {
                Self::Raw(ValidPrompt::TokenIds(ids)) => return Ok(Prompt { ids, text: None }),
                Self::Raw(ValidPrompt::Text(text)) => (Rendered { text, break_offsets: Vec::new() }, true),
                Self::Conversation(conversation) => (render(facts, conversation).await?, false),
            };
            let Rendered { text, break_offsets } = rendered;
            let input = EncodeInput { text: text.clone(), break_offsets, add_special_tokens };
            let ids = tokenizers.encode(facts, input, caller).await?;
            if ids.is_empty() {
                return Err(RequestError::invalid("prompt", "the text has no tokens").into());
            }
            Ok(Prompt { ids, text: Some(text) })
        };
        let until = tokio::time::Instant::from_std(caller.until);
        tokio::time::timeout_at(until, encoded).await.map_err(|_| Failure::Deadline)?
    }
}

// === impl Prompt ===

impl Prompt {
    /// Its length. Unit: tokens.
    pub fn n_tokens(&self) -> u32 {
        u32::try_from(self.ids.len()).unwrap_or(u32::MAX)
    }
}

/// Renders a short conversation at once, and any other on a thread that may block: it takes longer than a task should.
async fn render(facts: &Arc<Facts>, conversation: ValidConversation) -> Result<Rendered, Failure> {
    let started = Instant::now();
    let rendered = match template(facts)?.render_quickly(&conversation, now()) {
        Some(rendered) => rendered?,
        None => render_apart(Arc::clone(facts), conversation).await?,
    };
    tracing::debug!(n_bytes = rendered.text.len(), took = ?started.elapsed(), "rendered");
    Ok(rendered)
}

async fn render_apart(facts: Arc<Facts>, conversation: ValidConversation) -> Result<Rendered, Failure> {
    let rendering = tokio::task::spawn_blocking(move || Ok(template(&facts)?.render(&conversation, now())?));
    rendering.await.map_err(|panic| Failure::Bug(format!("rendering broke: {panic}")))?
}

fn template(facts: &Facts) -> Result<&ChatTemplate, Failure> {
    let no_template = |why: &NoTemplate| Failure::NoTemplate { model: facts.model().to_owned(), why: why.clone() };
    facts.template().map_err(no_template)
}

/// The time that templates may ask for is UTC, so that every gateway renders the same prompt.
fn now() -> NaiveDateTime {
    Utc::now().naive_utc()
}

//! The facts of a model, as its tokenizer describes it, with what the gateway derives from them once.

use std::collections::HashSet;

use lockstep_proto::tokenizer::v1::GetTokenizerResponse;

use super::Vocabulary;
use crate::template::{ChatTemplate, ControlTokens, TemplateTokens};

/// Why conversations with a model cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoTemplate {
    /// It comes without a chat template.
    #[error("it has no chat template; send it a raw prompt")]
    Missing,
    /// Its template is no use.
    #[error("its chat template cannot be used: {0}")]
    Unusable(String),
}

/// What is known of a model.
#[derive(Debug)]
pub struct Facts {
    model: String,
    description: GetTokenizerResponse,
    template: Result<ChatTemplate, NoTemplate>,
    control_tokens: HashSet<u32>,
    vocabulary: Vocabulary,
}

// === impl Facts ===

impl Facts {
    /// The facts of `model`, its template compiled.
    pub(crate) fn new(model: &str, description: GetTokenizerResponse, vocabulary: Vocabulary) -> Self {
        let template = compile(&description);
        if let Err(error @ NoTemplate::Unusable(_)) = &template {
            tracing::error!(model, %error, "a model cannot chat");
        }
        let control_tokens = description.special_tokens.iter().map(|token| token.id).collect();
        Self { model: model.to_owned(), description, template, control_tokens, vocabulary }
    }

    /// The name that requests use.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Digest of all that decides how text and ids become each other.
    pub fn fingerprint(&self) -> &str {
        &self.description.fingerprint
    }

    /// What the tokenizer says.
    pub fn description(&self) -> &GetTokenizerResponse {
        &self.description
    }

    /// Whether a token stands for structure, not for text.
    pub fn is_control_token(&self, id: u32) -> bool {
        self.control_tokens.contains(&id)
    }

    /// The chat template.
    ///
    /// # Errors
    /// Why there is none.
    pub fn template(&self) -> Result<&ChatTemplate, &NoTemplate> {
        self.template.as_ref()
    }

    /// What each id stands for.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }
}

fn compile(description: &GetTokenizerResponse) -> Result<ChatTemplate, NoTemplate> {
    if description.chat_template.is_empty() {
        return Err(NoTemplate::Missing);
    }
    let special = &description.special_tokens;
    let text_of = |id: Option<u32>| special.iter().find(|token| Some(token.id) == id).map(|token| token.text.clone());
    let tokens = TemplateTokens { bos: text_of(description.bos_token_id), eos: text_of(description.eos_token_id) };
    let control_tokens = ControlTokens::new(special.iter().map(|token| token.text.as_str()))
        .map_err(|error| NoTemplate::Unusable(error.to_string()))?;
    ChatTemplate::compile(&description.chat_template, tokens, control_tokens)
        .map_err(|error| NoTemplate::Unusable(error.to_string()))
}

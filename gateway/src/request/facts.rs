//! The facts of a model are what a request is checked against: sizes, ends of turn and the model's own defaults.

use lockstep_proto::tokenizer::v1::{GenerationDefaults, GetTokenizerResponse};

use crate::{sampling::range, tools::Convention};

/// What is known of a served model. Made once a model, from what its tokenizer service says.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFacts {
    vocab_size: u32,
    context_length: u32,
    eos_token_ids: Vec<u32>,
    has_chat_template: bool,
    convention: Convention,
    defaults: GenerationDefaults,
}

/// A model whose own files contradict themselves or the contract.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FactsError {
    /// A size is zero.
    #[error("the model states no {0}")]
    Missing(&'static str),
    /// An end-of-turn token lies outside the vocabulary.
    #[error("end-of-turn token {id} is not below the vocabulary's size of {vocab_size}")]
    EosOutOfVocabulary {
        /// The token.
        id: u32,
        /// Ids are below this.
        vocab_size: u32,
    },
    /// A default of `generation_config.json` is out of its range.
    #[error("generation default `{name}`: {message}")]
    Default {
        /// The parameter.
        name: &'static str,
        /// What is wrong with it.
        message: String,
    },
}

// === impl ModelFacts ===

impl ModelFacts {
    /// Reads the facts from a tokenizer's description and the length of the context that the workers serve.
    ///
    /// # Errors
    ///
    /// A zero size, an end-of-turn token outside the vocabulary, or a sampling default out of its range.
    pub fn new(tokenizer: &GetTokenizerResponse, context_length: u32) -> Result<Self, FactsError> {
        let vocab_size = tokenizer.vocab_size;
        if vocab_size == 0 {
            return Err(FactsError::Missing("vocabulary size"));
        }
        if context_length == 0 {
            return Err(FactsError::Missing("context length"));
        }
        if let Some(&id) = tokenizer.eos_token_ids.iter().find(|&&id| id >= vocab_size) {
            return Err(FactsError::EosOutOfVocabulary { id, vocab_size });
        }
        let defaults = tokenizer.generation_defaults.unwrap_or_default();
        check_defaults(&defaults)?;
        Ok(Self {
            vocab_size,
            context_length,
            eos_token_ids: tokenizer.eos_token_ids.clone(),
            has_chat_template: !tokenizer.chat_template.is_empty(),
            convention: Convention::of(tokenizer),
            defaults,
        })
    }

    /// Token ids are below this.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Longest prompt and output together. Unit: tokens.
    pub fn context_length(&self) -> u32 {
        self.context_length
    }

    /// Every token that ends a turn or a text.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Whether a conversation can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.has_chat_template
    }

    /// How the model calls tools.
    pub fn convention(&self) -> &Convention {
        &self.convention
    }

    /// The sampling defaults of the model's files, each within its range.
    pub fn defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }
}

fn check_defaults(defaults: &GenerationDefaults) -> Result<(), FactsError> {
    let ranged = [
        ("temperature", defaults.temperature, range::TEMPERATURE),
        ("top_p", defaults.top_p, range::TOP_P),
        ("min_p", defaults.min_p, range::MIN_P),
        ("typical_p", defaults.typical_p, range::TYPICAL_P),
        ("repetition_penalty", defaults.repetition_penalty, range::REPETITION_PENALTY),
    ];
    for (name, value, range) in ranged {
        if let Some(message) = value.and_then(|value| range.refuse(value)) {
            return Err(FactsError::Default { name, message });
        }
    }
    if defaults.max_new_tokens == Some(0) {
        return Err(FactsError::Default { name: "max_new_tokens", message: "0 is not at least 1".into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut GetTokenizerResponse)) -> Result<ModelFacts, String> {
        let mut tokenizer =
            GetTokenizerResponse { vocab_size: 10, eos_token_ids: vec![1, 9], ..GetTokenizerResponse::default() };
        change(&mut tokenizer);
        ModelFacts::new(&tokenizer, 64).map_err(|error| error.to_string())
    }

    #[test]
    fn a_sane_description_is_taken_over() {
        let facts = check(|tokenizer| tokenizer.chat_template = "x".into()).unwrap();
        assert_eq!((facts.vocab_size(), facts.context_length(), facts.eos_token_ids()), (10, 64, &[1, 9][..]));
        assert!(facts.has_chat_template());
    }

    #[test]
    fn contradictions_are_named() {
        assert_eq!(check(|tokenizer| tokenizer.vocab_size = 0), Err("the model states no vocabulary size".into()));
        assert_eq!(
            check(|tokenizer| tokenizer.eos_token_ids.push(10)),
            Err("end-of-turn token 10 is not below the vocabulary's size of 10".into())
        );
        let defaults = GenerationDefaults { top_p: Some(f32::NAN), ..GenerationDefaults::default() };
        assert_eq!(
            check(|tokenizer| tokenizer.generation_defaults = Some(defaults)),
            Err("generation default `top_p`: NaN is not in (0, 1]".into())
        );
    }
}

//! Tools: how a model spells the calls that it makes. Models were trained on one [`Format`] each; what they write in it
//! is read by a [`Reader`](reader::Reader), what they must write is a [`grammar`], and where a template does not show
//! tools, [`prompt`] puts them into the conversation.

pub mod call;
pub mod grammar;
pub mod prompt;
pub mod reader;

use lockstep_proto::tokenizer::v1::{GetTokenizerResponse, SpecialToken};

/// How calls are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Llama 3.1 and its kin: the answer is `{"name": ..., "parameters": ...}`, after `<|python_tag|>` or not.
    Llama,
    /// Hermes, Qwen: `<tool_call>` and `</tool_call>` around `{"name": ..., "arguments": ...}`, anywhere in the answer.
    Hermes,
    /// Mistral: `[TOOL_CALLS]` before a list of `{"name": ..., "arguments": ...}`.
    Mistral,
    /// No model's own: the answer is `{"name": ..., "arguments": ...}`, or a list of such objects.
    Json,
}

/// How a model calls tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Convention {
    /// How calls are spelled.
    pub format: Format,
    /// The control token that begins them, if it is one.
    pub mark: Option<u32>,
    /// Whether the template shows tools to the model.
    pub shown_by_template: bool,
}

// === impl Format ===

impl Format {
    /// The format of a template, by the words that it uses.
    fn of(template: &str) -> Self {
        let formats = [("[TOOL_CALLS]", Self::Mistral), ("<tool_call>", Self::Hermes)];
        let llama = [("<|python_tag|>", Self::Llama), ("ipython", Self::Llama)];
        let known = formats.into_iter().chain(llama).find(|(word, _)| template.contains(word));
        known.map_or(Self::Json, |(_, format)| format)
    }

    /// What stands before calls, if anything does.
    pub fn opening(self) -> Option<&'static str> {
        match self {
            Self::Llama => Some("<|python_tag|>"),
            Self::Hermes => Some("<tool_call>"),
            Self::Mistral => Some("[TOOL_CALLS]"),
            Self::Json => None,
        }
    }

    /// What stands behind each call, if anything does.
    pub fn closing(self) -> Option<&'static str> {
        matches!(self, Self::Hermes).then_some("</tool_call>")
    }

    /// Whether an answer that begins with a call needs no opening.
    pub fn may_be_bare(self) -> bool {
        matches!(self, Self::Llama | Self::Json)
    }

    /// Whether calls may stand in a list.
    pub fn may_be_listed(self) -> bool {
        matches!(self, Self::Mistral | Self::Json)
    }

    /// The name of the arguments.
    pub fn arguments(self) -> &'static str {
        match self {
            Self::Llama => "parameters",
            Self::Hermes | Self::Mistral | Self::Json => "arguments",
        }
    }
}

// === impl Convention ===

impl Convention {
    /// The convention of a model, as its tokenizer describes it.
    pub fn of(tokenizer: &GetTokenizerResponse) -> Self {
        let shown_by_template = tokenizer.chat_template.contains("tools");
        let format = if shown_by_template { Format::of(&tokenizer.chat_template) } else { Format::Json };
        let is_mark = |token: &&SpecialToken| Some(token.text.as_str()) == format.opening();
        let mark = tokenizer.special_tokens.iter().find(is_mark).map(|token| token.id);
        Self { format, mark, shown_by_template }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_in_common_use_are_known() {
        let templates = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/templates");
        let convention = |name: &str, special: &[(u32, &str)]| {
            let chat_template = std::fs::read_to_string(format!("{templates}/{name}.jinja")).unwrap();
            let special_tokens = special.iter().map(|&(id, text)| SpecialToken { id, text: text.into() }).collect();
            Convention::of(&GetTokenizerResponse { chat_template, special_tokens, ..GetTokenizerResponse::default() })
        };
        for (name, special, format, mark) in [
            ("llama-3.1", &[(128_010, "<|python_tag|>")][..], Format::Llama, Some(128_010)),
            ("llama-3.2", &[(128_010, "<|python_tag|>")], Format::Llama, Some(128_010)),
            ("qwen2.5", &[(1, "<|im_end|>")], Format::Hermes, None),
            ("mistral-nemo", &[(9, "[TOOL_CALLS]")], Format::Mistral, Some(9)),
        ] {
            assert_eq!(convention(name, special), Convention { format, mark, shown_by_template: true }, "{name}");
        }
        for name in ["smollm2", "llama-3", "phi-3-mini"] {
            let plain = Convention { format: Format::Json, mark: None, shown_by_template: false };
            assert_eq!(convention(name, &[]), plain, "{name}");
        }
    }
}

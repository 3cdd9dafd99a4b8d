//! A request is what one client call asks for, once nothing in it can be wrong any more.
//!
//! Wire messages end here: each `Valid*` type has one constructor, which reads the wire type once, checks every limit
//! that the `.proto` comments state, the facts of the model and the caps of the policy, and either owns values that
//! need no further check or returns a [`RequestError`] with *every* violation, each under its field's path. What a
//! request may not know before its prompt is encoded (does it fit the context?) is asked of
//! [`ValidSampling::resolve`](crate::sampling::ValidSampling::resolve).

mod conversation;
mod embedding;
mod facts;
mod output;
mod prompt;
mod violations;

use std::sync::Arc;

use lockstep_proto::v1;

pub use conversation::{
    Ending, ValidConversation, ValidDocument, ValidMessage, ValidTool, ValidToolCall, ValidToolChoice,
};
pub(crate) use conversation::{MAX_LISTED, MAX_MESSAGES, MAX_TOOL_NAME_BYTES};
pub use embedding::ValidEmbed;
pub use facts::{FactsError, ModelFacts};
pub(crate) use output::MAX_LOGPROBS;
pub use output::ValidOutput;
pub use prompt::ValidPrompt;
pub use violations::{RequestError, Violation, ViolationKind, Violations};

use crate::{
    sampling::{ModelPolicy, ValidSampling},
    tools::{grammar, reader},
};

/// What a model and its operator allow: all that a constructor must know beside the wire message.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The model's own facts.
    pub facts: &'a ModelFacts,
    /// The policy for this model.
    pub policy: &'a ModelPolicy,
}

/// A `Chat` or `StreamChat` call.
#[derive(Clone, Debug)]
pub struct ValidChat {
    conversation: ValidConversation,
    tools: Option<reader::Rules>,
    sampling: ValidSampling,
    output: ValidOutput,
}

/// A `Generate` or `StreamGenerate` call.
#[derive(Clone, Debug)]
pub struct ValidGenerate {
    prompt: ValidPrompt,
    sampling: ValidSampling,
    output: ValidOutput,
}

/// What a `CountTokens` or `RenderChat` call turns into tokens.
#[derive(Clone, Debug)]
pub enum ValidCount {
    /// A conversation, rendered first.
    Conversation(ValidConversation),
    /// A raw prompt.
    Prompt(ValidPrompt),
}

// === impl ValidChat ===

impl ValidChat {
    /// Checks a conversation with its sampling parameters and output options.
    ///
    /// # Errors
    ///
    /// Every violation of all three parts.
    pub fn new(request: v1::ChatRequest, rules: Rules<'_>) -> Result<Self, RequestError> {
        let mut violations = Violations::default();
        let conversation = ValidConversation::read(request.conversation, rules.facts, &mut violations);
        let mut sampling = ValidSampling::read(request.sampling, rules, &mut violations);
        let output = ValidOutput::read(request.output, rules, &mut violations);
        let tools = read_calls(&conversation, rules.facts, &mut sampling, &mut violations);
        violations.into_result()?;
        Ok(Self { conversation, tools, sampling, output })
    }

    /// What the template sees.
    pub fn conversation(&self) -> &ValidConversation {
        &self.conversation
    }

    /// Which calls of tools are read from the answer, if any may be made.
    pub fn tools(&self) -> Option<&reader::Rules> {
        self.tools.as_ref()
    }

    /// How tokens are chosen.
    pub fn sampling(&self) -> &ValidSampling {
        &self.sampling
    }

    /// What comes back beside the text.
    pub fn output(&self) -> &ValidOutput {
        &self.output
    }
}

/// How calls are read from the answer, if there are tools. Where one must be made, the answer is constrained to that; where
/// a tool is strict, to text or calls.
fn read_calls(
    conversation: &ValidConversation,
    facts: &ModelFacts,
    sampling: &mut ValidSampling,
    violations: &mut Violations,
) -> Option<reader::Rules> {
    let choice = conversation.tool_choice();
    if choice.tools.is_empty() {
        return None;
    }
    if sampling.constraint_path().is_some() {
        violations.invalid("conversation.tools", "the answer's constraint allows no calls of tools");
    }
    let convention = facts.convention().clone();
    if choice.required {
        let grammar = grammar::calls(convention.format, &choice.tools, choice.parallel.unwrap_or(false));
        sampling.constrain(grammar, "conversation.tools");
    } else if choice.tools.iter().any(|tool| tool.strict) || !convention.shown_by_template {
        // A model that nobody taught to call tools may want to, but not know how.
        let grammar = grammar::text_or_calls(&convention, &choice.tools, choice.parallel.unwrap_or(true));
        sampling.constrain(grammar, "conversation.tools");
    }
    let names = choice.tools.iter().map(|tool| tool.name.clone()).collect();
    Some(reader::Rules {
        convention,
        names: Arc::new(names),
        single: choice.parallel == Some(false),
        forced: choice.required,
    })
}

// === impl ValidGenerate ===

impl ValidGenerate {
    /// Checks a raw prompt with its sampling parameters and output options.
    ///
    /// # Errors
    ///
    /// Every violation of all three parts.
    pub fn new(request: v1::GenerateRequest, rules: Rules<'_>) -> Result<Self, RequestError> {
        let mut violations = Violations::default();
        let prompt = ValidPrompt::read(request.prompt, rules.facts, &mut violations);
        let sampling = ValidSampling::read(request.sampling, rules, &mut violations);
        let output = ValidOutput::read(request.output, rules, &mut violations);
        violations.into_result()?;
        Ok(Self { prompt, sampling, output })
    }

    /// What to continue.
    pub fn prompt(&self) -> &ValidPrompt {
        &self.prompt
    }

    /// How tokens are chosen.
    pub fn sampling(&self) -> &ValidSampling {
        &self.sampling
    }

    /// What comes back beside the text.
    pub fn output(&self) -> &ValidOutput {
        &self.output
    }
}

// === impl ValidCount ===

impl ValidCount {
    /// Checks the input of a `CountTokens` call.
    ///
    /// # Errors
    ///
    /// Every violation.
    pub fn new(request: v1::CountTokensRequest, facts: &ModelFacts) -> Result<Self, RequestError> {
        use v1::count_tokens_request::Input;
        let mut violations = Violations::default();
        let valid = match request.input {
            Some(Input::Prompt(prompt)) => Self::Prompt(ValidPrompt::read(Some(prompt), facts, &mut violations)),
            Some(Input::Conversation(conversation)) => {
                Self::Conversation(ValidConversation::read(Some(conversation), facts, &mut violations))
            }
            None => return Err(RequestError::invalid("input", "neither a conversation nor a prompt is set")),
        };
        violations.into_result()?;
        Ok(valid)
    }
}

impl ValidConversation {
    /// Checks the conversation of a `RenderChat` call.
    ///
    /// # Errors
    ///
    /// Every violation.
    pub fn new(request: v1::RenderChatRequest, facts: &ModelFacts) -> Result<Self, RequestError> {
        let mut violations = Violations::default();
        let valid = Self::read(request.conversation, facts, &mut violations);
        violations.into_result()?;
        Ok(valid)
    }
}

// The streamed calls ask for the same things under other names.

impl ValidChat {
    /// Checks a `StreamChat` call; see [`ValidChat::new`].
    ///
    /// # Errors
    ///
    /// Every violation.
    pub fn from_stream(request: v1::StreamChatRequest, rules: Rules<'_>) -> Result<Self, RequestError> {
        let v1::StreamChatRequest { model, conversation, sampling, output } = request;
        Self::new(v1::ChatRequest { model, conversation, sampling, output }, rules)
    }
}

impl ValidGenerate {
    /// Checks a `StreamGenerate` call; see [`ValidGenerate::new`].
    ///
    /// # Errors
    ///
    /// Every violation.
    pub fn from_stream(request: v1::StreamGenerateRequest, rules: Rules<'_>) -> Result<Self, RequestError> {
        let v1::StreamGenerateRequest { model, prompt, sampling, output } = request;
        Self::new(v1::GenerateRequest { model, prompt, sampling, output }, rules)
    }
}

#[cfg(test)]
mod tests;

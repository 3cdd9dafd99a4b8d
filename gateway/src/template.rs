//! A chat template is a model's own Jinja program that turns a conversation into the text the model was trained on.
//!
//! [`ChatTemplate::render`] writes what `apply_chat_template` of Hugging Face's `transformers` (5.23) writes, byte for
//! byte; `tests/data/templates` holds renderings of it to compare with. Beside the text it says where text that came
//! from the request looks like a control token, so that the tokenizer takes it for text ([`control_tokens`] has the
//! exact guarantee).
//!
//! Templates come with model files, which nobody vouches for, so they run in a sandbox: no IO, no clock but the time
//! that the caller gives, no other templates, and a bound on work ([`MAX_FUEL`]), nesting and output
//! ([`MAX_RENDERED_BYTES`]). A template that fails, loops or raises costs its own request an error of one line.

mod context;
pub mod control_tokens;
mod functions;
mod generation_tag;
mod json;
mod marker;
mod python;

use std::{
    io,
    panic::{self, AssertUnwindSafe},
    thread,
};

use chrono::NaiveDateTime;
use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig};

pub(crate) use context::is_reserved_name;
pub use control_tokens::{ControlTokens, ControlTokensError};

use self::{context::Rewrite, functions::Raised, marker::Marker};
use crate::request::{Ending, ValidConversation};

/// Longest template. The longest in common use (gpt-oss) has 17 KB. Unit: bytes.
const MAX_TEMPLATE_BYTES: usize = 1024 * 1024;
/// Longest rendered text, which is the longest that the tokenizer service takes. Unit: bytes.
pub const MAX_RENDERED_BYTES: usize = 4 * 1024 * 1024;
/// Work that one rendering may do. One unit pays for one instruction or for 64 bytes of text that is built, so this
/// also bounds the memory in use at 64 MB. A conversation of 4,096 turns and 4 MiB takes
/// a third of it with Qwen's template.
pub const MAX_FUEL: u64 = 1_000_000;
/// Conversations of so much text, as it came, are first rendered where the caller is. Unit: bytes.
const QUICK_BYTES: usize = 16 * 1024;
/// Work of such a rendering; no conversation of `tests/data/templates` needs more.
const QUICK_FUEL: u64 = 8_192;
/// Stack of such a rendering: what the work pays for, as for [`STACK_BYTES`]. To map one for each rendering would take as
/// long as the rendering; the threads of a runtime that renders should have more than this.
pub const QUICK_STACK_BYTES: usize = 4 * 1024 * 1024;
/// Stack of any other rendering. The engine bounds its own recursion, but not how deeply a template may nest values, and it
/// drops, compares and shows them recursively: the deepest value that [`MAX_FUEL`] pays for, about 600,000 levels,
/// takes between 128 and 256 MB (minijinja 3.1, x86-64, measured for each operation). Pages that are not touched cost
/// nothing.
const STACK_BYTES: usize = 512 * 1024 * 1024;
/// The name under which error messages of the engine know the template.
const NAME: &str = "chat_template";

/// A compiled template with what it must know of its model. Compiled once a model, used from any thread.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The same with less fuel.
    quick: Environment<'static>,
    tokens: TemplateTokens,
    control_tokens: ControlTokens,
    mentions_content: bool,
}

/// The tokens that templates know by name; unset where the model has none.
#[derive(Clone, Debug, Default)]
pub struct TemplateTokens {
    /// `bos_token`.
    pub bos: Option<String>,
    /// `eos_token`.
    pub eos: Option<String>,
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The prompt's text.
    pub text: String,
    /// Byte offsets into the text, ascending, across which no control token may be recognised.
    pub break_offsets: Vec<u32>,
}

/// A template or a conversation that cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template is no Jinja, or too long.
    #[error("chat template: line {line}: {message}")]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// The template refuses the conversation (`raise_exception`).
    #[error("the chat template refuses the conversation: {message} (line {line} of the template)")]
    Raised {
        /// The line, from 1.
        line: usize,
        /// What the template says.
        message: String,
    },
    /// The template fails on the conversation.
    #[error("the chat template fails: {message} (line {line} of the template)")]
    Failed {
        /// The line, from 1; 0 if the engine cannot tell.
        line: usize,
        /// What failed.
        message: String,
    },
    /// The template works without end, or the conversation is far too long for it.
    #[error("the chat template does not end, or the conversation is too long for it")]
    OutOfFuel,
    /// The template writes without end, or breaks the engine.
    #[error("the chat template {0}")]
    OverLimit(&'static str),
    /// `continue_final_message` with a template that does not show the final message's content as it is.
    #[error("the chat template does not show the final message's content, so it cannot be continued")]
    NotContinuable,
    /// Control-token strings of the request that the template would look into or change.
    #[error("a control-token string in the conversation changes what the chat template does, so it is refused")]
    Unguarded,
    /// More control-token strings than a request may hold.
    #[error("the conversation holds more than {0} control-token strings")]
    TooManyControlTokens(usize),
    /// The operating system gave no thread to render on.
    #[error("no thread for the chat template: {0}")]
    Thread(#[source] io::Error),
    /// The operating system gave no random bits for a marker.
    #[error("no random marker: {0}")]
    Entropy(#[from] getrandom::Error),
}

// === impl ChatTemplate ===

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    ///
    /// [`TemplateError::Syntax`] for a template that is no Jinja, or too long.
    pub fn compile(source: &str, tokens: TemplateTokens, control_tokens: ControlTokens) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            let message = format!("{} bytes are over {MAX_TEMPLATE_BYTES}", source.len());
            return Err(TemplateError::Syntax { line: 1, message });
        }
        let mut environment = environment()?;
        environment.add_template_owned(NAME, generation_tag::strip(source)).map_err(syntax_error)?;
        let mut quick = environment.clone();
        quick.set_fuel(Some(QUICK_FUEL));
        Ok(Self { environment, quick, tokens, control_tokens, mentions_content: source.contains("content") })
    }

    /// Renders a conversation. `now` is what the template gets for the time, in the model's own idea of a time zone.
    ///
    /// # Errors
    ///
    /// A template that raises, fails or does not end, a final message that cannot be continued, and control-token
    /// strings that cannot be kept text.
    pub fn render(&self, conversation: &ValidConversation, now: NaiveDateTime) -> Result<Rendered, TemplateError> {
        self.render_by(conversation, now, &|context| self.execute_apart(context))
    }

    /// The same where the caller is, with little work, or not at all: a thread that is woken for a short conversation
    /// takes longer than that.
    ///
    /// # Errors
    ///
    /// See [`Self::render`].
    pub fn render_quickly(
        &self,
        conversation: &ValidConversation,
        now: NaiveDateTime,
    ) -> Option<Result<Rendered, TemplateError>> {
        if conversation.n_bytes() > QUICK_BYTES {
            return None;
        }
        match self.render_by(conversation, now, &|context| self.execute_quickly(context)) {
            Err(TemplateError::OutOfFuel) => None,
            rendered => Some(rendered),
        }
    }

    fn render_by(
        &self,
        conversation: &ValidConversation,
        now: NaiveDateTime,
        execute: &dyn Fn(Value) -> Result<String, TemplateError>,
    ) -> Result<Rendered, TemplateError> {
        let tag = match conversation.ending() {
            Ending::OpenFinalMessage => Some(self.continue_tag(conversation)?),
            Ending::LastTurn | Ending::GenerationPrompt => None,
        };
        let render = |rewrite: &mut Rewrite<'_>| {
            let context = context::build(conversation, &self.tokens, now, tag.as_deref(), rewrite)?;
            let text = execute(context)?;
            match &tag {
                Some(tag) => cut_at_tag(text, tag),
                None => Ok(text),
            }
        };

        let plain = render(&mut |text, _| Ok(text.to_owned()))?;
        if let Some(final_message) = conversation.messages().last().filter(|_| tag.is_some())
            && !plain.contains(python::strip(&final_message.content))
        {
            return Err(TemplateError::NotContinuable);
        }
        let marker = Marker::draw()?;
        let mut guard = self.control_tokens.guard(&marker);
        // Building the context is cheap next to running the template, which is run again only if a marker is in it.
        context::build(conversation, &self.tokens, now, None, &mut |text, place| guard.rewrite(text, place))?;
        if !guard.has_marked() {
            return within_limit(Rendered { text: plain, break_offsets: Vec::new() });
        }
        let mut guard = self.control_tokens.guard(&marker);
        let marked = render(&mut |text, place| guard.rewrite(text, place)).map_err(disturbed)?;
        let guarded = marker.cut(&marked);
        if guarded.text != plain { Err(TemplateError::Unguarded) } else { within_limit(guarded) }
    }

    /// A string that no request can know, to find the end of the final message by. It ends with a space, which tells
    /// whether the template trims the message.
    fn continue_tag(&self, conversation: &ValidConversation) -> Result<String, TemplateError> {
        if !self.mentions_content || conversation.messages().is_empty() {
            return Err(TemplateError::NotContinuable);
        }
        Ok(format!("{} ", Marker::draw()?.digits()))
    }

    /// Runs the template, on a thread of its own for the sake of its stack.
    fn execute_apart(&self, context: Value) -> Result<String, TemplateError> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name(NAME.into()).stack_size(STACK_BYTES);
            let run = || execute(&self.environment, context);
            let rendering = thread.spawn_scoped(scope, run).map_err(TemplateError::Thread)?;
            rendering.join().unwrap_or(Err(BROKEN))
        })
    }

    /// Runs it with little fuel on this thread, which gets a stack for it if its own does not suffice.
    fn execute_quickly(&self, context: Value) -> Result<String, TemplateError> {
        let run = AssertUnwindSafe(|| execute(&self.quick, context));
        let run = || panic::catch_unwind(run);
        stacker::maybe_grow(QUICK_STACK_BYTES, QUICK_STACK_BYTES, run).unwrap_or(Err(BROKEN))
    }
}

const BROKEN: TemplateError = TemplateError::OverLimit("makes the template engine panic");

fn execute(environment: &Environment<'_>, context: Value) -> Result<String, TemplateError> {
    let template = environment.get_template(NAME).map_err(syntax_error)?;
    let mut output = Output::default();
    template.render_captured_to(context, &mut output).map_err(render_error)?;
    // The engine writes whole strings only.
    String::from_utf8(output.bytes).map_err(|_| TemplateError::OverLimit("writes half a character"))
}

fn environment() -> Result<Environment<'static>, TemplateError> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(syntax_error)?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_fuel(Some(MAX_FUEL));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    functions::install(&mut environment);
    Ok(environment)
}

/// Ends the text where the final message ends: at the last tag, and before the white space that the message ended with
/// if the template has trimmed it. A template that shows the message more than once leaves no other tags behind (in
/// `transformers` it does).
fn cut_at_tag(mut text: String, tag: &str) -> Result<String, TemplateError> {
    let Some(at) = text.rfind(tag.trim_end()) else { return Err(TemplateError::NotContinuable) };
    let is_untrimmed = text[at..].starts_with(tag);
    text.truncate(at);
    if !is_untrimmed {
        text.truncate(python::rstrip(&text).len());
    }
    Ok(if text.contains(tag.trim_end()) { text.replace(tag, "").replace(tag.trim_end(), "") } else { text })
}

/// What goes wrong with markers and not without them is the markers' doing, unless a limit was met.
fn disturbed(error: TemplateError) -> TemplateError {
    use TemplateError::{Failed, NotContinuable, Raised};
    if matches!(error, Raised { .. } | Failed { .. } | NotContinuable) { TemplateError::Unguarded } else { error }
}

fn within_limit(rendered: Rendered) -> Result<Rendered, TemplateError> {
    if rendered.text.len() > MAX_RENDERED_BYTES {
        return Err(TemplateError::OverLimit("writes more than 4 MiB"));
    }
    Ok(rendered)
}

fn syntax_error(error: Error) -> TemplateError {
    TemplateError::Syntax { line: error.line().unwrap_or(0), message: one_line(&error) }
}

fn render_error(error: Error) -> TemplateError {
    let line = error.line().unwrap_or(0);
    if let Some(Raised(message)) = std::error::Error::source(&error).and_then(|source| source.downcast_ref()) {
        return TemplateError::Raised { line, message: python::one_line(message) };
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TemplateError::OutOfFuel,
        ErrorKind::WriteFailure => TemplateError::OverLimit("writes more than 4 MiB"),
        _ => TemplateError::Failed { line, message: one_line(&error) },
    }
}

fn one_line(error: &Error) -> String {
    let kind = error.kind();
    python::one_line(&error.detail().map_or_else(|| kind.to_string(), |detail| format!("{kind}: {detail}")))
}

/// A buffer that takes no more than a marked text of the longest length.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_RENDERED_BYTES + marker::MAX_MARKED_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;

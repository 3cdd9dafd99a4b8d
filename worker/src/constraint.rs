//! A constraint says what the text of a choice must be: rank 0 lets only those tokens be chosen that lead there.
//!
//! It is held by llguidance, which needs the bytes of every token. The model's own files say them, and are read when the
//! first constraint comes. Followers know nothing of any of this.
//!
//! In the order in which a request meets them:
//!
//! * [`compiler`]: from a constraint to a [`Matcher`], before the job is admitted; first on trial, in a process of its own
//!   ([`trial`]), since nothing else ends a compilation that takes too long or too much;
//! * [`grammar`]: what llguidance makes of a constraint and a vocabulary, and the limits that it is given;
//! * [`matcher`]: from each token that is chosen to the mask for the next;
//! * [`guide`]: the matcher of one choice, which works on a thread of its own while the next step is computed.

pub mod compiler;
pub mod grammar;
pub mod guide;
pub mod matcher;
pub mod trial;

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Longest constraint, as the contract states it. Unit: bytes.
pub const MAX_BYTES: usize = 65_536;

/// Longest reason for a refusal, which may quote the constraint. Unit: characters.
const MAX_REASON_CHARS: usize = 300;

/// Stack of the threads on which llguidance works, which goes down a grammar by recursion. The deepest grammar of
/// [`MAX_BYTES`], a chain of 8,000 rules, takes some 30 MiB. Only what is used becomes memory.
const STACK_BYTES: usize = 128 << 20;

/// What a text must be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Constraint {
    /// A JSON value that a JSON Schema accepts.
    JsonSchema(String),
    /// What a regular expression matches as a whole.
    Regex(String),
    /// What a grammar in llguidance's form of Lark derives.
    Lark(String),
}

/// Why a constraint is not held.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConstraintError {
    /// It makes no sense, or is too much. `field` is its field in the contract.
    #[error("{field}: {reason}")]
    Refused {
        /// Its field in the contract.
        field: &'static str,
        /// Why, in one line.
        reason: String,
    },
    /// The bytes of the model's tokens are not known.
    #[error("this model takes no constraints: {0}")]
    NoVocabulary(String),
    /// Too many are being compiled.
    #[error("too many constraints are being compiled")]
    Busy,
    /// The operating system does not do what is needed.
    #[error("a constraint could not be compiled: {0}")]
    System(String),
}

// === impl Constraint ===

impl Constraint {
    /// Its field in the contract.
    pub fn field(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "sampling.constraint.json_schema",
            Self::Regex(_) => "sampling.constraint.regex",
            Self::Lark(_) => "sampling.constraint.lark",
        }
    }

    /// What it says.
    pub fn text(&self) -> &str {
        match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text,
        }
    }
}

/// What llguidance says, in one line of bounded length.
fn one_line(error: &impl std::fmt::Display) -> String {
    let text = error.to_string().replace("<non-verbose/>", "");
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_REASON_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// A time as messages have it.
fn millis(duration: Duration) -> String {
    format!("{} ms", duration.as_millis())
}

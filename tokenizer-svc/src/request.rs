//! Requests, checked: what is wrong with a request is found here, and past here there is nothing wrong with it but
//! ids, which are checked as they are looked up.

use lockstep_proto::{
    error::{Error, Reason},
    tokenizer::v1::{DecodeRequest, EncodeInput, EncodeRequest},
};

use crate::{error::TokenizeError, tokenizer::Breaks};

/// Most texts of one request.
const MAX_INPUTS: usize = 1024;

/// Longest text. Unit: bytes.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// Most lists of ids of one request.
const MAX_LISTS: usize = 4096;

/// A text to encode.
#[derive(Debug)]
pub(crate) struct ValidInput {
    text: String,
    breaks: Breaks,
    add_special_tokens: bool,
}

/// Lists of ids to decode.
#[derive(Debug)]
pub(crate) struct ValidDecode {
    lists: Vec<Vec<u32>>,
    skip_special_tokens: bool,
}

// === impl ValidInput ===

impl ValidInput {
    /// The texts of a request.
    ///
    /// # Errors
    /// Names the first field that breaks the contract.
    pub(crate) fn all(request: EncodeRequest) -> Result<Vec<Self>, Error> {
        check_count("inputs", request.inputs.len(), 1, MAX_INPUTS)?;
        request.inputs.into_iter().enumerate().map(|(idx, input)| Self::new(idx, input)).collect()
    }

    fn new(idx: usize, input: EncodeInput) -> Result<Self, Error> {
        let EncodeInput { text, break_offsets, add_special_tokens } = input;
        if text.len() > MAX_TEXT_BYTES {
            let message = format!("has {} bytes, at most {MAX_TEXT_BYTES} are allowed", text.len());
            return Err(invalid(format!("inputs[{idx}].text"), message));
        }
        let breaks =
            Breaks::new(break_offsets, text.len()).map_err(|e| tokenize_error(&format!("inputs[{idx}]"), &e))?;
        Ok(Self { text, breaks, add_special_tokens })
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn breaks(&self) -> &Breaks {
        &self.breaks
    }

    pub(crate) fn add_special_tokens(&self) -> bool {
        self.add_special_tokens
    }
}

// === impl ValidDecode ===

impl ValidDecode {
    /// # Errors
    /// If there are no lists, or too many.
    pub(crate) fn new(request: DecodeRequest) -> Result<Self, Error> {
        check_count("inputs", request.inputs.len(), 1, MAX_LISTS)?;
        let lists = request.inputs.into_iter().map(|list| list.ids).collect();
        Ok(Self { lists, skip_special_tokens: request.skip_special_tokens })
    }

    pub(crate) fn lists(&self) -> &[Vec<u32>] {
        &self.lists
    }

    pub(crate) fn skip_special_tokens(&self) -> bool {
        self.skip_special_tokens
    }
}

/// A request that breaks the contract in one field.
pub(crate) fn invalid(path: impl Into<String>, message: impl Into<String>) -> Error {
    let (path, message) = (path.into(), message.into());
    Error::new(Reason::InvalidArgument, format!("{path}: {message}")).violation(path, message)
}

/// What the tokenizer refused, at the field under `path` that it stood in.
pub(crate) fn tokenize_error(path: &str, error: &TokenizeError) -> Error {
    match error {
        TokenizeError::BreakOffset { idx, .. } => invalid(format!("{path}.break_offsets[{idx}]"), error.to_string()),
        TokenizeError::BlankRun { .. } => invalid(format!("{path}.text"), error.to_string()),
        TokenizeError::TokenId { idx, .. } => invalid(format!("{path}[{idx}]"), error.to_string()),
        TokenizeError::Pipeline(_) => Error::new(Reason::Internal, error.to_string()),
    }
}

fn check_count(path: &str, count: usize, min: usize, max: usize) -> Result<(), Error> {
    if (min..=max).contains(&count) {
        return Ok(());
    }
    Err(invalid(path, format!("is {count} or has {count} entries, the range is {min} to {max}")))
}

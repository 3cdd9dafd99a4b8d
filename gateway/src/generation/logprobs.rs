//! Log-probabilities with the texts of their tokens: the worker knows ids alone.

use lockstep_proto::{
    v1::{LogprobEntry, TokenLogprob},
    worker::v1::{Logprob, TokenLogprobs},
};

use crate::tokenizer::{UnknownToken, Vocabulary};

/// Gives the tokens of log-probabilities their texts.
pub(super) fn with_texts(from: &[TokenLogprobs], vocabulary: &Vocabulary) -> Result<Vec<TokenLogprob>, UnknownToken> {
    let entry = |logprob: &Logprob| {
        let raw = vocabulary.bytes(logprob.token_id)?.to_vec();
        let text = String::from_utf8_lossy(&raw).into_owned();
        Ok(LogprobEntry { token_id: logprob.token_id, text, raw, logprob: logprob.logprob })
    };
    let of_token = |from: &TokenLogprobs| {
        let token = from.token.as_ref().map(entry).transpose()?;
        Ok(TokenLogprob { token, top: from.top.iter().map(entry).collect::<Result<_, _>>()? })
    };
    from.iter().map(of_token).collect()
}

/// The prompt's log-probabilities: the worker's, and before them 0 for the first token, which nothing predicts.
pub(super) fn of_prompt(first: u32, rest: Vec<TokenLogprobs>) -> Vec<TokenLogprobs> {
    let first = TokenLogprobs { token: Some(Logprob { token_id: first, logprob: 0.0 }), top: Vec::new() };
    std::iter::once(first).chain(rest).collect()
}

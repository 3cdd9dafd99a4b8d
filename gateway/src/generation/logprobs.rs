//! Log-probabilities with the texts of their tokens: the worker knows ids alone.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use lockstep_proto::{
    v1::{LogprobEntry, TokenLogprob},
    worker::v1::{Logprob, TokenLogprobs},
};

use crate::tokenizer::{Caller, Facts, TokenText, TokenizerError, Tokenizers};

/// Gives the tokens of log-probabilities their texts.
pub(super) async fn with_texts(
    logprobs: &[TokenLogprobs],
    tokenizers: &Tokenizers,
    facts: &Facts,
    caller: Caller<'_>,
) -> Result<Vec<TokenLogprob>, TokenizerError> {
    let all = logprobs.iter().flat_map(|entry| entry.token.iter().chain(&entry.top));
    let ids: BTreeSet<u32> = all.map(|entry| entry.token_id).collect();
    let texts = tokenizers.token_texts(facts, &ids, caller).await?;
    Ok(logprobs.iter().map(|entry| token_logprob(entry, &texts)).collect())
}

/// The prompt's log-probabilities: the worker's, and before them 0 for the first token, which nothing predicts.
pub(super) fn of_prompt(first: u32, rest: Vec<TokenLogprobs>) -> Vec<TokenLogprobs> {
    let first = TokenLogprobs { token: Some(Logprob { token_id: first, logprob: 0.0 }), top: Vec::new() };
    std::iter::once(first).chain(rest).collect()
}

fn token_logprob(from: &TokenLogprobs, texts: &HashMap<u32, Arc<TokenText>>) -> TokenLogprob {
    let entry = |logprob: &Logprob| {
        let known = texts.get(&logprob.token_id);
        let (text, raw) = known.map(|known| (known.text.clone(), known.raw.clone())).unwrap_or_default();
        LogprobEntry { token_id: logprob.token_id, text, raw, logprob: logprob.logprob }
    };
    TokenLogprob { token: from.token.as_ref().map(entry), top: from.top.iter().map(entry).collect() }
}

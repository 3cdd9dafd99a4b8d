//! Log-probabilities in the two forms that OpenAI has: a list of entries for chats, parallel lists for completions.

use std::collections::BTreeMap;

use lockstep_proto::v1::{LogprobEntry, TokenLogprob};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Number, Value};

/// Those of a chat's choice.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub(super) struct ChatLogprobs {
    content: Vec<ChatEntry>,
    refusal: Option<()>,
}

/// A token of the answer, and the most probable ones in its place.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[schemars(rename = "ChatLogprob")]
struct ChatEntry {
    #[serde(flatten)]
    token: Entry,
    top_logprobs: Vec<Entry>,
}

/// A token, its log-probability and its bytes, which need not be whole characters.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[schemars(rename = "TokenLogprob")]
struct Entry {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// Those of a completion's choice.
#[derive(Debug, Clone, Default, PartialEq, Serialize, JsonSchema)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f64>>,
    #[schemars(with = "Vec<Option<BTreeMap<String, Option<f64>>>>")]
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

// === impl ChatLogprobs ===

impl ChatLogprobs {
    /// What a chat shows of these.
    pub(super) fn new(logprobs: Vec<TokenLogprob>) -> Self {
        let entry = |entry: TokenLogprob| ChatEntry {
            token: Entry::from(entry.token.unwrap_or_default()),
            top_logprobs: entry.top.into_iter().map(Entry::from).collect(),
        };
        Self { content: logprobs.into_iter().map(entry).collect(), refusal: None }
    }
}

impl From<LogprobEntry> for Entry {
    fn from(entry: LogprobEntry) -> Self {
        Self { token: entry.text, logprob: entry.logprob, bytes: entry.raw }
    }
}

// === impl CompletionLogprobs ===

impl CompletionLogprobs {
    /// What a completion shows of these. Its text begins at `offset`, in characters of the whole text.
    pub(super) fn new(logprobs: Vec<TokenLogprob>, mut offset: usize) -> Self {
        let mut lists = Self::default();
        for entry in logprobs {
            let token = entry.token.unwrap_or_default();
            lists.text_offset.push(offset);
            offset += token.text.chars().count();
            // Clients compare it with those of `top`, so that both are written with the same digits.
            lists.token_logprobs.push(Some(token.logprob.into()));
            lists.tokens.push(token.text);
            lists.top_logprobs.push(Some(by_text(entry.top)));
        }
        lists
    }

    /// The same for a prompt, whose first token nothing predicts.
    pub(super) fn of_prompt(logprobs: Vec<TokenLogprob>) -> Self {
        let mut lists = Self::new(logprobs, 0);
        if let (Some(logprob), Some(top)) = (lists.token_logprobs.first_mut(), lists.top_logprobs.first_mut()) {
            (*logprob, *top) = (None, None);
        }
        lists
    }

    /// How much text these tokens are. Unit: characters.
    pub(super) fn text_len(&self) -> usize {
        self.tokens.iter().map(|token| token.chars().count()).sum()
    }

    /// Appends what follows.
    pub(super) fn extend(&mut self, next: Self) {
        self.tokens.extend(next.tokens);
        self.token_logprobs.extend(next.token_logprobs);
        self.top_logprobs.extend(next.top_logprobs);
        self.text_offset.extend(next.text_offset);
    }
}

/// The most probable tokens by their texts, of which parts of characters share one: the most probable of them has it.
fn by_text(top: Vec<LogprobEntry>) -> Map<String, Value> {
    let mut texts = Map::new();
    for LogprobEntry { text, logprob, .. } in top {
        texts.entry(text).or_insert_with(|| Number::from_f64(logprob.into()).map_or(Value::Null, Value::Number));
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completion_s_numbers_are_equal_where_they_mean_the_same() {
        let entry = |text: &str, logprob| LogprobEntry { text: text.into(), logprob, ..LogprobEntry::default() };
        let top = vec![entry("\u{fffd}", -0.1), entry("a", -0.2), entry("\u{fffd}", -0.3)];
        let lists = CompletionLogprobs::new(vec![TokenLogprob { token: Some(entry("a", -0.2)), top }], 3);
        let json = serde_json::to_value(lists).unwrap();
        assert_eq!(json["token_logprobs"][0], json["top_logprobs"][0]["a"]);
        assert_eq!(json["top_logprobs"][0]["\u{fffd}"], f64::from(-0.1_f32));
        assert_eq!(json["text_offset"][0], 3);
    }
}

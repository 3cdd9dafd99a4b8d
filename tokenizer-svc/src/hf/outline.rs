//! An outline of a `tokenizer.json`: its sizes, counted before the tokenizers library builds anything from it.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use crate::tokenizer::{MAX_MERGES, MAX_VOCAB_SIZE};

#[derive(Deserialize)]
struct Outline {
    model: Model,
    #[serde(default)]
    added_tokens: Count,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    vocab: Count,
    #[serde(default)]
    merges: Count,
}

/// The number of entries of a list or a map whose content does not matter.
#[derive(Debug, Default, Clone, Copy)]
struct Count(usize);

/// Refuses a description with more entries than we want to hold.
///
/// # Errors
/// What is wrong, in one line: it is no JSON, has no model, or is too large.
pub(super) fn check(description: &[u8]) -> Result<(), String> {
    let outline: Outline = serde_json::from_slice(description).map_err(|e| e.to_string())?;
    let counts = [
        ("tokens", outline.model.vocab, MAX_VOCAB_SIZE),
        ("merges", outline.model.merges, MAX_MERGES),
        ("added tokens", outline.added_tokens, MAX_VOCAB_SIZE),
    ];
    match counts.into_iter().find(|(_, count, limit)| count.0 > *limit) {
        Some((what, count, limit)) => Err(format!("it has {} {what}, the limit is {limit}", count.0)),
        None => Ok(()),
    }
}

// === impl Count ===

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Counting;
        impl<'de> Visitor<'de> for Counting {
            type Value = Count;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list or a map")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Count, A::Error> {
                let mut count = 0;
                while entries.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Count(count))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Count, A::Error> {
                let mut count = 0;
                while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Count(count))
            }
        }
        deserializer.deserialize_any(Counting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_entries_are_refused_by_name() {
        let check = |merges: usize, expected: Result<(), &str>| {
            let merges = vec!["0"; merges].join(",");
            let json = format!(r#"{{"model": {{"vocab": {{"a": [1]}}, "merges": [{merges}]}}}}"#);
            assert_eq!(check(json.as_bytes()), expected.map_err(str::to_owned));
        };
        check(MAX_MERGES, Ok(()));
        check(MAX_MERGES + 1, Err("it has 4194305 merges, the limit is 4194304"));
    }

    #[test]
    fn what_is_no_description_is_refused() {
        for (json, expected) in [("[", "EOF while parsing"), ("{}", "missing field `model`"), ("", "EOF")] {
            let refusal = check(json.as_bytes()).unwrap_err();
            assert!(refusal.contains(expected), "{refusal}");
        }
    }
}

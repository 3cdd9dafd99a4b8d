//! Raw prompts, in the four forms that the protocol has: a text, texts, the ids of one prompt, lists of ids.

use lockstep_proto::v1::{self, raw_prompt::Prompt};
use schemars::{JsonSchema, Schema};
use serde::Deserialize;
use serde_json::json;

use crate::{json::OneOrMany, request::RequestError};

/// One of several prompts, or one token of the only one.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a string, a token id, or a list of token ids")]
#[schemars(inline)]
pub(super) enum PromptItem {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

/// The schema of such prompts, at most so many.
pub(super) fn bound_prompts(prompts: &mut Schema, most: usize) {
    let id = json!({ "type": "integer", "format": "uint32", "minimum": 0, "maximum": u32::MAX });
    let ids = json!({ "type": "array", "items": id, "minItems": 1 });
    let several = json!({ "anyOf": [{ "type": "string" }, ids] });
    let list = json!({ "type": "array", "items": several, "minItems": 1, "maxItems": most });
    prompts.insert("anyOf".into(), json!([{ "type": "string" }, ids, list]));
}

/// A list is either of prompts, or of the ids of one.
pub(super) fn prompts(name: &str, prompt: &OneOrMany<PromptItem>, most: usize) -> Result<Vec<Prompt>, RequestError> {
    let ids = |ids: Vec<u32>| Prompt::TokenIds(v1::TokenIds { ids });
    let items = match prompt {
        OneOrMany::One(text) => return Ok(vec![Prompt::Text(text.clone())]),
        OneOrMany::Many(items) => items,
    };
    let tokens: Vec<u32> =
        items.iter().filter_map(|item| if let PromptItem::Token(id) = item { Some(*id) } else { None }).collect();
    if !tokens.is_empty() {
        if tokens.len() < items.len() {
            return Err(RequestError::invalid(name, "it has token ids beside whole prompts"));
        }
        return Ok(vec![ids(tokens)]);
    }
    if items.is_empty() || items.len() > most {
        return Err(RequestError::invalid(name, format!("{} prompts are not in [1, {most}]", items.len())));
    }
    let prompt = |item: &PromptItem| match item {
        PromptItem::Text(text) => Prompt::Text(text.clone()),
        PromptItem::Tokens(tokens) => ids(tokens.clone()),
        PromptItem::Token(id) => ids(vec![*id]),
    };
    Ok(items.iter().map(prompt).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::parse;

    fn read(text: &str) -> Result<Vec<Prompt>, String> {
        let items = parse::<OneOrMany<PromptItem>>(text.as_bytes()).map_err(|error| error.to_string())?;
        prompts("prompt", &items, 128).map_err(|error| error.to_string())
    }

    #[test]
    fn all_four_forms_of_a_prompt_are_read() {
        let ids = |ids: &[u32]| Prompt::TokenIds(v1::TokenIds { ids: ids.to_vec() });
        assert_eq!(read(r#""a""#), Ok(vec![Prompt::Text("a".into())]));
        assert_eq!(read(r#"["a", "b"]"#), Ok(vec![Prompt::Text("a".into()), Prompt::Text("b".into())]));
        assert_eq!(read("[1, 2]"), Ok(vec![ids(&[1, 2])]));
        assert_eq!(read("[[1, 2], [3]]"), Ok(vec![ids(&[1, 2]), ids(&[3])]));
    }

    #[test]
    fn other_prompts_are_refused_by_name() {
        for (text, expected) in [
            ("1", "body: invalid type: integer `1`, expected a string or a list"),
            ("[]", "prompt: 0 prompts are not in [1, 128]"),
            (r#"[1, "a"]"#, "prompt: it has token ids beside whole prompts"),
            ("[-1]", "[0]: a string, a token id, or a list of token ids"),
            ("[{}]", "[0]: a string, a token id, or a list of token ids"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}

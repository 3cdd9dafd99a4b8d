//! The context of a rendering is the set of variables that its template sees, in the shape of `apply_chat_template`.
//!
//! | variable | value |
//! |---|---|
//! | `messages` | `role`, `content`; `name`, `tool_calls`, `tool_call_id` only where the turn has them |
//! | `tools` | OpenAI's `{"type": "function", "function": {…}}`, or none |
//! | `documents` | `{"title", "text"}`, or none |
//! | `add_generation_prompt` | as the request ends |
//! | `bos_token`, `eos_token` | only where the model has them |
//! | `strftime_now` | a function of the time that the caller gave |
//!
//! and the request's own variables under any other name.

use chrono::NaiveDateTime;
use minijinja::Value;
use serde_json::{Map, Value as Json};

use super::{TemplateError, TemplateTokens, functions};
use crate::request::{Ending, ValidConversation, ValidMessage, ValidTool, ValidToolCall};

/// What a user string is, which decides how a marker may change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Content or a document: templates show it and seldom look into it.
    Prose,
    /// A name, an id, a description, a key or a string in JSON: templates may compare it.
    Name,
}

/// What each user string becomes on its way into the context.
pub(super) type Rewrite<'a> = dyn FnMut(&str, Place) -> Result<String, TemplateError> + 'a;

/// Names that a request's own variables may not have: they would replace what the template relies on.
const RESERVED: [&str; 18] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "raise_exception",
    "strftime_now",
    "namespace",
    "range",
    "dict",
    "loop",
];

/// Whether a request may not set a template variable of this name.
pub(crate) fn is_reserved_name(name: &str) -> bool {
    RESERVED.contains(&name)
}

/// Builds the context. `tag` is put after the content of the last message.
pub(super) fn build(
    conversation: &ValidConversation,
    tokens: &TemplateTokens,
    now: NaiveDateTime,
    tag: Option<&str>,
    rewrite: &mut Rewrite<'_>,
) -> Result<Value, TemplateError> {
    let last = conversation.messages().len().saturating_sub(1);
    let mut messages = Vec::with_capacity(conversation.messages().len());
    for (index, message) in conversation.messages().iter().enumerate() {
        messages.push(message_value(message, tag.filter(|_| index == last), rewrite)?);
    }
    let mut pairs = Vec::new();
    for (name, value) in conversation.variables() {
        pairs.push((name.clone(), json_value(value, rewrite)?));
    }
    let tools = some_list(conversation.tools(), |tool| tool_value(tool, rewrite))?;
    let documents = some_list(conversation.documents(), |document| {
        let title = rewrite(&document.title, Place::Prose)?;
        Ok(Value::from_pairs([("title", title), ("text", rewrite(&document.text, Place::Prose)?)]))
    })?;
    let own = [
        ("messages", Value::from(messages)),
        ("tools", tools),
        ("documents", documents),
        ("add_generation_prompt", Value::from(conversation.ending() == Ending::GenerationPrompt)),
        ("strftime_now", functions::strftime(now)),
    ];
    pairs.extend(own.map(|(name, value)| (name.to_owned(), value)));
    let named = [("bos_token", &tokens.bos), ("eos_token", &tokens.eos)];
    pairs.extend(named.into_iter().filter_map(|(name, token)| Some((name.to_owned(), Value::from(token.as_deref()?)))));
    Ok(Value::from_pairs(pairs))
}

fn message_value(message: &ValidMessage, tag: Option<&str>, rewrite: &mut Rewrite<'_>) -> Result<Value, TemplateError> {
    let mut content = rewrite(&message.content, Place::Prose)?;
    content.push_str(tag.unwrap_or_default());
    let mut pairs = vec![("role", Value::from(message.role)), ("content", Value::from(content))];
    if !message.name.is_empty() {
        pairs.push(("name", Value::from(rewrite(&message.name, Place::Name)?)));
    }
    if !message.tool_calls.is_empty() {
        pairs.push(("tool_calls", some_list(&message.tool_calls, |call| tool_call_value(call, rewrite))?));
    }
    if !message.tool_call_id.is_empty() {
        pairs.push(("tool_call_id", Value::from(rewrite(&message.tool_call_id, Place::Name)?)));
    }
    Ok(Value::from_pairs(pairs))
}

fn tool_call_value(call: &ValidToolCall, rewrite: &mut Rewrite<'_>) -> Result<Value, TemplateError> {
    let name = Value::from(rewrite(&call.name, Place::Name)?);
    let function = Value::from_pairs([("name", name), ("arguments", object_value(&call.arguments, rewrite)?)]);
    let mut pairs = vec![("type", Value::from("function")), ("function", function)];
    if !call.id.is_empty() {
        pairs.insert(0, ("id", Value::from(rewrite(&call.id, Place::Name)?)));
    }
    Ok(Value::from_pairs(pairs))
}

fn tool_value(tool: &ValidTool, rewrite: &mut Rewrite<'_>) -> Result<Value, TemplateError> {
    let mut pairs = vec![("name", Value::from(rewrite(&tool.name, Place::Name)?))];
    if !tool.description.is_empty() {
        pairs.push(("description", Value::from(rewrite(&tool.description, Place::Name)?)));
    }
    pairs.push(("parameters", object_value(&tool.parameters, rewrite)?));
    Ok(Value::from_pairs([("type", Value::from("function")), ("function", Value::from_pairs(pairs))]))
}

/// A list, or none for an empty one, as `apply_chat_template` passes what it is not given.
fn some_list<T>(items: &[T], convert: impl FnMut(&T) -> Result<Value, TemplateError>) -> Result<Value, TemplateError> {
    if items.is_empty() {
        return Ok(Value::from(()));
    }
    Ok(Value::from(items.iter().map(convert).collect::<Result<Vec<_>, _>>()?))
}

/// Recursion ends with the JSON, which serde_json reads no deeper than 128.
fn json_value(json: &Json, rewrite: &mut Rewrite<'_>) -> Result<Value, TemplateError> {
    Ok(match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => number_value(number),
        Json::String(text) => Value::from(rewrite(text, Place::Name)?),
        Json::Array(items) => {
            Value::from(items.iter().map(|item| json_value(item, rewrite)).collect::<Result<Vec<_>, _>>()?)
        }
        Json::Object(object) => object_value(object, rewrite)?,
    })
}

fn object_value(object: &Map<String, Json>, rewrite: &mut Rewrite<'_>) -> Result<Value, TemplateError> {
    let mut pairs = Vec::with_capacity(object.len());
    for (key, value) in object {
        pairs.push((rewrite(key, Place::Name)?, json_value(value, rewrite)?));
    }
    Ok(Value::from_pairs(pairs))
}

fn number_value(number: &serde_json::Number) -> Value {
    match (number.as_i64(), number.as_u64()) {
        (Some(value), _) => Value::from(value),
        (None, Some(value)) => Value::from(value),
        (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
    }
}

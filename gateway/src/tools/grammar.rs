//! The grammar of an answer that must call a tool, or may, in llguidance's form of Lark: a model that is held to it writes
//! a valid call however small it is.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::{Convention, Format};
use crate::{request::ValidTool, sampling::closed};

/// Most calls of an answer that may have several: a model that is made to call tools may not know when to stop.
const MAX_CALLS: u32 = 8;

/// The grammar of calls of these tools, one call or up to eight.
pub fn calls(format: Format, tools: &[ValidTool], several: bool) -> String {
    // A control token has no spelling, and what must be a call needs no sign that it is one.
    match format {
        Format::Hermes => grammar("opening calls", &literal("<tool_call>"), format, tools, several),
        Format::Llama | Format::Mistral | Format::Json => grammar("calls", "", format, tools, several),
    }
}

/// The grammar of text, of calls, or of text before calls. A [`Reader`](super::reader::Reader) finds no calls in it but
/// those that the tools take: text does not contain what begins calls, nor control tokens.
pub fn text_or_calls(convention: &Convention, tools: &[ValidTool], several: bool) -> String {
    let &Convention { format, mark, .. } = convention;
    let text = match format {
        Format::Llama => r"/(?s:\s*([^{\s].*)?)/",
        Format::Json => r"/(?s:\s*([^{\[\s].*)?)/",
        Format::Hermes | Format::Mistral => "ANY",
    };
    let bare = if format.may_be_bare() { r#" | " "? calls"# } else { "" };
    let (opening, opened, terminals) = match (mark, format.opening().map(literal)) {
        (Some(id), _) => (format!("<[{id}]>"), " | TEXT opening calls", format!("TEXT: {text}\n")),
        // A terminal is as long as it can be: one that ended before the opening would swallow the beginning of that.
        (None, Some(word)) => {
            let terminals = format!("TEXT: {text} & ~(ANY {word} ANY)\nOPENED: TEXT {word}\n");
            (word, " | OPENED calls", terminals)
        }
        (None, None) => (String::new(), "", format!("TEXT: {text}\n")),
    };
    // One call will do for a model that nobody taught to make several.
    let several = several && format != Format::Json;
    let rules = grammar(&format!("TEXT{bare}{opened}"), &opening, format, tools, several);
    format!("{rules}{terminals}ANY: /(?s:.*)/\n")
}

/// The rules of calls. `opening` is what stands before them or, in Hermes' format, before each: then the first one's is up
/// to `start`.
fn grammar(start: &str, opening: &str, format: Format, tools: &[ValidTool], several: bool) -> String {
    let further = |separator: &str| match several {
        true => format!(" ({separator} call){{0,{}}}", MAX_CALLS - 1),
        false => String::new(),
    };
    let calls = match format {
        Format::Llama => format!("call{}", further(r#""; ""#)),
        Format::Hermes => format!("call{}", further(r#""\n" opening"#)),
        Format::Mistral => format!("\"[\" call{} \"]\"", further(r#"", ""#)),
        Format::Json if several => format!("call | \"[\" call{} \"]\"", further(r#"", ""#)),
        Format::Json => "call".to_owned(),
    };
    let object = (0..tools.len()).map(|index| format!("object_{index}")).collect::<Vec<_>>().join(" | ");
    let call = match format {
        Format::Hermes => format!(r#""\n" ({object}) "\n</tool_call>""#),
        _ => object,
    };
    let mut lark = format!("start: {start}\ncalls: {calls}\ncall: {call}\n");
    if !opening.is_empty() {
        // Writing to a string cannot fail.
        let _ = writeln!(lark, "opening: {opening}");
    }
    for (index, tool) in tools.iter().enumerate() {
        let head = format!(r#"{{"name": {}, "{}": "#, Value::from(tool.name.as_str()), format.arguments());
        let _ = writeln!(lark, "object_{index}: {} arguments_{index} \"}}\"", literal(&head));
        let _ = writeln!(lark, "arguments_{index}: %json {}", closed(Value::Object(schema(&tool.parameters))));
    }
    lark
}

/// The schema of a tool's arguments, as they are written: on one line, and without what the schema does not name.
fn schema(parameters: &Map<String, Value>) -> Map<String, Value> {
    let mut schema = parameters.clone();
    schema.entry("type").or_insert_with(|| "object".into());
    let layout = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
    schema.insert("x-guidance".into(), layout);
    schema
}

/// A text as a string of Lark, which is JSON's but for DEL, which must be escaped.
fn literal(text: &str) -> String {
    crate::sampling::lark_string(text)
}

#[cfg(test)]
mod tests;

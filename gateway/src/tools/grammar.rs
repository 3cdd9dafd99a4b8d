//! The grammar of an answer that must call a tool, in llguidance's form of Lark: a model that is held to it writes a valid
//! call however small it is.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::{Convention, Format};
use crate::request::ValidTool;

/// Most calls of an answer that may have several: a model that is made to call tools may not know when to stop.
const MAX_CALLS: u32 = 8;

/// The grammar of calls of these tools, one call or up to eight.
pub fn calls(convention: &Convention, tools: &[ValidTool], several: bool) -> String {
    let format = convention.format;
    let further = |separator: &str| match several {
        true => format!(" ({separator} call){{0,{}}}", MAX_CALLS - 1),
        false => String::new(),
    };
    let start = match format {
        Format::Llama => format!("call{}", further(r#""; ""#)),
        Format::Hermes => format!("call{}", further(r#""\n""#)),
        Format::Mistral => format!("{} \"[\" call{} \"]\"", mark(convention), further(r#"", ""#)),
        Format::Json if several => format!("call | \"[\" call{} \"]\"", further(r#"", ""#)),
        Format::Json => "call".to_owned(),
    };
    let object = (0..tools.len()).map(|index| format!("object_{index}")).collect::<Vec<_>>().join(" | ");
    let call = match format {
        Format::Hermes => format!("{} ({object}) \"\\n</tool_call>\"", literal("<tool_call>\n")),
        _ => object,
    };
    let mut lark = format!("start: {start}\ncall: {call}\n");
    for (index, tool) in tools.iter().enumerate() {
        let head = format!(r#"{{"name": {}, "{}": "#, Value::from(tool.name.as_str()), format.arguments());
        // Writing to a string cannot fail.
        let _ = writeln!(lark, "object_{index}: {} arguments_{index} \"}}\"", literal(&head));
        let _ = writeln!(lark, "arguments_{index}: %json {}", Value::Object(schema(&tool.parameters)));
    }
    lark
}

/// The opening: a control token by its id, which no text can be, or text.
fn mark(convention: &Convention) -> String {
    match (convention.mark, convention.format.opening()) {
        (Some(id), _) => format!("<[{id}]>"),
        (None, Some(opening)) => literal(opening),
        (None, None) => String::new(),
    }
}

/// The schema of a tool's arguments, as they are written: on one line, and without what the schema does not name.
fn schema(parameters: &Map<String, Value>) -> Map<String, Value> {
    let mut schema = parameters.clone();
    schema.entry("type").or_insert_with(|| "object".into());
    if schema.contains_key("properties") {
        schema.entry("additionalProperties").or_insert(Value::Bool(false));
    }
    let layout = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
    schema.insert("x-guidance".into(), layout);
    schema
}

/// A text as a string of Lark, which is JSON's but for DEL, which must be escaped.
fn literal(text: &str) -> String {
    crate::sampling::lark_string(text)
}

//! The grammar of an answer that must call a tool, or may, in llguidance's form of Lark: a model that is held to it writes
//! a valid call however small it is.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use super::Format;
use crate::{request::ValidTool, sampling::closed};

/// Most calls of an answer that may have several: a model that is made to call tools may not know when to stop.
const MAX_CALLS: u32 = 8;

/// The grammar of calls of these tools, one call or up to eight.
pub fn calls(format: Format, tools: &[ValidTool], several: bool) -> String {
    grammar("", format, tools, several)
}

/// The grammar of text or a call: what begins like a call is one.
pub fn text_or_call(format: Format, tools: &[ValidTool]) -> String {
    format!("{}TEXT: /(?s:[^{{\\[\\s].*)?/\n", grammar("TEXT | ", format, tools, false))
}

fn grammar(otherwise: &str, format: Format, tools: &[ValidTool], several: bool) -> String {
    let further = |separator: &str| match several {
        true => format!(" ({separator} call){{0,{}}}", MAX_CALLS - 1),
        false => String::new(),
    };
    let start = match format {
        Format::Llama => format!("call{}", further(r#""; ""#)),
        Format::Hermes => format!("call{}", further(r#""\n""#)),
        // Without the opening: what must be a call needs no sign that it is one, and a control token has no spelling here.
        Format::Mistral => format!("\"[\" call{} \"]\"", further(r#"", ""#)),
        Format::Json if several => format!("call | \"[\" call{} \"]\"", further(r#"", ""#)),
        Format::Json => "call".to_owned(),
    };
    let object = (0..tools.len()).map(|index| format!("object_{index}")).collect::<Vec<_>>().join(" | ");
    let call = match format {
        Format::Hermes => format!("{} ({object}) \"\\n</tool_call>\"", literal("<tool_call>\n")),
        _ => object,
    };
    let mut lark = format!("start: {otherwise}{start}\ncall: {call}\n");
    for (index, tool) in tools.iter().enumerate() {
        let head = format!(r#"{{"name": {}, "{}": "#, Value::from(tool.name.as_str()), format.arguments());
        // Writing to a string cannot fail.
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
mod tests {
    use super::*;

    #[test]
    fn each_format_has_its_frame() {
        let tool = |name: &str| ValidTool {
            name: name.into(),
            description: String::new(),
            parameters: Map::from_iter([("properties".into(), Map::new().into())]),
        };
        let tools = [tool("f"), tool("g")];
        let starts = |format, several| {
            let lark = calls(format, &tools, several);
            lark.lines().take(2).map(str::to_owned).collect::<Vec<_>>()
        };
        let objects = "call: object_0 | object_1";
        assert_eq!(starts(Format::Llama, false), ["start: call", objects]);
        assert_eq!(starts(Format::Llama, true), [r#"start: call ("; " call){0,7}"#, objects]);
        assert_eq!(starts(Format::Mistral, false), [r#"start: "[" call "]""#, objects]);
        assert_eq!(starts(Format::Json, true)[0], r#"start: call | "[" call (", " call){0,7} "]""#);
        let hermes =
            [r#"start: call ("\n" call){0,7}"#, r#"call: "<tool_call>\n" (object_0 | object_1) "\n</tool_call>""#];
        assert_eq!(starts(Format::Hermes, true), hermes);
        let either = text_or_call(Format::Json, &tools);
        assert!(
            either.starts_with("start: TEXT | call\n") && either.ends_with("TEXT: /(?s:[^{\\[\\s].*)?/\n"),
            "{either}"
        );
    }
}

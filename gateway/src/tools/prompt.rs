//! Tools in the prompt, where the template does not show them: the system message says what there is and how it is
//! called, earlier calls are text of the assistant, and their results come from the user.

use serde_json::{Value, json};

use crate::request::{ValidConversation, ValidMessage, ValidTool, ValidToolCall};

/// Writes the tools, calls and results of a conversation as text that any template shows.
pub fn spell_out(conversation: &mut ValidConversation) {
    let tools = std::mem::take(&mut conversation.tools);
    for message in &mut conversation.messages {
        spell_message(message);
    }
    if tools.is_empty() {
        return;
    }
    let text = instructions(&tools);
    match conversation.messages.first_mut().filter(|message| message.role == "system") {
        Some(system) if system.content.is_empty() => system.content = text,
        Some(system) => system.content = format!("{}\n\n{text}", system.content),
        None => conversation.messages.insert(0, ValidMessage::plain("system", text)),
    }
}

fn instructions(tools: &[ValidTool]) -> String {
    let tool = |tool: &ValidTool| {
        json!({ "name": tool.name, "description": tool.description, "parameters": tool.parameters }).to_string()
    };
    let tools: Vec<String> = tools.iter().map(tool).collect();
    format!(
        "You may call these functions:\n{}\nTo call one, answer with nothing but a JSON object: \
         {{\"name\": \"its name\", \"arguments\": {{\"argument\": \"value\"}}}}",
        tools.join("\n")
    )
}

fn spell_message(message: &mut ValidMessage) {
    if message.role == "tool" {
        let what = if message.name.is_empty() { "The function" } else { &message.name };
        message.content = format!("{what} returned: {}", message.content);
        (message.role, message.name, message.tool_call_id) = ("user", String::new(), String::new());
    }
    for call in message.tool_calls.drain(..) {
        if !message.content.is_empty() {
            message.content.push('\n');
        }
        message.content.push_str(&call_text(call));
    }
}

fn call_text(call: ValidToolCall) -> String {
    json!({ "name": call.name, "arguments": Value::Object(call.arguments) }).to_string()
}

//! Tools in the prompt, where the template does not show them: the system message says what there is and how it is
//! called, two turns show when it is and when it is not, earlier calls are text of the assistant, and their results come
//! from the user.

use serde_json::{Value, json};

use crate::request::{ValidConversation, ValidMessage, ValidTool, ValidToolCall};

/// Turns that show a model which nobody taught to call tools what a call looks like, and that not every answer is one.
/// SmolLM2-135M calls tools where it should with them, and never without.
const EXAMPLES: [(&str, &str); 4] = [
    ("user", "What is the time in Oslo?"),
    ("assistant", r#"{"name": "get_time", "arguments": {"city": "Oslo"}}"#),
    ("user", "Thank you!"),
    ("assistant", "You are welcome!"),
];

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
    let examples = EXAMPLES.map(|(role, content)| ValidMessage::plain(role, content.to_owned()));
    conversation.messages.splice(1..1, examples);
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

#[cfg(test)]
mod tests {
    use lockstep_proto::{tokenizer::v1::GetTokenizerResponse, v1};

    use super::*;
    use crate::request::ModelFacts;

    fn spelled(messages: Vec<v1::Message>, with_tool: bool) -> Vec<(&'static str, String)> {
        let template = "{{ messages }}";
        let tokenizer =
            GetTokenizerResponse { vocab_size: 10, chat_template: template.into(), ..GetTokenizerResponse::default() };
        let facts = ModelFacts::new(&tokenizer, 64).unwrap();
        let tool = v1::Tool { name: "f".into(), description: "Does it.".into(), ..v1::Tool::default() };
        let tools = if with_tool { vec![tool] } else { Vec::new() };
        let conversation = Some(v1::Conversation { messages, tools, ..v1::Conversation::default() });
        let request = v1::RenderChatRequest { conversation, ..v1::RenderChatRequest::default() };
        let valid = ValidConversation::new(request, &facts).unwrap();
        assert!(valid.tools().is_empty(), "the template is not shown what it does not show");
        valid.messages().iter().map(|message| (message.role, message.content.clone())).collect()
    }

    fn message(role: v1::Role, text: &str) -> v1::Message {
        let part = v1::content_part::Part::Text(text.into());
        v1::Message { role: role.into(), content: vec![v1::ContentPart { part: Some(part) }], ..v1::Message::default() }
    }

    #[test]
    fn the_system_message_says_what_there_is() {
        let spelled = spelled(vec![message(v1::Role::System, "Be brief."), message(v1::Role::User, "Hi")], true);
        assert_eq!(spelled.len(), 6);
        assert!(spelled[0].1.starts_with("Be brief.\n\nYou may call"), "{spelled:?}");
        assert!(spelled[0].1.contains(r#"{"name":"f","description":"Does it.","parameters":{"type":"object""#));
        assert_eq!(spelled[5], ("user", "Hi".into()));
    }

    #[test]
    fn earlier_calls_and_their_results_are_text_even_without_tools() {
        let call = v1::ToolCall { id: "1".into(), name: "f".into(), arguments_json: r#"{"b":1,"a":2}"#.into() };
        let called = v1::Message { tool_calls: vec![call], ..message(v1::Role::Assistant, "Well:") };
        let result = v1::Message { tool_call_id: "1".into(), ..message(v1::Role::Tool, "42") };
        let spelled = spelled(vec![message(v1::Role::User, "Do it"), called, result], false);
        assert_eq!(spelled[1], ("assistant", "Well:\n{\"name\":\"f\",\"arguments\":{\"b\":1,\"a\":2}}".into()));
        assert_eq!(spelled[2], ("user", "The function returned: 42".into()));
    }
}

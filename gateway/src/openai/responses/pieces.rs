//! The events of a streamed response: items are opened, grow and are closed, one after another.

use axum::response::sse;
use lockstep_proto::v1;
use serde_json::{Value, json};

use super::{Echo, Response, call_item, message_item, text_part};
use crate::generation::Event;

/// What makes the events.
pub(super) struct Pieces {
    echo: Option<Echo>,
    response: Option<Response>,
    sequence_number: u64,
    open: Option<Open>,
    sent: Vec<sse::Event>,
}

/// The item that is being written.
enum Open {
    Text(String),
    Call(v1::ToolCall),
}

// === impl Pieces ===

impl Pieces {
    pub(super) fn new(echo: Echo) -> Self {
        Self { echo: Some(echo), response: None, sequence_number: 0, open: None, sent: Vec::new() }
    }

    pub(super) fn of(&mut self, event: Event) -> Vec<sse::Event> {
        match event {
            Event::Start(start) => {
                self.response = self.echo.take().map(|echo| Response::begun(&start, echo));
                self.say_response("response.created");
                self.say_response("response.in_progress");
            }
            Event::Chunk(chunk) => {
                if !chunk.text.is_empty() {
                    self.text(&chunk.text);
                }
                for delta in chunk.tool_calls {
                    self.call(delta);
                }
            }
            Event::Finish(finish) => self.finish(&finish),
        }
        std::mem::take(&mut self.sent)
    }

    fn text(&mut self, delta: &str) {
        if !matches!(self.open, Some(Open::Text(_))) {
            self.close();
            self.open = Some(Open::Text(String::new()));
            self.say_item("response.output_item.added", message_item(&self.id(), "in_progress", Vec::new()));
            self.say_part("response.content_part.added", json!({ "part": text_part("") }));
        }
        if let Some(Open::Text(text)) = &mut self.open {
            text.push_str(delta);
        }
        self.say_part("response.output_text.delta", json!({ "delta": delta, "logprobs": [] }));
    }

    fn call(&mut self, delta: v1::ToolCallDelta) {
        let v1::ToolCallDelta { id, name, arguments_json, .. } = delta;
        if !name.is_empty() {
            self.close();
            let call = v1::ToolCall { id, name, arguments_json: String::new() };
            self.say_item("response.output_item.added", call_item(&call, "in_progress"));
            self.open = Some(Open::Call(call));
        }
        let Some(Open::Call(call)) = &mut self.open else { return };
        call.arguments_json.push_str(&arguments_json);
        let item_id = format!("fc_{}", call.id);
        if !arguments_json.is_empty() {
            let index = self.index();
            let fields = json!({ "item_id": item_id, "output_index": index, "delta": arguments_json });
            self.say("response.function_call_arguments.delta", fields);
        }
    }

    /// Closes the item that is open, if one is.
    fn close(&mut self) {
        let item = match self.open.take() {
            None => return,
            Some(Open::Text(text)) => {
                self.say_part("response.output_text.done", json!({ "text": text, "logprobs": [] }));
                self.say_part("response.content_part.done", json!({ "part": text_part(&text) }));
                message_item(&self.id(), "completed", vec![text_part(&text)])
            }
            Some(Open::Call(call)) => {
                let (index, item_id) = (self.index(), format!("fc_{}", call.id));
                let v1::ToolCall { name, arguments_json, .. } = &call;
                let fields = json!({
                    "item_id": item_id, "output_index": index, "name": name, "arguments": arguments_json,
                });
                self.say("response.function_call_arguments.done", fields);
                call_item(&call, "completed")
            }
        };
        self.say_item("response.output_item.done", item.clone());
        if let Some(response) = &mut self.response {
            response.output.push(item);
        }
    }

    fn finish(&mut self, finish: &v1::Finish) {
        let nothing = self.open.is_none() && self.index() == 0;
        if nothing {
            // An empty answer is an empty message.
            self.text("");
        }
        self.close();
        let reason = finish.choices.first().map(v1::ChoiceFinish::reason).unwrap_or_default();
        let Some(response) = &mut self.response else { return };
        response.end(finish, reason);
        let kind = if response.status == "completed" { "response.completed" } else { "response.incomplete" };
        self.say_response(kind);
    }

    fn id(&self) -> String {
        self.response.as_ref().map(|response| response.id.clone()).unwrap_or_default()
    }

    /// Items that are complete, which is the index of the one that is open.
    fn index(&self) -> usize {
        self.response.as_ref().map_or(0, |response| response.output.len())
    }

    fn say_response(&mut self, kind: &'static str) {
        let response = json!({ "response": self.response });
        self.say(kind, response);
    }

    fn say_item(&mut self, kind: &'static str, item: Value) {
        let fields = json!({ "output_index": self.index(), "item": item });
        self.say(kind, fields);
    }

    /// About the only part of the message that is open.
    fn say_part(&mut self, kind: &'static str, mut fields: Value) {
        if let Value::Object(fields) = &mut fields {
            fields.insert("item_id".into(), self.id().replacen("resp_", "msg_", 1).into());
            fields.insert("output_index".into(), self.index().into());
            fields.insert("content_index".into(), 0.into());
        }
        self.say(kind, fields);
    }

    fn say(&mut self, kind: &'static str, mut fields: Value) {
        if let Value::Object(fields) = &mut fields {
            fields.insert("type".into(), kind.into());
            fields.insert("sequence_number".into(), self.sequence_number.into());
        }
        self.sequence_number += 1;
        self.sent.push(sse::Event::default().event(kind).data(fields.to_string()));
    }
}

//! The events of a streamed response: items are opened, grow and are closed, one after another.

use axum::response::sse;
use lockstep_proto::v1;
use schemars::JsonSchema;
use serde::Serialize;

use super::output::{Content, Echo, Item, Response, Status, call_id, message_id};
use crate::{generation::Event, openai::stream::data};

/// An event.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ResponsePiece")]
pub(super) struct Piece<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    sequence_number: u64,
    #[serde(flatten)]
    body: Body<'a>,
}

/// What an event is about.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
enum Body<'a> {
    Response {
        response: &'a Response,
    },
    Item {
        output_index: usize,
        item: &'a Item,
    },
    Part {
        #[serde(flatten)]
        place: Place,
        content_index: usize,
        part: Content,
    },
    TextDelta {
        #[serde(flatten)]
        place: Place,
        content_index: usize,
        delta: &'a str,
        logprobs: [(); 0],
    },
    Text {
        #[serde(flatten)]
        place: Place,
        content_index: usize,
        text: &'a str,
        logprobs: [(); 0],
    },
    ArgumentsDelta {
        #[serde(flatten)]
        place: Place,
        delta: &'a str,
    },
    Arguments {
        #[serde(flatten)]
        place: Place,
        name: &'a str,
        arguments: &'a str,
    },
}

/// An item that an event is about.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(inline)]
struct Place {
    item_id: String,
    output_index: usize,
}

/// What makes the events.
pub(super) struct Pieces {
    echo: Option<Echo>,
    response: Option<Response>,
    open: Option<Open>,
    said: Said,
}

/// The item that is being written.
enum Open {
    Text(String),
    Call(v1::ToolCall),
}

/// Events that are to be sent, and the number of the next one.
#[derive(Default)]
struct Said {
    events: Vec<sse::Event>,
    sequence_number: u64,
}

// === impl Pieces ===

impl Pieces {
    pub(super) fn new(echo: Echo) -> Self {
        Self { echo: Some(echo), response: None, open: None, said: Said::default() }
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
        std::mem::take(&mut self.said.events)
    }

    fn text(&mut self, delta: &str) {
        if !matches!(self.open, Some(Open::Text(_))) {
            self.close();
            self.open = Some(Open::Text(String::new()));
            self.say_item("response.output_item.added", &Item::message(&self.id(), Status::InProgress, Vec::new()));
            let (place, part) = (self.message(), Content::text(""));
            self.said.say("response.content_part.added", Body::Part { place, content_index: 0, part });
        }
        if let Some(Open::Text(text)) = &mut self.open {
            text.push_str(delta);
        }
        let place = self.message();
        let body = Body::TextDelta { place, content_index: 0, delta, logprobs: [] };
        self.said.say("response.output_text.delta", body);
    }

    fn call(&mut self, delta: v1::ToolCallDelta) {
        let v1::ToolCallDelta { id, name, arguments_json, .. } = delta;
        if !name.is_empty() {
            self.close();
            let call = v1::ToolCall { id, name, arguments_json: String::new() };
            self.say_item("response.output_item.added", &Item::call(&call, Status::InProgress));
            self.open = Some(Open::Call(call));
        }
        let output_index = self.index();
        let Some(Open::Call(call)) = &mut self.open else { return };
        call.arguments_json.push_str(&arguments_json);
        if !arguments_json.is_empty() {
            let place = Place { item_id: call_id(&call.id), output_index };
            let body = Body::ArgumentsDelta { place, delta: &arguments_json };
            self.said.say("response.function_call_arguments.delta", body);
        }
    }

    /// Closes the item that is open, if one is.
    fn close(&mut self) {
        let item = match self.open.take() {
            None => return,
            Some(Open::Text(text)) => {
                let (place, content_index) = (self.message(), 0);
                let body = Body::Text { place, content_index, text: &text, logprobs: [] };
                self.said.say("response.output_text.done", body);
                let (place, part) = (self.message(), Content::text(&text));
                self.said.say("response.content_part.done", Body::Part { place, content_index, part });
                Item::message(&self.id(), Status::Completed, vec![Content::text(&text)])
            }
            Some(Open::Call(call)) => {
                let place = Place { item_id: call_id(&call.id), output_index: self.index() };
                let v1::ToolCall { name, arguments_json: arguments, .. } = &call;
                let body = Body::Arguments { place, name, arguments };
                self.said.say("response.function_call_arguments.done", body);
                Item::call(&call, Status::Completed)
            }
        };
        self.say_item("response.output_item.done", &item);
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
        let whole = response.status == Status::Completed;
        self.say_response(if whole { "response.completed" } else { "response.incomplete" });
    }

    fn id(&self) -> String {
        self.response.as_ref().map(|response| response.id.clone()).unwrap_or_default()
    }

    /// Items that are complete, which is the index of the one that is open.
    fn index(&self) -> usize {
        self.response.as_ref().map_or(0, |response| response.output.len())
    }

    /// The message that is open.
    fn message(&self) -> Place {
        Place { item_id: message_id(&self.id()), output_index: self.index() }
    }

    fn say_response(&mut self, kind: &'static str) {
        if let Some(response) = &self.response {
            self.said.say(kind, Body::Response { response });
        }
    }

    fn say_item(&mut self, kind: &'static str, item: &Item) {
        let output_index = self.index();
        self.said.say(kind, Body::Item { output_index, item });
    }
}

// === impl Said ===

impl Said {
    fn say(&mut self, kind: &'static str, body: Body<'_>) {
        let piece = Piece { kind, sequence_number: self.sequence_number, body };
        self.sequence_number += 1;
        self.events.push(data(&piece).event(kind));
    }
}

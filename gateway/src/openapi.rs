//! The document at `/openapi.json`: all that is answered by HTTP, described in OpenAPI 3.1.
//!
//! What requests and answers look like is read off the types that serde reads and writes ([`schemars`]), limits and all. A
//! [`Route`] is made with its description, and the router of routes alone, so that nothing is answered undescribed.

mod document;
pub(crate) mod rules;
#[cfg(test)]
mod tests;

use axum::{
    Router,
    handler::Handler,
    routing::{MethodRouter, get, post},
};
use bytes::Bytes;
use http::{StatusCode, header};
use lockstep_proto::error::Reason;
use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::http::Front;

/// Where the document is.
pub const PATH: &str = "/openapi.json";

/// Makes the schema of a type.
pub type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// A front, as its clients see it.
#[derive(Debug)]
pub struct Api {
    /// The heading of its routes.
    pub name: &'static str,
    /// What it is, in a line.
    pub description: &'static str,
    /// The shape of its errors.
    pub error: SchemaOf,
    /// The status under which it reports each reason.
    pub status: fn(Reason) -> StatusCode,
    /// All that it answers.
    pub routes: Vec<Route>,
}

/// What is answered under a path and a method.
#[derive(Debug)]
pub struct Route {
    path: &'static str,
    method: &'static str,
    handler: MethodRouter<Front>,
    operation: Operation,
}

/// What a route does, takes and answers.
#[derive(Debug)]
pub struct Operation {
    description: &'static str,
    needs_key: bool,
    /// The part of the path that varies, and what it means.
    parameter: Option<(&'static str, &'static str)>,
    request: Option<SchemaOf>,
    answers: Vec<Answer>,
    /// Why it may fail.
    reasons: Vec<Reason>,
}

/// What comes with status 200.
#[derive(Debug, Clone, Copy)]
enum Answer {
    Json(SchemaOf),
    /// A document of HTML.
    Page,
    /// Server-sent events, each of which has an object of this type for its data, or an error if the answer is cut; and
    /// the data of one that ends them, if there is one.
    Events(SchemaOf, Option<&'static str>),
}

/// Why any call may fail that needs a key.
const OF_CALLS: &[Reason] = &[
    Reason::InvalidArgument,
    Reason::Unauthenticated,
    Reason::MessageTooLarge,
    Reason::Overloaded,
    Reason::Internal,
    Reason::Draining,
    Reason::TokenizerUnavailable,
    Reason::Deadline,
];

/// Why else a call may fail that is about one model.
pub const OF_MODELS: &[Reason] = &[Reason::ModelNotFound, Reason::GroupUnavailable];

/// Why else a call may fail that gives a model a prompt.
pub const OF_PROMPTS: &[Reason] = &[Reason::PromptTooLong, Reason::OverPolicy, Reason::Unimplemented];

/// Why else a call may fail whose prompt is a conversation.
pub const OF_CHATS: &[Reason] = &[Reason::TemplateFailed, Reason::NoChatTemplate];

/// The routes of these fronts, and the document that describes them. `keyed`: callers must show a key.
pub fn router(apis: Vec<Api>, keyed: bool) -> Router<Front> {
    let document = Bytes::from(document::of(&apis, keyed).to_string());
    let document = async move || ([(header::CONTENT_TYPE, "application/json")], document);
    let routes = apis.into_iter().flat_map(|api| api.routes);
    routes.fold(Router::new().route(PATH, get(document)), |router, route| router.route(route.path, route.handler))
}

// === impl Route ===

impl Route {
    /// A path that answers GET.
    pub fn get<T: 'static>(path: &'static str, handler: impl Handler<T, Front>, operation: Operation) -> Self {
        Self { path, method: "get", handler: get(handler), operation }
    }

    /// A path that answers POST.
    pub fn post<T: 'static>(path: &'static str, handler: impl Handler<T, Front>, operation: Operation) -> Self {
        Self { path, method: "post", handler: post(handler), operation }
    }
}

// === impl Operation ===

impl Operation {
    /// A call, for which a key must be shown where there are keys.
    pub fn call(description: &'static str) -> Self {
        Self { needs_key: true, ..Self::open(description) }.fails(OF_CALLS)
    }

    /// What everyone may ask for.
    pub fn open(description: &'static str) -> Self {
        Self { description, needs_key: false, parameter: None, request: None, answers: Vec::new(), reasons: Vec::new() }
    }

    /// Names the part of the path that varies.
    #[must_use]
    pub fn of(mut self, parameter: &'static str, description: &'static str) -> Self {
        self.parameter = Some((parameter, description));
        self
    }

    /// It takes JSON of this type.
    #[must_use]
    pub fn takes<T: JsonSchema>(self) -> Self {
        self.takes_schema(SchemaGenerator::subschema_for::<T>)
    }

    /// It takes JSON of this schema.
    #[must_use]
    pub fn takes_schema(mut self, schema: SchemaOf) -> Self {
        self.request = Some(schema);
        self
    }

    /// It answers JSON of this type.
    #[must_use]
    pub fn answers<T: JsonSchema>(mut self) -> Self {
        self.answers.push(Answer::Json(SchemaGenerator::subschema_for::<T>));
        self
    }

    /// It answers with a document for a browser.
    #[must_use]
    pub fn shows_page(mut self) -> Self {
        self.answers.push(Answer::Page);
        self
    }

    /// It answers with a stream whose events are of this type; `end` is the last one's data.
    #[must_use]
    pub fn streams<T: JsonSchema>(mut self, end: Option<&'static str>) -> Self {
        self.answers.push(Answer::Events(SchemaGenerator::subschema_for::<T>, end));
        self
    }

    /// It may fail for these reasons.
    #[must_use]
    pub fn fails(mut self, reasons: &[Reason]) -> Self {
        self.reasons.extend_from_slice(reasons);
        self
    }
}

//! The page: a chat and a live picture of the cluster, for people with a browser. Its files are part of the program. It
//! knows nothing that other clients do not: it talks to OpenAI's API (see [`openai`](crate::openai)) and to `/cluster`.

mod cluster;

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use axum::{
    Router,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
    routing::get,
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use lockstep_proto::error::Reason;
use schemars::SchemaGenerator;

use crate::{
    http::Front,
    openai,
    openapi::{Api, Operation, Route},
};

/// Where the state is, which the page asks for again and again.
pub const CLUSTER: &str = "/cluster";

/// Nothing comes from anywhere else, no script or style stands in a document, and no text becomes markup.
const CONTENT_SECURITY_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
     form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
);

/// A file of the page.
#[derive(Debug, Clone, Copy)]
struct File {
    path: &'static str,
    content_type: &'static str,
    text: &'static str,
}

const INDEX: File = File { path: "/", content_type: "text/html; charset=utf-8", text: include_str!("page/index.html") };

/// What the page asks for.
const FILES: [File; 4] = [
    File { path: "/page/style.css", content_type: "text/css; charset=utf-8", text: include_str!("page/style.css") },
    File { path: "/page/app.js", content_type: "text/javascript; charset=utf-8", text: include_str!("page/app.js") },
    File {
        path: "/page/cluster.js",
        content_type: "text/javascript; charset=utf-8",
        text: include_str!("page/cluster.js"),
    },
    File { path: "/page/icon.svg", content_type: "image/svg+xml", text: include_str!("page/icon.svg") },
];

/// Whether a path is the page's, but for the root, which is also of [`tgi`](crate::tgi).
pub fn has(path: &str) -> bool {
    path == CLUSTER || path.starts_with("/page/")
}

/// The page, which everybody may read, and the state, which needs a key where there are keys.
pub fn api() -> Api {
    Api {
        name: "Page",
        description: "A page for people, and the state of the cluster that it shows.",
        error: SchemaGenerator::subschema_for::<openai::ErrorBody>,
        status: Reason::http_status,
        routes: vec![
            Route::get(INDEX.path, index, Operation::open("A page to chat and to see the cluster.").shows_page()),
            Route::get(CLUSTER, cluster, cluster::operation()),
        ],
    }
}

/// The page's files.
pub fn files() -> Router<Front> {
    FILES.into_iter().fold(Router::new(), |routes, file| {
        routes.route(file.path, get(move |headers: HeaderMap| async move { file.answer(&headers) }))
    })
}

async fn index(headers: HeaderMap) -> Response {
    INDEX.answer(&headers)
}

async fn cluster(State(front): State<Front>, request: Request) -> Response {
    cluster::get(&front, request).await.unwrap_or_else(|failure| openai::refusal(&failure.to_error()))
}

// === impl File ===

impl File {
    /// The file, unless the browser has it as it is.
    fn answer(self, request: &HeaderMap) -> Response {
        let tag = self.tag();
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static(self.content_type)),
            // Kept, and asked for each time: another version of the gateway has another page.
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        ];
        let is_known = request.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes());
        let tag = [(header::ETAG, tag)];
        if is_known {
            (StatusCode::NOT_MODIFIED, tag, headers).into_response()
        } else {
            (tag, headers, self.text).into_response()
        }
    }

    /// Changes with the text.
    fn tag(self) -> String {
        let mut hasher = DefaultHasher::new();
        self.text.hash(&mut hasher);
        format!("\"{:016x}\"", hasher.finish())
    }
}

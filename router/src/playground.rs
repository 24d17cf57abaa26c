//! The playground: a page at `/` on which people try the model in a browser, if the deployment has `spec.playground`.
//!
//! The page is static, has no external resource and requires no API key; the requests that it sends do. A browser runs only the
//! script and the style whose hashes are in the Content-Security-Policy.

use std::sync::{Arc, LazyLock};

use athanor_serving::api::openai::{method_not_allowed, not_found};
use axum::{
    extract::{Request, State},
    http::{
        HeaderName, Method,
        header::{
            ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
        },
    },
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};

use crate::gateway::Gateway;

/// Path of the page.
pub const PATH: &str = "/";

const STYLE: &str = include_str!("playground/page.css");
const SCRIPT: &str = concat!(include_str!("playground/common.js"), "\n", include_str!("playground/page.js"));

/// The page with its style and script.
static PAGE: LazyLock<String> = LazyLock::new(|| {
    let (style, script) = ("<style>", "<script type=\"module\">");
    let page = include_str!("playground/page.html").replacen(style, &format!("{style}{STYLE}"), 1);
    page.replacen(script, &format!("{script}{SCRIPT}"), 1)
});

/// Value of the Content-Security-Policy: nothing but the style, the script, requests to this router and the icon in the page.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)));
    format!(
        "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
        hash(SCRIPT),
        hash(STYLE)
    )
});

/// Whether the deployment has a playground.
pub fn is_on(gateway: &Gateway) -> bool {
    gateway.registry.snapshot().config.as_ref().is_some_and(|config| config.playground)
}

/// Answers with the page; without a playground, as an unknown path does.
pub async fn page(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    if !is_on(&gateway) {
        return not_found(request).await;
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return ([(ALLOW, "GET,HEAD")], method_not_allowed(request).await).into_response();
    }
    let headers: [(HeaderName, &str); 6] = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, PAGE.as_str()).into_response()
}

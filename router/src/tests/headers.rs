//! Which headers go through the router.

use axum::http::{HeaderMap, HeaderName, header::CONNECTION};

use super::*;

/// Headers of an answer. The first is named by `Connection`.
const ANSWERED: [(&str, &str); 5] = [
    ("x-hop", "1"),
    ("x-kept", "2"),
    ("keep-alive", "timeout=5"),
    ("proxy-connection", "keep-alive"),
    ("connection", "keep-alive, X-Hop"),
];

/// A server whose answer names the headers of its request, except those that its HTTP library writes itself.
async fn echo(headers: HeaderMap) -> impl IntoResponse {
    let names: Vec<String> = headers.keys().map(|name| name.as_str().to_owned()).collect();
    let answered: HeaderMap = ANSWERED
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), axum::http::HeaderValue::from_static(value)))
        .collect();
    (answered, Json(json!({"names": names})))
}

#[tokio::test]
async fn headers_of_one_connection_are_not_passed_on_in_either_direction() {
    let app = Router::new().route("/v1/classify", post(echo)).route("/v1/embeddings", post(echo));
    let (address, _server) = serve(([127, 0, 0, 1], 0).into(), app).await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[address])]);
    // An answer that is read whole, and one whose body is passed on as it comes.
    for path in ["/v1/classify", "/v1/embeddings"] {
        let request = Request::builder().method(Method::POST).uri(path).header("content-type", "application/json");
        // Two lines, in another case, and one that is no name.
        let request = request.header(CONNECTION, "close, X-Private").header(CONNECTION, "x-other,, no name");
        let request = request.header("x-private", "1").header("x-other", "2").header("x-end-to-end", "3");
        let request = request.header("keep-alive", "timeout=5").header("proxy-connection", "close");
        let (parts, body) = send(&gateway, request, r#"{"input": "x"}"#).await;
        assert_eq!(parts.status, StatusCode::OK, "{path}: {body}");
        let names: Vec<&str> = body["names"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert!(names.contains(&"x-end-to-end") && names.contains(&"content-type"), "{path}: {names:?}");
        for name in ["x-private", "x-other", "keep-alive", "proxy-connection", "connection"] {
            assert!(!names.contains(&name), "{path}: {name} was passed on to the server");
        }
        assert_eq!(parts.headers["x-kept"], "2", "{path}");
        for name in ["x-hop", "keep-alive", "proxy-connection", "connection"] {
            assert!(!parts.headers.contains_key(name), "{path}: {name} was passed on to the client");
        }
    }
}

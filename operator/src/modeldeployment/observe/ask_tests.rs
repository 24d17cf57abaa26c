use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{Router, body::Body, http::header::LOCATION, response::IntoResponse, routing::get};
use futures::{StreamExt, stream};
use serde_json::Value;

use super::*;

/// Asks a pod with these routes at `path`.
async fn answer(routes: Router, path: &str) -> Result<Value, Unreadable> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { axum::serve(listener, routes).await });
    // As in main, where the Kubernetes client chooses the cryptography of the process.
    let url = "http://127.0.0.1:9".parse().unwrap();
    let _client = kube::Client::try_from(kube::Config::new(url)).unwrap();
    ask(&client().unwrap(), "127.0.0.1", port, path).await
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let followed = Arc::new(AtomicUsize::new(0));
    let count = followed.clone();
    let target = get(async move || {
        count.fetch_add(1, Ordering::Relaxed);
        "{}"
    });
    let routes = |status: u16| {
        let moved = get(async move || {
            let status = axum::http::StatusCode::from_u16(status).unwrap();
            (status, [(LOCATION, "/target")], "").into_response()
        });
        Router::new().route("/analysis", moved).route("/target", target.clone())
    };
    for status in [301, 302, 307, 308] {
        let error = answer(routes(status), "/analysis").await.unwrap_err();
        assert!(matches!(error, Unreadable::Format(_)), "{status}: {error}");
    }
    assert_eq!(followed.load(Ordering::Relaxed), 0);
    assert_eq!(answer(routes(301), "/target").await.unwrap(), serde_json::json!({}));
    assert_eq!(followed.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_answer_without_an_end_is_given_up_at_the_limit() {
    let sent = Arc::new(AtomicUsize::new(0));
    let count = sent.clone();
    let endless = get(async move || {
        let pieces = stream::repeat(vec![b' '; 16 << 10]).inspect(move |piece| {
            count.fetch_add(piece.len(), Ordering::Relaxed);
        });
        Body::from_stream(pieces.map(Ok::<_, Infallible>))
    });
    let sized = |bytes: usize| get(async move || format!("\"{}\"", "x".repeat(bytes - 2)));
    let routes = || {
        let routes = Router::new().route("/endless", endless.clone());
        routes.route("/fits", sized(MOST_BYTES)).route("/exceeds", sized(MOST_BYTES + 1))
    };
    let error = answer(routes(), "/endless").await.unwrap_err();
    assert!(matches!(error, Unreadable::TooLong), "{error}");
    // What was under way in the buffers of the connection is more than what was read.
    assert!(sent.load(Ordering::Relaxed) < 64 * MOST_BYTES, "{} bytes", sent.load(Ordering::Relaxed));
    assert!(answer(routes(), "/fits").await.unwrap().is_string());
    assert!(matches!(answer(routes(), "/exceeds").await, Err(Unreadable::TooLong)));
}

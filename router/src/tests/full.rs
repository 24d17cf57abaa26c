//! Requests to language models that are refused without asking servers which have just refused others for long.

use super::{
    streams::{QUESTION, chat},
    *,
};

/// A server that refuses chats, counts them, and answers what runs no model.
async fn refusing(retry_after: &'static str) -> (SocketAddr, Arc<AtomicUsize>, CancellationToken) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let refuse = post(async move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let error = json!({"error": {"code": "queue_full", "message": "the server's own"}});
        (StatusCode::TOO_MANY_REQUESTS, [("retry-after", retry_after)], Json(error))
    });
    let tokenize = post(async || Json(json!({"count": 1})));
    let app = Router::new().route("/v1/chat/completions", refuse).route("/v1/tokenize", tokenize);
    let (address, stop) = serve(([127, 0, 0, 1], 0).into(), app).await;
    (address, count, stop)
}

#[tokio::test]
async fn servers_that_are_full_are_not_asked_for_a_moment() {
    let (first, asked_first, _first) = refusing("9").await;
    let (second, asked_second, _second) = refusing("7").await;
    let gateway = gateway(config(&[("a", 50), ("b", 50)]), &[("a", &[first]), ("b", &[second])]);
    let asked = || asked_first.load(Ordering::Relaxed) + asked_second.load(Ordering::Relaxed);
    let (mut shown, mut requests) = (0, 0);
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(110)).await;
        let (before, begin) = (asked(), Instant::now());
        let (parts, body) = send(&gateway, chat(), QUESTION).await;
        assert_eq!((parts.status.as_u16(), asked() - before), (429, 2), "both are asked after a while");
        assert_eq!(body["error"]["message"], "the server's own");
        let (parts, body) = send(&gateway, chat(), QUESTION).await;
        requests += 2;
        // On a machine that is slow at the moment the time is over.
        if begin.elapsed() < Duration::from_millis(40) {
            assert_eq!((parts.status.as_u16(), asked() - before), (429, 2), "none is asked again");
            assert_eq!(body["error"]["code"], "queue_full");
            assert_eq!(body["error"]["type"], "rate_limit_error");
            assert_eq!(parts.headers["retry-after"], "7", "the shortest");
            assert!(["a", "b"].map(Some).contains(&parts.headers["x-athanor-revision"].to_str().ok()));
            // What runs no model is passed on.
            let tokenize = Request::builder().method(Method::POST).uri("/v1/tokenize");
            let tokenize = tokenize.header("content-type", "application/json");
            assert_eq!(send(&gateway, tokenize, r#"{"prompt": "x"}"#).await.0.status, StatusCode::OK);
            shown += 1;
        }
        if shown == 3 {
            break;
        }
    }
    assert_eq!(shown, 3, "the machine was too slow to show anything");
    let analysis = gateway.analysis.read();
    // Each request counts at both revisions, whether it was passed on or not.
    for revision in ["a", "b"].map(|name| &analysis.revisions[name]) {
        assert_eq!((revision.busy, revision.errors), (requests, 0));
    }
}

#[tokio::test]
async fn a_server_that_refuses_for_a_short_time_or_that_is_not_alone_is_asked() {
    let (short, asked, _short) = refusing("1").await;
    let alone = gateway(config(&[("a", 100)]), &[("a", &[short])]);
    for count in 1..=5 {
        assert_eq!(send(&alone, chat(), QUESTION).await.0.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(asked.load(Ordering::Relaxed), count);
    }
    let (long, _, _long) = refusing("30").await;
    let ok = Router::new().route("/v1/chat/completions", post(async || Json(json!({"choices": []}))));
    let (good, _good) = serve(([127, 0, 0, 1], 0).into(), ok).await;
    let two = gateway(config(&[("a", 100)]), &[("a", &[long, good])]);
    for _ in 0..10 {
        assert_eq!(send(&two, chat(), QUESTION).await.0.status, StatusCode::OK);
    }
}

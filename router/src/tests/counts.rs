//! What a canary's analysis counts of requests that took several attempts, and what the router does when it has no room.

use athanor_serving::capacity::Capacity;
use tokio::io::AsyncReadExt;

use super::*;

/// A server that reads requests and closes their connections.
async fn losing() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let count = count.clone();
            tokio::spawn(async move {
                if stream.read(&mut [0; 1024]).await.is_ok_and(|bytes| bytes > 0) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    (address, asked)
}

/// (requests, errors, missing) of a revision.
fn counts(gateway: &Gateway, revision: &str) -> (u64, u64, u64) {
    let read = gateway.analysis.read().revisions.get(revision).cloned().unwrap_or_default();
    (read.requests, read.errors, read.missing)
}

#[tokio::test]
async fn a_request_that_the_champion_had_to_answer_is_one_error_of_the_candidate() {
    let (losing, asked) = losing().await;
    let (good, _, _good) = healthy().await;
    let gateway = gateway(config(&[("new", 100), ("old", 0)]), &[("new", &[losing]), ("old", &[good])]);
    let (parts, _) = send(&gateway, classify(), r#"{"input": "x"}"#).await;
    assert_eq!((parts.status, &parts.headers["x-athanor-revision"]), (StatusCode::OK, &"old".parse().unwrap()));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert_eq!((counts(&gateway, "new"), counts(&gateway, "old")), ((1, 1, 1), (1, 0, 0)));
}

#[tokio::test]
async fn a_request_that_two_pods_lose_is_one_error() {
    let (one, first) = losing().await;
    let (two, second) = losing().await;
    let gateway = gateway(config(&[("new", 100)]), &[("new", &[one, two])]);
    assert_eq!(send(&gateway, classify(), r#"{"input": "x"}"#).await.0.status, StatusCode::BAD_GATEWAY);
    assert_eq!((first.load(Ordering::Relaxed), second.load(Ordering::Relaxed)), (1, 1));
    assert_eq!(counts(&gateway, "new"), (1, 1, 1));
}

#[tokio::test]
async fn a_request_that_another_pod_of_the_revision_answers_is_no_error() {
    let (losing, asked) = losing().await;
    let (good, _, _good) = healthy().await;
    let gateway = gateway(config(&[("new", 100)]), &[("new", &[losing, good])]);
    let mut sent = 0;
    while asked.load(Ordering::Relaxed) == 0 {
        assert_eq!(send(&gateway, classify(), r#"{"input": "x"}"#).await.0.status, StatusCode::OK);
        sent += 1;
    }
    assert_eq!(counts(&gateway, "new"), (sent, 0, 0));
}

#[tokio::test]
async fn refusals_and_answers_that_are_not_finite_are_counted_by_kind() {
    let app = Router::new().route(
        "/v1/classify",
        post(async |body: String| {
            let status = StatusCode::from_bytes(&body.as_bytes()[..3]).unwrap();
            let failure = body.ends_with("nan").then_some([("x-athanor-failure", "not_finite")]);
            (status, failure.unwrap_or([("x-none", "")]), "")
        }),
    );
    let (address, _server) = serve(([127, 0, 0, 1], 0).into(), app).await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[address])]);
    for body in ["429", "400", "422", "501", "500", "500 nan", "400 nan"] {
        send(&gateway, classify(), body).await;
        // A server that was busy is asked all the same when it is alone; the next request is another one.
        tokio::time::sleep(Duration::from_millis(110)).await;
    }
    let read = gateway.analysis.read().revisions["a"].clone();
    assert_eq!((read.busy, read.rejected, read.refused), (1, 4, 5));
    assert_eq!((read.requests, read.errors, read.missing, read.non_finite), (2, 2, 0, 1));
}

#[tokio::test]
async fn an_answer_that_there_is_no_room_for_is_429_and_counts_for_no_revision() {
    let (address, asked, _server) = healthy().await;
    let mut full = unshared(config(&[("a", 100)]), &[("a", &[address])]);
    full.capacity = Capacity::new(40);
    let full = Arc::new(full);
    let (parts, body) = send(&full, classify(), r#"{"input": "x"}"#).await;
    assert_eq!((parts.status, &body["error"]["code"]), (StatusCode::TOO_MANY_REQUESTS, &json!("overloaded")));
    assert_eq!(parts.headers["retry-after"], "1");
    assert_eq!((asked.load(Ordering::Relaxed), counts(&full, "a")), (1, (0, 0, 0)));
    let held = full.capacity.hold(40);
    assert!(held.is_ok(), "what had arrived is free again");
}

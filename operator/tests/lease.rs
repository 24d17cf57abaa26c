//! Renewals of the Lease against a server that checks resource versions.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use athanor_operator::lease::Election;
use axum::{
    Json, Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode},
};
use kube::Client;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

#[derive(Default)]
struct Stored {
    lease: Option<Value>,
    version: u64,
    /// Writes that failed with a conflict.
    conflicts: u32,
    /// Edits that somebody makes between the next reads and the writes that follow them.
    edits: u32,
}

#[derive(Clone, Default)]
struct Server(Arc<Mutex<Stored>>);

impl Stored {
    fn put(&mut self, mut lease: Value) -> Value {
        self.version += 1;
        lease["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.lease = Some(lease.clone());
        lease
    }
}

fn failure(code: StatusCode, reason: &str) -> (StatusCode, Json<Value>) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(),
        "reason": reason, "message": "refused by the test's server"});
    (code, Json(status))
}

async fn answer(State(server): State<Server>, method: Method, body: Bytes) -> (StatusCode, Json<Value>) {
    let mut stored = server.0.lock().unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    match (method, stored.lease.clone()) {
        (Method::GET, None) => failure(StatusCode::NOT_FOUND, "NotFound"),
        (Method::GET, Some(lease)) => {
            if stored.edits > 0 {
                stored.edits -= 1;
                stored.put(lease.clone());
            }
            (StatusCode::OK, Json(lease))
        }
        (Method::POST, None) => (StatusCode::CREATED, Json(stored.put(body))),
        (Method::PUT, Some(lease)) if lease["metadata"]["resourceVersion"] == body["metadata"]["resourceVersion"] => {
            (StatusCode::OK, Json(stored.put(body)))
        }
        _ => {
            stored.conflicts += 1;
            failure(StatusCode::CONFLICT, "Conflict")
        }
    }
}

impl Server {
    async fn client(&self) -> Client {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Client::try_from(kube::Config::new(format!("http://{address}").parse().unwrap())).unwrap()
    }

    fn version(&self) -> u64 {
        self.0.lock().unwrap().version
    }
}

#[tokio::test]
async fn an_edit_of_the_lease_does_not_end_leadership_and_another_holder_does() {
    let server = Server::default();
    let shutdown = CancellationToken::new();
    let mut election = Election::new(server.client().await, "ns", "athanor-operator", "me".into());
    assert!(election.acquire(&shutdown, || {}).await);
    let leadership = election.leadership();
    server.0.lock().unwrap().edits = 1;
    let before = server.version();
    let held = tokio::spawn(async move { election.hold(&shutdown).await });
    // The first renewal fails, and the one after it does not.
    for _ in 0..80 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        if server.version() >= before + 2 {
            break;
        }
    }
    assert_eq!(server.0.lock().unwrap().conflicts, 1);
    assert!(server.version() >= before + 2, "an edit and a renewal");
    assert!(leadership.is_held() && !held.is_finished());

    let mut other = server.0.lock().unwrap().lease.clone().unwrap();
    other["spec"]["holderIdentity"] = json!("other");
    server.0.lock().unwrap().put(other);
    let lost = tokio::time::timeout(Duration::from_secs(8), held).await.expect("the holder is read within two seconds");
    assert!(lost.unwrap());
    assert!(!leadership.is_held());
}

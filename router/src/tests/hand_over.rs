//! Events that a router leaves on its disk reach another router.

use std::path::Path;

use athanor_contract::event::{Feedback, Judgement};
use athanor_feedback::{
    signing::{SharedKeys, SigningKeys},
    spill::Spill,
};

use super::*;
use crate::{
    balance::client::Client,
    record::hand_over::{Sender, routes},
};

fn keys(secret: &str) -> SharedKeys {
    SigningKeys::new(secret.as_bytes(), None).into()
}

fn events() -> Vec<Event> {
    let event = |id: u32| Event {
        id: id.to_string(),
        source: "/athanor/n/d".into(),
        time: "2026-11-28T12:00:00Z".into(),
        trace_parent: None,
        data: EventData::Feedback(Feedback {
            request_id: format!("r-{id}"),
            index: 0,
            judgement: Judgement::ExpectedLabel("good".into()),
            comment: None,
            caller: None,
        }),
    };
    (0..3).map(event).collect()
}

fn fill(folder: &Path) {
    Spill::open(folder, 1 << 20).unwrap().append(&events()).unwrap();
}

fn is_empty(folder: &Path) -> bool {
    Spill::open(folder, 1 << 20).unwrap().is_empty()
}

fn sender(secret: &str) -> Sender {
    Sender { client: Client::default(), keys: keys(secret), events: EventsConfig::new("127.0.0.1:1", "t") }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_router_takes_what_kafka_did_not() {
    let gateway = gateway(config(&[("a", 100)]), &[]);
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    let app = routes(gateway.clone(), keys("k"));
    let (broken, ready) = (nobody().await, serve(([127, 0, 0, 1], 0).into(), app).await);
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    // The only router is away at first.
    let asked = AtomicUsize::new(0);
    let peers = async || match asked.fetch_add(1, Ordering::Relaxed) {
        0 => vec![],
        _ => vec![broken, ready.0],
    };
    sender("k").run(folder.path(), peers).await;
    assert_eq!(*kept.events.lock().unwrap(), events());
    assert!(is_empty(folder.path()));
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn only_routers_of_the_deployment_are_believed_and_nothing_is_taken_by_half() {
    let gateway = gateway(config(&[("a", 100)]), &[]);
    let kept = Arc::new(Kept::default());
    let (address, _running) = serve(([127, 0, 0, 1], 0).into(), routes(gateway.clone(), keys("k"))).await;
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let give = async |secret: &'static str| {
        let give = async |events: Vec<Event>| sender(secret).give(&[address], &events).await;
        athanor_feedback::spill::hand_over(folder.path(), give).await
    };
    assert!(give("k").await.unwrap_err().contains("503"), "it publishes no events");
    gateway.events.set(Some(kept.clone()));
    assert!(give("another").await.unwrap_err().contains("403"));
    kept.broken.store(true, Ordering::Relaxed);
    assert!(give("k").await.unwrap_err().contains("503"), "its disk is full");
    assert!(kept.events.lock().unwrap().is_empty() && !is_empty(folder.path()));
    kept.broken.store(false, Ordering::Relaxed);
    assert_eq!(give("k").await, Ok(3));
    assert_eq!(*kept.events.lock().unwrap(), events());
}

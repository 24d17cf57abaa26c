//! `serve.json` between versions: an operator's configuration is read by servers of its own and of earlier versions.

use athanor_contract::serve::ServeLimits;
use serde_json::json;

#[test]
fn a_default_that_earlier_servers_do_not_read_is_left_out() {
    let default = serde_json::to_value(ServeLimits::default()).unwrap();
    assert_eq!(default.get("maxQueueSeconds"), None);
    let own = serde_json::to_value(ServeLimits { max_queue_seconds: 60, ..ServeLimits::default() }).unwrap();
    assert_eq!(own["maxQueueSeconds"], json!(60));
    assert_eq!(serde_json::from_value::<ServeLimits>(default).unwrap().max_queue_seconds, 30);
}

//! `serve.json` between versions: an operator's configuration is read by servers of its own and of earlier versions.

use athanor_contract::serve::{LatencyHistogram, ServeLimits};
use serde_json::json;

#[test]
fn a_default_that_earlier_servers_do_not_read_is_left_out() {
    let default = serde_json::to_value(ServeLimits::default()).unwrap();
    assert_eq!(default.get("maxQueueSeconds"), None);
    let own = serde_json::to_value(ServeLimits { max_queue_seconds: 60, ..ServeLimits::default() }).unwrap();
    assert_eq!(own["maxQueueSeconds"], json!(60));
    assert_eq!(serde_json::from_value::<ServeLimits>(default).unwrap().max_queue_seconds, 30);
}

#[test]
fn answers_are_counted_from_the_bucket_above_a_latency_on() {
    let mut counts = vec![0; LatencyHistogram::BUCKETS];
    for milliseconds in [0.01, 100.0, 200.0, 250.0, 1e9] {
        counts[LatencyHistogram::bucket(milliseconds)] += 1;
    }
    let latency = LatencyHistogram::new(counts);
    let slower = [0.001, 90.0, 200.0, 199.9, 250.0, 1e6, f64::MAX].map(|limit| latency.slower_than(limit));
    assert_eq!((latency.total(), slower), (5, [4, 4, 2, 2, 1, 0, 0]));
    // No answer that was faster counts as slower.
    for limit in (1..2_000).map(|tenths| f64::from(tenths) / 10.0) {
        let mut counts = vec![0; LatencyHistogram::BUCKETS];
        counts[LatencyHistogram::bucket(limit)] = 1;
        assert_eq!(LatencyHistogram::new(counts).slower_than(limit), 0, "{limit}");
    }
    assert_eq!((LatencyHistogram::default().total(), LatencyHistogram::default().slower_than(1.0)), (0, 0));
}

//! Reads what the routers counted. Part of `dereference`: it is the one other place that asks somebody.

use std::{collections::BTreeMap, time::Duration};

use athanor_contract::process::{path, port};
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;

const TIMEOUT: Duration = Duration::from_secs(2);
/// A router's answer is a few hundred bytes a revision.
const MOST_BYTES: usize = 1 << 20;

/// What routers counted for one revision since they started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Counts {
    pub requests: u64,
    /// Failed requests among them.
    pub errors: u64,
    pub latency_p95_ms: f64,
    /// Requests with feedback, and those whose answer was right.
    pub feedback_total: u64,
    pub feedback_correct: u64,
}

#[derive(Deserialize)]
struct Answer {
    revisions: BTreeMap<String, Counts>,
}

/// Sums over all ready routers; `None` when one of them did not answer, because its share would be missing.
pub async fn read(http: &reqwest::Client, routers: &[&Pod]) -> Option<BTreeMap<String, Counts>> {
    let addresses: Vec<&str> =
        routers.iter().filter(|pod| is_ready(pod)).filter_map(|pod| pod.status.as_ref()?.pod_ip.as_deref()).collect();
    if addresses.is_empty() {
        return None;
    }
    let answers = join_all(addresses.into_iter().map(|address| ask(http, address))).await;
    answers.into_iter().collect::<Option<Vec<_>>>().map(sum)
}

async fn ask(http: &reqwest::Client, address: &str) -> Option<BTreeMap<String, Counts>> {
    let host = if address.contains(':') { format!("[{address}]") } else { address.into() };
    let answer = async {
        let response = http
            .get(format!("http://{host}:{}{}", port::ROUTER_OPS, path::ANALYSIS))
            .timeout(TIMEOUT)
            .send()
            .await?
            .error_for_status()?;
        response.bytes().await
    };
    match answer.await {
        Ok(bytes) if bytes.len() <= MOST_BYTES => {
            let parsed = serde_json::from_slice::<Answer>(&bytes);
            parsed
                .inspect_err(|error| tracing::warn!(address, %error, "a router's analysis cannot be read"))
                .ok()
                .map(|answer| answer.revisions)
        }
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(address, %error, "a router does not answer");
            None
        }
    }
}

fn sum(answers: Vec<BTreeMap<String, Counts>>) -> BTreeMap<String, Counts> {
    let mut total: BTreeMap<String, Counts> = BTreeMap::new();
    for (name, counts) in answers.into_iter().flatten() {
        let all = total.entry(name).or_default();
        all.requests += counts.requests;
        all.errors += counts.errors;
        // Percentiles do not add up; the slowest router's is the one to keep to.
        all.latency_p95_ms = all.latency_p95_ms.max(counts.latency_p95_ms);
        all.feedback_total += counts.feedback_total;
        all.feedback_correct += counts.feedback_correct;
    }
    total
}

/// Whether a pod's condition Ready is True.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_routers_add_up_and_the_slowest_latency_stays() {
        let parse = |text: &str| serde_json::from_str::<Answer>(text).unwrap().revisions;
        let one = parse(
            r#"{"revisions":{"m-1":{"requests":10,"errors":1,"latency_p95_ms":3.5,"feedback_total":2,"feedback_correct":1}}}"#,
        );
        let two = parse(r#"{"revisions":{"m-1":{"requests":5,"errors":0,"latency_p95_ms":9.0},"m-2":{"requests":1}}}"#);
        let total = sum(vec![one, two]);
        let counts = total["m-1"];
        assert_eq!((counts.requests, counts.errors, counts.latency_p95_ms, counts.feedback_total), (15, 1, 9.0, 2));
        assert_eq!(total["m-2"].requests, 1);
    }
}

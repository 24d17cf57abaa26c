//! Reads what the routers counted, by HTTP from every router.

use std::{collections::BTreeMap, time::Duration};

use athanor_contract::{
    process::{path, port},
    serve::{RevisionAnalysis, RouterAnalysis},
};
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;

use super::workload;

const PORT: u16 = port::ROUTER_OPS;
const TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes of a router's answer, which has a few hundred for each revision.
const MOST_BYTES: usize = 1 << 20;

/// Counts by revision, since each router started.
pub type Counts = BTreeMap<String, RevisionAnalysis>;

/// Adds up the counts of all ready routers. Returns `None` if there is none, or if one does not answer: its share would
/// be missing.
pub async fn read(http: &reqwest::Client, routers: &[&Pod]) -> Option<Counts> {
    let ready = routers.iter().filter(|pod| workload::is_ready(pod));
    let addresses: Vec<&str> = ready.filter_map(|pod| pod.status.as_ref()?.pod_ip.as_deref()).collect();
    if addresses.is_empty() {
        return None;
    }
    let answers = join_all(addresses.into_iter().map(|address| ask(http, address))).await;
    answers.into_iter().collect::<Option<Vec<_>>>().map(sum)
}

/// Why a router's counts could not be read.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    #[error("the answer has more than {MOST_BYTES} bytes")]
    TooLong,
    #[error(transparent)]
    Format(#[from] serde_json::Error),
}

async fn ask(http: &reqwest::Client, address: &str) -> Option<Counts> {
    let answer = request(http, address).await;
    answer.inspect_err(|error| tracing::warn!(address, %error, "the counts of a router could not be read")).ok()
}

async fn request(http: &reqwest::Client, address: &str) -> Result<Counts, Unreadable> {
    let host = if address.contains(':') { format!("[{address}]") } else { address.into() };
    let url = format!("http://{host}:{PORT}{}", path::ANALYSIS);
    let mut response = http.get(url).timeout(TIMEOUT).send().await?.error_for_status()?;
    let mut bytes = Vec::new();
    // Checked as it arrives: an answer without an end must not fill the memory.
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() + chunk.len() > MOST_BYTES {
            return Err(Unreadable::TooLong);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(serde_json::from_slice::<RouterAnalysis>(&bytes)?.revisions)
}

fn sum(answers: Vec<Counts>) -> Counts {
    let mut total = Counts::new();
    for (name, counts) in answers.into_iter().flatten() {
        let all = total.entry(name).or_default();
        all.requests += counts.requests;
        all.errors += counts.errors;
        all.refused += counts.refused;
        // Percentiles do not add up; the slowest router's counts.
        all.latency_p95_ms = all.latency_p95_ms.max(counts.latency_p95_ms);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_routers_add_up_and_the_slowest_latency_stays() {
        let parse = |text: &str| serde_json::from_str::<RouterAnalysis>(text).unwrap().revisions;
        let one = parse(
            r#"{"revisions":{"m-1":{"requests":10,"errors":1,"latency_p95_ms":3.5,"feedback_total":2,"feedback_correct":1}}}"#,
        );
        let two = parse(
            r#"{"revisions":{"m-1":{"requests":5,"errors":0,"latency_p95_ms":9.0,"feedback_total":0,"feedback_correct":0},
                "m-2":{"requests":1,"errors":0,"latency_p95_ms":0.0,"feedback_total":0,"feedback_correct":0}}}"#,
        );
        let total = sum(vec![one, two]);
        let counts = &total["m-1"];
        assert_eq!((counts.requests, counts.errors, counts.latency_p95_ms), (15, 1, 9.0));
        assert_eq!(total["m-2"].requests, 1);
    }
}

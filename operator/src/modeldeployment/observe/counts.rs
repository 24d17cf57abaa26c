//! Reads what the routers counted, by HTTP from every router.

use std::collections::BTreeMap;

use athanor_contract::{
    artifact::sha256_hex,
    process::{path, port},
    serve::{RevisionAnalysis, RouterAnalysis},
};
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use super::ask::ask;

/// Counts by revision, since each router started.
pub type Counts = BTreeMap<String, RevisionAnalysis>;

/// Returns a digest of the routers and their restarts: with another one their counts have begun again.
pub fn identity(routers: &[&Pod]) -> String {
    let mut parts: Vec<String> = routers
        .iter()
        .map(|pod| {
            let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
            format!(
                "{} {}",
                pod.uid().unwrap_or_default(),
                containers.map(|container| container.restart_count).sum::<i32>()
            )
        })
        .collect();
    parts.sort();
    let mut digest = sha256_hex(parts.join("\n").as_bytes());
    digest.truncate(16);
    digest
}

/// Adds up the counts of the routers, which are ready. Returns `None` if there is none, or if one does not answer: its share would
/// be missing.
pub async fn read(http: &reqwest::Client, routers: &[&Pod]) -> Option<Counts> {
    let addresses: Vec<&str> = routers.iter().filter_map(|pod| pod.status.as_ref()?.pod_ip.as_deref()).collect();
    if addresses.is_empty() {
        return None;
    }
    let answers = join_all(addresses.into_iter().map(|address| request(http, address))).await;
    answers.into_iter().collect::<Option<Vec<_>>>().map(sum)
}

async fn request(http: &reqwest::Client, address: &str) -> Option<Counts> {
    let answer = ask::<RouterAnalysis>(http, address, port::ROUTER_OPS, path::ANALYSIS).await;
    let answer =
        answer.inspect_err(|error| tracing::warn!(address, %error, "the counts of a router could not be read"));
    answer.ok().map(|analysis| analysis.revisions)
}

fn sum(answers: Vec<Counts>) -> Counts {
    let mut total = Counts::new();
    for (name, counts) in answers.into_iter().flatten() {
        let all = total.entry(name).or_default();
        all.requests += counts.requests;
        all.errors += counts.errors;
        all.refused += counts.refused;
        all.busy += counts.busy;
        all.rejected += counts.rejected;
        all.missing += counts.missing;
        all.non_finite += counts.non_finite;
        all.latency.add(&counts.latency);
        all.feedback_total += counts.feedback_total;
        all.feedback_correct += counts.feedback_correct;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_routers_add_up() {
        let parse = |text: &str| serde_json::from_str::<RouterAnalysis>(text).unwrap().revisions;
        let one = parse(
            r#"{"revisions":{"m-1":{"requests":10,"errors":1,"refused":3,"busy":2,"rejected":1,"missing":1,"latency":[0,9],
                "feedback_total":2,"feedback_correct":1}}}"#,
        );
        let two = parse(
            r#"{"revisions":{"m-1":{"requests":5,"errors":0,"busy":1,"non_finite":4,"latency":[0,0,0,1],
                "feedback_total":3,"feedback_correct":3},
                "m-2":{"requests":1,"errors":0,"feedback_total":0,"feedback_correct":0}}}"#,
        );
        let total = sum(vec![one, two]);
        let counts = &total["m-1"];
        assert_eq!((counts.requests, counts.errors, counts.feedback_total, counts.feedback_correct), (15, 1, 5, 4));
        let apart = [counts.refused, counts.busy, counts.rejected, counts.missing, counts.non_finite];
        assert_eq!(apart, [3, 3, 1, 1, 4]);
        // Nine answers are in the second bucket and one is in the fourth.
        let slower = [0.1, 0.105, 0.115].map(|milliseconds| counts.latency.slower_than(milliseconds));
        assert_eq!((counts.latency.total(), slower), (10, [10, 1, 1]));
        assert_eq!((total["m-2"].requests, total["m-2"].latency.total()), (1, 0));
    }
}

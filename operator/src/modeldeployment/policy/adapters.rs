//! Adapters of `spec.adapters`: which folders they have.

use std::{collections::BTreeMap, sync::Arc};

use athanor_crds::{AdapterStatus, FineTuneJob, ServedAdapter};

use super::target;
use crate::condition::{State, Value};

/// Adapters from now on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adapters {
    /// Adapters that the servers get, in the order of the specification.
    pub served: Vec<AdapterStatus>,
    /// The condition AdaptersResolved; absent without spec.adapters.
    pub condition: Option<Value>,
}

/// Finds the folder of each adapter. One whose job is not over waits. One that was served stays as it was when its job
/// is deleted or trains again.
pub fn resolve(
    specs: &[ServedAdapter],
    jobs: &BTreeMap<String, Arc<FineTuneJob>>,
    before: &[AdapterStatus],
) -> Adapters {
    let mut served = Vec::new();
    let mut waiting: Vec<(&'static str, String)> = Vec::new();
    for ServedAdapter { name, from, from_job } in specs {
        let status = |uri: &str, job: Option<&str>| AdapterStatus {
            name: name.clone(),
            uri: uri.into(),
            job: job.map(Into::into),
        };
        match (from, from_job) {
            (Some(uri), _) => served.push(status(uri, None)),
            (None, Some(reference)) => {
                let job = jobs.get(&reference.name).map(|job| &**job);
                let trained = job.filter(|job| target::has_adapter(job)).and_then(target::passed);
                let known = before
                    .iter()
                    .find(|known| known.name == *name && known.job.as_deref() == Some(reference.name.as_str()));
                match (trained, known) {
                    (Some(summary), _) => served.push(status(&summary.artifact, Some(&reference.name))),
                    (None, Some(known)) => served.push(known.clone()),
                    (None, None) => {
                        let (reason, why) = target::missing(&reference.name, job, true, "spec.adapters");
                        waiting.push((reason, format!("{name}: {why}")));
                    }
                }
            }
            // Refused by the API server, and by `validate`.
            (None, None) => {}
        }
    }
    let condition = match waiting.first() {
        _ if specs.is_empty() => None,
        None => Some(Value::new(State::True, "Resolved", format!("{} adapters are served", served.len()))),
        Some((reason, _)) => {
            let all: Vec<&str> = waiting.iter().map(|(_, why)| why.as_str()).collect();
            Some(Value::new(State::False, reason, all.join("; ")))
        }
    };
    Adapters { served, condition }
}

//! Turns a FineTuneJob into one that children can be built from. What the API server refuses by the CRD is not checked
//! again.

use athanor_contract::{
    process::api,
    train::{Backend, Mistake, mistakes},
};
use athanor_crds::{FineTuneJob, FineTuneJobSpec, TRIAL_ANNOTATION, schema::LONGEST_JOB_NAME};
use athanor_search::Search;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;

use super::{attempt::is_over, policy::queue};
use crate::{cluster, images::gpus};

/// A job whose children have valid names, or one that is over and has no further children.
pub struct ValidatedJob {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub owner: Vec<OwnerReference>,
    /// The FineTuneJob whose search this one is a trial of.
    pub trial_of: Option<OwnerReference>,
    /// Labels of a queue, which its Kubernetes Jobs get as well.
    pub queue_labels: Vec<(String, String)>,
    /// Number of nodes, which is the number of pods of an attempt.
    pub nodes: u32,
    pub spec: FineTuneJobSpec,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJob {
    #[error(
        "metadata.name: {0:?} is the name of Services and pods; it must have at most {LONGEST_JOB_NAME} characters, start with a \
         lower-case letter and contain only lower-case letters, digits and '-'"
    )]
    Name(String),
    #[error("spec.hyperparameters.{0}")]
    Search(String),
    #[error("{}", .0.iter().map(|mistake| format!("spec.{mistake}")).collect::<Vec<_>>().join("; "))]
    Rules(Vec<Mistake>),
    #[error(
        "spec.distributed.processesPerNode: {processes}, but a pod reserves {gpus} GPUs (spec.podTemplate.resources), of which each \
         process uses one: the others would be idle"
    )]
    IdleGpus { processes: u32, gpus: u32 },
    #[error("the object has no {0}")]
    Incomplete(&'static str),
}

/// Checks the specification, unless the job is over: a stricter rule of a newer operator must not turn a success into a
/// failure.
///
/// # Errors
/// The first mistake, with its field.
pub fn validate(job: &FineTuneJob) -> Result<ValidatedJob, InvalidJob> {
    if !job.status.as_ref().is_some_and(is_over) {
        check(job)?;
    }
    let is_trial = job.annotations().contains_key(TRIAL_ANNOTATION);
    let parent = job.owner_references().iter().find(|owner| owner.kind == api::FINE_TUNE_JOB);
    Ok(ValidatedJob {
        name: job.name_any(),
        namespace: job.namespace().ok_or(InvalidJob::Incomplete("namespace"))?,
        uid: job.uid().ok_or(InvalidJob::Incomplete("uid"))?,
        owner: cluster::owner(job),
        trial_of: parent.filter(|_| is_trial).cloned(),
        queue_labels: queue::labels(job),
        nodes: job.spec.train.distributed.num_nodes,
        spec: job.spec.clone(),
    })
}

fn check(job: &FineTuneJob) -> Result<(), InvalidJob> {
    let name = job.name_any();
    if !is_service_name(&name, LONGEST_JOB_NAME) {
        return Err(InvalidJob::Name(name));
    }
    let mistakes = mistakes(&job.spec.train);
    if !mistakes.is_empty() {
        return Err(InvalidJob::Rules(mistakes));
    }
    let hyperparameters = &job.spec.train.hyperparameters;
    if let Some(search) = &hyperparameters.search {
        Search::new(search, hyperparameters).map_err(InvalidJob::Search)?;
    }
    let (processes, gpus) = (job.spec.train.distributed.processes_per_node, gpus(job.spec.pod_template.as_ref()));
    if gpus > processes && job.spec.train.distributed.backend != Backend::Gloo {
        return Err(InvalidJob::IdleGpus { processes, gpus });
    }
    Ok(())
}

/// Returns whether the name is a label of RFC 1035, as names of Services must be, with at most `longest` characters.
pub fn is_service_name(name: &str, longest: usize) -> bool {
    let fine = |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-';
    name.len() <= longest
        && name.chars().all(fine)
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
}

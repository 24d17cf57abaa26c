//! From a FineTuneJob to one that children can be built from. What the API server's rules already refuse is not checked again.

use athanor_contract::{
    process::api,
    train::{Mistake, mistakes},
};
use athanor_crds::{FineTuneJob, FineTuneJobSpec, TRIAL_ANNOTATION, schema::LONGEST_JOB_NAME};
use athanor_search::Search;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;

use crate::cluster;

/// A job whose children have valid names.
pub struct ValidatedJob {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub owner: Vec<OwnerReference>,
    /// The job whose search has this one as a trial.
    pub trial_of: Option<OwnerReference>,
    /// Labels of the job that its Job gets too.
    pub queue_labels: Vec<(String, String)>,
    pub spec: FineTuneJobSpec,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidJob {
    #[error(
        "metadata.name: {0:?} names Services and pods, so it must be at most {LONGEST_JOB_NAME} lower-case letters, digits and '-', beginning with a letter"
    )]
    Name(String),
    #[error("spec.hyperparameters.{0}")]
    Search(String),
    #[error("{}", .0.iter().map(|mistake| format!("spec.{mistake}")).collect::<Vec<_>>().join("; "))]
    Rules(Vec<Mistake>),
    #[error("the object has no {0}")]
    Incomplete(&'static str),
}

pub fn validate(job: &FineTuneJob) -> Result<ValidatedJob, InvalidJob> {
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
    let is_trial = job.annotations().contains_key(TRIAL_ANNOTATION);
    let parent = job.owner_references().iter().find(|owner| owner.kind == api::FINE_TUNE_JOB);
    let queue_labels = job.labels().iter().filter(|(key, _)| key.starts_with("kueue.x-k8s.io/"));
    Ok(ValidatedJob {
        namespace: job.namespace().ok_or(InvalidJob::Incomplete("namespace"))?,
        uid: job.uid().ok_or(InvalidJob::Incomplete("uid"))?,
        owner: cluster::owner(job),
        trial_of: parent.filter(|_| is_trial).cloned(),
        queue_labels: queue_labels.map(|(key, value)| (key.clone(), value.clone())).collect(),
        spec: job.spec.clone(),
        name,
    })
}

/// RFC 1035, which Services ask for.
pub fn is_service_name(name: &str, longest: usize) -> bool {
    let fine = |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '-';
    name.len() <= longest
        && name.chars().all(fine)
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
}

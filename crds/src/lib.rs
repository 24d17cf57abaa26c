//! Athanor's custom resources: [`FineTuneJob`] says how to make a model, [`ModelDeployment`] how to serve it and when
//! it is stale.
//!
//! The training part of a job is [`athanor_contract::train::TrainSpec`], shared with the trainer; this crate adds what
//! only a cluster needs. [`schema::definitions`] gives the CustomResourceDefinitions that `crdgen` writes beside this
//! crate. There is no Kubernetes client here.

// Printer columns are attributes that repeat json_path and type_ by design.
#![allow(clippy::duplicated_attributes)]

mod access;
mod adapter;
mod container;
mod engine;
mod feedback;
mod finetunejob;
mod modeldeployment;
mod pod;
mod retraining;
pub mod schema;

pub use athanor_contract::process::annotation::{
    APPROVE as APPROVE_ANNOTATION, RETRY_ROLLOUT as RETRY_ROLLOUT_ANNOTATION, TRIAL as TRIAL_ANNOTATION,
};
/// API group of both kinds.
pub use athanor_contract::process::api::GROUP;
/// Labels of the objects that Athanor creates.
pub use athanor_contract::process::label;

pub use access::{AccessSpec, ApiKeysSpec, TlsSpec};
pub use adapter::{AdapterStatus, BaseModel, JobReference, ServedAdapter};
pub use container::ContainerEngine;
pub use engine::{BuiltinEngine, EngineSpec};
pub use feedback::{FeedbackSpec, KafkaSpec};
pub use finetunejob::*;
pub use modeldeployment::*;
pub use pod::PodOverrides;
pub use retraining::*;

/// Types of conditions.
pub mod condition {
    /// Summary of a FineTuneJob: True, False or, as long as it is not over, Unknown.
    pub const SUCCEEDED: &str = "Succeeded";
    /// All pods of the FineTuneJob's current attempt run.
    pub const RUNNING: &str = "Running";
    /// Summary of a ModelDeployment: the current revision answers with all its replicas.
    pub const READY: &str = "Ready";
    /// A candidate revision is on its way.
    pub const PROGRESSING: &str = "Progressing";
    /// The monitor says that the current revision is stale.
    pub const DRIFTED: &str = "Drifted";
    /// A retraining runs.
    pub const RETRAINING: &str = "Retraining";
    /// Every adapter of spec.adapters has a folder and is served; absent without spec.adapters.
    pub const ADAPTERS_RESOLVED: &str = "AdaptersResolved";
    /// False if the pods reserve GPUs that their image is not expected to use; absent otherwise.
    pub const GPU_IMAGE: &str = "GpuImage";
}

/// Whether a field may be left out when it is written.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use athanor_contract::process::api;
    use kube::CustomResourceExt;

    use super::*;

    #[test]
    fn the_derives_have_the_names_of_the_contract() {
        let definitions = [
            (FineTuneJob::crd(), api::FINE_TUNE_JOB, api::FINE_TUNE_JOBS),
            (ModelDeployment::crd(), api::MODEL_DEPLOYMENT, api::MODEL_DEPLOYMENTS),
        ];
        for (definition, kind, plural) in definitions {
            let spec = definition.spec;
            assert_eq!((spec.group.as_str(), spec.versions[0].name.as_str()), (api::GROUP, api::VERSION));
            assert_eq!((spec.names.kind.as_str(), spec.names.plural.as_str()), (kind, plural));
        }
    }
}

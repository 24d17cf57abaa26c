//! Athanor's custom resources: [`FineTuneJob`] says how to make a model, [`ModelDeployment`] how to serve it and when it is stale.
//!
//! The training part of a job is [`athanor_contract::train::TrainSpec`], shared with the trainer; this crate adds what only a cluster
//! needs. [`schema::definitions`] gives the CustomResourceDefinitions that `crdgen` writes beside this crate. There is no
//! Kubernetes client here.

// Printer columns are attributes that repeat json_path and type_ by design.
#![allow(clippy::duplicated_attributes)]

mod finetunejob;
mod modeldeployment;
mod pod;
pub mod schema;

pub use finetunejob::*;
pub use modeldeployment::*;
pub use pod::PodOverrides;

/// API group of both kinds.
pub const GROUP: &str = "athanor.dev";

/// Labels that Athanor puts on what it creates.
pub mod label {
    /// Name of the FineTuneJob that an object belongs to.
    pub const FINE_TUNE_JOB: &str = "athanor.dev/finetunejob";
    /// Name of the ModelDeployment that an object (a retraining included) belongs to.
    pub const DEPLOYMENT: &str = "athanor.dev/deployment";
    /// Name of the FineTuneJob whose search for hyperparameters an object is a trial of.
    pub const SEARCH: &str = "athanor.dev/search";
    /// Name of the revision that an object belongs to.
    pub const REVISION: &str = "athanor.dev/revision";
}

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
}

/// Annotation of a trial's FineTuneJob: which trial it is, as JSON. It is read if the operator was killed before it could note the
/// trial in the search's status.
pub const TRIAL_ANNOTATION: &str = "athanor.dev/trial";
/// Annotation of a ModelDeployment with `approval: Manual`: its value is the name of the retraining that may start.
pub const APPROVE_ANNOTATION: &str = "athanor.dev/approve";

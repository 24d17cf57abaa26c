//! All children that a decision requires.

use athanor_crds::FineTuneJob;

use super::{
    children::{
        monitor::{self, MonitorChildren},
        retraining,
        revision::{self, RevisionChildren},
        router::{self, RouterChildren},
    },
    decide::Decision,
    policy::servers,
    validate::ValidatedDeployment,
};
use crate::settings::Settings;

/// Everything that should exist.
pub struct Children {
    /// Servers: those of each revision, or those that several share.
    pub revisions: Vec<RevisionChildren>,
    /// Absent before there is a model.
    pub router: Option<RouterChildren>,
    /// Absent without spec.monitor.
    pub monitor: Option<MonitorChildren>,
    /// A retraining to create.
    pub retraining: Option<FineTuneJob>,
}

/// Builds the children. `fresh_key` becomes the key of request ids if there is none yet.
pub fn build(
    deployment: &ValidatedDeployment,
    settings: &Settings,
    decision: &Decision,
    fresh_key: String,
) -> Children {
    let rollout = &decision.rollout;
    let servers = servers::servers(&deployment.name, rollout, &decision.adapters.served);
    let new = decision.retraining.create.as_ref();
    Children {
        revisions: servers.iter().map(|server| revision::build(deployment, settings, server)).collect(),
        router: router::build(deployment, settings, decision, fresh_key),
        monitor: monitor::build(deployment, settings, rollout),
        retraining: new.and_then(|new| retraining::build(deployment, new)),
    }
}

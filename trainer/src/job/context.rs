//! The process that runs a job, and the job on one of its ranks.

use std::path::{Path, PathBuf};

use athanor_contract::train::{TrainConfig, TrainSpec};
use tch::Device;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    distributed::{Node, Topology},
    report::Timeline,
    train::watchdog::Watchdog,
};

/// The process: its runtime, its clock, and how it is watched and stopped.
pub struct Process {
    pub runtime: Handle,
    pub timeline: Timeline,
    /// Asks the run to stop after a checkpoint.
    pub stop: CancellationToken,
    pub watchdog: Watchdog,
    /// The processes of this machine.
    pub node: Node,
    /// Whether standard error is a terminal.
    pub terminal: bool,
    /// Kubernetes namespace, for progress reports; empty on a laptop.
    pub namespace: String,
    /// A file that gets one line for each step.
    pub loss_log: Option<PathBuf>,
}

/// A job on one rank.
#[derive(Clone, Copy)]
pub struct JobContext<'a> {
    pub config: &'a TrainConfig,
    pub topology: &'a Topology,
    pub process: &'a Process,
    /// This process's own folder.
    pub work: &'a Path,
}

impl<'a> JobContext<'a> {
    pub fn spec(&self) -> &'a TrainSpec {
        &self.config.spec
    }

    pub fn device(&self) -> Device {
        self.topology.device()
    }

    pub fn is_rank_0(&self) -> bool {
        self.topology.rank() == 0
    }

    pub fn beat(&self) {
        self.process.watchdog.beat();
    }
}

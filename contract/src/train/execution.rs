//! Processes, checkpoints and failures.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DistributedSpec {
    /// Number of pods.
    #[schemars(range(min = 1, max = 512))]
    pub num_nodes: u32,
    /// Number of processes in each pod: one for each GPU.
    #[schemars(range(min = 1, max = 16))]
    pub processes_per_node: u32,
    /// Library through which the processes communicate.
    pub backend: Backend,
    /// Whether each process keeps the optimizer's state (for AdamW two numbers per weight) of its own part of the
    /// weights only and sends the updated part to the others: the same training with less memory and more traffic. It
    /// has no effect with one process.
    pub shard_optimizer: bool,
}

impl Default for DistributedSpec {
    fn default() -> Self {
        Self { num_nodes: 1, processes_per_node: 1, backend: Backend::Auto, shard_optimizer: false }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Backend {
    /// NCCL with GPUs, otherwise Gloo.
    Auto,
    NCCL,
    Gloo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CheckpointSpec {
    /// Number of optimizer steps between checkpoints. 0: only at the end of each epoch.
    #[schemars(range(min = 0))]
    pub every_steps: u64,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every_steps: 100 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FailurePolicy {
    /// Number of restarts of all processes together before the job fails. Errors in the user's input are not retried.
    #[schemars(range(min = 0, max = 100))]
    pub max_restarts: u32,
    /// Seconds that a step may take; after them the process exits with code 43. 0: no limit.
    #[schemars(range(min = 0, max = 86400))]
    pub hang_seconds: u32,
    /// Reaction to a loss or gradients that are not finite. Fail exits with code 44. Skip leaves the step out. RollBack
    /// restores the state of the last checkpoint and leaves the step out, at most three times without a new checkpoint;
    /// each process keeps a copy of weights and optimizer state on its device for it (with AdamW three times the size
    /// of the weights).
    pub on_non_finite: OnNonFinite,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self { max_restarts: 3, hang_seconds: 600, on_non_finite: OnNonFinite::Fail }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnNonFinite {
    /// The process exits with code 44.
    Fail,
    /// The step is left out, and training continues.
    Skip,
    /// The state of the last checkpoint is restored, and the steps since then are repeated without the one that was not
    /// finite. Unlike Skip this also repairs weights that became corrupt in between. After three times without a new
    /// checkpoint the process exits with code 44. Each process keeps a copy of weights and optimizer state on its
    /// device.
    RollBack,
}

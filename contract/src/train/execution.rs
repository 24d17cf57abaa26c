//! Processes, checkpoints and failures.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DistributedSpec {
    /// Pods, each of one Indexed Job's indices.
    #[schemars(range(min = 1, max = 512))]
    pub num_nodes: u32,
    /// Processes in a pod: one for each GPU.
    #[schemars(range(min = 1, max = 16))]
    pub processes_per_node: u32,
    /// What gradients travel by.
    pub backend: Backend,
    /// Each process keeps the optimizer's state (two numbers a weight for AdamW) of its own part of the weights only, and sends the
    /// others what it makes of that part: the same training in less memory, for more traffic. Nothing changes with one process.
    pub shard_optimizer: bool,
}

impl Default for DistributedSpec {
    fn default() -> Self {
        Self { num_nodes: 1, processes_per_node: 1, backend: Backend::Auto, shard_optimizer: false }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Backend {
    /// NCCL with GPUs, else Gloo.
    Auto,
    NCCL,
    Gloo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CheckpointSpec {
    /// Save every so many optimizer steps; 0 saves at the end of each epoch only.
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
    /// Restarts of the whole gang before the job fails. Errors in the user's input are never retried.
    #[schemars(range(min = 0, max = 100))]
    pub max_restarts: u32,
    /// A step that takes longer ends the process with exit code 43; 0 turns the watch off.
    #[schemars(range(min = 0, max = 86400))]
    pub hang_seconds: u32,
    /// What happens when loss or gradients are not finite: Fail ends with exit code 44; Skip leaves the step out; RollBack goes back to
    /// the last checkpoint's state and leaves the step out, three times at most without a new checkpoint, and keeps a copy of
    /// weights and optimizer on each process's device for it (with AdamW three times the weights).
    pub on_non_finite: OnNonFinite,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self { max_restarts: 3, hang_seconds: 600, on_non_finite: OnNonFinite::Fail }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnNonFinite {
    /// End with exit code 44.
    Fail,
    /// Leave the step out and go on.
    Skip,
    /// Go back to the last checkpoint's state, take the steps since then again, and leave out the one that was not finite: unlike
    /// Skip this mends weights that were corrupted meanwhile. After three times without a new checkpoint the run ends with exit
    /// code 44. Each process keeps a copy of weights and optimizer on its device: with AdamW three times the weights.
    RollBack,
}

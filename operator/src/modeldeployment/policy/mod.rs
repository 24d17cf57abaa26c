//! The policies of a ModelDeployment: functions of the specification, the status, what was read, and the time.

pub mod adapters;
pub mod compare;
pub mod retrain;
pub mod rollout;
pub mod servers;
pub mod target;

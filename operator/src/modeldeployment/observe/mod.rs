//! What is read about a ModelDeployment besides objects: the state of workloads and the routers' counts.

pub mod counts;
pub mod workload;

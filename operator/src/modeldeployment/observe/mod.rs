//! What is read about a ModelDeployment besides objects: the state of workloads, the routers' counts, and the adapters
//! that servers have loaded.

pub mod adapters;
pub mod ask;
pub mod counts;
pub mod workload;

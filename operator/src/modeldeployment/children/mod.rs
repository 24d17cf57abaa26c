//! The children of a ModelDeployment, one file each: how it is built and in which order it is deleted.

pub mod common;
pub mod container;
pub mod monitor;
pub mod retraining;
pub mod revision;
pub mod router;

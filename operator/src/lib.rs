//! The controllers of FineTuneJob and ModelDeployment.
//!
//! A reconcile is the same steps for both kinds: `dereference` reads what exists, `validate` turns the object into something that
//! cannot be wrong any more, `decide` says what should be (pure), `build` writes the children (pure), `apply` puts them into the
//! cluster and `status` tells the user. Only `dereference`, `apply` and `status` (and [`lease`]) hold a Kubernetes client.
//! There is no libtorch, no Kafka and no object store here: a model is an address that trainers and servers read.

pub mod cluster;
pub mod condition;
pub mod context;
pub mod controllers;
pub mod finetunejob;
pub mod lease;
pub mod modeldeployment;
pub mod object_metrics;
pub mod pods;
pub mod progress;
pub mod settings;

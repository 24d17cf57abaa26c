//! The controllers of FineTuneJob and ModelDeployment.
//!
//! A reconcile has the same steps for both kinds (see [`reconciler`]): `dereference` reads caches, `validate` turns the
//! object into one without mistakes, `decide` says what should be, `build` makes the children, `apply` puts them into
//! the cluster and `status` reports to the user. `validate`, `decide` and `build` are functions of their arguments.
//! Only `apply` and `status`, through [`cluster`], [`controllers`] and [`lease`] have a Kubernetes client. There is no
//! libtorch, no Kafka and no object store here: a model is an address that trainers and servers read.

pub mod cluster;
pub mod condition;
pub mod context;
pub mod controllers;
pub mod finetunejob;
pub mod images;
pub mod index;
pub mod lease;
pub mod liveness;
pub mod memory;
pub mod modeldeployment;
pub mod object_metrics;
pub mod ops;
pub mod pace;
pub mod pods;
pub mod progress;
pub mod prune;
pub mod reconciler;
pub mod settings;
pub mod stores;
pub mod time;
pub mod wakes;

//! The harness of the demo and of the tests that need a real API server or a real cluster.
//!
//! Nothing here stands in for a part of the product: Kubernetes, Kafka, S3 and Prometheus are the real ones that `cluster/up` starts,
//! and Athanor's own processes run from the images or as binaries. Trainer and server are never linked.

pub mod apiserver;
pub mod availability;
pub mod chaos;
pub mod chat;
pub mod cluster;
pub mod dataset;
pub mod events;
pub mod faults;
pub mod finance;
pub mod follow;
pub mod labelled;
pub mod otlp;
pub mod paths;
pub mod prometheus;
pub mod retrainings;
pub mod sentiment;
pub mod stages;
pub mod storage;
pub mod traffic;
pub mod verdicts;

/// Tells rustls which cryptography to use: an HTTP client brings none and cannot be made without.
pub(crate) fn settle_tls() {
    // An error means that it was settled before.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

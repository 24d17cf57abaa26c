//! Logs, traces, metrics, health and shutdown, the same in every Athanor process.
//!
//! Logs are JSON lines on standard error, filtered by `RUST_LOG` (default `info`). Traces go out over OTLP/gRPC when
//! `OTEL_EXPORTER_OTLP_ENDPOINT` is set, and nowhere otherwise. What a process measures is its own business: this crate names none.

mod info;
mod logs;
mod ops;
pub mod propagation;
mod shutdown;

pub use info::publish_info;
pub use logs::{Guard, init};
pub use ops::{MetricsHandle, Readiness, metrics, ops_router};
pub use shutdown::shutdown_signal;

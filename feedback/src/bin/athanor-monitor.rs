//! `athanor-monitor`: watches a ModelDeployment's events for drift and publishes the verdict in its status.

use std::{net::SocketAddr, path::PathBuf};

use athanor_contract::process::{path, port};
use clap::Parser;

#[path = "../monitor/mod.rs"]
mod monitor;

/// Watches a ModelDeployment's events for drift.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The mounted configuration; read again when it changes.
    #[arg(long, default_value = path::MONITOR_CONFIG)]
    config: PathBuf,
    /// Where /metrics, /healthz and /readyz are served.
    #[arg(long, default_value_t = SocketAddr::from(([0, 0, 0, 0], port::MONITOR_OPS)))]
    ops_address: SocketAddr,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let _telemetry = athanor_telemetry::init("athanor-monitor");
    monitor::run(arguments.config, arguments.ops_address, athanor_telemetry::shutdown_signal()).await
}

//! `athanor-monitor`: watches a ModelDeployment's events for drift and publishes the verdict in its status.

use std::{net::SocketAddr, path::PathBuf};

use clap::Parser;

#[path = "../monitor/mod.rs"]
mod monitor;

/// Watches a ModelDeployment's events for drift.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The mounted configuration; read again when it changes.
    #[arg(long, default_value = "/etc/athanor/monitor.json")]
    config: PathBuf,
    /// Where /metrics, /healthz and /readyz are served.
    #[arg(long, default_value = "0.0.0.0:9102")]
    ops_address: SocketAddr,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let _telemetry = athanor_telemetry::init("athanor-monitor");
    monitor::run(arguments.config, arguments.ops_address, athanor_telemetry::shutdown_signal()).await
}

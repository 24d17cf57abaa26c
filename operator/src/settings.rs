//! Command line and environment of the operator: images, addresses, ports.

use athanor_contract::process::{port, variable};
use clap::Parser;

use crate::images::Images;

/// The controllers of FineTuneJob and ModelDeployment.
#[derive(Clone, Debug, Parser)]
#[command(name = "athanor-operator", version)]
pub struct Settings {
    /// Namespace to watch. Absent: all namespaces.
    #[arg(long, env = variable::NAMESPACE_WATCH)]
    pub namespace_watch: Option<String>,
    /// Image of athanor-trainer.
    #[arg(long, env = variable::TRAINER_IMAGE, default_value = "athanor-trainer:latest")]
    pub trainer_image: String,
    /// Image of athanor-trainer with CUDA, for pods that reserve nvidia.com/gpu. Absent: they get the other one, and a
    /// condition of the job says so.
    #[arg(long, env = variable::TRAINER_CUDA_IMAGE)]
    pub trainer_cuda_image: Option<String>,
    /// Image of athanor-server.
    #[arg(long, env = variable::SERVER_IMAGE, default_value = "athanor-server:latest")]
    pub server_image: String,
    /// Image of athanor-server with CUDA, for pods that reserve nvidia.com/gpu. Absent: they get the other one, and a
    /// condition of the deployment says so.
    #[arg(long, env = variable::SERVER_CUDA_IMAGE)]
    pub server_cuda_image: Option<String>,
    /// Image of athanor-router.
    #[arg(long, env = variable::ROUTER_IMAGE, default_value = "athanor-router:latest")]
    pub router_image: String,
    /// Image of athanor-monitor.
    #[arg(long, env = variable::MONITOR_IMAGE, default_value = "athanor-monitor:latest")]
    pub monitor_image: String,
    /// Secret for pulling the images of all pods, in the namespace of the pods. May be given several times.
    #[arg(long = "image-pull-secret")]
    pub image_pull_secrets: Vec<String>,
    /// Number of routers of each ModelDeployment.
    #[arg(long, env = variable::ROUTER_REPLICAS, default_value_t = 2, value_parser = clap::value_parser!(i32).range(1..=100))]
    pub router_replicas: i32,
    /// Seconds that servers and routers keep serving after SIGTERM, until nobody sends to them any more. Large clusters need
    /// more.
    #[arg(long, env = variable::STOP_DELAY_SECONDS, default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=600))]
    pub stop_delay_seconds: u32,
    /// Address for progress reports of trainers, such as http://athanor-operator.athanor-system:9443. Absent: trainers
    /// do not report.
    #[arg(long, env = variable::PROGRESS_ADDRESS)]
    pub progress_address: Option<String>,
    /// Port for progress reports (gRPC).
    #[arg(long, env = variable::PROGRESS_PORT, default_value_t = port::PROGRESS)]
    pub progress_port: u16,
    /// Port of /metrics, /healthz and /readyz.
    #[arg(long, env = variable::OPS_PORT, default_value_t = port::OPERATOR_OPS)]
    pub ops_port: u16,
    /// Value of OTEL_EXPORTER_OTLP_ENDPOINT in trainers, servers, routers and monitors. Absent: they send no traces.
    #[arg(long, env = variable::OTLP_ENDPOINT)]
    pub otlp_endpoint: Option<String>,
    /// Namespace of the Lease that elects the leader; only the leader reconciles.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub lease_namespace: String,
    /// Name of that Lease.
    #[arg(long, env = variable::LEASE_NAME, default_value = "athanor-operator")]
    pub lease_name: String,
    /// Name of this process in the Lease. Absent: the host name with a random number.
    #[arg(long, env = "POD_NAME")]
    pub identity: Option<String>,
}

impl Settings {
    /// Returns the images of athanor-trainer.
    pub fn trainer_images(&self) -> Images<'_> {
        Images { cpu: &self.trainer_image, cuda: self.trainer_cuda_image.as_deref(), option: "--trainer-cuda-image" }
    }

    /// Returns the images of athanor-server.
    pub fn server_images(&self) -> Images<'_> {
        Images { cpu: &self.server_image, cuda: self.server_cuda_image.as_deref(), option: "--server-cuda-image" }
    }
}

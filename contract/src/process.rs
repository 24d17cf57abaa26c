//! Names that processes share: environment variables, ports, files, paths, headers, and the names of the API.
//!
//! One process sets such a name and another reads it, so it is written here and nowhere else; `tests/process.rs`
//! searches the workspace for the literals. Names that only tests and scripts use (`ATHANOR_CACHE`, ...) are not part
//! of it.

/// Environment variables.
pub mod variable {
    // The operator sets these in each pod of a trainer.
    /// Index of the pod, from 0. The trainer reads [`JOB_COMPLETION_INDEX`] where it is absent.
    pub const NODE_RANK: &str = "ATHANOR_NODE_RANK";
    /// Index of the pod, set by Kubernetes in the pods of an Indexed Job.
    pub const JOB_COMPLETION_INDEX: &str = "JOB_COMPLETION_INDEX";
    /// Number of pods.
    pub const NUM_NODES: &str = "ATHANOR_NUM_NODES";
    /// DNS name or address of pod 0.
    pub const MASTER_ADDR: &str = "ATHANOR_MASTER_ADDR";
    /// Port of the rendezvous in pod 0; default [`port::RENDEZVOUS`](super::port::RENDEZVOUS).
    pub const MASTER_PORT: &str = "ATHANOR_MASTER_PORT";
    /// Address of the pod: Gloo listens there.
    pub const POD_IP: &str = "ATHANOR_POD_IP";
    /// Namespace of the FineTuneJob (trainer) or of the ModelDeployment (router).
    pub const NAMESPACE: &str = "ATHANOR_NAMESPACE";
    /// Port of a trainer's `/metrics`. Absent: the trainer serves none outside a pod.
    pub const METRICS_PORT: &str = "ATHANOR_METRICS_PORT";

    // A trainer process sets these for the processes that it starts.
    /// Index of the process in its pod.
    pub const LOCAL_RANK: &str = "ATHANOR_LOCAL_RANK";
    /// Process id of the starting process, which the started one does not outlive.
    pub const PARENT: &str = "ATHANOR_PARENT";
    /// Folder of the processes of one pod, for what the first of them prepares for all. Absent: each prepares it itself.
    pub const NODE_FOLDER: &str = "ATHANOR_NODE_FOLDER";
    /// File for the termination message; default [`path::TERMINATION_LOG`](super::path::TERMINATION_LOG) if it exists.
    pub const TERMINATION_LOG: &str = "ATHANOR_TERMINATION_LOG";
    /// File for the loss of each step, for tests and comparisons. Absent or empty: none is written.
    pub const LOSS_LOG: &str = "ATHANOR_LOSS_LOG";

    // The operator sets these in the pods of servers and routers.
    /// Configuration file of a server.
    pub const CONFIG: &str = "ATHANOR_CONFIG";
    /// Folder for the model that a server fetches.
    pub const CACHE_DIR: &str = "ATHANOR_CACHE_DIR";
    /// ConfigMap with the router's configuration.
    pub const CONFIG_MAP: &str = "ATHANOR_CONFIG_MAP";
    /// Folder for events that Kafka has not taken yet.
    pub const SPILL_DIR: &str = "ATHANOR_SPILL_DIR";
    /// Folder with the keys that sign request ids and events ([`file::CURRENT_KEY`](super::file::CURRENT_KEY),
    /// [`file::PREVIOUS_KEY`](super::file::PREVIOUS_KEY)), the same for routers, monitor and retrainings of a
    /// deployment. Absent: a router makes a key of its own, the others verify nothing.
    pub const SIGNING_KEYS: &str = "ATHANOR_SIGNING_KEYS";
    /// Who may use a router, as JSON: [`AccessConfig`](crate::serve::AccessConfig). Absent: everyone.
    pub const ACCESS: &str = "ATHANOR_ACCESS";
    /// Folder with the hashes of API keys, a file for each caller.
    pub const API_KEYS: &str = "ATHANOR_API_KEYS";
    /// Bytes of bodies of requests and answers that a server or router holds at the same time. Absent: 134217728 (128 MiB).
    pub const BODY_MEMORY: &str = "ATHANOR_BODY_MEMORY";
    /// Folder with a router's certificate and its private key. Absent: the router serves without TLS.
    pub const TLS: &str = "ATHANOR_TLS";

    // Keys of the user's Secret for Kafka, in the pods of routers, monitors and trainers.
    /// PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL.
    pub const KAFKA_SECURITY_PROTOCOL: &str = "KAFKA_SECURITY_PROTOCOL";
    /// PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.
    pub const KAFKA_SASL_MECHANISM: &str = "KAFKA_SASL_MECHANISM";
    pub const KAFKA_SASL_USERNAME: &str = "KAFKA_SASL_USERNAME";
    pub const KAFKA_SASL_PASSWORD: &str = "KAFKA_SASL_PASSWORD";
    /// Certificates, in PEM, that sign the brokers' certificates.
    pub const KAFKA_SSL_CA: &str = "KAFKA_SSL_CA";
    /// Certificate of the client, in PEM.
    pub const KAFKA_SSL_CERTIFICATE: &str = "KAFKA_SSL_CERTIFICATE";
    /// Private key of the client's certificate, in PEM.
    pub const KAFKA_SSL_KEY: &str = "KAFKA_SSL_KEY";
    /// GPUs that a trainer's pod has reserved: it fails if it cannot use them.
    pub const GPUS: &str = "ATHANOR_GPUS";
    /// Seconds that a server or router keeps serving after SIGTERM before it drains.
    pub const SHUTDOWN_GRACE_SECONDS: &str = "ATHANOR_SHUTDOWN_GRACE_SECONDS";

    // The operator sets these in the container of a server of another project; users name them in its arguments.
    /// Folder of the model.
    pub const MODEL_DIR: &str = "MODEL_DIR";
    /// Name that requests have as `model`.
    pub const MODEL_NAME: &str = "MODEL_NAME";
    /// Port on which the server listens.
    pub const PORT: &str = "PORT";

    // The chart sets these in the operator's pod.
    pub const NAMESPACE_WATCH: &str = "ATHANOR_NAMESPACE_WATCH";
    pub const TRAINER_IMAGE: &str = "ATHANOR_TRAINER_IMAGE";
    pub const TRAINER_CUDA_IMAGE: &str = "ATHANOR_TRAINER_CUDA_IMAGE";
    pub const SERVER_IMAGE: &str = "ATHANOR_SERVER_IMAGE";
    pub const SERVER_CUDA_IMAGE: &str = "ATHANOR_SERVER_CUDA_IMAGE";
    pub const ROUTER_IMAGE: &str = "ATHANOR_ROUTER_IMAGE";
    pub const MONITOR_IMAGE: &str = "ATHANOR_MONITOR_IMAGE";
    pub const ROUTER_REPLICAS: &str = "ATHANOR_ROUTER_REPLICAS";
    pub const STOP_DELAY_SECONDS: &str = "ATHANOR_STOP_DELAY_SECONDS";
    pub const PROGRESS_ADDRESS: &str = "ATHANOR_PROGRESS_ADDRESS";
    pub const PROGRESS_PORT: &str = "ATHANOR_PROGRESS_PORT";
    pub const OPS_PORT: &str = "ATHANOR_OPS_PORT";
    pub const OTLP_ENDPOINT: &str = "ATHANOR_OTLP_ENDPOINT";
    pub const LEASE_NAME: &str = "ATHANOR_LEASE_NAME";
}

/// Ports.
pub mod port {
    /// HTTP API of a server and of a router.
    pub const HTTP: u16 = 8080;
    /// gRPC API of a server and of a router, and port of the deployment's Service for it.
    pub const GRPC: u16 = 8081;
    /// HTTP port of the deployment's Service.
    pub const SERVICE_HTTP: u16 = 80;
    /// HTTPS port of the deployment's Service, if it has a certificate.
    pub const SERVICE_HTTPS: u16 = 443;
    /// `/metrics` of a trainer.
    pub const TRAINER_METRICS: u16 = 9100;
    /// `/metrics`, `/healthz`, `/readyz` and `/analysis` of a router.
    pub const ROUTER_OPS: u16 = 9101;
    /// `/metrics`, `/healthz` and `/readyz` of a monitor.
    pub const MONITOR_OPS: u16 = 9102;
    /// `/metrics`, `/healthz` and `/readyz` of the operator.
    pub const OPERATOR_OPS: u16 = 9103;
    /// Progress reports (gRPC) to the operator.
    pub const PROGRESS: u16 = 9443;
    /// Rendezvous of a trainer's ranks (TCPStore of c10d).
    pub const RENDEZVOUS: u16 = 29500;
}

/// Keys of the ConfigMaps and Secrets that the operator writes, which are the names of the mounted files.
pub mod file {
    /// [`TrainConfig`](crate::train::TrainConfig).
    pub const TRAIN: &str = "train.json";
    /// [`ServeConfig`](crate::serve::ServeConfig).
    pub const SERVE: &str = "serve.json";
    /// [`AdaptersFile`](crate::serve::AdaptersFile).
    pub const ADAPTERS: &str = "adapters.json";
    /// [`RouterConfig`](crate::serve::RouterConfig).
    pub const ROUTER: &str = "router.json";
    /// [`MonitorConfig`](crate::monitor::MonitorConfig).
    pub const MONITOR: &str = "monitor.json";
    /// Key of the Secret with signing keys: what is signed now.
    pub const CURRENT_KEY: &str = "key";
    /// Key of the Secret with signing keys: what was signed before the last rotation.
    pub const PREVIOUS_KEY: &str = "previous";
}

/// How long a router that ends tries to hand events over which Kafka did not take.
pub const HAND_OVER_SECONDS: u64 = 45;

/// Paths in a container, and of a process' operational HTTP server.
pub mod path {
    /// Folder in which a ConfigMap is mounted.
    pub const CONFIG: &str = "/etc/athanor";
    /// Configuration of a trainer.
    pub const TRAIN_CONFIG: &str = "/etc/athanor/train.json";
    /// Configuration of a server.
    pub const SERVE_CONFIG: &str = "/etc/athanor/serve.json";
    /// Configuration of a monitor.
    pub const MONITOR_CONFIG: &str = "/etc/athanor/monitor.json";
    /// Folder in which the Secret with signing keys is mounted.
    pub const SIGNING_KEYS: &str = "/etc/athanor-signing-keys";
    /// Folder in which the Secret with the hashes of API keys is mounted.
    pub const API_KEYS: &str = "/etc/athanor-api-keys";
    /// Folder in which the Secret with a router's certificate is mounted.
    pub const TLS: &str = "/etc/athanor-tls";
    /// Folder for a server's model.
    pub const MODEL_CACHE: &str = "/var/cache/athanor";
    /// Folder of the model for a server of another project; KServe has it there too.
    pub const ENGINE_MODEL: &str = "/mnt/models";
    /// Folder for a router's events in a pod.
    pub const SPOOL: &str = "/var/spool/athanor";
    /// File that the kubelet reads the termination message from.
    pub const TERMINATION_LOG: &str = "/dev/termination-log";
    /// A router's counts by revision: [`RouterAnalysis`](crate::serve::RouterAnalysis).
    pub const ANALYSIS: &str = "/analysis";
    /// Where a router takes the events of one that ends.
    pub const HAND_OVER: &str = "/hand-over";
}

/// Headers of requests and responses on the serving path.
pub mod header {
    /// Id of the request, made by the router unless the client sends one.
    pub const REQUEST_ID: &str = "x-request-id";
    /// Revision that answered; in a request the revision that shall answer.
    pub const REVISION: &str = "x-athanor-revision";
    /// In a request to a server: the adapter that shall answer. It takes precedence over `model`.
    pub const ADAPTER: &str = "x-athanor-adapter";
    /// In an error of a server: what failed, if the router counts it apart ([`failure`](super::failure)).
    pub const FAILURE: &str = "x-athanor-failure";
}

/// Values of [`header::FAILURE`].
pub mod failure {
    /// The model's output has a number that is not finite.
    pub const NOT_FINITE: &str = "not_finite";
}

/// The API group and its kinds.
pub mod api {
    pub const GROUP: &str = "athanor.dev";
    pub const VERSION: &str = "v1alpha1";
    /// `{GROUP}/{VERSION}`.
    pub const API_VERSION: &str = "athanor.dev/v1alpha1";
    pub const FINE_TUNE_JOB: &str = "FineTuneJob";
    pub const FINE_TUNE_JOBS: &str = "finetunejobs";
    pub const MODEL_DEPLOYMENT: &str = "ModelDeployment";
    pub const MODEL_DEPLOYMENTS: &str = "modeldeployments";
}

/// Labels of the objects that Athanor creates.
pub mod label {
    /// Name of the FineTuneJob that an object belongs to.
    pub const FINE_TUNE_JOB: &str = "athanor.dev/finetunejob";
    /// Name of the ModelDeployment that an object (a retraining included) belongs to.
    pub const DEPLOYMENT: &str = "athanor.dev/deployment";
    /// Name of the FineTuneJob whose search for hyperparameters an object is a trial of.
    pub const SEARCH: &str = "athanor.dev/search";
    /// Name of the revision that an object belongs to.
    pub const REVISION: &str = "athanor.dev/revision";
}

/// Annotations of the objects that users and Athanor create.
pub mod annotation {
    /// Trial that a FineTuneJob trains, as JSON. The operator reads it if it was killed before it recorded the trial in
    /// the search's status.
    pub const TRIAL: &str = "athanor.dev/trial";
    /// Name of the retraining that may start, on a ModelDeployment with `approval: Manual`.
    pub const APPROVE: &str = "athanor.dev/approve";
    /// With every new value, such as the time, on a ModelDeployment: revisions that were rolled back may be tried again.
    pub const RETRY_ROLLOUT: &str = "athanor.dev/retry-rollout";
    /// Digest of the mounted configuration: a changed configuration is another pod template.
    pub const CONFIG: &str = "athanor.dev/config";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn composed_names_agree_with_their_parts() {
        let mounted = |file: &str| format!("{}/{file}", path::CONFIG);
        assert_eq!(path::TRAIN_CONFIG, mounted(file::TRAIN));
        assert_eq!(path::SERVE_CONFIG, mounted(file::SERVE));
        assert_eq!(path::MONITOR_CONFIG, mounted(file::MONITOR));
        assert_eq!(api::API_VERSION, format!("{}/{}", api::GROUP, api::VERSION));
        for key in [
            label::FINE_TUNE_JOB,
            label::DEPLOYMENT,
            label::SEARCH,
            label::REVISION,
            annotation::TRIAL,
            annotation::APPROVE,
            annotation::CONFIG,
        ] {
            assert!(key.starts_with(&format!("{}/", api::GROUP)), "{key}");
        }
    }
}

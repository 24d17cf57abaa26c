//! A real API server of its own for one test program: etcd and kube-apiserver on loopback, with Athanor's CRDs, gone
//! when dropped.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams},
    config::{
        AuthInfo, Cluster, Context as KubeContext, KubeConfigOptions, Kubeconfig, NamedAuthInfo, NamedCluster,
        NamedContext,
    },
};

use crate::paths;

const TOKEN: &str = "athanor-test-admin-token";

/// etcd and kube-apiserver; both end when this is dropped.
pub struct ApiServer {
    pub client: Client,
    port: u16,
    _apiserver: Process,
    _etcd: Process,
    folder: tempfile::TempDir,
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // The data is thrown away with its folder, so there is nothing to end in good order.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl ApiServer {
    /// Starts both, installs the CRDs of the checkout and waits until they are served.
    pub async fn start() -> Result<Self> {
        crate::settle_tls();
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name).display().to_string();
        let [client_port, peer_port, api_port] = free_ports()?;
        let etcd_url = format!("http://127.0.0.1:{client_port}");
        let peer_url = format!("http://127.0.0.1:{peer_port}");
        let etcd = start(
            folder.path(),
            "etcd",
            "etcd",
            &[
                format!("--data-dir={}", at("etcd")),
                format!("--listen-client-urls={etcd_url}"),
                format!("--advertise-client-urls={etcd_url}"),
                format!("--listen-peer-urls={peer_url}"),
                format!("--initial-advertise-peer-urls={peer_url}"),
                format!("--initial-cluster=default={peer_url}"),
                "--unsafe-no-fsync".into(),
            ],
        )?;
        std::fs::write(at("tokens.csv"), format!("{TOKEN},admin,admin,\"system:masters\"\n"))?;
        let key =
            Command::new("openssl").args(["genrsa", "-out", &at("sa.key"), "2048"]).output().context("openssl")?;
        if !key.status.success() {
            bail!("openssl genrsa: {}", String::from_utf8_lossy(&key.stderr));
        }
        let apiserver = start(
            folder.path(),
            "kube-apiserver",
            "kube-apiserver",
            &[
                format!("--etcd-servers={etcd_url}"),
                "--bind-address=127.0.0.1".into(),
                format!("--secure-port={api_port}"),
                format!("--cert-dir={}", at("certs")),
                format!("--token-auth-file={}", at("tokens.csv")),
                format!("--service-account-key-file={}", at("sa.key")),
                format!("--service-account-signing-key-file={}", at("sa.key")),
                "--service-account-issuer=https://kubernetes.default.svc".into(),
                "--service-cluster-ip-range=10.96.0.0/16".into(),
                "--authorization-mode=RBAC".into(),
                "--endpoint-reconciler-type=none".into(),
                "--disable-admission-plugins=ServiceAccount".into(),
            ],
        )?;
        let client = client(api_port).await?;
        let server = Self { client, port: api_port, _apiserver: apiserver, _etcd: etcd, folder };
        server.wait_ready().await?;
        server.install_crds().await?;
        Ok(server)
    }

    /// Folder of this server, for logs of a test; gone when the server is dropped.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn address(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// The administrator's token.
    pub fn token(&self) -> &'static str {
        TOKEN
    }

    /// Writes the administrator's kubeconfig to a file, for processes that connect to this server. Returns its path.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        self.kubeconfig_at("kubeconfig", &self.address())
    }

    /// Writes a kubeconfig for the address of this server, or of a proxy, with the administrator's rights.
    pub fn kubeconfig_at(&self, file: &str, server: &str) -> Result<PathBuf> {
        self.kubeconfig_of(file, server, TOKEN)
    }

    /// Writes a kubeconfig for the address of this server, or of a proxy, with the rights of whom a token names.
    pub fn kubeconfig_of(&self, file: &str, server: &str, token: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(format!("{file}.json"));
        let mut cluster = serde_json::json!({"server": server});
        if server.starts_with("https:") {
            cluster["insecure-skip-tls-verify"] = true.into();
        }
        // By hand: the client's own type does not write the token.
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        std::fs::write(&path, kubeconfig.to_string())?;
        Ok(path)
    }

    async fn wait_ready(&self) -> Result<()> {
        let started = Instant::now();
        while let Err(error) = self.client.apiserver_version().await {
            if started.elapsed() > Duration::from_secs(90) {
                return Err(error).context("kube-apiserver did not get ready in 90 s");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    async fn install_crds(&self) -> Result<()> {
        let api: Api<CustomResourceDefinition> = Api::all(self.client.clone());
        let started = Instant::now();
        for file in ["finetunejobs.yaml", "modeldeployments.yaml"] {
            let text =
                std::fs::read_to_string(paths::checkout().join("crds").join(file)).with_context(|| file.to_owned())?;
            let crd: CustomResourceDefinition = serde_yaml::from_str(&text).with_context(|| file.to_owned())?;
            let name = crd.metadata.name.clone().context("a CRD without a name")?;
            // The very first seconds of an API server refuse some writes (its default namespaces and roles are being
            // made).
            loop {
                match api.patch(&name, &PatchParams::apply("athanor-tests"), &Patch::Apply(&crd)).await {
                    Ok(_) => break,
                    Err(kube::Error::Api(status)) if status.code == 422 => bail!("{file}: {}", status.message),
                    Err(error) if started.elapsed() > Duration::from_secs(60) => return Err(error).context(file),
                    Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
                }
            }
            loop {
                let crd = api.get(&name).await?;
                let conditions = crd.status.and_then(|status| status.conditions).unwrap_or_default();
                if conditions.iter().any(|condition| condition.type_ == "Established" && condition.status == "True") {
                    break;
                }
                if started.elapsed() > Duration::from_secs(60) {
                    bail!("{name} was not established in 60 s");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }
}

fn start(folder: &Path, tool: &str, name: &str, arguments: &[String]) -> Result<Process> {
    let binary =
        paths::tool(tool, name).with_context(|| format!("{name} is not built: run cluster/tools --only {tool}"))?;
    let log = std::fs::File::create(folder.join(format!("{name}.log")))?;
    let child = Command::new(&binary)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| binary.display().to_string())?;
    Ok(Process(child))
}

async fn client(port: u16) -> Result<Client> {
    let kubeconfig = Kubeconfig {
        clusters: vec![NamedCluster {
            name: "test".into(),
            cluster: Some(Cluster {
                server: Some(format!("https://127.0.0.1:{port}")),
                // Its certificate is made at each start in a folder of this test alone.
                insecure_skip_tls_verify: Some(true),
                ..Cluster::default()
            }),
            ..NamedCluster::default()
        }],
        auth_infos: vec![NamedAuthInfo {
            name: "test".into(),
            auth_info: Some(AuthInfo { token: Some(TOKEN.to_owned().into()), ..AuthInfo::default() }),
            ..NamedAuthInfo::default()
        }],
        contexts: vec![NamedContext {
            name: "test".into(),
            context: Some(KubeContext { cluster: "test".into(), user: Some("test".into()), ..KubeContext::default() }),
            ..NamedContext::default()
        }],
        current_context: Some("test".into()),
        ..Kubeconfig::default()
    };
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Ports that were free a moment ago. Bound together, so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut listeners = Vec::with_capacity(N);
    for _ in 0..N {
        listeners.push(TcpListener::bind("127.0.0.1:0")?);
    }
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

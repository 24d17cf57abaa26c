//! The local cluster as the demo and the end-to-end tests see it.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use athanor_crds::{FineTuneJob, ModelDeployment};
use k8s_openapi::{
    api::core::v1::{Namespace, Pod, Secret, Service},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};

use crate::{paths, storage};

/// Who writes what the tests apply.
const MANAGER: &str = "athanor-tests";

/// A client with the rights of the cluster's administrator.
#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
}

impl Cluster {
    /// Connects to what `cluster/up` started.
    pub async fn connect() -> Result<Self> {
        crate::settle_tls();
        let output =
            Command::new(paths::checkout().join("cluster/kubeconfig")).output().context("cluster/kubeconfig")?;
        ensure!(output.status.success(), "the cluster is not up: {}", String::from_utf8_lossy(&output.stderr).trim());
        let path = String::from_utf8(output.stdout)?;
        let kubeconfig = Kubeconfig::read_from(path.trim())?;
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        config.proxy_url = None;
        Ok(Self { client: Client::try_from(config)? })
    }

    pub fn jobs(&self, namespace: &str) -> Api<FineTuneJob> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub fn deployments(&self, namespace: &str) -> Api<ModelDeployment> {
        Api::namespaced(self.client.clone(), namespace)
    }

    pub fn pods(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// A namespace under the restricted Pod Security level, with the S3 credentials in it.
    pub async fn namespace(&self, name: &str) -> Result<()> {
        let namespace: Namespace = serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }))?;
        let apply = PatchParams::apply(MANAGER).force();
        Api::<Namespace>::all(self.client.clone()).patch(name, &apply, &Patch::Apply(&namespace)).await?;
        let data: serde_json::Map<String, serde_json::Value> =
            storage::environment().into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect();
        self.secret(name, "s3-credentials", data.into()).await
    }

    /// A Secret with these keys.
    pub async fn secret(&self, namespace: &str, name: &str, data: serde_json::Value) -> Result<()> {
        let secret: Secret = serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data,
        }))?;
        let apply = PatchParams::apply(MANAGER).force();
        Api::<Secret>::namespaced(self.client.clone(), namespace).patch(name, &apply, &Patch::Apply(&secret)).await?;
        Ok(())
    }

    /// A namespace as [`Self::namespace`] makes it, without what was in it before.
    pub async fn fresh_namespace(&self, name: &str) -> Result<()> {
        self.delete_namespace(name).await?;
        self.namespace(name).await
    }

    /// Deletes a namespace with all in it and waits until it is gone.
    pub async fn delete_namespace(&self, name: &str) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        if let Err(error) = namespaces.delete(name, &DeleteParams::default()).await
            && !is_not_found(&error)
        {
            return Err(error.into());
        }
        wait(&format!("namespace {name} is deleted"), Duration::from_secs(120), async || {
            Ok(namespaces.get_opt(name).await?.is_none().then_some(()))
        })
        .await
    }

    /// Server-side applies every document of a YAML text into a namespace.
    pub async fn apply(&self, namespace: &str, yaml: &str) -> Result<()> {
        use serde::Deserialize;
        for document in serde_yaml::Deserializer::from_str(yaml) {
            let mut object = DynamicObject::deserialize(document)?;
            let types = object.types.clone().context("a document without kind")?;
            let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types)?);
            object.metadata.namespace = Some(namespace.to_owned());
            let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource);
            let name = object.name_any();
            api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&object))
                .await
                .with_context(|| format!("{} {name}", types.kind))?;
        }
        Ok(())
    }

    /// `http://address` of a Service; its cluster address is routed on the node itself.
    pub async fn service(&self, namespace: &str, name: &str) -> Result<String> {
        let services: Api<Service> = Api::namespaced(self.client.clone(), namespace);
        wait(&format!("service {namespace}/{name}"), Duration::from_secs(60), async || {
            let address = services.get_opt(name).await?.and_then(|service| service.spec?.cluster_ip);
            Ok(address.map(|address| format!("http://{address}")))
        })
        .await
    }

    /// Pods by label selector.
    pub async fn select(&self, namespace: &str, selector: &str) -> Result<Vec<Pod>> {
        Ok(self.pods(namespace).list(&ListParams::default().labels(selector)).await?.items)
    }
}

/// Whether the API server said that the object does not exist.
pub fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// A condition by type.
pub fn condition<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == kind)
}

/// Asks five times a second until there is an answer.
pub async fn wait<T>(what: &str, limit: Duration, mut ask: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        match ask().await {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) if started.elapsed() > limit => bail!("not within {} s: {what}", limit.as_secs()),
            Err(error) if started.elapsed() > limit => return Err(error).with_context(|| what.to_owned()),
            Ok(None) | Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// The job's summary once it succeeded; an error with the condition's message once it failed.
pub async fn job_succeeded(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    limit: Duration,
    look: impl Fn(&FineTuneJob),
) -> Result<FineTuneJob> {
    let jobs = cluster.jobs(namespace);
    let job = wait(&format!("FineTuneJob {name} ends"), limit, async || {
        let Some(job) = jobs.get_opt(name).await? else { return Ok(None) };
        look(&job);
        let status = job.status.clone().unwrap_or_default();
        let ended = condition(&status.conditions, "Succeeded").is_some_and(|condition| condition.status != "Unknown");
        Ok(ended.then_some(job))
    })
    .await?;
    let status = job.status.clone().unwrap_or_default();
    let succeeded = condition(&status.conditions, "Succeeded").context("no Succeeded condition")?;
    ensure!(succeeded.status == "True", "FineTuneJob {name}: {}: {}", succeeded.reason, succeeded.message);
    Ok(job)
}

/// Waits until a job has failed by its user's error, without a restart; its message has all `parts`.
pub async fn job_refused(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    limit: Duration,
    parts: &[&str],
) -> Result<()> {
    let jobs = cluster.jobs(namespace);
    let status = wait(&format!("{name} fails"), limit, async || {
        let status = jobs.get(name).await?.status.unwrap_or_default();
        let ended = condition(&status.conditions, "Succeeded").is_some_and(|condition| condition.status != "Unknown");
        Ok(ended.then_some(status))
    })
    .await?;
    let succeeded = condition(&status.conditions, "Succeeded").context("no condition")?;
    println!("{name}: {}: {}", succeeded.reason, succeeded.message);
    ensure!(succeeded.status == "False" && succeeded.reason == "UserError", "{name}: {}", succeeded.reason);
    ensure!(status.restarts == 0, "{name} was retried {} times", status.restarts);
    for part in parts {
        ensure!(succeeded.message.contains(part), "{name}: {part:?} is not in {}", succeeded.message);
    }
    Ok(())
}

/// Process ids, on this machine, of the processes of a pod whose command name is `command`.
pub fn processes(pod: &Pod, command: &str) -> Vec<u32> {
    let Some(uid) = pod.metadata.uid.as_deref() else { return Vec::new() };
    // The cgroup folder of a pod carries its UID, with dashes or underscores by driver.
    let marks = [format!("pod{uid}"), format!("pod{}", uid.replace('-', "_"))];
    let Ok(folders) = std::fs::read_dir("/proc") else { return Vec::new() };
    folders
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            // The kernel keeps 15 characters of a name.
            let name: String = command.chars().take(15).collect();
            read("comm").trim() == name && marks.iter().any(|mark| read("cgroup").contains(mark))
        })
        .collect()
}

/// Ends processes at once, as the kernel's out-of-memory killer would.
pub fn kill_9(pids: &[u32]) -> Result<()> {
    ensure!(!pids.is_empty(), "there is no process to kill");
    for pid in pids {
        let done = Command::new("kill").args(["-9", &pid.to_string()]).status()?;
        ensure!(done.success(), "kill -9 {pid} failed");
    }
    Ok(())
}

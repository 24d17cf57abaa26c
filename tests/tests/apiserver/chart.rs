//! The rendered chart on a real API server: each object under each of its flags, its pods and those of the operator's
//! children under the restricted Pod Security level in a namespace with a ResourceQuota.

use std::{
    collections::BTreeSet,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use athanor_tests::{apiserver::ApiServer, paths};
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        batch::v1::Job,
        core::v1::{Namespace, Pod, PodTemplateSpec, ResourceQuota},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
    discovery::{Scope, pinned_kind},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::operator::Operator;

/// Flags that add or remove objects.
const FLAGS: [&str; 8] = [
    "serviceAccount.create",
    "rbac.create",
    "rbac.aggregate",
    "podDisruptionBudget.enabled",
    "networkPolicy.enabled",
    "monitoring.podMonitors.enabled",
    "monitoring.rules.enabled",
    "monitoring.dashboards.enabled",
];
/// Kinds of the Prometheus operator, whose CRDs are not here: any content.
const MONITORING: [(&str, &str); 3] =
    [("PodMonitor", "podmonitors"), ("ServiceMonitor", "servicemonitors"), ("PrometheusRule", "prometheusrules")];
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn applied() -> PatchParams {
    PatchParams::apply("athanor-chart-test").force()
}

async fn monitoring_kinds(client: &Client) -> Result<()> {
    let crds: Api<CustomResourceDefinition> = Api::all(client.clone());
    for (kind, plural) in MONITORING {
        let name = format!("{plural}.monitoring.coreos.com");
        let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
        let crd = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": name},
            "spec": {
                "group": "monitoring.coreos.com", "scope": "Namespaced", "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}],
            },
        });
        crds.patch(&name, &applied(), &Patch::Apply(crd)).await?;
    }
    let kind = GroupVersionKind::gvk("monitoring.coreos.com", "v1", "PrometheusRule");
    let begun = Instant::now();
    while pinned_kind(client, &kind).await.is_err() {
        ensure!(begun.elapsed() < PATIENCE, "the kinds of the Prometheus operator are not served");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// A namespace under the restricted level, with a quota that every container has to fit.
pub async fn namespace(client: &Client, name: &str) -> Result<()> {
    let levels = json!({"pod-security.kubernetes.io/enforce": "restricted", "kubernetes.io/metadata.name": name});
    let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": levels}});
    Api::<Namespace>::all(client.clone()).patch(name, &applied(), &Patch::Apply(object)).await?;
    let hard = json!({"requests.cpu": "8", "requests.memory": "16Gi", "limits.memory": "32Gi", "pods": "50"});
    let quota =
        json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "all"}, "spec": {"hard": hard}});
    let quotas: Api<ResourceQuota> = Api::namespaced(client.clone(), name);
    quotas.patch("all", &applied(), &Patch::Apply(quota)).await?;
    // The controller that counts does not run here; admission goes by what it would have written.
    let used = json!({"requests.cpu": "0", "requests.memory": "0", "limits.memory": "0", "pods": "0"});
    quotas
        .patch_status("all", &PatchParams::default(), &Patch::Merge(json!({"status": {"hard": hard, "used": used}})))
        .await?;
    Ok(())
}

/// The chart's objects under these settings.
pub fn render(namespace: &str, settings: &[String]) -> Result<Vec<DynamicObject>> {
    let helm = paths::tool("helm", "helm").context("cluster/tools --only helm")?;
    let chart = paths::checkout().join("helm/athanor");
    let output = Command::new(helm)
        .args(["template", "athanor"])
        .arg(chart)
        .args(["--namespace", namespace, "--kube-version", "1.34.0"])
        .args(settings.iter().flat_map(|setting| ["--set".to_owned(), setting.clone()]))
        .output()?;
    ensure!(output.status.success(), "{settings:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let documents = serde_yaml::Deserializer::from_str(&text).map(Value::deserialize);
    let objects = documents.collect::<Result<Vec<Value>, _>>()?.into_iter().filter(|document| !document.is_null());
    Ok(objects.map(serde_json::from_value).collect::<Result<_, _>>()?)
}

/// Applies the objects and makes a pod of each workload, as its controller would. Returns the kinds.
async fn install(client: &Client, namespace: &str, settings: &[String]) -> Result<BTreeSet<String>> {
    let mut kinds = BTreeSet::new();
    for object in render(namespace, settings)? {
        let types = object.types.clone().context("an object without a kind")?;
        let kind = GroupVersionKind::try_from(&types)?;
        let (resource, capabilities) = pinned_kind(client, &kind).await.with_context(|| format!("{types:?}"))?;
        let api: Api<DynamicObject> = match capabilities.scope {
            Scope::Cluster => Api::all_with(client.clone(), &resource),
            Scope::Namespaced => {
                let own = object.namespace().unwrap_or_else(|| namespace.to_owned());
                Api::namespaced_with(client.clone(), &own, &resource)
            }
        };
        let name = object.name_any();
        let strict = PatchParams { field_validation: Some(kube::api::ValidationDirective::Strict), ..applied() };
        let patched = api.patch(&name, &strict, &Patch::Apply(&object)).await;
        patched.with_context(|| format!("{} {name} under {settings:?}", types.kind))?;
        if types.kind == "Deployment" {
            let deployment: Deployment = serde_json::from_value(serde_json::to_value(&object)?)?;
            let template = deployment.spec.context("a Deployment without a specification")?.template;
            make_pod(client, namespace, &name, template).await.with_context(|| format!("under {settings:?}"))?;
        }
        kinds.insert(types.kind);
    }
    Ok(kinds)
}

/// Makes the pod of a workload, which admission takes or refuses.
async fn make_pod(client: &Client, namespace: &str, of: &str, template: PodTemplateSpec) -> Result<()> {
    let mut pod = Pod { metadata: template.metadata.unwrap_or_default(), spec: template.spec, status: None };
    pod.metadata.generate_name = Some(format!("{of}-"));
    let made = Api::<Pod>::namespaced(client.clone(), namespace).create(&PostParams::default(), &pod).await;
    made.with_context(|| format!("a pod of {of}"))?;
    Ok(())
}

#[tokio::test]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn the_chart_is_accepted_under_every_flag() -> Result<()> {
    let server = ApiServer::start().await?;
    let client = &server.client;
    monitoring_kinds(client).await?;
    let off: Vec<String> =
        FLAGS.iter().map(|flag| format!("{flag}=false")).chain(["serviceAccount.name=athanor".into()]).collect();
    let on: Vec<String> = FLAGS.iter().map(|flag| format!("{flag}=true")).collect();
    let alone = FLAGS.iter().enumerate().map(|(index, flag)| {
        let mut settings = off.clone();
        settings[index] = format!("{flag}=true");
        settings
    });
    let mut watching = on.clone();
    watching.extend(["operator.watchNamespace=own".to_owned(), "operator.replicas=2".into()]);
    watching.extend([
        "networkPolicy.workloadNamespaces={chart-0}".to_owned(),
        "operator.otlpEndpoint=http://collector:4317".into(),
    ]);
    namespace(client, "own").await?;
    let combinations: Vec<Vec<String>> = [off.clone(), on, watching].into_iter().chain(alone).collect();
    let mut all = BTreeSet::new();
    for (index, settings) in combinations.iter().enumerate() {
        let name = format!("chart-{index}");
        namespace(client, &name).await?;
        all.extend(install(client, &name, settings).await?);
    }
    println!("{} combinations, kinds: {all:?}", combinations.len());
    for kind in
        ["Deployment", "Role", "ClusterRole", "NetworkPolicy", "PodMonitor", "PrometheusRule", "PodDisruptionBudget"]
    {
        ensure!(all.contains(kind), "no combination has a {kind}");
    }
    Ok(())
}

/// A job `first`, a deployment `reviews` with feedback and a monitor, and `foreign` with another server.
pub async fn create_samples(client: &Client, namespace: &str) -> Result<()> {
    let pod = json!({"resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}});
    let job = json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "first"},
        "spec": {
            "model": {"from": "s3://bucket/model", "task": "TextClassification"},
            "data": {"sources": [{"name": "reviews", "uri": "s3://bucket/reviews.csv"}]},
            "output": {"to": "s3://bucket/out"}, "podTemplate": pod,
        },
    });
    let deployment = json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "reviews"},
        "spec": {
            "model": {"from": "s3://bucket/model"}, "podTemplate": pod,
            "feedback": {"kafka": {"bootstrapServers": "kafka:9092"}}, "monitor": {},
        },
    });
    let foreign = json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "foreign"},
        "spec": {"model": {"from": "s3://bucket/model"}, "engine": {"container": {"image": "vllm:1"}}, "podTemplate": pod},
    });
    for object in [job, deployment, foreign] {
        let object: DynamicObject = serde_json::from_value(object)?;
        let kind = GroupVersionKind::try_from(object.types.as_ref().context("a kind")?)?;
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &ApiResource::from_gvk(&kind));
        api.patch(&object.name_any(), &applied(), &Patch::Apply(&object)).await?;
    }
    Ok(())
}

#[tokio::test]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn children_fit_a_restricted_namespace_with_a_quota() -> Result<()> {
    let server = ApiServer::start().await?;
    let client = &server.client;
    namespace(client, "team").await?;
    let _operator = Operator::start(&server, "operator", &server.kubeconfig()?, &["--namespace-watch=team"])?;
    create_samples(client, "team").await?;
    // Servers and routers of both deployments, and the monitor.
    let (deployments, jobs): (Api<Deployment>, Api<Job>) =
        (Api::namespaced(client.clone(), "team"), Api::namespaced(client.clone(), "team"));
    let begun = Instant::now();
    let (workloads, batch_jobs) = loop {
        let workloads = deployments.list(&ListParams::default()).await?.items;
        let batch_jobs = jobs.list(&ListParams::default()).await?.items;
        if workloads.len() == 5 && batch_jobs.len() == 1 {
            break (workloads, batch_jobs);
        }
        let names: Vec<String> = workloads.iter().map(ResourceExt::name_any).collect();
        ensure!(begun.elapsed() < PATIENCE, "{names:?} and {} Jobs", batch_jobs.len());
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    for workload in workloads {
        let name = workload.name_any();
        make_pod(client, "team", &name, workload.spec.context("no specification")?.template).await?;
    }
    for batch_job in batch_jobs {
        let name = batch_job.name_any();
        make_pod(client, "team", &name, batch_job.spec.context("no specification")?.template).await?;
    }
    Ok(())
}

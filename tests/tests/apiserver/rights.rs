//! The operator under the rights that the chart grants it, with `operator.watchNamespace` and without: they suffice, and
//! with `watchNamespace` they end at that namespace.

use std::fmt::Debug;

use anyhow::{Context, Result, ensure};
use athanor_crds::FineTuneJob;
use athanor_tests::{apiserver::ApiServer, cluster::wait};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        authentication::v1::{TokenRequest, TokenRequestSpec},
        batch::v1::Job,
        coordination::v1::Lease,
        core::v1::{ConfigMap, Secret, Service, ServiceAccount},
        policy::v1::PodDisruptionBudget,
        rbac::v1::{Role, RoleBinding},
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ListParams, Patch, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::{
    chart::{PATIENCE, applied, create_samples, namespace, render},
    operator::Operator,
    requests::samples,
};

/// Where the chart is installed.
const RELEASE: &str = "default";
const WATCHED: &str = "team";
const OTHER: &str = "others";

/// The operator's container in the chart.
struct Installed {
    /// Without its ports.
    arguments: Vec<String>,
    service_account: String,
}

/// Applies the chart's rights.
async fn grant(client: &Client, settings: &[&str]) -> Result<Installed> {
    let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    let mut installed = None;
    for object in render(RELEASE, &settings)? {
        let types = object.types.clone().context("an object without a kind")?;
        let resource = ApiResource::from_gvk(&GroupVersionKind::try_from(&types)?);
        let own = object.namespace().unwrap_or_else(|| RELEASE.to_owned());
        let api: Api<DynamicObject> = match &*types.kind {
            "Deployment" => {
                let pod = &object.data["spec"]["template"]["spec"];
                let all: Vec<String> = serde_json::from_value(pod["containers"][0]["args"].clone())?;
                installed = Some(Installed {
                    arguments: all.into_iter().filter(|one| !one.contains("-port=")).collect(),
                    service_account: serde_json::from_value(pod["serviceAccountName"].clone())?,
                });
                continue;
            }
            "ClusterRole" | "ClusterRoleBinding" => Api::all_with(client.clone(), &resource),
            "Role" | "RoleBinding" | "ServiceAccount" => Api::namespaced_with(client.clone(), &own, &resource),
            _ => continue,
        };
        api.patch(&object.name_any(), &applied(), &Patch::Apply(&object)).await.with_context(|| types.kind)?;
    }
    installed.context("the chart has no Deployment")
}

/// Number of requests that the API server has forbidden.
async fn forbidden(client: &Client) -> Result<u64> {
    let samples = samples(client).await?;
    Ok(samples.iter().filter(|(labels, _)| labels.contains(r#"code="403""#)).map(|(_, count)| count).sum())
}

async fn names<K>(client: &Client, of: &str) -> Result<Vec<String>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    let found = Api::<K>::namespaced(client.clone(), of).list(&ListParams::default()).await?;
    Ok(found.items.iter().map(ResourceExt::name_any).collect())
}

/// Waits until a list of names fulfils a condition.
async fn until<K>(client: &Client, of: &str, what: &str, reached: impl Fn(&[String]) -> bool) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    wait(what, PATIENCE, async || Ok(reached(&names::<K>(client, of).await?).then_some(()))).await
}

/// Every kind of object that the operator makes, a change, a deletion, and a status, in a namespace with samples.
async fn works(client: &Client, of: &str) -> Result<()> {
    create_samples(client, of).await?;
    until::<Deployment>(client, of, "servers, routers and a monitor", |all| all.len() == 5).await?;
    until::<Job>(client, of, "the job's gang", |all| all.len() == 1).await?;
    let some = |all: &[String]| all.iter().any(|name| name.starts_with("reviews"));
    until::<Service>(client, of, "Services", some).await?;
    until::<ConfigMap>(client, of, "ConfigMaps", some).await?;
    until::<ServiceAccount>(client, of, "ServiceAccounts", some).await?;
    until::<PodDisruptionBudget>(client, of, "PodDisruptionBudgets", some).await?;
    until::<Role>(client, of, "Roles", some).await?;
    until::<RoleBinding>(client, of, "RoleBindings", some).await?;
    until::<Secret>(client, of, "the key of signatures", some).await?;

    let jobs: Api<FineTuneJob> = Api::namespaced(client.clone(), of);
    ensure!(jobs.get("first").await?.status.is_some(), "the job has no status");
    jobs.patch("first", &Default::default(), &Patch::Merge(json!({"spec": {"suspend": true}}))).await?;
    until::<Job>(client, of, "the suspended job's gang is deleted", <[_]>::is_empty).await
}

async fn token(client: &Client, service_account: &str) -> Result<String> {
    let request = TokenRequest {
        spec: TokenRequestSpec { audiences: vec!["https://kubernetes.default.svc".into()], ..Default::default() },
        ..Default::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), RELEASE);
    let answer = accounts.create_token_request(service_account, &PostParams::default(), &request).await?;
    Ok(answer.status.context("no token")?.token)
}

fn is_forbidden<T: Debug>(answer: kube::Result<T>) -> Result<()> {
    ensure!(matches!(&answer, Err(kube::Error::Api(status)) if status.code == 403), "not forbidden: {answer:?}");
    Ok(())
}

#[tokio::test]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn the_rights_of_the_chart_suffice_and_end_at_the_watched_namespace() -> Result<()> {
    for watched in [true, false] {
        let server = ApiServer::start().await?;
        let client = &server.client;
        for name in [WATCHED, OTHER] {
            namespace(client, name).await?;
        }
        let watch = format!("operator.watchNamespace={}", if watched { WATCHED } else { "" });
        let installed = grant(client, &[&watch]).await?;
        let kubeconfig =
            server.kubeconfig_of("operator", &server.address(), &token(client, &installed.service_account).await?)?;
        let before = forbidden(client).await?;
        let arguments: Vec<&str> = installed.arguments.iter().map(String::as_str).collect();
        let _operator = Operator::start(&server, "operator", &kubeconfig, &arguments)?;
        works(client, WATCHED).await?;
        if !watched {
            works(client, OTHER).await?;
        }
        let log = std::fs::read_to_string(server.folder().join("operator.log"))?;
        ensure!(forbidden(client).await? == before, "the operator was refused a request: {log}");

        let config = Kubeconfig::read_from(&kubeconfig)?;
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
        let as_operator = Client::try_from(config)?;
        let secrets = |of: &str| Api::<Secret>::namespaced(as_operator.clone(), of);
        is_forbidden(secrets(WATCHED).list(&ListParams::default()).await)?;
        is_forbidden(secrets(WATCHED).get(&names::<Secret>(client, WATCHED).await?[0]).await)?;
        is_forbidden(Api::<Lease>::namespaced(as_operator.clone(), RELEASE).get("another").await)?;
        if watched {
            is_forbidden(Api::<FineTuneJob>::all(as_operator.clone()).list(&ListParams::default()).await)?;
            is_forbidden(Api::<Job>::namespaced(as_operator.clone(), OTHER).list(&ListParams::default()).await)?;
            is_forbidden(Api::<Deployment>::namespaced(as_operator.clone(), OTHER).list(&ListParams::default()).await)?;
            is_forbidden(secrets(OTHER).create(&PostParams::default(), &Secret::default()).await)?;
        }
    }
    Ok(())
}

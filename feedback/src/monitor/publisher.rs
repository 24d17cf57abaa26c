//! `status.monitor` of a ModelDeployment: read at the start, written by server-side apply under an own field manager.

use std::time::Duration;

use anyhow::Context;
use athanor_contract::{monitor::MonitorStatus, process::api};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, Patch, PatchParams},
    core::GroupVersionKind,
};
use serde_json::json;

const FIELD_MANAGER: &str = "athanor-monitor";
const TIMEOUT: Duration = Duration::from_secs(5);

pub struct Publisher {
    api: Api<DynamicObject>,
    deployment: String,
}

impl Publisher {
    pub async fn connect(namespace: &str, deployment: &str) -> anyhow::Result<Self> {
        let client = Client::try_default().await.context("no access to the Kubernetes API")?;
        let kind = GroupVersionKind::gvk(api::GROUP, api::VERSION, api::MODEL_DEPLOYMENT);
        let resource = ApiResource::from_gvk_with_plural(&kind, api::MODEL_DEPLOYMENTS);
        Ok(Self { api: Api::namespaced_with(client, namespace, &resource), deployment: deployment.to_owned() })
    }

    /// What was last published; `None` if nothing was, or if it cannot be read any more.
    pub async fn read(&self) -> anyhow::Result<Option<MonitorStatus>> {
        let read = tokio::time::timeout(TIMEOUT, self.api.get_status(&self.deployment)).await;
        let object = match read.context("reading the status took too long")? {
            Ok(object) => object,
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(None),
            Err(error) => return Err(error).context("the status cannot be read"),
        };
        let Some(status) = object.data.pointer("/status/monitor") else { return Ok(None) };
        Ok(serde_json::from_value(status.clone())
            .inspect_err(|error| tracing::warn!(%error, "the published status is of another version and is replaced"))
            .ok())
    }

    pub async fn publish(&self, status: &MonitorStatus) -> anyhow::Result<()> {
        let patch = Patch::Apply(json!({
            "apiVersion": api::API_VERSION,
            "kind": api::MODEL_DEPLOYMENT,
            "status": {"monitor": status},
        }));
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let patched = self.api.patch_status(&self.deployment, &parameters, &patch);
        tokio::time::timeout(TIMEOUT, patched)
            .await
            .context("publishing the status took too long")?
            .context("the status cannot be published")?;
        Ok(())
    }
}

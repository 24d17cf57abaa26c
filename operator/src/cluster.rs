//! Writing to the cluster: server-side apply with one field manager, create-if-absent and delete-if-present.

use std::fmt::Debug;

use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy},
};
use serde::{Serialize, de::DeserializeOwned};

/// Field manager of everything the operator writes.
pub const FIELD_MANAGER: &str = "athanor-operator";

/// A child that could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("{action} {kind} {name}: {source}")]
    Request { action: &'static str, kind: String, name: String, source: Box<kube::Error> },
    /// Somebody else's object has the name of one that the operator needs.
    #[error("{kind} {name} exists and belongs to somebody else; rename one of the two")]
    Foreign { kind: String, name: String },
}

impl ClusterError {
    /// Whether the API server refused the object itself (quota, admission, rights): worth telling the user.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Request { source, .. } => {
                matches!(&**source, kube::Error::Api(status) if matches!(status.code, 400 | 403 | 404 | 422))
            }
            Self::Foreign { .. } => true,
        }
    }
}

fn request<K: Resource<DynamicType = ()>>(action: &'static str, name: &str, source: kube::Error) -> ClusterError {
    ClusterError::Request { action, kind: K::kind(&()).into(), name: name.into(), source: Box::new(source) }
}

/// Bounds of the children that the operator makes.
pub trait Child:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

impl<K> Child for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

/// Whether the object has the owner as its controller.
pub fn is_owned_by<K: Resource>(object: &K, uid: &str) -> bool {
    object.owner_references().iter().any(|owner| owner.uid == uid && owner.controller == Some(true))
}

/// Applies a child. It must carry its controller's owner reference; an object of that name with another controller stays as it is.
pub async fn apply<K: Child>(client: &Client, child: &K) -> Result<K, ClusterError> {
    let (namespace, name) = (child.namespace().unwrap_or_default(), child.name_any());
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match api.patch(&name, &params, &Patch::Apply(child)).await {
        Ok(applied) => Ok(applied),
        // Two controllers in one list: the object is another owner's.
        Err(kube::Error::Api(status))
            if status.code == 422 && status.message.contains("Only one reference can have Controller") =>
        {
            Err(ClusterError::Foreign { kind: K::kind(&()).into(), name })
        }
        Err(error) => Err(request::<K>("applying", &name, error)),
    }
}

/// Applies a child whose name somebody else may well have used: one that has not this owner stays as it is.
pub async fn apply_to_own<K: Child>(client: &Client, child: &K, uid: &str) -> Result<K, ClusterError> {
    let (namespace, name) = (child.namespace().unwrap_or_default(), child.name_any());
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    match api.get_opt(&name).await {
        Ok(Some(there)) if !is_owned_by(&there, uid) => Err(ClusterError::Foreign { kind: K::kind(&()).into(), name }),
        Ok(_) => apply(client, child).await,
        Err(error) => Err(request::<K>("reading", &name, error)),
    }
}

/// Creates a child unless there is one already. Says whether it was created.
pub async fn create<K: Child>(client: &Client, child: &K) -> Result<bool, ClusterError> {
    let (namespace, name) = (child.namespace().unwrap_or_default(), child.name_any());
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    let params = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
    match api.create(&params, child).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(request::<K>("creating", &name, error)),
    }
}

/// Deletes an object, its dependants in the background. One that is not there is fine; with `uid`, so is another of that name.
pub async fn delete<K: Child>(
    client: &Client,
    namespace: &str,
    name: &str,
    uid: Option<&str>,
) -> Result<(), ClusterError> {
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let params = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Background),
        preconditions: uid.map(|uid| Preconditions { uid: Some(uid.into()), resource_version: None }),
        ..DeleteParams::default()
    };
    match api.delete(name, &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(request::<K>("deleting", name, error)),
    }
}

/// Applies the status of an object, with the operator's field manager: fields of other writers stay.
pub async fn apply_status<K: Child>(
    client: &Client,
    namespace: &str,
    name: &str,
    status: &impl Serialize,
) -> Result<(), ClusterError> {
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    let body = serde_json::json!({
        "apiVersion": K::api_version(&()), "kind": K::kind(&()), "metadata": {"name": name}, "status": status,
    });
    match api.patch_status(name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&body)).await {
        Ok(_) => Ok(()),
        // Deleted meanwhile.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(request::<K>("writing the status of", name, error)),
    }
}

/// The controller reference to an object that came from the API server.
pub fn owner<K: Resource<DynamicType = ()>>(object: &K) -> Vec<OwnerReference> {
    object.controller_owner_ref(&()).into_iter().collect()
}

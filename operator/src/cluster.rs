//! Writes to the cluster: server-side apply with one field manager, creation, deletion and status.
//!
//! Nothing is taken over: an object that exists without the owner's reference stays as it is, whatever its name.

use std::{
    borrow::Cow,
    fmt::Debug,
    time::{Duration, Instant},
};

use athanor_contract::artifact::sha256_hex;
use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    lease::Leadership,
    memory::Memory,
    pace::Change,
    stores::{Mark, Present, Stores, Written, version},
};

/// Field manager of everything that the operator writes.
pub const FIELD_MANAGER: &str = "athanor-operator";

/// A write that failed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("{action} {kind} {name}: {source}")]
    Request { action: &'static str, kind: String, name: String, source: Box<kube::Error> },
    /// An object that another owner has, or none, has the name of a child.
    #[error("{kind} {name} already exists and belongs to another owner; rename one of the two")]
    Foreign { kind: String, name: String },
    /// The object changed after it was read.
    #[error("{kind} {name} changed while it was reconciled")]
    Conflict { kind: String, name: String },
    /// Another process may be the leader by now.
    #[error("{action} {kind} {name}: this operator's leadership is over")]
    NotLeader { action: &'static str, kind: String, name: String },
    #[error("{kind} {name} has no numeric resource version")]
    Version { kind: String, name: String },
}

impl ClusterError {
    /// Reason of the condition that reports the error. `Refused`: the user has to act, on a quota, a right, a name.
    pub fn reason(&self) -> &'static str {
        let refused = match self {
            Self::Request { source, .. } => {
                matches!(&**source, kube::Error::Api(status) if matches!(status.code, 400 | 403 | 404 | 422))
            }
            Self::Foreign { .. } => true,
            Self::Conflict { .. } | Self::NotLeader { .. } | Self::Version { .. } => false,
        };
        if refused { "Refused" } else { "ApplyFailed" }
    }
}

fn kind<K: Resource<DynamicType = ()>>() -> Cow<'static, str> {
    K::kind(&())
}

fn request<K: Resource<DynamicType = ()>>(action: &'static str, name: &str, source: kube::Error) -> ClusterError {
    ClusterError::Request { action, kind: kind::<K>().into(), name: name.into(), source: Box::new(source) }
}

/// Returns the digest of a child.
fn digest(child: &impl Serialize) -> String {
    sha256_hex(serde_json::to_string(child).expect("a child has string keys only").as_bytes())
}

/// Returns the version of an object that the API server answered a write with.
fn written<K: Resource<DynamicType = ()>>(object: &K) -> Result<Written, ClusterError> {
    let version = version(object.meta())
        .ok_or_else(|| ClusterError::Version { kind: kind::<K>().into(), name: object.name_any() })?;
    Ok(Written { version, at: Instant::now() })
}

/// Name and UID of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub name: String,
    pub uid: String,
}

impl Identity {
    pub fn from_object<K: Resource>(object: &K) -> Self {
        Self { name: object.name_any(), uid: object.uid().unwrap_or_default() }
    }
}

/// When a status is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It did not change.
    Unchanged,
    /// Now.
    Due,
    /// After this time, unless something more urgent changes.
    For(Duration),
}

/// Objects that the operator writes.
pub trait Child:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

impl<K> Child for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned
{
}

/// Returns whether the object's controller is the owner with this UID.
pub fn is_owned_by<K: Resource>(object: &K, uid: &str) -> bool {
    object.owner_references().iter().any(|owner| owner.uid == uid && owner.controller == Some(true))
}

/// The writes for one object.
pub struct Cluster<'a> {
    client: &'a Client,
    stores: &'a Stores,
    memory: &'a Memory,
    leadership: &'a Leadership,
    /// The object in the operator's own records.
    key: &'a str,
}

impl<'a> Cluster<'a> {
    pub fn new(
        client: &'a Client,
        stores: &'a Stores,
        memory: &'a Memory,
        leadership: &'a Leadership,
        key: &'a str,
    ) -> Self {
        Self { client, stores, memory, leadership, key }
    }

    /// Fails unless this process may write. Each write asks just before its request.
    fn check_leadership<K: Child>(&self, action: &'static str, name: &str) -> Result<(), ClusterError> {
        if self.leadership.is_held() {
            return Ok(());
        }
        Err(ClusterError::NotLeader { action, kind: kind::<K>().into(), name: name.into() })
    }

    fn api<K: Child>(&self, namespace: &str) -> Api<K> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Records the version that a write made: the next reconcile waits until the caches have it.
    fn wrote<K: Child>(&self, object: &K) -> Result<(), ClusterError> {
        self.memory.wrote(self.key, &kind::<K>(), written(object)?);
        Ok(())
    }

    /// Applies a child that carries its controller's owner reference, unless it is as it was last applied.
    ///
    /// # Errors
    /// A request that failed, or an object with the child's name that does not belong to the owner.
    pub async fn apply<K: Child>(&self, child: &K, owner: &str) -> Result<(), ClusterError> {
        let digest = digest(child);
        if self.is_applied(child, &digest) {
            return Ok(());
        }
        self.apply_to_own(child, owner, digest).await
    }

    /// Applies a child as [`Self::apply`] does, and creates it by a single request if the caches do not have it.
    ///
    /// It is for children whose set of fields never changes: server-side apply later removes no field that a creation
    /// set.
    ///
    /// # Errors
    /// As those of [`Self::apply`].
    pub async fn create_or_apply<K: Child>(&self, child: &K, owner: &str) -> Result<(), ClusterError> {
        let digest = digest(child);
        if self.is_applied(child, &digest) {
            return Ok(());
        }
        let (kind, name) = (kind::<K>(), child.name_any());
        if self.stores.child(&kind, &child.namespace().unwrap_or_default(), &name) == Present::Absent
            && let Some(created) = self.post(child).await?
        {
            self.memory.applied(self.key, (&kind, &name), digest, Mark::new(created.meta()), Instant::now());
            return Ok(());
        }
        self.apply_to_own(child, owner, digest).await
    }

    fn is_applied<K: Child>(&self, child: &K, digest: &str) -> bool {
        let (kind, namespace, name) = (kind::<K>(), child.namespace().unwrap_or_default(), child.name_any());
        let present = self.stores.child(&kind, &namespace, &name);
        self.memory.is_applied(self.key, (&kind, &name), digest, &present, Instant::now())
    }

    /// Applies a child after a look at who owns the object of its name.
    async fn apply_to_own<K: Child>(&self, child: &K, owner: &str, digest: String) -> Result<(), ClusterError> {
        let (kind, namespace, name) = (kind::<K>(), child.namespace().unwrap_or_default(), child.name_any());
        self.check_owner::<K>(&namespace, &name, owner).await?;
        let params = PatchParams::apply(FIELD_MANAGER).force();
        self.check_leadership::<K>("applying", &name)?;
        let applied = self.api::<K>(&namespace).patch(&name, &params, &Patch::Apply(child)).await;
        let applied = applied.map_err(|error| request::<K>("applying", &name, error))?;
        self.wrote(&applied)?;
        self.memory.applied(self.key, (&kind, &name), digest, Mark::new(applied.meta()), Instant::now());
        Ok(())
    }

    /// Fails if an object of the name exists that does not belong to the owner.
    async fn check_owner<K: Child>(&self, namespace: &str, name: &str, owner: &str) -> Result<(), ClusterError> {
        match self.api::<K>(namespace).get_opt(name).await {
            Ok(Some(there)) if !is_owned_by(&there, owner) => {
                Err(ClusterError::Foreign { kind: kind::<K>().into(), name: name.into() })
            }
            Ok(_) => Ok(()),
            Err(error) => Err(request::<K>("reading", name, error)),
        }
    }

    /// Creates a child unless it exists. Returns whether it was created.
    ///
    /// # Errors
    /// A request that failed, or an object with the child's name that does not belong to the owner.
    pub async fn create<K: Child>(&self, child: &K, owner: &str) -> Result<bool, ClusterError> {
        let created = self.create_unread(child).await?;
        if !created {
            self.check_owner::<K>(&child.namespace().unwrap_or_default(), &child.name_any(), owner).await?;
        }
        Ok(created)
    }

    /// Creates a child unless an object of its name exists, without reading that one. Returns whether it was created.
    ///
    /// # Errors
    /// A request that failed.
    pub async fn create_unread<K: Child>(&self, child: &K) -> Result<bool, ClusterError> {
        Ok(self.post(child).await?.is_some())
    }

    /// Creates a child. Returns it, or `None` if an object of its name exists.
    async fn post<K: Child>(&self, child: &K) -> Result<Option<K>, ClusterError> {
        let name = child.name_any();
        let params = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
        self.check_leadership::<K>("creating", &name)?;
        match self.api::<K>(&child.namespace().unwrap_or_default()).create(&params, child).await {
            Ok(created) => self.wrote(&created).map(|()| Some(created)),
            // Any other conflict says nothing about an object of that name.
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => Ok(None),
            Err(error) => Err(request::<K>("creating", &name, error)),
        }
    }

    /// Creates a child that is never changed, unless this process has seen it exist not long ago.
    ///
    /// # Errors
    /// A request that failed.
    pub async fn create_once<K: Child>(&self, child: &K) -> Result<(), ClusterError> {
        let (kind, namespace, name) = (kind::<K>(), child.namespace().unwrap_or_default(), child.name_any());
        let present = self.stores.child(&kind, &namespace, &name);
        if self.memory.is_applied(self.key, (&kind, &name), "", &present, Instant::now()) {
            return Ok(());
        }
        self.create_unread(child).await?;
        self.memory.applied(self.key, (&kind, &name), String::new(), Mark::new(child.meta()), Instant::now());
        Ok(())
    }

    /// Deletes an object, its dependants in the background. An object that does not exist is no error.
    ///
    /// # Errors
    /// A request that failed, or [`ClusterError::Conflict`]: with `uid`, another object has that name by now.
    pub async fn delete<K: Child>(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<(), ClusterError> {
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            preconditions: uid.map(|uid| Preconditions { uid: Some(uid.into()), resource_version: None }),
            ..DeleteParams::default()
        };
        self.memory.forget_child(self.key, &kind::<K>(), name);
        self.check_leadership::<K>("deleting", name)?;
        match self.api::<K>(namespace).delete(name, &params).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                Err(ClusterError::Conflict { kind: kind::<K>().into(), name: name.to_owned() })
            }
            Err(error) => Err(request::<K>("deleting", name, error)),
        }
    }

    /// Returns when the status of the object is to be written after this change.
    pub fn hold_status(&self, change: Option<Change>) -> Hold {
        match change {
            None => {
                self.memory.is_current(self.key);
                Hold::Unchanged
            }
            Some(change) => self.memory.hold(self.key, change, Instant::now()).map_or(Hold::Due, Hold::For),
        }
    }

    /// Removes a field of another writer from the status of the object with this UID.
    ///
    /// # Errors
    /// A request that failed.
    pub async fn clear_status<K: Child>(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        field: &str,
    ) -> Result<(), ClusterError> {
        let body = serde_json::json!({"metadata": {"uid": uid}, "status": {field: null}});
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        self.check_leadership::<K>("writing the status of", name)?;
        let written = self.api::<K>(namespace).patch_status(name, &params, &Patch::Merge(&body)).await;
        self.wrote(&written.map_err(|error| request::<K>("writing the status of", name, error))?)
    }

    /// Applies the status of an object with the operator's field manager; fields of other writers stay. The write
    /// carries UID and resource version of the object that was read: a recreated object never gets the status of the
    /// old one, and an operator that lost its leadership cannot write over its successor.
    ///
    /// # Errors
    /// A request that failed, or [`ClusterError::Conflict`].
    pub async fn write_status<K: Child>(&self, object: &K, status: &impl Serialize) -> Result<(), ClusterError> {
        let name = object.name_any();
        let meta = object.meta();
        let body = serde_json::json!({
            "apiVersion": K::api_version(&()), "kind": kind::<K>(),
            "metadata": {"name": name, "uid": meta.uid, "resourceVersion": meta.resource_version},
            "status": status,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let api = self.api::<K>(&object.namespace().unwrap_or_default());
        self.check_leadership::<K>("writing the status of", &name)?;
        match api.patch_status(&name, &params, &Patch::Apply(&body)).await {
            Ok(object) => {
                self.memory.wrote_status(self.key, &kind::<K>(), written(&object)?);
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.code == 409 => {
                Err(ClusterError::Conflict { kind: kind::<K>().into(), name })
            }
            // Deleted after it was read.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(error) => Err(request::<K>("writing the status of", &name, error)),
        }
    }
}

/// Returns the controller reference to an object that came from the API server.
pub fn owner<K: Resource<DynamicType = ()>>(object: &K) -> Vec<OwnerReference> {
    object.controller_owner_ref(&()).into_iter().collect()
}

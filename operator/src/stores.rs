//! Caches of everything that a reconcile reads, kept current by one watch for each resource (see
//! [`crate::controllers`]).
//!
//! A cache may lag behind the API server, also behind this operator's own writes. Every write returns a resource
//! version, and a cache has the newest version that its watch has shown; [`crate::memory`] compares the two before a
//! reconcile reads. kube's shared streams are not used here: they leave out deletions.

use std::{
    collections::HashSet,
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Instant,
};

use athanor_contract::process::api;
use athanor_crds::{FineTuneJob, ModelDeployment, label};
use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Service},
};
use kube::{
    Resource,
    api::ObjectMeta,
    core::PartialObjectMeta,
    runtime::{
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher::Event,
    },
};
use tokio::sync::watch;

use crate::index::Index;

/// A resource without a dynamic type that a watch can keep.
pub trait Cached: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static {}

impl<K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static> Cached for K {}

/// A write to the API server: the version that it made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub version: u64,
    pub at: Instant,
}

/// What identifies one state of an object: its UID, and its generation or else its resource version. Two equal marks
/// are the same specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark(String);

impl Mark {
    pub fn new(meta: &ObjectMeta) -> Self {
        let uid = meta.uid.as_deref().unwrap_or_default();
        let version = meta.resource_version.as_deref().unwrap_or_default();
        // A generation does not change with the status.
        let state =
            meta.generation.map_or_else(|| format!("version {version}"), |number| format!("generation {number}"));
        Self(format!("{uid} {state}"))
    }
}

/// Parses a resource version. Kubernetes defines it as a decimal number that grows with each write of a resource.
pub fn version(meta: &ObjectMeta) -> Option<u64> {
    meta.resource_version.as_deref()?.parse().ok()
}

/// How far a watch has come.
#[derive(Debug, Default)]
struct Seen {
    /// Newest resource version.
    version: u64,
    /// Start of the list that is under way.
    listing: Option<Instant>,
    /// Start of the last list that is complete: it has everything that was written before.
    listed: Option<Instant>,
}

/// Objects of one resource, as of the last event of its watch.
#[derive(Debug)]
pub struct Cache<K: Cached> {
    store: Store<K>,
    index: Arc<RwLock<Index>>,
    seen: Arc<Mutex<Seen>>,
    /// Whether the first list is complete. [`Store::wait_until_ready`] wakes only the last of several waiting tasks, and a
    /// controller waits for its store as well.
    ready: watch::Receiver<bool>,
}

impl<K: Cached> Clone for Cache<K> {
    fn clone(&self) -> Self {
        let Self { store, index, seen, ready } = self;
        Self { store: store.clone(), index: index.clone(), seen: seen.clone(), ready: ready.clone() }
    }
}

impl<K: Cached> Cache<K> {
    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.store.get(&ObjectRef::new(name).within(namespace))
    }

    /// Returns the objects of a namespace whose label has the value, by name.
    ///
    /// # Panics
    /// The cache was made without this label.
    pub fn select(&self, namespace: &str, label: &str, value: &str) -> Vec<Arc<K>> {
        let names = self.index.read().unwrap_or_else(PoisonError::into_inner).names(namespace, label, value);
        // An object that went away in between is in the index only.
        names.iter().filter_map(|name| self.get(namespace, name)).collect()
    }

    /// Returns all objects.
    pub fn state(&self) -> Vec<Arc<K>> {
        self.store.state()
    }

    pub fn store(&self) -> Store<K> {
        self.store.clone()
    }

    /// Returns whether the cache has the effect of a write.
    pub fn has_seen(&self, written: &Written) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.version >= written.version || seen.listed.is_some_and(|listed| listed > written.at)
    }

    async fn wait_until_ready(&self) {
        // An error means that the watch ended: the process is shutting down, and the reconcile with it.
        let mut ready = self.ready.clone();
        let _ended = ready.wait_for(|ready| *ready).await.is_err();
    }
}

/// Takes the events of a watch into its cache.
pub struct Feed<K: Cached> {
    writer: Writer<K>,
    cache: Cache<K>,
    ready: watch::Sender<bool>,
}

impl<K: Cached> Feed<K> {
    /// Takes one event in. Returns the objects that it concerns, which the cache has or has not as of now.
    ///
    /// A watch that starts again lists everything: all objects count as changed then, those that the list no longer has
    /// included.
    pub fn take(&mut self, event: &Event<K>, now: Instant) -> Vec<Arc<K>> {
        let before = match event {
            Event::InitDone => self.cache.state(),
            Event::Apply(object) | Event::Delete(object) => {
                self.cache.store.get(&ObjectRef::from_obj(object)).into_iter().collect()
            }
            Event::Init | Event::InitApply(_) => Vec::new(),
        };
        self.writer.apply_watcher_event(event);
        self.update_index(event, &before);
        let changed = match event {
            Event::Apply(object) | Event::Delete(object) => vec![Arc::new(object.clone())],
            Event::Init | Event::InitApply(_) => Vec::new(),
            Event::InitDone => {
                let after = self.cache.state();
                let there: HashSet<ObjectRef<K>> = after.iter().map(|object| ObjectRef::from_obj(&**object)).collect();
                let gone = before.into_iter().filter(|object| !there.contains(&ObjectRef::from_obj(&**object)));
                gone.chain(after.iter().cloned()).collect()
            }
        };
        // After the store has changed, so that a write counts as seen only when it can be read.
        let mut seen = self.cache.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => seen.listing = Some(now),
            Event::InitDone => {
                seen.listed = seen.listing.take();
                self.ready.send_replace(true);
            }
            Event::InitApply(_) | Event::Apply(_) | Event::Delete(_) => {}
        }
        let newest = changed.iter().filter_map(|object| version(object.meta())).max().unwrap_or(0);
        seen.version = seen.version.max(newest);
        changed
    }

    /// Brings the index to the state of the store. `before`: the objects of the event as they were.
    fn update_index(&self, event: &Event<K>, before: &[Arc<K>]) {
        let mut index = self.cache.index.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init | Event::InitApply(_) => {}
            Event::Apply(object) => {
                before.iter().for_each(|before| index.remove(&**before));
                index.add(object);
            }
            Event::Delete(_) => before.iter().for_each(|before| index.remove(&**before)),
            Event::InitDone => {
                index.clear();
                self.cache.state().iter().for_each(|object| index.add(&**object));
            }
        }
    }
}

/// Makes an empty cache whose objects can be selected by these labels.
pub fn cache<K: Cached>(labels: &'static [&'static str]) -> (Cache<K>, Feed<K>) {
    let (store, writer) = reflector::store();
    let (sender, ready) = watch::channel(false);
    let cache = Cache { store, index: Arc::new(RwLock::new(Index::new(labels))), seen: Arc::default(), ready };
    (cache.clone(), Feed { writer, cache, ready: sender })
}

/// The caches that reconciles of both kinds read.
#[derive(Clone, Debug)]
pub struct Stores {
    pub fine_tune_jobs: Cache<FineTuneJob>,
    pub model_deployments: Cache<ModelDeployment>,
    /// Kubernetes Jobs.
    pub batch_jobs: Cache<Job>,
    pub pods: Cache<Pod>,
    /// Kubernetes Deployments.
    pub workloads: Cache<Deployment>,
    pub replica_sets: Cache<PartialObjectMeta<ReplicaSet>>,
    pub services: Cache<PartialObjectMeta<Service>>,
    pub config_maps: Cache<PartialObjectMeta<ConfigMap>>,
}

/// The other ends of [`Stores`].
pub struct Feeds {
    pub fine_tune_jobs: Feed<FineTuneJob>,
    pub model_deployments: Feed<ModelDeployment>,
    pub batch_jobs: Feed<Job>,
    pub pods: Feed<Pod>,
    pub workloads: Feed<Deployment>,
    pub replica_sets: Feed<PartialObjectMeta<ReplicaSet>>,
    pub services: Feed<PartialObjectMeta<Service>>,
    pub config_maps: Feed<PartialObjectMeta<ConfigMap>>,
}

impl Stores {
    pub fn new() -> (Self, Feeds) {
        let (fine_tune_jobs, fine_tune_jobs_feed) = cache(&[label::SEARCH, label::DEPLOYMENT]);
        let (model_deployments, model_deployments_feed) = cache(&[]);
        let (batch_jobs, batch_jobs_feed) = cache(&[label::FINE_TUNE_JOB]);
        let (pods, pods_feed) = cache(&[label::FINE_TUNE_JOB, label::DEPLOYMENT]);
        let (workloads, workloads_feed) = cache(&[label::DEPLOYMENT]);
        let (replica_sets, replica_sets_feed) = cache(&[label::DEPLOYMENT]);
        let (services, services_feed) = cache(&[]);
        let (config_maps, config_maps_feed) = cache(&[]);
        let stores = Self {
            fine_tune_jobs,
            model_deployments,
            batch_jobs,
            pods,
            workloads,
            replica_sets,
            services,
            config_maps,
        };
        let feeds = Feeds {
            fine_tune_jobs: fine_tune_jobs_feed,
            model_deployments: model_deployments_feed,
            batch_jobs: batch_jobs_feed,
            pods: pods_feed,
            workloads: workloads_feed,
            replica_sets: replica_sets_feed,
            services: services_feed,
            config_maps: config_maps_feed,
        };
        (stores, feeds)
    }

    /// Waits until every watch has listed its objects once.
    pub async fn wait_until_ready(&self) {
        let Self {
            fine_tune_jobs,
            model_deployments,
            batch_jobs,
            pods,
            workloads,
            replica_sets,
            services,
            config_maps,
        } = self;
        fine_tune_jobs.wait_until_ready().await;
        model_deployments.wait_until_ready().await;
        batch_jobs.wait_until_ready().await;
        pods.wait_until_ready().await;
        workloads.wait_until_ready().await;
        replica_sets.wait_until_ready().await;
        services.wait_until_ready().await;
        config_maps.wait_until_ready().await;
    }

    /// Returns whether the cache of a kind has the effect of a write; true for kinds that have no cache.
    pub fn has_seen(&self, kind: &str, written: &Written) -> bool {
        match kind {
            api::FINE_TUNE_JOB => self.fine_tune_jobs.has_seen(written),
            api::MODEL_DEPLOYMENT => self.model_deployments.has_seen(written),
            "Job" => self.batch_jobs.has_seen(written),
            "Deployment" => self.workloads.has_seen(written),
            "Service" => self.services.has_seen(written),
            "ConfigMap" => self.config_maps.has_seen(written),
            _ => true,
        }
    }

    /// Returns the present state of a child.
    pub fn child(&self, kind: &str, namespace: &str, name: &str) -> Present {
        let mark = match kind {
            "Deployment" => self.workloads.get(namespace, name).map(|there| Mark::new(&there.metadata)),
            "Service" => self.services.get(namespace, name).map(|there| Mark::new(&there.metadata)),
            "ConfigMap" => self.config_maps.get(namespace, name).map(|there| Mark::new(&there.metadata)),
            _ => return Present::Unwatched,
        };
        mark.map_or(Present::Absent, Present::Marked)
    }
}

/// State of a child in the caches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Present {
    /// Its kind is not watched.
    Unwatched,
    Absent,
    Marked(Mark),
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kube::ResourceExt;

    use super::*;

    fn pod(name: &str, version: u64) -> Pod {
        let metadata = ObjectMeta {
            name: Some(name.into()),
            namespace: Some("ns".into()),
            resource_version: Some(version.to_string()),
            labels: Some([("app".to_owned(), "a".to_owned())].into()),
            ..ObjectMeta::default()
        };
        Pod { metadata, ..Pod::default() }
    }

    fn names(objects: &[Arc<Pod>]) -> Vec<String> {
        let mut names: Vec<String> = objects.iter().map(|object| object.name_any()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn every_task_that_waits_for_a_cache_goes_on_once_it_is_filled() {
        let (cache, mut feed) = cache::<Pod>(&["app"]);
        let wait = |cache: Cache<Pod>| tokio::spawn(async move { cache.wait_until_ready().await });
        let waiting = [wait(cache.clone()), wait(cache.clone()), wait(cache)];
        tokio::task::yield_now().await;
        feed.take(&Event::Init, Instant::now());
        assert!(waiting.iter().all(|task| !task.is_finished()), "a list that has begun is not complete");
        feed.take(&Event::InitDone, Instant::now());
        for task in waiting {
            tokio::time::timeout(Duration::from_secs(5), task).await.expect("woken").unwrap();
        }
    }

    #[test]
    fn a_write_is_seen_once_the_watch_has_shown_its_version() {
        let (cache, mut feed) = cache::<Pod>(&["app"]);
        let now = Instant::now();
        let written = Written { version: 7, at: now };
        assert!(!cache.has_seen(&written));
        feed.take(&Event::Apply(pod("a", 6)), now);
        assert!(!cache.has_seen(&written));
        feed.take(&Event::Delete(pod("a", 7)), now);
        assert!(cache.has_seen(&written), "a deletion has a version too");
        assert!(cache.get("ns", "a").is_none());
    }

    #[test]
    fn a_list_that_began_after_a_write_has_it() {
        let (cache, mut feed) = cache::<Pod>(&["app"]);
        let start = Instant::now();
        let list = |feed: &mut Feed<Pod>, at| {
            feed.take(&Event::Init, at);
            feed.take(&Event::InitApply(pod("b", 3)), at);
            feed.take(&Event::InitDone, at)
        };
        // The object that was written is deleted already: no event will ever have its version.
        let written = Written { version: 9, at: start + Duration::from_secs(1) };
        list(&mut feed, start);
        assert!(!cache.has_seen(&written), "the list may be older than the write");
        list(&mut feed, start + Duration::from_secs(2));
        assert!(cache.has_seen(&written));
    }

    #[test]
    fn objects_are_selected_by_the_labels_that_they_have_now() {
        let (cache, mut feed) = cache::<Pod>(&["app"]);
        let now = Instant::now();
        let labelled = |name: &str, value: Option<&str>| {
            let mut pod = pod(name, 1);
            pod.metadata.labels = value.map(|value| [("app".to_owned(), value.to_owned())].into());
            pod
        };
        let selected = |value: &str| names(&cache.select("ns", "app", value));
        for (name, value) in [("b", Some("x")), ("a", Some("x")), ("c", Some("y")), ("d", None)] {
            feed.take(&Event::Apply(labelled(name, value)), now);
        }
        assert_eq!(
            (selected("x"), selected("y"), selected("z")),
            (vec!["a".into(), "b".into()], vec!["c".into()], vec![])
        );
        feed.take(&Event::Apply(labelled("a", Some("y"))), now);
        feed.take(&Event::Apply(labelled("d", Some("x"))), now);
        feed.take(&Event::Apply(labelled("b", None)), now);
        assert_eq!((selected("x"), selected("y")), (vec!["d".into()], vec!["a".into(), "c".into()]));
        // A deletion may show labels that the cache never had.
        feed.take(&Event::Delete(labelled("c", Some("x"))), now);
        assert_eq!((selected("x"), selected("y")), (vec!["d".into()], vec!["a".into()]));
        for event in [Event::Init, Event::InitApply(labelled("e", Some("x"))), Event::InitDone] {
            feed.take(&event, now);
        }
        assert_eq!((selected("x"), selected("y")), (vec!["e".into()], vec![]));
    }

    #[test]
    fn a_watch_that_starts_again_names_what_is_gone() {
        let (cache, mut feed) = cache::<Pod>(&["app"]);
        let now = Instant::now();
        for event in [Event::Apply(pod("a", 1)), Event::Apply(pod("b", 2))] {
            assert_eq!(feed.take(&event, now).len(), 1);
        }
        assert_eq!(cache.select("ns", "app", "a").len(), 2);
        assert!(cache.select("other", "app", "a").is_empty() && cache.select("ns", "app", "b").is_empty());
        assert!(feed.take(&Event::Init, now).is_empty());
        assert!(feed.take(&Event::InitApply(pod("b", 2)), now).is_empty());
        assert_eq!(names(&cache.state()), ["a", "b"], "the old state counts until the list is complete");
        assert_eq!(names(&feed.take(&Event::InitDone, now)), ["a", "b"]);
        assert_eq!(names(&cache.state()), ["b"]);
    }
}

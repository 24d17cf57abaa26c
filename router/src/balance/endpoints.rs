//! What the router knows of the world: its configuration and the revisions' endpoints, as one snapshot that readers share.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tonic::transport::Channel;

use crate::config::Configuration;

/// Where a server listens, as a source of endpoints says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    pub http: SocketAddr,
    pub grpc: Option<SocketAddr>,
    /// Going down but still answering: used only when nothing else is there.
    pub draining: bool,
}

/// One server, for as long as it is listed: its load and its recent failures survive new snapshots.
#[derive(Debug)]
pub struct Endpoint {
    pub http: SocketAddr,
    pub grpc: Option<SocketAddr>,
    draining: AtomicBool,
    outstanding: AtomicUsize,
    since: Instant,
    /// Milliseconds after `since` until which it is avoided; 0: never was.
    avoided_until: AtomicU64,
    /// Milliseconds after `since` until which it counts as busy; 0: never was.
    busy_until: AtomicU64,
    /// Milliseconds after `since` until which it counts as full; 0: never was.
    full_until: AtomicU64,
    /// Seconds after which those may try again whom it refused last.
    retry_after: AtomicU64,
    channel: OnceLock<Channel>,
}

impl Endpoint {
    pub fn new(address: Address) -> Self {
        Self {
            http: address.http,
            grpc: address.grpc,
            draining: AtomicBool::new(address.draining),
            outstanding: AtomicUsize::new(0),
            since: Instant::now(),
            avoided_until: AtomicU64::new(0),
            busy_until: AtomicU64::new(0),
            full_until: AtomicU64::new(0),
            retry_after: AtomicU64::new(0),
            channel: OnceLock::new(),
        }
    }

    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Requests under way.
    pub fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Relaxed)
    }

    /// Counts a request until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> Outstanding {
        self.outstanding.fetch_add(1, Ordering::Relaxed);
        Outstanding(self.clone())
    }

    /// Leaves the endpoint out for `time` from `now`.
    pub fn avoid(&self, now: Instant, time: Duration) {
        self.avoided_until.fetch_max(self.milliseconds(now + time), Ordering::Relaxed);
    }

    /// Keeps for `time` from `now` that the endpoint has too much to do.
    pub fn set_busy(&self, now: Instant, time: Duration) {
        self.busy_until.fetch_max(self.milliseconds(now + time), Ordering::Relaxed);
    }

    /// Whether the endpoint has said shortly before `now` that it has too much to do.
    pub fn is_busy(&self, now: Instant) -> bool {
        self.milliseconds(now) < self.busy_until.load(Ordering::Relaxed)
    }

    /// Keeps for `time` from `now` that the endpoint refuses whatever comes, which may try again after `retry_after` seconds.
    pub fn set_full(&self, now: Instant, time: Duration, retry_after: u64) {
        self.retry_after.store(retry_after, Ordering::Relaxed);
        // Whoever sees the time sees these seconds as well.
        self.full_until.fetch_max(self.milliseconds(now + time), Ordering::Release);
    }

    /// Seconds after which to try again, if the endpoint has said shortly before `now` that it refuses whatever comes.
    pub fn full(&self, now: Instant) -> Option<u64> {
        let is_full = self.milliseconds(now) < self.full_until.load(Ordering::Acquire);
        is_full.then(|| self.retry_after.load(Ordering::Relaxed))
    }

    fn milliseconds(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.since).as_millis()).unwrap_or(u64::MAX)
    }

    /// When the endpoint may be used again, if it is to be avoided at `now`.
    pub fn avoided_until(&self, now: Instant) -> Option<Instant> {
        let milliseconds = self.avoided_until.load(Ordering::Relaxed);
        if milliseconds == 0 {
            return None;
        }
        let until = self.since + Duration::from_millis(milliseconds);
        (until > now).then_some(until)
    }

    /// A lazily connected gRPC channel; `None` without a gRPC address.
    pub fn channel(&self) -> Option<Channel> {
        let address = self.grpc?;
        let connect = || {
            let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
                .expect("a socket address makes a URI")
                .connect_timeout(Duration::from_secs(1))
                .tcp_nodelay(true)
                .http2_keep_alive_interval(Duration::from_secs(10))
                .keep_alive_timeout(Duration::from_secs(3));
            endpoint.connect_lazy()
        };
        Some(self.channel.get_or_init(connect).clone())
    }
}

/// Counts a request of an endpoint while it lives.
#[derive(Debug)]
pub struct Outstanding(Arc<Endpoint>);

impl Drop for Outstanding {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A revision with its endpoints.
#[derive(Clone, Debug)]
pub struct Revision {
    pub name: Arc<str>,
    pub weight: u32,
    /// Adapter that makes the revision out of the servers' model. Endpoints may be those of another revision as well.
    pub adapter: Option<Arc<str>>,
    pub endpoints: Vec<Arc<Endpoint>>,
}

/// What is known at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Absent until the first valid configuration.
    pub config: Option<Arc<Configuration>>,
    /// Revisions in the order of the configuration.
    pub revisions: Vec<Revision>,
    /// The endpoints of every revision have been listed at least once.
    pub synced: bool,
}

impl Snapshot {
    pub fn revision(&self, name: &str) -> Option<&Revision> {
        self.revisions.iter().find(|revision| &*revision.name == name)
    }
}

#[derive(Default)]
struct Known {
    config: Option<Arc<Configuration>>,
    services: HashMap<String, Vec<Arc<Endpoint>>>,
}

/// Takes news from the sources and hands out snapshots.
pub struct Registry {
    known: Mutex<Known>,
    snapshots: watch::Sender<Arc<Snapshot>>,
}

impl Default for Registry {
    fn default() -> Self {
        Self { known: Mutex::default(), snapshots: watch::Sender::new(Arc::default()) }
    }
}

impl Registry {
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.subscribe()
    }

    /// Replaces the configuration; services it no longer names are forgotten.
    pub fn set_config(&self, config: Configuration) {
        self.change(|known| {
            known.services.retain(|service, _| config.revisions.iter().any(|revision| revision.service == *service));
            known.config = Some(Arc::new(config));
        });
    }

    /// Replaces the endpoints of a service. Those that stay keep their load and failures.
    pub fn set_endpoints(&self, service: &str, mut addresses: Vec<Address>) {
        addresses.sort_unstable();
        addresses.dedup_by_key(|address| address.http);
        self.change(|known| {
            let before = known.services.remove(service).unwrap_or_default();
            let endpoints = addresses.into_iter().map(|address| {
                match before.iter().find(|endpoint| endpoint.http == address.http && endpoint.grpc == address.grpc) {
                    Some(endpoint) => {
                        endpoint.draining.store(address.draining, Ordering::Relaxed);
                        endpoint.clone()
                    }
                    None => Arc::new(Endpoint::new(address)),
                }
            });
            known.services.insert(service.to_owned(), endpoints.collect());
        });
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut known);
        let Some(config) = known.config.clone() else { return };
        let revisions = config.revisions.iter().map(|revision| Revision {
            name: revision.name.as_str().into(),
            weight: revision.weight,
            adapter: revision.adapter.as_deref().map(Arc::from),
            endpoints: known.services.get(&revision.service).cloned().unwrap_or_default(),
        });
        let snapshot = Snapshot {
            revisions: revisions.collect(),
            synced: config.revisions.iter().all(|revision| known.services.contains_key(&revision.service)),
            config: Some(config),
        };
        for revision in &snapshot.revisions {
            let ready = revision.endpoints.iter().filter(|endpoint| !endpoint.draining()).count();
            metrics::gauge!("athanor_router_endpoints", "revision" => revision.name.to_string()).set(ready as f64);
            metrics::gauge!("athanor_router_weight_ratio", "revision" => revision.name.to_string())
                .set(f64::from(revision.weight) / 100.0);
        }
        let before = self.snapshots.send_replace(Arc::new(snapshot));
        for gone in before.revisions.iter().filter(|before| config_lacks(&known, &before.name)) {
            metrics::gauge!("athanor_router_endpoints", "revision" => gone.name.to_string()).set(0.0);
            metrics::gauge!("athanor_router_weight_ratio", "revision" => gone.name.to_string()).set(0.0);
        }
    }
}

fn config_lacks(known: &Known, name: &str) -> bool {
    known.config.as_ref().is_some_and(|config| config.revisions.iter().all(|revision| revision.name != name))
}

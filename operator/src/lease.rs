//! Elects the leader by a Lease of coordination.k8s.io, as client-go does. Only the leader reconciles.
//!
//! Clocks of different machines are not compared: a holder counts as gone when its record has not changed for the whole
//! duration by the clock of this process. Writes carry the resource version, so one of two candidates fails.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::liveness::Liveness;

/// Time without a renewal after which another process takes the Lease.
const DURATION: Duration = Duration::from_secs(15);
/// Time without a renewal after which the holder gives up its leadership, well before another process takes the Lease.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Whether this process may write as the leader. Clones share it.
///
/// It ends by itself when the Lease was not renewed in time: a process that was suspended finds its leadership over at its first
/// write, before it knows that there is another leader.
#[derive(Clone, Debug, Default)]
pub struct Leadership(Arc<Mutex<Option<Instant>>>);

impl Leadership {
    /// Leadership of a process that takes part in no election: it does not end.
    pub fn without_election() -> Self {
        let leadership = Self::default();
        // Less than nothing has passed since then, for as long as a process lives.
        leadership.renew(Instant::now() + FOR_EVER);
        leadership
    }

    /// The Lease was renewed by a request that began then.
    fn renew(&self, began: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(began);
    }

    fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether the last renewal is recent enough that no other process can have taken the Lease.
    pub fn is_held(&self) -> bool {
        let renewed = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        renewed.is_some_and(|renewed| renewed.elapsed() < RENEW_DEADLINE)
    }
}

/// A candidate, or the leader.
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
    /// The record as last read, and when it was first read with this content.
    seen: Option<(Record, Instant)>,
    leadership: Leadership,
    liveness: Liveness,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    holder: String,
    renewed: Option<Timestamp>,
    transitions: i32,
}

/// Result of an attempt to take or renew the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Held,
    /// Another process holds it.
    Taken,
    /// It changed after it was read: another candidate was faster, or somebody edited it.
    Conflict,
}

impl Election {
    pub fn new(client: Client, namespace: &str, name: &str, identity: String) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.into(),
            identity,
            seen: None,
            leadership: Leadership::default(),
            liveness: Liveness::default(),
        }
    }

    /// Beats this from now on, once for each attempt to take or renew the Lease.
    pub fn beat(&mut self, liveness: Liveness) {
        self.liveness = liveness;
    }

    fn has_turned(&self) {
        self.liveness.beat("the election", std::time::Instant::now());
    }

    /// What writers ask before they write.
    pub fn leadership(&self) -> Leadership {
        self.leadership.clone()
    }

    /// Waits until this process is the leader. Calls `reached` after each successful request. Returns false on
    /// shutdown.
    pub async fn acquire(&mut self, shutdown: &CancellationToken, mut reached: impl FnMut()) -> bool {
        loop {
            let began = Instant::now();
            self.has_turned();
            match timeout(RENEW_DEADLINE, self.attempt()).await {
                Ok(Ok(outcome)) => {
                    reached();
                    if outcome == Outcome::Held {
                        self.leadership.renew(began);
                        return true;
                    }
                }
                Ok(Err(error)) => tracing::warn!(%error, lease = self.name, "the Lease could not be taken"),
                Err(_) => tracing::warn!(lease = self.name, "the API server does not answer"),
            }
            tokio::select! {
                () = shutdown.cancelled() => return false,
                () = sleep(RETRY) => {}
            }
        }
    }

    /// Renews until shutdown, until another process holds the Lease, or until the deadline has passed. Returns true if
    /// leadership was lost.
    pub async fn hold(&mut self, shutdown: &CancellationToken) -> bool {
        let mut renewed = Instant::now();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return false,
                () = sleep(RETRY) => {}
            }
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            let began = Instant::now();
            self.has_turned();
            match timeout(left.max(Duration::from_millis(1)), self.attempt()).await {
                Ok(Ok(Outcome::Held)) => {
                    renewed = began;
                    self.leadership.renew(began);
                }
                Ok(Ok(Outcome::Taken)) => {
                    self.leadership.end();
                    return true;
                }
                // Somebody edited the Lease in between. The next attempt reads who holds it.
                Ok(Ok(Outcome::Conflict)) => {
                    tracing::warn!(lease = self.name, "the Lease changed while it was renewed");
                }
                Ok(Err(error)) => tracing::warn!(%error, lease = self.name, "the Lease could not be renewed"),
                Err(_) => {}
            }
            if renewed.elapsed() >= RENEW_DEADLINE {
                return true;
            }
        }
    }

    /// Gives the Lease up, so that another process can take it at once.
    pub async fn release(&mut self) {
        let released = async {
            let lease = self.api.get(&self.name).await?;
            let record = record(&lease);
            if record.holder == self.identity {
                self.write(Some(&lease), String::new(), record.transitions).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match timeout(Duration::from_secs(5), released).await {
            Ok(Ok(())) => tracing::info!(lease = self.name, "released"),
            Ok(Err(error)) => tracing::warn!(%error, lease = self.name, "the Lease was not released"),
            Err(_) => tracing::warn!(lease = self.name, "the Lease was not released within 5 s"),
        }
    }

    async fn attempt(&mut self) -> Result<Outcome, kube::Error> {
        let lease = self.api.get_opt(&self.name).await?;
        let now = Instant::now();
        let seen = lease.as_ref().map(record);
        if let Some(record) = &seen
            && self.seen.as_ref().is_none_or(|(before, _)| before != record)
        {
            self.seen = Some((record.clone(), now));
        }
        let silent = self.seen.as_ref().map_or(Duration::ZERO, |(_, since)| now - *since);
        let Some(transitions) = may_take(seen.as_ref(), &self.identity, silent) else { return Ok(Outcome::Taken) };
        match self.write(lease.as_ref(), self.identity.clone(), transitions).await {
            Ok(()) => Ok(Outcome::Held),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Outcome::Conflict),
            Err(error) => Err(error),
        }
    }

    async fn write(&self, before: Option<&Lease>, holder: String, transitions: i32) -> Result<(), kube::Error> {
        let now = MicroTime(Timestamp::now());
        let same = before
            .and_then(|lease| lease.spec.as_ref())
            .filter(|spec| spec.holder_identity.as_deref() == Some(&holder));
        let acquired = same.and_then(|spec| spec.acquire_time.clone()).unwrap_or_else(|| now.clone());
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                resource_version: before.and_then(|lease| lease.metadata.resource_version.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                acquire_time: Some(acquired),
                renew_time: Some(now),
                lease_transitions: Some(transitions),
                ..LeaseSpec::default()
            }),
        };
        let params = PostParams::default();
        match before {
            Some(_) => self.api.replace(&self.name, &params, &lease).await?,
            None => self.api.create(&params, &lease).await?,
        };
        Ok(())
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        renewed: spec.renew_time.map(|time| time.0),
        transitions: spec.lease_transitions.unwrap_or(0),
    }
}

/// Returns the number of transitions to write if this process may take or renew the Lease.
fn may_take(record: Option<&Record>, identity: &str, silent: Duration) -> Option<i32> {
    match record {
        None => Some(0),
        Some(record) if record.holder == identity => Some(record.transitions),
        Some(record) if record.holder.is_empty() || silent > DURATION => Some(record.transitions.saturating_add(1)),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leadership_ends_by_itself() {
        let leadership = Leadership::default();
        assert!(!leadership.is_held());
        leadership.renew(Instant::now() - RENEW_DEADLINE + Duration::from_secs(5));
        assert!(leadership.is_held());
        leadership.renew(Instant::now() - RENEW_DEADLINE);
        assert!(!leadership.is_held());
        leadership.renew(Instant::now());
        leadership.end();
        assert!(!leadership.is_held());
        assert!(Leadership::without_election().is_held());
    }

    #[test]
    fn a_lease_is_taken_when_free_mine_or_silent_for_long() {
        let held = |holder: &str| Record { holder: holder.into(), renewed: None, transitions: 4 };
        let long = DURATION + Duration::from_secs(1);
        for (record, silent, expected) in [
            (None, Duration::ZERO, Some(0)),
            (Some(held("me")), Duration::ZERO, Some(4)),
            (Some(held("")), Duration::ZERO, Some(5)),
            (Some(held("other")), Duration::ZERO, None),
            (Some(held("other")), DURATION, None),
            (Some(held("other")), long, Some(5)),
        ] {
            assert_eq!(may_take(record.as_ref(), "me", silent), expected, "{record:?} {silent:?}");
        }
    }
}

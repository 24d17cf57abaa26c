//! What this process has written for each object: versions that the caches must reach, and the children as they were
//! last applied.
//!
//! All of it may be lost at any time. A process that starts with an empty memory reads caches that were filled after it
//! became the leader, and applies every child once.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    pace::{Change, PACE},
    stores::{Mark, Present, Stores, Written},
};

/// Longest time between two applications of a child. Children that are not watched are repaired this often.
pub const RESYNC: Duration = Duration::from_secs(600);
/// Wait for a cache that lags. The event that ends the lag wakes the object as well.
const SHORT: Duration = Duration::from_millis(250);
/// A cache that lags longer than this is an error.
const LONG: Duration = Duration::from_secs(60);

/// How far the caches lag behind this process's own writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lag {
    Short(Duration),
    Long { kind: String, waited: Duration },
}

/// A child as it was last applied.
#[derive(Clone, Debug)]
struct AppliedChild {
    digest: String,
    mark: Mark,
    at: Instant,
}

#[derive(Default)]
struct Record {
    /// Newest write by kind.
    written: HashMap<String, Written>,
    /// Entries by kind and name.
    applied: HashMap<(String, String), AppliedChild>,
    status: StatusWrites,
}

/// Writes of an object's status.
#[derive(Default)]
struct StatusWrites {
    last: Option<Written>,
    /// When a change of a message alone was first held back.
    held: Option<Instant>,
    /// Version after whose write nothing was left to do.
    settled: Option<u64>,
}

/// Records by the keys of objects.
#[derive(Default)]
pub struct Memory {
    records: Mutex<HashMap<String, Record>>,
}

impl Memory {
    fn records(&self) -> MutexGuard<'_, HashMap<String, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a write, so that the next reconcile waits until the cache has it.
    pub fn wrote(&self, key: &str, kind: &str, written: Written) {
        let mut records = self.records();
        let newest = records.entry(key.into()).or_default().written.entry(kind.into()).or_insert(written);
        if newest.version < written.version {
            *newest = written;
        }
    }

    /// Returns how far the caches lag behind what was written for an object; `None` if they have all of it.
    pub fn lag(&self, key: &str, stores: &Stores, now: Instant) -> Option<Lag> {
        let mut records = self.records();
        let written = &mut records.get_mut(key)?.written;
        written.retain(|kind, written| !stores.has_seen(kind, written));
        let (kind, oldest) = written.iter().min_by_key(|(_, written)| written.at)?;
        let waited = now.saturating_duration_since(oldest.at);
        Some(if waited < LONG { Lag::Short(SHORT) } else { Lag::Long { kind: kind.clone(), waited } })
    }

    /// Records a write of the status.
    pub fn wrote_status(&self, key: &str, kind: &str, written: Written) {
        self.wrote(key, kind, written);
        let mut records = self.records();
        let status = &mut records.entry(key.into()).or_default().status;
        status.last = Some(written);
        status.held = None;
    }

    /// Returns the time for which a change of the status is held back; `None` if it is to be written now.
    pub fn hold(&self, key: &str, change: Change, now: Instant) -> Option<Duration> {
        let mut records = self.records();
        let status = &mut records.entry(key.into()).or_default().status;
        let since = match change {
            Change::Stage => None,
            Change::Progress => status.last.map(|last| last.at),
            // A message that changes again within that time is never written.
            Change::Message => Some(*status.held.get_or_insert(now)),
        };
        let left = since.map_or(Duration::ZERO, |since| PACE.saturating_sub(now.saturating_duration_since(since)));
        (!left.is_zero()).then_some(left)
    }

    /// Records that the status is as it should be: no change is held back any more.
    pub fn is_current(&self, key: &str) {
        if let Some(record) = self.records().get_mut(key) {
            record.status.held = None;
        }
    }

    /// Records that nothing is left to do after the last write of the status.
    pub fn settle(&self, key: &str) {
        if let Some(record) = self.records().get_mut(key) {
            record.status.settled = record.status.last.map(|last| last.version);
        }
    }

    /// Returns whether an event shows no more than the last write of the status, after which nothing was left to do.
    pub fn is_settled(&self, key: &str, version: Option<u64>) -> bool {
        version.is_some() && self.records().get(key).is_some_and(|record| record.status.settled == version)
    }

    /// Returns whether a child is as it was last applied, which was not long ago.
    pub fn is_applied(&self, key: &str, child: (&str, &str), digest: &str, present: &Present, now: Instant) -> bool {
        let records = self.records();
        let applied = records.get(key).and_then(|record| record.applied.get(&(child.0.into(), child.1.into())));
        applied.is_some_and(|applied| {
            applied.digest == digest
                && now.saturating_duration_since(applied.at) < RESYNC
                && match present {
                    Present::Unwatched => true,
                    Present::Absent => false,
                    Present::Marked(mark) => *mark == applied.mark,
                }
        })
    }

    /// Records a child as it is after it was applied.
    pub fn applied(&self, key: &str, child: (&str, &str), digest: String, mark: Mark, now: Instant) {
        let child = (child.0.into(), child.1.into());
        let applied = AppliedChild { digest, mark, at: now };
        self.records().entry(key.into()).or_default().applied.insert(child, applied);
    }

    /// Forgets a child that was deleted.
    pub fn forget_child(&self, key: &str, kind: &str, name: &str) {
        if let Some(record) = self.records().get_mut(key) {
            record.applied.remove(&(kind.into(), name.into()));
        }
    }

    /// Forgets an object that is gone.
    pub fn forget(&self, key: &str) {
        self.records().remove(key);
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
    use kube::runtime::watcher::Event;

    use super::*;

    #[test]
    fn a_reconcile_waits_for_its_own_writes() {
        let (stores, mut feeds) = Stores::new();
        let memory = Memory::default();
        let start = Instant::now();
        assert_eq!(memory.lag("a", &stores, start), None);
        memory.wrote("a", "FineTuneJob", Written { version: 5, at: start });
        memory.wrote("a", "FineTuneJob", Written { version: 4, at: start });
        memory.wrote("a", "Role", Written { version: 9, at: start });
        assert_eq!(memory.lag("a", &stores, start), Some(Lag::Short(SHORT)));
        assert_eq!(memory.lag("b", &stores, start), None, "another object does not wait");
        let late = start + LONG;
        assert_eq!(memory.lag("a", &stores, late), Some(Lag::Long { kind: "FineTuneJob".into(), waited: LONG }));
        let mut job = crate::finetunejob::tests::job("a", "1");
        for (version, lag) in [("4", Some(Lag::Short(SHORT))), ("5", None)] {
            job.metadata.resource_version = Some(version.into());
            feeds.fine_tune_jobs.take(&Event::Apply(job.clone()), start);
            assert_eq!(memory.lag("a", &stores, start), lag, "version {version}");
        }
    }

    #[test]
    fn stages_are_written_at_once_and_the_rest_in_its_time() {
        let memory = Memory::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let hold = |change, seconds| memory.hold("a", change, after(seconds)).map(|wait| wait.as_secs());
        let wrote = |version, seconds| memory.wrote_status("a", "FineTuneJob", Written { version, at: after(seconds) });
        assert_eq!(hold(Change::Progress, 0), None, "this process has written nothing yet");
        wrote(1, 0);
        assert_eq!((hold(Change::Progress, 1), hold(Change::Progress, 5)), (Some(4), None));
        assert_eq!(hold(Change::Stage, 1), None);
        // A message waits from its first change, however long ago the last write was.
        assert_eq!((hold(Change::Message, 20), hold(Change::Message, 23)), (Some(5), Some(2)));
        assert_eq!(hold(Change::Message, 25), None);
        wrote(2, 25);
        assert_eq!(hold(Change::Message, 26), Some(5), "the next one");
        memory.is_current("a");
        assert_eq!(hold(Change::Message, 29), Some(5), "it had changed back");
    }

    #[test]
    fn an_event_of_the_last_status_alone_is_settled() {
        let memory = Memory::default();
        let at = Instant::now();
        memory.wrote_status("a", "FineTuneJob", Written { version: 7, at });
        assert!(!memory.is_settled("a", Some(7)), "something may be left to do");
        memory.settle("a");
        assert!(memory.is_settled("a", Some(7)));
        assert!(!memory.is_settled("a", Some(8)), "somebody changed it");
        assert!(!memory.is_settled("a", None) && !memory.is_settled("b", Some(7)));
        memory.wrote_status("a", "FineTuneJob", Written { version: 9, at });
        assert!(!memory.is_settled("a", Some(9)));
    }

    #[test]
    fn a_child_is_applied_again_when_anything_about_it_changed() {
        let memory = Memory::default();
        let mark = |generation| Mark::new(&ObjectMeta { generation: Some(generation), ..ObjectMeta::default() });
        let child = ("Deployment", "m-router");
        let start = Instant::now();
        let is_applied = |digest, present: Present, at| memory.is_applied("m", child, digest, &present, at);
        assert!(!is_applied("d1", Present::Marked(mark(1)), start), "never applied");
        memory.applied("m", child, "d1".into(), mark(1), start);
        assert!(is_applied("d1", Present::Marked(mark(1)), start));
        assert!(is_applied("d1", Present::Unwatched, start));
        assert!(!is_applied("d2", Present::Marked(mark(1)), start), "the wanted child changed");
        assert!(!is_applied("d1", Present::Marked(mark(2)), start), "somebody changed it");
        assert!(!is_applied("d1", Present::Absent, start), "somebody deleted it");
        assert!(!is_applied("d1", Present::Marked(mark(1)), start + RESYNC), "it is time to apply it again");
        memory.forget_child("m", child.0, child.1);
        assert!(!is_applied("d1", Present::Unwatched, start), "it was deleted by us");
    }
}

//! Receives progress reports of trainers over gRPC and keeps the newest one of each run in memory.
//!
//! Nothing depends on a report: the outcome of a job comes from its pods. A report on an unknown job or another run is
//! refused.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use athanor_crds::FineTuneJob;
use kube::{
    ResourceExt,
    runtime::reflector::{ObjectRef, Store},
};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use crate::pace::PACE;

/// Messages and server, generated from contract/proto/progress.proto.
pub mod proto {
    tonic::include_proto!("athanor.train.v1");
}

use proto::{ProgressReply, ProgressUpdate, progress_server::Progress};

/// Shortest time between two reconciles of a job by reports of the same stage.
const INTERVAL: Duration = PACE;
/// Most metrics, and most timeline entries, that are kept from a report.
const ENTRIES: usize = 32;
/// Largest number of steps: the API server has no larger integers.
const MOST_STEPS: u64 = i64::MAX as u64;

/// The newest report of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub stage: String,
    pub step: u64,
    pub total_steps: u64,
    pub loss: f64,
    pub samples_per_second: f64,
    pub eta_seconds: f64,
    pub metrics: BTreeMap<String, f64>,
    pub checkpoint_step: u64,
    /// Events in seconds since the trainer's process started.
    pub timeline: BTreeMap<String, f64>,
}

/// The newest report of every run, by the UID of its job.
pub struct Reports {
    newest: Mutex<HashMap<String, Report>>,
    jobs: RwLock<Option<Store<FineTuneJob>>>,
    changed: mpsc::Sender<ObjectRef<FineTuneJob>>,
}

impl Reports {
    /// `changed` receives the jobs to reconcile. When it is full, a report reaches the status together with the next
    /// one.
    pub fn new(changed: mpsc::Sender<ObjectRef<FineTuneJob>>) -> Self {
        Self { newest: Mutex::default(), jobs: RwLock::default(), changed }
    }

    /// Accepts reports on these jobs from now on: this process is the leader.
    pub fn serve(&self, jobs: Store<FineTuneJob>) {
        *self.jobs.write().unwrap_or_else(PoisonError::into_inner) = Some(jobs);
    }

    pub fn get(&self, uid: &str) -> Option<Report> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    /// Drops the report of a job that is over.
    pub fn forget(&self, uid: &str) {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    fn check(&self, update: &ProgressUpdate) -> Result<ObjectRef<FineTuneJob>, Status> {
        let key = ObjectRef::new(&update.job).within(&update.namespace);
        let jobs = self.jobs.read().unwrap_or_else(PoisonError::into_inner);
        let jobs = jobs.as_ref().ok_or_else(|| Status::unavailable("another operator is the leader"))?;
        let job = jobs.get(&key).ok_or_else(|| {
            Status::not_found(format!("FineTuneJob {}/{} does not exist", update.namespace, update.job))
        })?;
        if job.uid().as_deref() != Some(&update.run_id) {
            return Err(Status::permission_denied("run_id is not the UID of this FineTuneJob"));
        }
        Ok(key)
    }

    fn keep(&self, update: ProgressUpdate) {
        let run_id = update.run_id.clone();
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if !newest.contains_key(&update.run_id)
            && let Some(jobs) = &*self.jobs.read().unwrap_or_else(PoisonError::into_inner)
        {
            let known: std::collections::HashSet<String> = jobs.state().iter().filter_map(|job| job.uid()).collect();
            newest.retain(|uid, _| known.contains(uid));
        }
        let report = bounded(update);
        newest.insert(run_id, report);
    }
}

/// Keeps of a report what the schema of the status allows: a status that is refused would hide what else it says.
fn bounded(update: ProgressUpdate) -> Report {
    Report {
        stage: update.stage.chars().take(64).collect(),
        step: update.step.min(MOST_STEPS),
        total_steps: update.total_steps.min(MOST_STEPS),
        loss: update.loss,
        samples_per_second: update.samples_per_second,
        eta_seconds: update.eta_seconds,
        metrics: update.metrics.into_iter().filter(|(name, _)| name.len() <= 128).take(ENTRIES).collect(),
        checkpoint_step: update.checkpoint_step.min(MOST_STEPS),
        timeline: update.timeline.into_iter().filter(|(name, _)| name.len() <= 64).take(ENTRIES).collect(),
    }
}

/// The gRPC service.
pub struct ProgressService(pub Arc<Reports>);

#[tonic::async_trait]
impl Progress for ProgressService {
    async fn report(&self, request: Request<Streaming<ProgressUpdate>>) -> Result<Response<ProgressReply>, Status> {
        let mut updates = request.into_inner();
        let mut last: Option<(Instant, String)> = None;
        let mut unseen = None;
        while let Some(update) = updates.message().await? {
            let key = self.0.check(&update)?;
            let stage = update.stage.clone();
            self.0.keep(update);
            let due = last.as_ref().is_none_or(|(at, before)| at.elapsed() >= INTERVAL || *before != stage);
            if due {
                last = Some((Instant::now(), stage));
                unseen = self.0.changed.try_send(key.clone()).is_err().then_some(key);
            } else {
                unseen = Some(key);
            }
        }
        if let Some(key) = unseen {
            let _full_or_closed = self.0.changed.try_send(key);
        }
        Ok(Response::new(ProgressReply {}))
    }
}

#[cfg(test)]
mod tests {
    use kube::runtime::{reflector, watcher};

    use super::*;

    #[test]
    fn a_report_is_cut_to_what_a_status_may_hold() {
        let named = |length: usize| (0..100).map(move |number| (format!("{number:0length$}"), 1.0)).collect();
        let report = bounded(ProgressUpdate {
            stage: "é".repeat(100),
            step: u64::MAX,
            total_steps: u64::MAX,
            checkpoint_step: u64::MAX,
            metrics: named(10),
            timeline: named(65),
            ..ProgressUpdate::default()
        });
        assert_eq!((report.stage.chars().count(), report.metrics.len(), report.timeline.len()), (64, ENTRIES, 0));
        assert_eq!([report.step, report.total_steps, report.checkpoint_step], [MOST_STEPS; 3]);
    }

    #[test]
    fn only_the_run_of_a_known_job_may_report() {
        let (sender, _receiver) = mpsc::channel(1);
        let reports = Reports::new(sender);
        let update = |job: &str, run: &str| ProgressUpdate {
            namespace: "ns".into(),
            job: job.into(),
            run_id: run.into(),
            ..ProgressUpdate::default()
        };
        assert_eq!(reports.check(&update("a", "1")).unwrap_err().code(), tonic::Code::Unavailable);
        let (store, mut writer) = reflector::store();
        writer.apply_watcher_event(&watcher::Event::Apply(crate::finetunejob::tests::job("a", "1")));
        reports.serve(store);
        assert!(reports.check(&update("a", "1")).is_ok());
        assert_eq!(reports.check(&update("a", "2")).unwrap_err().code(), tonic::Code::PermissionDenied);
        assert_eq!(reports.check(&update("b", "1")).unwrap_err().code(), tonic::Code::NotFound);
    }
}

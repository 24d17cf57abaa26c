//! Queues such as Kueue: a FineTuneJob with a queue's labels gives them to its Kubernetes Job, which is created
//! suspended and starts when the queue admits it.

use athanor_crds::FineTuneJob;
use k8s_openapi::api::batch::v1::Job;
use kube::ResourceExt;

const PREFIX: &str = "kueue.x-k8s.io/";

/// Returns the queue's labels of a FineTuneJob.
pub fn labels(job: &FineTuneJob) -> Vec<(String, String)> {
    let labels = job.labels().iter().filter(|(key, _)| key.starts_with(PREFIX));
    labels.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Returns `spec.suspend` of a new Kubernetes Job with these labels.
pub fn suspend(labels: &[(String, String)]) -> Option<bool> {
    (!labels.is_empty()).then_some(true)
}

/// Returns whether a queue has not admitted the Kubernetes Job yet.
pub fn holds(batch_job: &Job) -> bool {
    batch_job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::batch::v1::JobSpec;

    use super::*;

    #[test]
    fn a_job_with_a_queue_waits_for_its_admission() {
        let mut job = crate::finetunejob::tests::job("a", "1");
        assert_eq!((labels(&job), suspend(&labels(&job))), (vec![], None));
        let queue = ("kueue.x-k8s.io/queue-name".to_owned(), "nlp".to_owned());
        job.metadata.labels = Some([queue.clone(), ("team".into(), "nlp".into())].into());
        assert_eq!((labels(&job), suspend(&labels(&job))), (vec![queue], Some(true)));
        let batch_job = |suspend| Job { spec: Some(JobSpec { suspend, ..JobSpec::default() }), ..Job::default() };
        assert!(holds(&batch_job(Some(true))));
        assert!(!holds(&batch_job(Some(false))) && !holds(&Job::default()));
    }
}

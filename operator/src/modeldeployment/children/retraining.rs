//! A retraining: a FineTuneJob from the template.

use athanor_contract::train::{KafkaSource, Source};
use athanor_crds::{FineTuneJob, label};

use super::common::{kafka_credentials, metadata};
use crate::modeldeployment::{names, policy::retrain::NewRetraining, validate::ValidatedDeployment};

/// Builds the FineTuneJob: the template with the recorded events as one more source and the current artifact as the
/// baseline. A retraining is never deleted by its deployment.
pub fn build(deployment: &ValidatedDeployment, new: &NewRetraining) -> Option<FineTuneJob> {
    let (retrain, events) = deployment.spec.retrain.as_ref().zip(deployment.events.as_ref())?;
    let mut spec = retrain.template.spec.clone();
    spec.train.data.sources.push(Source {
        name: retrain.source_name.clone(),
        uri: None,
        format: None,
        kafka: Some(KafkaSource {
            credentials_secret_name: kafka_credentials(deployment).map(Into::into),
            signing_keys_secret_name: Some(names::signing_keys(&deployment.name)),
            maximum_samples: retrain.maximum_samples,
            maximum_caller_percent: events.maximum_caller_percent,
            ..KafkaSource::new(&events.bootstrap_servers, &events.topic, new.ranges.clone())
        }),
        columns: Default::default(),
        part: None,
    });
    spec.train.evaluate.baseline = Some(new.baseline.clone());
    if spec.credentials_secret_name.is_none() {
        spec.credentials_secret_name = deployment.spec.credentials_secret_name.clone();
    }
    let mut labels = retrain.template.labels.clone();
    labels.extend([
        (label::DEPLOYMENT.into(), deployment.name.clone()),
        ("app.kubernetes.io/managed-by".into(), "athanor".into()),
    ]);
    let mut job = FineTuneJob::new(&new.name, spec);
    job.metadata = metadata(deployment, &new.name, labels);
    Some(job)
}

//! Labels for rows that have none, from a language model: rank 0 asks, all ranks get the answers.
//!
//! What was answered is kept in a journal beside the output, so that a job that starts again pays for no row twice.

use std::{path::Path, time::Duration};

use athanor_contract::{
    artifact::sha256_hex,
    train::{AnnotateSpec, TrainConfig},
};
use athanor_data::{
    Dataset,
    annotate::{AnnotationReport, Annotations, annotate},
};
use athanor_store::{Location, StoreError};
use athanor_torch::ProcessGroup;
use tch::{Device, Tensor};
use tokio::runtime::Handle;

use crate::TrainError;

/// Between two copies of the journal to the store, and two signs of life to the other ranks.
const EVERY: Duration = Duration::from_secs(20);
const JOURNAL: &str = "annotations.jsonl";

/// Labels the dataset's rows without a label; those that stay without one are left out. The digest then covers the labels.
pub fn complete(
    dataset: &mut Dataset,
    config: &TrainConfig,
    runtime: &Handle,
    group: Option<&ProcessGroup>,
    device: Device,
    work: &Path,
) -> Result<Option<AnnotationReport>, TrainError> {
    let Some(spec) = &config.spec.data.annotate else { return Ok(None) };
    let open: Vec<usize> = (0..dataset.rows.len()).filter(|&row| dataset.rows.label(row).is_none()).collect();
    let Some(labels) = spec.labels.as_ref().or(config.spec.model.labels.as_ref()) else {
        return Err(TrainError::User(
            "data.annotate.labels, or model.labels, has to name the labels to choose from".into(),
        ));
    };
    let mut found = vec![-1_i64; open.len()];
    let mut report = None;
    if group.is_none_or(|group| group.rank() == 0) {
        let texts: Vec<(usize, &str)> = open.iter().map(|&row| (row, dataset.rows.text(row))).collect();
        let output = athanor_store::open(&config.spec.output.to)?;
        let annotations = ask(&texts, spec, labels, &output, (runtime, group, device), work)?;
        for (place, row) in annotations.rows.iter().enumerate() {
            found[place] = row.label.map_or(-1, |label| label as i64);
        }
        report = Some(annotations.report);
    } else if let Some(group) = group {
        while !told(group, false, device)? {}
    }
    if let Some(group) = group {
        let shared = Tensor::from_slice(&found).to_device(device);
        group.broadcast(&shared, 0)?;
        found = Vec::<i64>::try_from(shared)?;
    }
    for (&row, &label) in open.iter().zip(&found) {
        if let Ok(label) = usize::try_from(label) {
            dataset.rows.set_label(row, &labels[label]);
        }
    }
    let kept: Vec<bool> = (0..dataset.rows.len()).map(|row| dataset.rows.label(row).is_some()).collect();
    dataset.rows.retain(|row| kept[row]);
    if let Some(clusters) = &mut dataset.clusters {
        let mut row = 0;
        clusters.retain(|_| {
            row += 1;
            kept[row - 1]
        });
    }
    if dataset.rows.is_empty() {
        return Err(TrainError::User("data.annotate: no row has a label".into()));
    }
    dataset.digest = sha256_hex(&serde_json::to_vec(&(&dataset.digest, spec, &found)).map_err(TrainError::other)?);
    Ok(report)
}

/// Whether rank 0 is done; all ranks have to call it alike, and none waits longer than its peers' patience.
fn told(group: &ProcessGroup, done: bool, device: Device) -> Result<bool, TrainError> {
    let word = Tensor::from_slice(&[i64::from(done)]).to_device(device);
    group.broadcast(&word, 0)?;
    Ok(word.int64_value(&[0]) == 1)
}

fn ask(
    texts: &[(usize, &str)],
    spec: &AnnotateSpec,
    labels: &[String],
    output: &Location,
    (runtime, group, device): (&Handle, Option<&ProcessGroup>, Device),
    work: &Path,
) -> Result<Annotations, TrainError> {
    let name =
        sha256_hex(&serde_json::to_vec(&(spec.endpoint.as_str(), spec.model.as_str())).map_err(TrainError::other)?);
    let place = output.child(&format!("annotations/{}.jsonl", &name[..32]));
    let journal = work.join(JOURNAL);
    let result = runtime.block_on(async {
        match place.read().await {
            Ok(bytes) => tokio::fs::write(&journal, &bytes).await.map_err(TrainError::other)?,
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let progress = |progress: athanor_data::annotate::AnnotationProgress| {
            tracing::debug!(done = progress.done, total = progress.total, cost = progress.cost, "annotating");
        };
        let asking = annotate(texts, spec, labels, &journal, &progress);
        tokio::pin!(asking);
        let mut clock = tokio::time::interval(EVERY);
        loop {
            tokio::select! {
                result = &mut asking => {
                    keep(&journal, &place).await?;
                    break result.map_err(TrainError::from);
                }
                _ = clock.tick() => {
                    keep(&journal, &place).await?;
                    if let Some(group) = group {
                        told(group, false, device)?;
                    }
                }
            }
        }
    });
    let annotations = result?;
    if let Some(group) = group {
        told(group, true, device)?;
    }
    let report = &annotations.report;
    tracing::info!(rows = report.rows, labelled = report.labelled, cost = report.cost, "annotated");
    Ok(annotations)
}

/// Copies the journal to the store; the last line may be torn, which its reader minds.
async fn keep(journal: &Path, place: &Location) -> Result<(), TrainError> {
    match tokio::fs::read(journal).await {
        Ok(bytes) if !bytes.is_empty() => Ok(place.write(bytes.into()).await?),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(TrainError::other(error)),
    }
}

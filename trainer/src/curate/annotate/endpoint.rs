//! Labels from a language model: rank 0 asks and keeps a journal of the answers that it pays for.

use std::{path::Path, time::Duration};

use athanor_contract::{artifact::sha256_hex, train::EndpointAnnotator};
use athanor_data::{
    Dataset,
    annotate::{AnnotationReport, Annotations, annotate},
};
use athanor_store::{Location, StoreError};
use athanor_torch::ProcessGroup;
use tch::{Device, Tensor};

use super::labels::{Context, apply, open_rows, shared};
use crate::{TrainError, job::context::JobContext};

/// Between two copies of the journal to the store, and two signs of life to the other ranks.
const EVERY: Duration = Duration::from_secs(20);
const JOURNAL: &str = "annotations.jsonl";

/// Labels the rows; the report is rank 0's.
pub fn complete(
    dataset: &mut Dataset,
    spec: &EndpointAnnotator,
    context: &Context,
) -> Result<Option<AnnotationReport>, TrainError> {
    let open = open_rows(dataset);
    let labels = labels(spec, context.job.spec().model.labels.as_ref())?;
    let mut found = vec![-1_i64; open.len()];
    let mut report = None;
    if context.job.is_rank_0() {
        let texts: Vec<(usize, &str)> = open.iter().map(|&row| (row, dataset.rows.text(row))).collect();
        let annotations = ask(&texts, &|row| dataset.rows.place(row), spec, labels, context)?;
        for (place, row) in annotations.rows.iter().enumerate() {
            found[place] = row.label.map_or(-1, |label| label as i64);
        }
        report = Some(annotations.report);
    } else if let Some(group) = context.group {
        while !rank_0_is_done(group, false, context.job.device())? {}
    }
    apply(dataset, &open, &shared(found, context)?, labels)?;
    Ok(report)
}

/// The labels to choose from.
pub fn labels<'a>(spec: &'a EndpointAnnotator, of_model: Option<&'a Vec<String>>) -> Result<&'a [String], TrainError> {
    spec.labels.as_ref().or(of_model).map(Vec::as_slice).ok_or_else(|| {
        TrainError::User("data.annotate.endpoint.labels, or model.labels, has to name the labels to choose from".into())
    })
}

/// Whether rank 0 is done; all ranks have to call it alike, and none waits longer than its peers' patience.
fn rank_0_is_done(group: &ProcessGroup, done: bool, device: Device) -> Result<bool, TrainError> {
    let word = Tensor::from_slice(&[i64::from(done)]).to_device(device);
    group.broadcast(&word, 0)?;
    Ok(word.int64_value(&[0]) == 1)
}

fn ask(
    texts: &[(usize, &str)],
    place_of: &(dyn Fn(usize) -> String + Sync),
    spec: &EndpointAnnotator,
    labels: &[String],
    context: &Context,
) -> Result<Annotations, TrainError> {
    let (JobContext { process, work, .. }, group) = (context.job, context.group);
    let device = context.job.device();
    let output = athanor_store::open(&context.job.spec().output.to)?;
    let name = sha256_hex(&serde_json::to_vec(&(spec.url.as_str(), spec.model.as_str())).map_err(TrainError::other)?);
    let place = output.child(&format!("annotations/{}.jsonl", &name[..32]));
    let journal = work.join(JOURNAL);
    let result = process.runtime.block_on(async {
        match place.read().await {
            Ok(bytes) => tokio::fs::write(&journal, &bytes).await.map_err(TrainError::at(&journal))?,
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let progress = |progress: athanor_data::annotate::AnnotationProgress| {
            tracing::debug!(done = progress.done, total = progress.total, cost = progress.cost, "annotating");
        };
        let asking = annotate(texts, spec, labels, &journal, place_of, &progress);
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
                        rank_0_is_done(group, false, device)?;
                    }
                }
            }
        }
    });
    let annotations = result?;
    if let Some(group) = group {
        rank_0_is_done(group, true, device)?;
    }
    let report = &annotations.report;
    tracing::info!(rows = report.rows, labelled = report.labelled, cost = report.cost, "annotated");
    Ok(annotations)
}

/// Copies the journal to the store. The last line may be incomplete, which the journal's reader expects.
async fn keep(journal: &Path, place: &Location) -> Result<(), TrainError> {
    match tokio::fs::read(journal).await {
        Ok(bytes) if !bytes.is_empty() => place.write(bytes.into()).await.map(|_| ()).map_err(TrainError::from),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(TrainError::at(journal)(error)),
    }
}

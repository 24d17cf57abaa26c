//! Labels for rows that have none, from a language model or from the job's teacher. All ranks get the same ones.
//!
//! What was answered is kept beside the output, so that a job that starts again asks about no row twice.

mod endpoint;
mod teacher;

use std::path::Path;

use athanor_contract::{artifact::sha256_hex, train::TrainConfig};
use athanor_data::{Dataset, annotate::AnnotationReport};
use athanor_torch::ProcessGroup;
use serde::Serialize;
use tch::{Device, Tensor};
use tokio::runtime::Handle;

use crate::{TrainError, watchdog::Watchdog};
pub use endpoint::labels as endpoint_labels;
pub use teacher::{TeacherReport, check_labels};

/// What a run has at hand when it annotates.
pub struct Context<'a> {
    pub config: &'a TrainConfig,
    pub runtime: &'a Handle,
    pub group: Option<&'a ProcessGroup>,
    pub device: Device,
    pub watchdog: &'a Watchdog,
    /// This process's own folder.
    pub work: &'a Path,
    /// The teacher's folder, where the job has one.
    pub teacher: Option<&'a Path>,
}

/// What became of the rows without a label, for the report.
#[derive(Debug, Serialize)]
#[serde(tag = "by")]
pub enum Annotation {
    Endpoint(AnnotationReport),
    Teacher(TeacherReport),
}

/// Rows without a label.
pub fn open_rows(dataset: &Dataset) -> Vec<usize> {
    (0..dataset.rows.len()).filter(|&row| dataset.rows.label(row).is_none()).collect()
}

/// Labels the dataset's rows without a label; those that stay without one are left out. The digest then covers the labels. Rank 0
/// gets the report.
///
/// # Errors
/// Data in which no row has a label then are the user's error, and so is whoever cannot be asked.
pub fn complete(dataset: &mut Dataset, context: &Context) -> Result<Option<Annotation>, TrainError> {
    let Some(spec) = &context.config.spec.data.annotate else { return Ok(None) };
    match (&spec.endpoint, &spec.teacher) {
        (Some(spec), None) => Ok(endpoint::complete(dataset, spec, context)?.map(Annotation::Endpoint)),
        (None, Some(spec)) => teacher::complete(dataset, spec, context).map(Annotation::Teacher).map(Some),
        _ => Err(TrainError::User("data.annotate: set exactly one of endpoint and teacher".into())),
    }
}

/// Rank 0's labels.
fn shared(found: Vec<i64>, context: &Context) -> Result<Vec<i64>, TrainError> {
    let Some(group) = context.group else { return Ok(found) };
    let shared = Tensor::from_slice(&found).to_device(context.device);
    group.broadcast(&shared, 0)?;
    Ok(Vec::try_from(shared)?)
}

/// Gives each of the `open` rows its label, an index into `labels`; -1 leaves a row out.
fn apply(dataset: &mut Dataset, open: &[usize], found: &[i64], labels: &[String]) -> Result<(), TrainError> {
    let mut annotated = vec![false; dataset.rows.len()];
    for (&row, &label) in open.iter().zip(found) {
        annotated[row] = true;
        if let Ok(label) = usize::try_from(label) {
            dataset.rows.set_label(row, &labels[label]);
        }
    }
    let kept: Vec<bool> = (0..dataset.rows.len()).map(|row| dataset.rows.label(row).is_some()).collect();
    dataset.rows.retain(|row| kept[row]);
    dataset.annotated = annotated.into_iter().zip(&kept).filter_map(|(one, &kept)| kept.then_some(one)).collect();
    if let Some(clusters) = &mut dataset.clusters {
        let mut kept = kept.iter();
        clusters.retain(|_| kept.next().copied().unwrap_or(false));
    }
    if dataset.rows.is_empty() {
        return Err(TrainError::User("data.annotate: no row has a label".into()));
    }
    dataset.digest = sha256_hex(&serde_json::to_vec(&(&dataset.digest, labels, found)).map_err(TrainError::other)?);
    Ok(())
}

//! Rows without a label, and labels for them that all ranks share.

use std::path::Path;

use athanor_contract::artifact::sha256_hex;
use athanor_data::Dataset;
use athanor_torch::ProcessGroup;
use tch::Tensor;

use crate::{TrainError, job::context::JobContext};

/// A job that annotates its rows.
pub struct Context<'a> {
    pub job: JobContext<'a>,
    pub group: Option<&'a ProcessGroup>,
    /// The teacher's folder, where the job has one.
    pub teacher: Option<&'a Path>,
}

/// Rows without a label.
pub fn open_rows(dataset: &Dataset) -> Vec<usize> {
    (0..dataset.rows.len()).filter(|&row| dataset.rows.label(row).is_none()).collect()
}

/// Rank 0's labels.
pub fn shared(found: Vec<i64>, context: &Context) -> Result<Vec<i64>, TrainError> {
    let Some(group) = context.group else { return Ok(found) };
    let shared = Tensor::from_slice(&found).to_device(context.job.device());
    group.broadcast(&shared, 0)?;
    Ok(Vec::try_from(shared)?)
}

/// Gives each of the `open` rows its label, an index into `labels`; -1 leaves a row out.
pub fn apply(dataset: &mut Dataset, open: &[usize], found: &[i64], labels: &[String]) -> Result<(), TrainError> {
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

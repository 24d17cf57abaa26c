//! Cross-validation: before the job's own training, one training for each fold of the training rows, measured on the
//! fold.
//!
//! A fold is trained as the job is: the validation rows choose its best weights, and the fold, which had no part in any
//! choice, measures them. The result of a finished fold is kept among the run's checkpoints: a run that was killed
//! continues with the next fold. Within a fold there are no checkpoints; it starts from its first step.

use std::{collections::BTreeMap, sync::Arc};

use athanor_data::Fold;
use athanor_search::{Spread, aggregate_folds};
use athanor_store::{Location, StoreError};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    prepare::Prepared,
    training_context::{Training, TrainingContext},
};
use crate::{
    TrainError,
    curate::training_data::TrainingData,
    data::{Encoded, Parts},
    evaluate,
    report::Reporter,
    train,
};

/// The results of a cross-validation.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CrossValidation {
    pub folds: Vec<FoldResult>,
    /// Mean and standard deviation of each metric over the folds that have it.
    pub metrics: BTreeMap<String, Spread>,
}

/// The result of one fold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FoldResult {
    /// From 1.
    pub fold: usize,
    /// Rows trained on.
    pub train: usize,
    /// Rows measured.
    pub held_out: usize,
    /// Optimizer steps taken, and those of the best weights.
    pub steps: u64,
    pub best_step: u64,
    /// On the rows held out: the score that chooses the best weights, and what a result reports of the test rows.
    /// Finite.
    pub metrics: BTreeMap<String, f64>,
}

impl CrossValidation {
    /// `folds` are in order.
    pub fn new(folds: Vec<FoldResult>) -> Self {
        let metrics: Vec<_> = folds.iter().map(|fold| fold.metrics.clone()).collect();
        Self { metrics: aggregate_folds(&metrics), folds }
    }

    /// Means and deviations over all rows, as a summary names them; those of single sources are the report's.
    pub fn summary(&self) -> impl Iterator<Item = (String, f64)> {
        let whole = self.metrics.iter().filter(|(name, _)| !name.contains('/'));
        whole.flat_map(|(name, spread)| {
            let name = format!("crossValidation/{name}");
            [(format!("{name}/deviation"), spread.deviation), (name, spread.mean)]
        })
    }
}

/// Trains and measures the folds that are not done yet; rank 0 gets the results of all. `None` where none was asked
/// for.
///
/// # Errors
/// Fewer rows or groups than folds, and a fold whose score is not finite, are user errors.
pub fn cross_validate(
    context: &TrainingContext,
    parts: &Parts,
    validation: &dyn Fn() -> Result<Arc<Encoded>, TrainError>,
    reporter: &mut Option<Reporter>,
) -> Result<Option<CrossValidation>, TrainError> {
    let spec = context.spec();
    let Some(wanted) = spec.hyperparameters.cross_validation else { return Ok(None) };
    let folds = context.prepared.dataset.folds(&spec.data.split, &parts.train, wanted.folds as usize)?;
    let (done, mut results) = find_done(context, folds.len())?;
    for (index, fold) in folds.iter().enumerate().filter(|(index, _)| !done[*index]) {
        let result = train_fold(context, fold, (index + 1, folds.len()), validation, reporter)?;
        if context.job.is_rank_0() {
            keep(context, &result)?;
        }
        results.push(result);
    }
    context.job.process.timeline.mark("crossValidated");
    results.sort_by_key(|result| result.fold);
    Ok(context.job.is_rank_0().then(|| CrossValidation::new(results)))
}

/// Trains on a fold's rows and measures the others. `place` is the fold's number, from 1, and their count.
fn train_fold(
    context: &TrainingContext,
    fold: &Fold,
    place: (usize, usize),
    validation: &dyn Fn() -> Result<Arc<Encoded>, TrainError>,
    reporter: &mut Option<Reporter>,
) -> Result<FoldResult, TrainError> {
    let process = context.job.process;
    let stage = format!("Fold {} of {}", place.0, place.1);
    let mut model = context.load_model()?;
    let TrainingData { train, teacher, .. } = TrainingData::new(context, &fold.train, &model, reporter)?;
    process.timeline.mark("dataReady");
    tracing::info!(rows = train.len(), held_out = fold.held_out.len(), "{stage}");
    let (teacher, reporter) = (teacher.as_ref(), reporter.as_mut());
    let session =
        context.session(Training { stage, model: &mut model, train: &train, teacher, validation, reporter })?;
    let trained = train::train(session).map_err(|error| match error {
        TrainError::Stopped { step, .. } => TrainError::Stopped { step, checkpoint: 0 },
        error => error,
    })?;
    let held_out = context.encoder.encode(&fold.held_out)?;
    let beat = || context.job.beat();
    let found = evaluate::evaluate_as_served(&mut model, &held_out, context.group(), context.device(), beat)?;
    process.watchdog.rest();
    let (name, score) = found.score();
    if !score.is_finite() {
        return Err(TrainError::User(format!(
            "hyperparameters.crossValidation: {name} of fold {} is not finite; lower learningRate",
            place.0
        )));
    }
    tracing::info!(fold = place.0, metric = name, score, "a fold is done");
    let mut metrics = found.report(&context.prepared.dataset.sources);
    metrics.insert(name.into(), score);
    metrics.retain(|_, value| value.is_finite());
    Ok(FoldResult {
        fold: place.0,
        train: train.len(),
        held_out: held_out.len(),
        steps: trained.steps,
        best_step: trained.best.step,
        metrics,
    })
}

/// A finished fold as it is kept among the checkpoints.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    /// Digest of data and specification, as in a checkpoint.
    fingerprint: String,
    result: FoldResult,
}

fn file(checkpoints: &Location, fold: usize) -> Location {
    checkpoints.child(&format!("fold-{fold}.json"))
}

/// Which folds are done, as rank 0 finds, and on rank 0 their results.
fn find_done(context: &TrainingContext, count: usize) -> Result<(Vec<bool>, Vec<FoldResult>), TrainError> {
    let Prepared { checkpoints, fingerprint, group, .. } = context.prepared;
    let results = match context.job.topology.rank() {
        0 => context.job.process.runtime.block_on(read_kept(checkpoints, fingerprint, count))?,
        _ => Vec::new(),
    };
    let mut marks = vec![0_i64; count];
    results.iter().for_each(|result| marks[result.fold - 1] = 1);
    if let Some(group) = group {
        let shared = Tensor::from_slice(&marks).to_device(context.device());
        group.broadcast(&shared, 0)?;
        marks = Vec::<i64>::try_from(shared)?;
    }
    Ok((marks.into_iter().map(|mark| mark == 1).collect(), results))
}

/// Results of the folds that are done. What cannot be read, or is of another run, is trained again.
async fn read_kept(checkpoints: &Location, fingerprint: &str, count: usize) -> Result<Vec<FoldResult>, TrainError> {
    let mut results = Vec::new();
    for fold in 1..=count {
        let bytes = match file(checkpoints, fold).read().await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        match serde_json::from_slice::<Kept>(&bytes) {
            Ok(kept) if kept.fingerprint == fingerprint && kept.result.fold == fold => {
                tracing::info!(fold, "the fold was done before");
                results.push(kept.result);
            }
            Ok(_) => tracing::warn!(fold, "the kept result is of another run: the fold is trained again"),
            Err(error) => tracing::warn!(fold, %error, "the kept result cannot be read: the fold is trained again"),
        }
    }
    Ok(results)
}

/// Keeps a fold's result; the file appears whole. A store that cannot be reached costs this fold after a restart; one
/// that refuses access ends the run, whose artifact would not arrive either.
fn keep(context: &TrainingContext, result: &FoldResult) -> Result<(), TrainError> {
    let Prepared { checkpoints, fingerprint, .. } = context.prepared;
    let kept = Kept { fingerprint: fingerprint.clone(), result: result.clone() };
    let bytes = serde_json::to_vec_pretty(&kept).map_err(TrainError::other)?;
    match context.job.process.runtime.block_on(file(checkpoints, result.fold).write(bytes.into())) {
        Err(error) if error.is_user_error() => Err(error.into()),
        Err(error) => {
            tracing::warn!(fold = result.fold, %error, "the result of the fold could not be kept");
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(fold: usize, accuracy: f64) -> FoldResult {
        let metrics = [("accuracy".to_owned(), accuracy), ("reviews/accuracy".to_owned(), accuracy)].into();
        FoldResult { fold, train: 8, held_out: 2, steps: 3, best_step: 2, metrics }
    }

    #[test]
    fn a_summary_has_mean_and_deviation_over_all_rows() {
        let found = CrossValidation::new(vec![result(1, 0.8), result(2, 0.9)]);
        assert_eq!(found.metrics["reviews/accuracy"].count, 2);
        let summary: BTreeMap<String, f64> = found.summary().collect();
        assert_eq!(summary.len(), 2, "{summary:?}");
        assert!((summary["crossValidation/accuracy"] - 0.85).abs() < 1e-12, "{summary:?}");
        assert!((summary["crossValidation/accuracy/deviation"] - 0.005_f64.sqrt()).abs() < 1e-12, "{summary:?}");
    }

    #[test]
    fn only_whole_results_of_their_own_run_and_fold_are_done() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = athanor_store::open(&format!("file://{}", folder.path().display())).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let write = |place: usize, fold: usize, fingerprint: &str, cut: usize| {
            let kept = Kept { fingerprint: fingerprint.into(), result: result(fold, 0.5) };
            let mut bytes = serde_json::to_vec(&kept).unwrap();
            bytes.truncate(bytes.len() - cut);
            runtime.block_on(file(&checkpoints, place).write(bytes.into())).unwrap();
        };
        write(1, 1, "this", 0);
        write(2, 1, "this", 0);
        write(4, 4, "this", 1);
        write(5, 5, "other", 0);
        write(6, 6, "this", 0);
        let found = runtime.block_on(read_kept(&checkpoints, "this", 6)).unwrap();
        assert_eq!(found, [result(1, 0.5), result(6, 0.5)]);
    }
}

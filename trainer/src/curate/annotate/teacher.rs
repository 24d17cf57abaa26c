//! Labels by the job's teacher, a trained classifier: the ranks share the rows, in batches of one length.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use athanor_contract::train::TeacherAnnotator;
use athanor_data::Dataset;
use athanor_models::{Classifier, EncoderConfig};
use serde::Serialize;
use tch::{Device, Tensor};

use super::labels::{Context, apply, open_rows, shared};
use crate::{
    TrainError,
    data::{Encoded, TaskTokenizer},
    evaluate::{self, How, Predictions},
    job::{context::JobContext, setup},
    tasks::{Rows, Task, classification::Classification},
    teacher::cached::{cached_at, read_kept, write_cached},
};

/// Most rows with a label that the teacher is compared with.
const COMPARED: usize = 1000;
/// Between two log lines.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The teacher's labels for the rows without one, and its agreement with the labels of some others.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TeacherReport {
    pub model: String,
    /// Rows that had no label.
    pub rows: usize,
    pub labelled: usize,
    /// Rows that were left out: the teacher was less sure than `minimumConfidence`.
    pub dropped: usize,
    pub minimum_confidence: f64,
    /// The labels that the teacher gave, those it gave to no row included.
    pub balance: Vec<LabelRows>,
    pub comparison: Comparison,
}

#[derive(Debug, PartialEq, Serialize)]
pub struct LabelRows {
    pub label: String,
    pub rows: usize,
}

/// The teacher against labels that it did not give, on rows of the training part.
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Comparison {
    pub rows: usize,
    /// Share of the rows whose label is another; absent without rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disagreement: Option<f64>,
    /// Rows of which the teacher is sure enough, so that it would have labelled them.
    pub confident_rows: usize,
    /// The same share of these: how many of the labels that were given are likely to be wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confident_disagreement: Option<f64>,
}

/// Labels the rows, and compares the teacher with the labels that are there.
pub fn complete(
    dataset: &mut Dataset,
    spec: &TeacherAnnotator,
    context: &Context,
) -> Result<TeacherReport, TrainError> {
    let Some((teacher, folder)) = context.job.spec().teacher.as_ref().zip(context.teacher) else {
        return Err(TrainError::User("data.annotate.teacher needs a teacher".into()));
    };
    check_labels(folder, context.job.spec().model.labels.as_deref())?;
    let annotator = Annotator::load(folder, context)?;
    let minimum = spec.minimum_confidence.get();
    let open = open_rows(dataset);
    let had_label: Vec<bool> = (0..dataset.rows.len()).map(|row| dataset.rows.label(row).is_some()).collect();
    let found = shared(confident(&annotator.predict(dataset, &open)?, minimum), context)?;
    let labels = annotator.classifier.labels();
    let balance = balance(labels, &found);
    let labelled = balance.iter().map(|label| label.rows).sum();
    let had_label = of_rows_that_stay(&had_label, &open, &found);
    apply(dataset, &open, &found, labels)?;
    let sample = sample(&dataset.split(&context.job.spec().data.split)?.train, &had_label);
    let comparison = compare(dataset, labels, &sample, &annotator.predict(dataset, &sample)?, minimum);
    context.job.process.watchdog.rest();
    let report = TeacherReport {
        model: teacher.from.clone(),
        rows: open.len(),
        labelled,
        dropped: open.len() - labelled,
        minimum_confidence: minimum,
        balance,
        comparison,
    };
    tracing::info!(
        rows = report.rows,
        labelled,
        dropped = report.dropped,
        disagreement = report.comparison.disagreement,
        "annotated by the teacher"
    );
    Ok(report)
}

/// # Errors
/// A teacher with a label that the job does not have is a user error.
pub fn check_labels(teacher: &Path, wanted: Option<&[String]>) -> Result<(), TrainError> {
    let labels = EncoderConfig::load(teacher)?.labels().unwrap_or_default();
    match wanted.and_then(|wanted| labels.iter().find(|label| !wanted.contains(label)).zip(Some(wanted))) {
        Some((label, wanted)) => Err(TrainError::User(format!(
            "data.annotate.teacher: the teacher's label {label:?} is not one of model.labels ({})",
            wanted.join(", ")
        ))),
        None => Ok(()),
    }
}

/// A teacher ready to be asked.
struct Annotator<'a> {
    classifier: Classifier,
    tokenizer: TaskTokenizer,
    folder: &'a Path,
    context: &'a Context<'a>,
}

impl<'a> Annotator<'a> {
    fn load(folder: &'a Path, context: &'a Context) -> Result<Self, TrainError> {
        let classifier = Classifier::load(folder, context.job.device())?;
        Ok(Self { classifier, tokenizer: TaskTokenizer::of_encoder(folder)?, folder, context })
    }

    /// The winning label and its probability for each row; kept next to the output, and read from there where every
    /// rank finds it.
    fn predict(&self, dataset: &Dataset, rows: &[usize]) -> Result<Predictions, TrainError> {
        if rows.is_empty() {
            return Ok(Predictions::default());
        }
        let (JobContext { process, work, .. }, group) = (self.context.job, self.context.group);
        let (spec, device) = (self.context.job.spec(), self.context.job.device());
        let rows = self.encode(dataset, rows)?;
        // Precision as the specification has it, not as the hardware has it: a restart elsewhere gets the same labels.
        let identity = ("annotation", self.classifier.labels(), spec.hyperparameters.precision);
        let place = cached_at(&athanor_store::open(&spec.output.to)?, self.folder, &rows.ids, &identity)?;
        if let Some(kept) = read_kept(&place, [rows.len(), 2], &process.runtime, group, device, work)? {
            return predictions(&kept);
        }
        let found = self.compute(&rows)?;
        if self.context.job.is_rank_0() {
            process.runtime.block_on(write_cached(&place, &tensor(&found), work))?;
        }
        Ok(found)
    }

    fn encode(&self, dataset: &Dataset, rows: &[usize]) -> Result<Encoded, TrainError> {
        let (tokenizer, labels) = (&self.tokenizer, self.classifier.labels());
        let max_length = setup::max_length(self.context.job.spec(), self.classifier.model().config());
        let generation = self.context.job.spec().evaluate.generation;
        Classification.encode(&Rows { dataset, rows, labels, tokenizer, max_length, generation, share: None })
    }

    fn compute(&self, rows: &Encoded) -> Result<Predictions, TrainError> {
        let (job, group) = (self.context.job, self.context.group);
        let device = job.device();
        // On the CPU its matrices are packed, which is the faster of the two.
        let bf16 = device != Device::Cpu && setup::uses_bf16(job.spec().hyperparameters.precision, device);
        let (mut batches, mut last) = (0_u64, Instant::now());
        let beat = || {
            job.beat();
            batches += 1;
            if last.elapsed() > LOG_EVERY {
                last = Instant::now();
                tracing::info!(batches, rows = rows.len(), "the teacher labels rows");
            }
        };
        let found =
            evaluate::evaluate(self.classifier.model(), rows, How { group, device, bf16, generates: false }, beat)?;
        let classes = found.classes().ok_or_else(|| TrainError::Other("a classifier gave no classes".into()))?;
        Ok(classes.predictions.clone())
    }
}

/// [rows, 2]: label and confidence. At most 1,024 labels: exact in FP32.
fn tensor(found: &Predictions) -> Tensor {
    let labels: Vec<f32> = found.labels.iter().map(|&label| label as f32).collect();
    Tensor::stack(&[Tensor::from_slice(&labels), Tensor::from_slice(&found.confidences)], 1)
}

fn predictions(kept: &Tensor) -> Result<Predictions, TrainError> {
    let column = |index: i64| Vec::<f32>::try_from(kept.select(1, index).contiguous());
    let labels = column(0)?.into_iter().map(|label| label as usize).collect();
    Ok(Predictions { labels, confidences: column(1)? })
}

/// The label of each row that the teacher is sure enough of, else -1.
fn confident(found: &Predictions, minimum: f64) -> Vec<i64> {
    let sure = |(&label, &confidence): (&usize, &f32)| if is_sure(confidence, minimum) { label as i64 } else { -1 };
    found.labels.iter().zip(&found.confidences).map(sure).collect()
}

fn is_sure(confidence: f32, minimum: f64) -> bool {
    f64::from(confidence) >= minimum
}

fn balance(labels: &[String], found: &[i64]) -> Vec<LabelRows> {
    let rows = |index: usize| found.iter().filter(|&&label| label == index as i64).count();
    labels.iter().enumerate().map(|(index, label)| LabelRows { label: label.clone(), rows: rows(index) }).collect()
}

/// Whether each of the rows that stay had a label before, in their order.
fn of_rows_that_stay(had_label: &[bool], open: &[usize], found: &[i64]) -> Vec<bool> {
    let mut stays = vec![true; had_label.len()];
    open.iter().zip(found).for_each(|(&row, &label)| stays[row] = label >= 0);
    had_label.iter().zip(stays).filter(|(_, stays)| *stays).map(|(&had, _)| had).collect()
}

/// At most [`COMPARED`] of the rows that had a label, evenly spread.
fn sample(train: &[usize], had_label: &[bool]) -> Vec<usize> {
    let labelled: Vec<usize> = train.iter().copied().filter(|&row| had_label[row]).collect();
    labelled.iter().copied().step_by(labelled.len().div_ceil(COMPARED).max(1)).collect()
}

fn compare(dataset: &Dataset, labels: &[String], rows: &[usize], found: &Predictions, minimum: f64) -> Comparison {
    let differs = |place: usize| dataset.rows.label(rows[place]) != Some(labels[found.labels[place]].as_str());
    let share = |places: &[usize]| {
        let different = places.iter().filter(|&&place| differs(place)).count();
        (!places.is_empty()).then(|| different as f64 / places.len() as f64)
    };
    let all: Vec<usize> = (0..rows.len()).collect();
    let sure: Vec<usize> = all.iter().copied().filter(|&place| is_sure(found.confidences[place], minimum)).collect();
    Comparison {
        rows: all.len(),
        disagreement: share(&all),
        confident_rows: sure.len(),
        confident_disagreement: share(&sure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsure_rows_are_left_out_and_counted() {
        let found = Predictions { labels: vec![1, 0, 1, 1], confidences: vec![0.95, 0.6, 0.9, 0.89] };
        let labels = ["neg".to_owned(), "pos".to_owned()];
        let sure = confident(&found, 0.5);
        assert_eq!(sure, [1, 0, 1, 1]);
        let sure = confident(&found, f64::from(0.9_f32));
        assert_eq!(sure, [1, -1, 1, -1]);
        let counts: Vec<usize> = balance(&labels, &sure).into_iter().map(|label| label.rows).collect();
        assert_eq!(counts, [0, 2], "a label without rows is there too");
        // Rows 1, 2, 4 and 5 had none; rows 2 and 5 go.
        let had_label = [true, false, false, true, false, false];
        assert_eq!(of_rows_that_stay(&had_label, &[1, 2, 4, 5], &sure), [true, false, true, false]);
        let again = predictions(&tensor(&found)).unwrap();
        assert_eq!(again, found, "kept answers come back");
    }

    #[test]
    fn a_sample_is_spread_over_the_labelled_rows_of_the_training_part() {
        let had_label: Vec<bool> = (0..10_000).map(|row| row % 2 == 0).collect();
        let train: Vec<usize> = (1000..10_000).collect();
        let rows = sample(&train, &had_label);
        assert_eq!(rows.len(), 900);
        assert!(rows.iter().all(|row| row % 2 == 0 && *row >= 1000) && rows[899] > 9900, "{rows:?}");
        assert_eq!(sample(&train[..20], &had_label).len(), 10);
        assert!(sample(&[1, 3], &had_label).is_empty());
    }
}

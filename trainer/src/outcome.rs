//! What is left of a run: metrics, gates, the artifact, its smaller forms and its report.

use std::{collections::BTreeMap, path::Path};

use athanor_contract::{
    Decimal,
    artifact::{EVENTS, Kind, Manifest},
    train::{TrainConfig, TrainResult, TrainSummary},
};
use athanor_models::Model;

use crate::{
    TrainError,
    annotate::Annotation,
    artifact,
    augment::AugmentReport,
    compress::Compression,
    cross_validation::CrossValidation,
    data::{Dataset, Encoded, Parts},
    evaluate::{self, Evaluation, Others},
    report::page,
    run::Surroundings,
    select::SelectionReport,
    training::Trained,
};

/// A finished training on rank 0.
pub struct Finished<'a> {
    pub config: &'a TrainConfig,
    pub around: &'a Surroundings,
    pub work: &'a Path,
    pub model: &'a Model,
    /// The folder whose tokenizer goes along.
    pub parent: &'a Path,
    pub labels: &'a [String],
    pub dataset: &'a Dataset,
    pub annotation: Option<&'a Annotation>,
    pub parts: &'a Parts,
    pub train: &'a Encoded,
    pub test: &'a Encoded,
    pub found: Evaluation,
    pub baseline: Option<(Encoded, Evaluation)>,
    /// What the teacher says of the test rows.
    pub teacher: Option<Evaluation>,
    pub trained: Trained,
    pub cross_validation: Option<CrossValidation>,
    pub selection: Option<SelectionReport>,
    pub augmented: Option<AugmentReport>,
    pub chosen: BTreeMap<String, String>,
    /// Everything of a manifest but its files.
    pub manifest: Manifest,
}

impl Finished<'_> {
    /// Compresses, writes report and artifact, and tells the result.
    pub fn write(self) -> Result<TrainResult, TrainError> {
        let Self { config, around, work, model, dataset, parts, test, .. } = self;
        let spec = &config.spec;
        let others = Others {
            baseline: self.baseline.as_ref().map(|(rows, found)| (rows, found)),
            teacher: self.teacher.as_ref(),
        };
        let compressed = Compression {
            steps: &spec.compress,
            gates: &spec.evaluate.gates,
            sources: &dataset.sources,
            train: self.train,
            test,
            others,
            work,
            beat: &|| around.watchdog.beat(),
        }
        .apply(model, self.found)?;
        if !spec.compress.is_empty() {
            around.timeline.mark("compressed");
        }
        around.watchdog.rest();
        let found = compressed.evaluation;
        let mut metrics = evaluate::report(test, &found, &dataset.sources);
        if let Some((rows, baseline)) = &self.baseline {
            let values = evaluate::report(rows, baseline, &dataset.sources);
            metrics.extend(values.into_iter().map(|(name, value)| (format!("baseline/{name}"), value)));
        }
        if let Some(teacher) = &self.teacher {
            let values = evaluate::report(test, teacher, &dataset.sources);
            warn_of_loss(&metrics, &values);
            metrics.extend(values.into_iter().map(|(name, value)| (format!("teacher/{name}"), value)));
        }
        // For whoever compares trials: they must not be chosen by test rows.
        let validated = &self.trained.best.metrics;
        metrics.extend(validated.iter().map(|(name, value)| (format!("validation/{name}"), *value)));
        metrics.extend(self.cross_validation.iter().flat_map(CrossValidation::summary));
        let metrics: BTreeMap<String, Decimal> =
            metrics.into_iter().filter_map(|(name, value)| Some((name, Decimal::new(value)?))).collect();
        let failed_gates = evaluate::failed_gates(&spec.evaluate.gates, &dataset.sources, (test, &found), others);
        let Trained { steps, best, history, checkpoints } = self.trained;
        let folder = work.join("artifact");
        let reference = evaluate::reference(self.labels, test, found.classes());
        artifact::write(&folder, model, compressed.quantized, self.parent, &reference)?;
        let location = athanor_store::open(&config.artifact_to)?;
        let mut summary = TrainSummary {
            artifact: location.uri.clone(),
            model_digest: around.runtime.block_on(athanor_store::artifact::folder_digest(&folder))?,
            data_digest: dataset.digest.clone(),
            steps,
            rows: parts.counts(),
            metrics: metrics.clone(),
            chosen: self.chosen,
            timeline: around.timeline.decimals(),
            failed_gates,
        };
        let objective = spec.objective_terms();
        let report = page::Report {
            job: &config.name,
            created: jiff::Timestamp::now().round(jiff::Unit::Second).map_err(TrainError::other)?.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            parent: &spec.model.from,
            teacher: spec.teacher.as_ref().map(|teacher| teacher.from.as_str()),
            objective: objective.iter().map(page::Term::new).collect(),
            labels: self.labels,
            summary: &summary,
            hyperparameters: &spec.hyperparameters,
            history: &history,
            sources: page::sources(dataset, parts),
            cleaning: dataset.cleaning.as_ref(),
            annotation: self.annotation,
            selection: self.selection.as_ref(),
            augmented: self.augmented.as_ref(),
            trials: &config.trials,
            cross_validation: self.cross_validation.as_ref(),
            forms: &compressed.forms,
            classes: found.classes().map(|predictions| page::Classes {
                confusion: page::confusion(self.labels, test, predictions),
                calibration: page::calibration(self.labels.len(), test, predictions),
                mistakes: page::mistakes(self.labels, dataset, &parts.test, test, predictions),
            }),
        };
        page::write(&folder, &report)?;
        let events = folder.join(EVENTS);
        history.write_events(&events).map_err(TrainError::at(&events))?;
        // A checkpoint that finds no room gives back what it took: the artifact may need it.
        if let Some(mut checkpoints) = checkpoints {
            checkpoints.finish()?;
        }
        let manifest = Manifest { kind: Kind::Model, step: best.step, metrics, ..self.manifest };
        let manifest = around.runtime.block_on(athanor_store::artifact::upload(&folder, &location, manifest))?;
        around.timeline.mark("written");
        summary.model_digest = manifest.model_digest;
        summary.timeline = around.timeline.decimals();
        Ok(if summary.failed_gates.is_empty() {
            TrainResult::Succeeded(summary)
        } else {
            TrainResult::GateFailed(summary)
        })
    }
}

/// A student whose teacher answers so much better has lost what it was to learn.
pub const SHARE_OF_TEACHER: f64 = 0.95;

fn warn_of_loss(student: &BTreeMap<String, f64>, teacher: &BTreeMap<String, f64>) {
    if let (Some(student), Some(teacher)) = (student.get("accuracy"), teacher.get("accuracy"))
        && *student < teacher * SHARE_OF_TEACHER
    {
        tracing::warn!(student, teacher, "the student answers much worse than its teacher: accuracy on the test rows");
    }
}

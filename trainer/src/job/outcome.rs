//! The results of a run: metrics, gates, the artifact, its smaller forms and its report.

use std::{collections::BTreeMap, path::Path};

use athanor_contract::{
    Decimal,
    artifact::{EVENTS, Kind, Manifest},
    train::{TrainResult, TrainSummary},
};

use super::{artifact::Artifact, cross_validation::CrossValidation, training_context::TrainingContext};
use crate::{
    TrainError,
    compress::{Compressed, Compression},
    curate::{augment::AugmentReport, select::SelectionReport},
    data::{Encoded, Parts},
    evaluate::{self, Evaluation, HeldOut, Others, SHARE_OF_TEACHER},
    network::Network,
    report::{History, page},
    train::Trained,
};

/// The models that the result is compared with, on the same rows.
#[derive(Default)]
pub struct Compared {
    /// Measured with the labels of the baseline.
    pub baseline: Option<Evaluation>,
    pub teacher: Option<Evaluation>,
}

impl Compared {
    fn others(&self) -> Others<'_> {
        Others { baseline: self.baseline.as_ref(), teacher: self.teacher.as_ref() }
    }
}

/// A finished training on rank 0.
pub struct Finished<'a> {
    pub context: &'a TrainingContext<'a>,
    pub model: &'a Network,
    pub parts: &'a Parts,
    pub train: &'a Encoded,
    pub validation: &'a Encoded,
    pub test: &'a Encoded,
    /// On the test rows.
    pub compared: Compared,
    /// On the validation rows, as far as gates choose a compressed form by them.
    pub compared_for_choice: Compared,
    pub trained: Trained,
    pub cross_validation: Option<CrossValidation>,
    pub selection: Option<SelectionReport>,
    pub augmented: Option<AugmentReport>,
    pub chosen: BTreeMap<String, String>,
    /// Everything of a manifest but its files.
    pub manifest: Manifest,
}

impl Finished<'_> {
    /// Compresses the model and writes report and artifact.
    ///
    /// # Errors
    /// A store that cannot be written to.
    pub fn write(mut self, found: Evaluation) -> Result<TrainResult, TrainError> {
        let job = self.context.job;
        let (spec, process) = (job.spec(), job.process);
        let compressed = self.compress(found)?;
        let metrics = self.metrics(&compressed.evaluation);
        let others = self.compared.others();
        let sources = &self.context.prepared.dataset.sources;
        let found = &compressed.evaluation;
        let failed_gates = evaluate::failed_gates(&spec.evaluate.gates, sources, HeldOut::Test, found, others);
        let folder = job.work.join("artifact");
        let (labels, quantized) = (&self.context.encoder.labels, compressed.quantized);
        let reference = evaluate::reference(labels, self.test.len(), &compressed.evaluation);
        let (tokenizer, parent) = (&self.context.encoder.tokenizer, &self.context.prepared.parent);
        Artifact { network: self.model, quantized, tokenizer, parent, reference: &reference }.write(&folder)?;
        let location = athanor_store::open(&job.config.artifact_to)?;
        let mut summary = TrainSummary {
            artifact: location.uri.clone(),
            model_digest: process.runtime.block_on(athanor_store::artifact::folder_digest(&folder))?,
            data_digest: self.context.prepared.dataset.digest.clone(),
            steps: self.trained.steps,
            rows: self.parts.counts(),
            metrics: metrics.clone(),
            chosen: std::mem::take(&mut self.chosen),
            timeline: process.timeline.decimals(),
            failed_gates,
        };
        self.write_report(&folder, &summary, &compressed)?;
        // A checkpoint that finds no room gives back what it took: the artifact may need it.
        if let Some(mut checkpoints) = self.trained.checkpoints {
            checkpoints.finish()?;
        }
        let manifest = Manifest { kind: Kind::Model, step: self.trained.best.step, metrics, ..self.manifest };
        let manifest = process.runtime.block_on(athanor_store::artifact::upload(&folder, &location, manifest))?;
        process.timeline.mark("written");
        summary.model_digest = manifest.model_digest;
        summary.timeline = process.timeline.decimals();
        Ok(if summary.failed_gates.is_empty() {
            TrainResult::Succeeded(summary)
        } else {
            TrainResult::GateFailed(summary)
        })
    }

    fn compress(&self, found: Evaluation) -> Result<Compressed, TrainError> {
        let job = self.context.job;
        let (spec, process) = (job.spec(), job.process);
        let compression = Compression {
            steps: &spec.compress,
            gates: &spec.evaluate.gates,
            sources: &self.context.prepared.dataset.sources,
            train: self.train,
            validation: self.validation,
            test: self.test,
            others: self.compared_for_choice.others(),
            work: job.work,
            beat: &|| job.beat(),
        };
        let compressed = compression.apply(self.model, found)?;
        if !spec.compress.is_empty() {
            process.timeline.mark("compressed");
        }
        process.watchdog.rest();
        Ok(compressed)
    }

    /// The metrics of a summary: the result's, and with a name in front those of the baseline, the teacher and the
    /// validations.
    fn metrics(&self, found: &Evaluation) -> BTreeMap<String, Decimal> {
        let sources = &self.context.prepared.dataset.sources;
        let mut metrics = found.report(sources);
        if let Some(baseline) = &self.compared.baseline {
            metrics.extend(named("baseline", baseline.report(sources)));
        }
        if let Some(teacher) = &self.compared.teacher {
            let values = teacher.report(sources);
            warn_of_loss(&metrics, &values);
            metrics.extend(named("teacher", values));
        }
        // A search compares trials by these: test rows must not choose among them.
        metrics.extend(named("validation", self.trained.best.metrics.clone()));
        metrics.extend(self.cross_validation.iter().flat_map(CrossValidation::summary));
        metrics.into_iter().filter_map(|(name, value)| Some((name, Decimal::new(value)?))).collect()
    }

    fn write_report(&self, folder: &Path, summary: &TrainSummary, compressed: &Compressed) -> Result<(), TrainError> {
        let TrainingContext { job, prepared, encoder, .. } = self.context;
        let (spec, labels, dataset) = (job.spec(), &encoder.labels, &prepared.dataset);
        let history: &History = &self.trained.history;
        let terms = spec.objective_terms();
        let classes = compressed.evaluation.classes();
        let report = page::Report {
            job: &job.config.name,
            created: jiff::Timestamp::now().round(jiff::Unit::Second).map_err(TrainError::other)?.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            parent: &spec.model.from,
            teacher: spec.teacher.as_ref().map(|teacher| teacher.from.as_str()),
            objective: terms.iter().map(page::Term::new).collect(),
            labels,
            summary,
            hyperparameters: &spec.hyperparameters,
            history,
            sources: page::sources(dataset, self.parts),
            skipped: (dataset.skipped.rows > 0).then_some(&dataset.skipped),
            topics: &dataset.topics,
            held_out_overlap: self.parts.overlap.as_ref(),
            cleaning: dataset.cleaning.as_ref(),
            annotation: prepared.annotation.as_ref(),
            selection: self.selection.as_ref(),
            augmented: self.augmented.as_ref(),
            trials: &job.config.trials,
            cross_validation: self.cross_validation.as_ref(),
            forms: &compressed.forms,
            answers: page::answers(&compressed.evaluation, self.compared.baseline.as_ref()),
            classes: classes.map(|classes| page::ClassReport::new(labels, dataset, &self.parts.test, classes)),
        };
        page::write(folder, &report)?;
        let events = folder.join(EVENTS);
        history.write_events(&events).map_err(TrainError::at(&events))
    }
}

fn named(whose: &str, values: BTreeMap<String, f64>) -> impl Iterator<Item = (String, f64)> {
    values.into_iter().map(move |(name, value)| (format!("{whose}/{name}"), value))
}

fn warn_of_loss(student: &BTreeMap<String, f64>, teacher: &BTreeMap<String, f64>) {
    if let (Some(student), Some(teacher)) = (student.get("accuracy"), teacher.get("accuracy"))
        && *student < teacher * SHARE_OF_TEACHER
    {
        tracing::warn!(student, teacher, "the accuracy on the test rows is much lower than the teacher's");
    }
}

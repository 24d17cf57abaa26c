//! What the trainings of a run have in common, and what one of them learns from: rows as tokens, those that were selected, and the
//! teacher's answers.

use std::{
    borrow::{Borrow, Cow},
    path::Path,
    time::{Duration, Instant},
};

use athanor_contract::{
    artifact::sha256_hex,
    train::{AugmentSpec, SelectSpec, SelectViewer, Task, TeacherOutputs, TrainConfig},
};
use athanor_models::{Model, Tokenizer, tokenizer::TokenRows};
use athanor_torch::ProcessGroup;
use tch::{Device, Kind, Tensor};

use crate::{
    TrainError,
    augment::{self, AugmentReport, Neighbours},
    data::{Dataset, Encoded},
    distributed::Topology,
    evaluate::{self, Evaluation, Predictions},
    objectives::{
        Objective, Teacher,
        teacher::{MOST_CACHED, Online, cached_at, read_kept, write_cached},
    },
    prepare::Prepared,
    report::Reporter,
    run::Surroundings,
    select::{self, Selection, SelectionReport},
    setup,
};

/// What all trainings of a run have in common.
pub struct Common<'a> {
    pub config: &'a TrainConfig,
    pub topology: &'a Topology,
    pub around: &'a Surroundings,
    /// This process's own folder.
    pub work: &'a Path,
    pub prepared: &'a Prepared,
    pub encoder: RowEncoder<'a>,
    pub bf16: bool,
}

/// Turns rows of the dataset into tokens; other than the rest, threads can share it.
pub struct RowEncoder<'a> {
    pub dataset: &'a Dataset,
    pub task: Task,
    pub labels: Vec<String>,
    pub tokenizer: Tokenizer,
    /// Tokens that texts are cut to.
    pub max_length: usize,
}

impl RowEncoder<'_> {
    /// The given rows, in their order.
    ///
    /// # Errors
    /// As [`Encoded::new`].
    pub fn encode(&self, rows: &[usize]) -> Result<Encoded, TrainError> {
        Encoded::new(self.dataset, rows, self.task, &self.labels, &self.tokenizer, self.max_length)
    }
}

impl Common<'_> {
    pub fn device(&self) -> Device {
        self.topology.device()
    }

    pub fn group(&self) -> Option<&ProcessGroup> {
        self.prepared.group.as_ref()
    }

    /// The model as every training begins with it.
    pub fn load_model(&self) -> Result<Model, TrainError> {
        setup::load_model(&self.config.spec, &self.prepared.parent, &self.encoder.labels, self.device())
    }

    /// What is minimised, with parameters of its own.
    pub fn objective(&self, model: &Model, teacher: Option<&Teacher>) -> Result<Objective, TrainError> {
        let spec = &self.config.spec;
        let terms = spec.objective_terms();
        Objective::new(terms, spec.model.task, model, teacher, spec.hyperparameters.seed as u64, self.device())
    }
}

/// What one training learns from.
pub struct Material {
    /// Selected rows, if a selection was asked for; behind them the new texts, if any.
    pub train: Encoded,
    pub teacher: Option<Teacher>,
    pub selection: Option<SelectionReport>,
    pub augmented: Option<AugmentReport>,
}

impl Material {
    /// From rows of the dataset, as numbers. `model` looks at them for a selection where there is no teacher.
    pub fn new(
        common: &Common,
        rows: &[usize],
        model: &Model,
        reporter: &mut Option<Reporter>,
    ) -> Result<Self, TrainError> {
        let spec = &common.config.spec;
        let mut train = common.encoder.encode(rows)?;
        let mut teacher = match &common.prepared.teacher {
            Some(folder) if spec.learns_from_teacher() => {
                let texts = rows.iter().map(|&row| common.prepared.dataset.rows.text(row));
                let (parent, device) = (&common.prepared.parent, common.device());
                let RowEncoder { labels, max_length, .. } = &common.encoder;
                Some(setup::load_teacher(spec, folder, parent, labels, *max_length, texts, device)?)
            }
            _ => None,
        };
        let mut kept = Cow::Borrowed(rows);
        let selection = match &spec.data.select {
            Some(select) => {
                if let Some(reporter) = reporter.as_mut() {
                    reporter.stage("Selecting");
                }
                let viewer = teacher.as_ref().filter(|_| select.viewer == SelectViewer::Teacher);
                let selection = common.select(select, viewer, model, rows, &train, teacher.as_ref())?;
                train.select(&selection.rows);
                kept = selection.rows.iter().map(|&place| rows[place]).collect();
                if let Some(teacher) = &mut teacher {
                    teacher.keep_rows(&selection.rows);
                }
                Some(selection.report)
            }
            None => None,
        };
        let new = match (&spec.data.augment, &mut teacher) {
            (Some(augment), Some(teacher)) => Some(common.augment(augment, &kept, teacher, &mut train, reporter)?),
            _ => None,
        };
        let (augmented, digest_of_new) = new.unzip();
        if let Some(teacher) = &teacher {
            teacher.check_tokens(&train.ids, |place| match kept.get(place) {
                Some(&row) => common.prepared.dataset.rows.place(row),
                None => format!("the new text {} of data.augment", place - kept.len() + 1),
            })?;
        }
        let teacher = match teacher.filter(|_| spec.objective_asks_teacher()) {
            Some(teacher) => Some(common.teacher_outputs(teacher, &kept, digest_of_new, &train, reporter)?),
            None => None,
        };
        Ok(Self { train, teacher, selection, augmented })
    }
}

impl Common<'_> {
    /// Chooses training rows on rank 0, for all ranks. `viewer` is the teacher if the rows are told by its view, else they are by the
    /// model's; `rows` are their places in the dataset.
    fn select(
        &self,
        spec: &SelectSpec,
        viewer: Option<&Online>,
        model: &Model,
        rows: &[usize],
        train: &Encoded,
        teacher: Option<&Online>,
    ) -> Result<Selection, TrainError> {
        let (device, group) = (self.device(), self.group());
        let beat = || self.around.watchdog.beat();
        let (looks, texts) = match viewer {
            Some(teacher) => (teacher.model(), teacher.own_rows().unwrap_or(&train.ids)),
            None => (model, &train.ids),
        };
        let vectors = evaluate::embed(looks, texts, group, device, self.bf16, beat)?.to_device(Device::Cpu);
        self.around.watchdog.rest();
        let labels: Vec<Option<usize>> = train.labels.iter().map(|label| label.map(usize::from)).collect();
        let agreement = match teacher.filter(|_| spec.minimum_agreement.is_some()) {
            Some(teacher) => Some(self.agreement(teacher, rows, train, &labels)?),
            None => None,
        };
        let mut selection = select::select(spec, &vectors, &labels, &self.encoder.labels, agreement.as_deref())?;
        if let Some(group) = group {
            // Sums may differ in their last bit from machine to machine.
            let mut marks = vec![0_i64; train.len()];
            selection.rows.iter().for_each(|&row| marks[row] = 1);
            let marks = Tensor::from_slice(&marks).to_device(device);
            group.broadcast(&marks, 0)?;
            let marks = Vec::<i64>::try_from(marks)?;
            selection.rows = (0..marks.len()).filter(|&row| marks[row] == 1).collect();
        }
        tracing::info!(rows = selection.rows.len(), of = train.len(), report = ?selection.report, "selected");
        Ok(selection)
    }

    /// The probability that the teacher gives each row's label; 0 for a row without one.
    fn agreement(
        &self,
        teacher: &Online,
        rows: &[usize],
        train: &Encoded,
        labels: &[Option<usize>],
    ) -> Result<Vec<f32>, TrainError> {
        let length = self.config.spec.hyperparameters.max_sequence_length;
        let identity = (&self.prepared.dataset.digest, rows, &None::<String>, &self.encoder.labels, length, self.bf16);
        let shape = [train.len(), teacher.outputs()];
        let logits = self.kept_or_asked(&identity, shape, || Ok(teacher), &train.ids, &mut None)?;
        let rows = Vec::<Vec<f32>>::try_from(logits.softmax(-1, Kind::Float).to_device(Device::Cpu))?;
        Ok(rows.iter().zip(labels).map(|(row, label)| label.map_or(0.0, |label| row[label])).collect())
    }

    /// Puts new texts behind the training rows, which are `rows` of the dataset; what was made, with the digest of the texts.
    fn augment(
        &self,
        spec: &AugmentSpec,
        rows: &[usize],
        teacher: &mut Online,
        train: &mut Encoded,
        reporter: &mut Option<Reporter>,
    ) -> Result<(AugmentReport, String), TrainError> {
        if let Some(reporter) = reporter.as_mut() {
            reporter.stage("Augmenting");
        }
        let texts: Vec<&str> = rows.iter().map(|&row| self.prepared.dataset.rows.text(row)).collect();
        let embeddings = teacher.model().word_embeddings();
        let near = Neighbours::find(texts.iter().copied(), teacher.words(), &embeddings, self.group())?;
        let new: Vec<String> = augment::texts(spec, &texts, &near).collect();
        let RowEncoder { tokenizer, max_length, .. } = &self.encoder;
        let ids = tokenizer.encode_rows(new.iter().map(String::as_str), *max_length)?;
        let copies = usize::from(spec.copies);
        let sources: Vec<u32> = train.sources.iter().flat_map(|&source| std::iter::repeat_n(source, copies)).collect();
        train.extend(&ids, sources);
        teacher.add_rows(new.iter().map(String::as_str))?;
        let report = AugmentReport::new(rows.len(), &near, &new);
        tracing::info!(rows = report.rows, words = report.words, "made new texts for the teacher");
        Ok((report, sha256_hex(new.join("\n").as_bytes())))
    }

    /// The teacher's answers, computed once and kept beside the output where they are small and the objective needs no more.
    /// `rows` of the dataset are the training rows, `digest_of_new` that of the texts behind them.
    fn teacher_outputs(
        &self,
        teacher: Online,
        rows: &[usize],
        digest_of_new: Option<String>,
        train: &Encoded,
        reporter: &mut Option<Reporter>,
    ) -> Result<Teacher, TrainError> {
        let (spec, device) = (&self.config.spec, self.device());
        let asked = spec.teacher.as_ref().and_then(|teacher| teacher.outputs);
        let by_token = spec.objective.compares_hidden_states();
        let online = by_token
            || spec.model.task != Task::TextClassification
            || asked == Some(TeacherOutputs::Online)
            || (asked.is_none() && train.len() * teacher.outputs() > MOST_CACHED);
        if online {
            return Ok(Teacher::Online(Box::new(teacher)));
        }
        if let Some(reporter) = reporter.as_mut() {
            reporter.stage("Asking the teacher");
        }
        let (digest, length) = (&self.prepared.dataset.digest, spec.hyperparameters.max_sequence_length);
        let identity = (digest, rows, digest_of_new, &self.encoder.labels, length, self.bf16);
        let shape = [train.len(), teacher.outputs()];
        let logits = self.kept_or_asked(&identity, shape, || Ok(teacher), &train.ids, reporter)?;
        self.around.timeline.mark("taught");
        Ok(Teacher::Cached(logits.to_device(device)))
    }

    /// What the teacher says of the test rows, for the report and the gates; `None` without a teacher that is learned from, and for
    /// other tasks than classification.
    ///
    /// # Errors
    /// As [`Online::load`].
    pub fn teacher_on(&self, rows: &[usize], test: &Encoded) -> Result<Option<Evaluation>, TrainError> {
        let spec = &self.config.spec;
        let RowEncoder { labels, max_length, dataset, .. } = &self.encoder;
        let Some(folder) = self
            .prepared
            .teacher
            .as_ref()
            .filter(|_| spec.learns_from_teacher() && spec.model.task == Task::TextClassification)
        else {
            return Ok(None);
        };
        let identity = ("test", &dataset.digest, rows, labels, spec.hyperparameters.max_sequence_length, self.bf16);
        let load = || {
            let texts = rows.iter().map(|&row| dataset.rows.text(row));
            setup::load_teacher(spec, folder, &self.prepared.parent, labels, *max_length, texts, self.device())
        };
        let logits = self.kept_or_asked(&identity, [rows.len(), labels.len()], load, &test.ids, &mut None)?;
        let (confidences, labels) = logits.softmax(-1, Kind::Float).max_dim(-1, false);
        let labels = Vec::<i64>::try_from(labels)?.into_iter().map(|label| label as usize).collect();
        Ok(Some(Evaluation::Classes(Predictions { labels, confidences: Vec::try_from(confidences)? })))
    }

    /// The teacher's logits [rows, L], kept beside the output under `identity` and all that the teacher is.
    fn kept_or_asked<T: Borrow<Online>>(
        &self,
        identity: &impl serde::Serialize,
        shape: [usize; 2],
        teacher: impl FnOnce() -> Result<T, TrainError>,
        student_ids: &TokenRows,
        reporter: &mut Option<Reporter>,
    ) -> Result<Tensor, TrainError> {
        let (runtime, device) = (&self.around.runtime, self.device());
        let (Some(folder), group) = (&self.prepared.teacher, self.group()) else {
            return Err(TrainError::Other("the teacher's folder is not there".into()));
        };
        let output = athanor_store::open(&self.config.spec.output.to)?;
        let place = cached_at(&output, folder, identity)?;
        if let Some(kept) = read_kept(&place, shape, runtime, group, device, self.work)? {
            return Ok(kept);
        }
        let mut last = Instant::now();
        let logits = teacher()?.borrow().all_logits(student_ids, group, device, self.bf16, |done| {
            self.around.watchdog.beat();
            if let Some(reporter) = reporter.as_mut() {
                reporter.asked(done, student_ids.len());
            }
            if last.elapsed() > Duration::from_secs(10) {
                last = Instant::now();
                tracing::info!(rows = done, of = student_ids.len(), "asking the teacher");
            }
        })?;
        self.around.watchdog.rest();
        if self.topology.rank() == 0
            && let Err(error) = runtime.block_on(write_cached(&place, &logits, self.work))
        {
            tracing::warn!(%error, "the teacher's answers are not kept: another run has to ask again");
        }
        Ok(logits)
    }
}

//! The data of one training: rows as tokens, those that were selected, new texts, and the teacher's answers.

use std::{
    borrow::Cow,
    path::Path,
    time::{Duration, Instant},
};

use athanor_contract::train::{AugmentSpec, SelectSpec, SelectViewer, TeacherOutputs};
use athanor_models::tokenizer::TokenRows;
use tch::{Device, Kind, Tensor};

use crate::{
    TrainError,
    curate::{
        augment::{self, AugmentReport, Neighbours},
        select::{self, Selection, SelectionReport},
    },
    data::Encoded,
    evaluate::{self, Classes, Evaluation, Predictions},
    job::{
        context::JobContext,
        memory, setup,
        training_context::{RowEncoder, TrainingContext},
    },
    network::Network,
    objectives::Teacher,
    report::Reporter,
    teacher::{
        Online,
        cached::{MOST_CACHED, cached_at, read_kept, write_cached},
    },
};

/// Between two log lines.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// New texts that are in memory at once.
const TEXTS_AT_A_TIME: usize = 8192;

/// The rows of one training, and its teacher.
pub struct TrainingData {
    /// Selected rows, if a selection was asked for; behind them the new texts, if any.
    pub train: Encoded,
    pub teacher: Option<Teacher>,
    /// On the first process of a machine, if a selection was asked for.
    pub selection: Option<SelectionReport>,
    pub augmented: Option<AugmentReport>,
}

impl TrainingData {
    /// Encodes `rows` of the dataset, selects among them and augments them as the specification says. `model` gives the
    /// vectors of a selection that does not use the teacher's.
    ///
    /// # Errors
    /// Data, teacher and selection that do not fit together are user errors.
    pub fn new(
        context: &TrainingContext,
        rows: &[usize],
        model: &Network,
        reporter: &mut Option<Reporter>,
    ) -> Result<Self, TrainError> {
        let spec = context.spec();
        let mut train = context.encoder.encode_once(rows, context.job)?;
        if spec.hyperparameters.packing {
            train.pack(context.encoder.max_length);
        }
        let mut teacher = match &context.prepared.teacher {
            Some(folder) if spec.learns_from_teacher() => Some(context.load_teacher(folder, rows)?),
            _ => None,
        };
        let mut kept = Cow::Borrowed(rows);
        let selection = match &spec.data.select {
            Some(select) => {
                if let Some(reporter) = reporter.as_mut() {
                    reporter.stage("Selecting");
                }
                let viewer = teacher.as_ref().filter(|_| select.viewer == SelectViewer::Teacher);
                let (chosen, report) = context.select(select, viewer, model, &train, teacher.as_ref())?;
                train.select(&chosen);
                kept = chosen.iter().map(|&place| rows[place]).collect();
                if let Some(teacher) = &mut teacher {
                    teacher.keep_rows(&chosen);
                }
                report
            }
            None => None,
        };
        let augmented = match (&spec.data.augment, &mut teacher) {
            (Some(augment), Some(teacher)) => Some(context.augment(augment, &kept, teacher, &mut train, reporter)?),
            _ => None,
        };
        if let Some(teacher) = &teacher {
            teacher.check_tokens(&train.ids, |place| match kept.get(place) {
                Some(&row) => context.prepared.dataset.rows.place(row),
                None => format!("the new text {} of data.augment", place - kept.len() + 1),
            })?;
        }
        let teacher = match teacher.filter(|_| spec.objective_asks_teacher()) {
            Some(teacher) => Some(context.teacher_outputs(teacher, &train, reporter)?),
            None => None,
        };
        Ok(Self { train, teacher, selection, augmented })
    }
}

impl TrainingContext<'_> {
    /// Chooses training rows on rank 0, for all ranks, by the vectors of `viewer` or, without one, of `model`. The first
    /// process of each machine computes and has the report.
    fn select(
        &self,
        spec: &SelectSpec,
        viewer: Option<&Online>,
        model: &Network,
        train: &Encoded,
        teacher: Option<&Online>,
    ) -> Result<(Vec<usize>, Option<SelectionReport>), TrainError> {
        let (device, group) = (self.device(), self.group());
        let beat = || self.job.beat();
        let (encoder, texts) = match viewer {
            Some(teacher) => (teacher.model(), teacher.asked(&train.ids)),
            None => (model.encoder()?, &train.ids),
        };
        let processes = self.job.topology.processes_per_node;
        let fits = || select::check_memory(train.len(), encoder.config().hidden_size, processes, memory::available());
        self.job.process.node.once("memory-check", beat, fits, |(), _| Ok(()), |_| Ok(()))?;
        let vectors = evaluate::embed(encoder, texts, group, device, self.bf16, beat)?.to_device(Device::Cpu);
        self.job.process.watchdog.rest();
        let labels = train.classes();
        let agreement = match teacher.filter(|_| spec.minimum_agreement.is_some()) {
            Some(teacher) => Some(self.agreement(teacher, train, &labels)?),
            None => None,
        };
        let choose = || -> Result<_, TrainError> {
            let names = &self.encoder.labels;
            let Selection { rows, report } = select::select(spec, &vectors, &labels, names, agreement.as_deref())?;
            Ok((rows, Some(report)))
        };
        let (mut rows, report) = self.job.process.node.once(
            "selection",
            beat,
            choose,
            |(rows, _), to| Ok(serde_json::to_writer(to, rows)?),
            |from| Ok((serde_json::from_reader::<_, Vec<usize>>(from)?, None)),
        )?;
        self.job.process.watchdog.rest();
        if let Some(group) = group {
            // Sums may differ in their last bit from machine to machine.
            let mut marks = vec![0_i64; train.len()];
            rows.iter().for_each(|&row| marks[row] = 1);
            let marks = Tensor::from_slice(&marks).to_device(device);
            group.broadcast(&marks, 0)?;
            let marks = Vec::<i64>::try_from(marks)?;
            rows = (0..marks.len()).filter(|&row| marks[row] == 1).collect();
        }
        tracing::info!(rows = rows.len(), of = train.len(), ?report, "selected");
        Ok((rows, report))
    }

    /// The probability that the teacher gives each row's label; 0 for a row without one.
    fn agreement(&self, teacher: &Online, train: &Encoded, labels: &[Option<usize>]) -> Result<Vec<f32>, TrainError> {
        let logits = self.logits(teacher, &train.ids, &mut None)?;
        let rows = Vec::<Vec<f32>>::try_from(logits.softmax(-1, Kind::Float).to_device(Device::Cpu))?;
        Ok(rows.iter().zip(labels).map(|(row, label)| label.map_or(0.0, |label| row[label])).collect())
    }

    /// Appends new texts to the training rows, which are `rows` of the dataset.
    fn augment(
        &self,
        spec: &AugmentSpec,
        rows: &[usize],
        teacher: &mut Online,
        train: &mut Encoded,
        reporter: &mut Option<Reporter>,
    ) -> Result<AugmentReport, TrainError> {
        if let Some(reporter) = reporter.as_mut() {
            reporter.stage("Augmenting");
        }
        let texts: Vec<&str> = rows.iter().map(|&row| self.prepared.dataset.rows.text(row)).collect();
        let embeddings = teacher.model().word_embeddings();
        let near = Neighbours::find(texts.iter().copied(), teacher.words(), &embeddings, self.group())?;
        let RowEncoder { tokenizer, max_length, .. } = &self.encoder;
        let copies = usize::from(spec.copies);
        let sources: Vec<u32> = train.sources.iter().flat_map(|&source| std::iter::repeat_n(source, copies)).collect();
        let mut report = AugmentReport::new(rows.len(), &near, sources.len());
        let mut new = augment::texts(spec, &texts, &near);
        // Only their tokens are kept.
        for sources in sources.chunks(TEXTS_AT_A_TIME) {
            let some: Vec<String> = new.by_ref().take(sources.len()).collect();
            let ids = tokenizer.encoder()?.encode_rows(some.iter().map(String::as_str), *max_length)?;
            train.extend(&ids, sources.iter().copied());
            teacher.add_rows(some.iter().map(String::as_str))?;
            report.add(&some);
        }
        tracing::info!(rows = report.rows, words = report.words, "made new texts");
        Ok(report)
    }

    /// The teacher for the training: its answers, computed once and kept next to the output, where they are small and
    /// the objective needs no more; else the teacher itself.
    fn teacher_outputs(
        &self,
        teacher: Online,
        train: &Encoded,
        reporter: &mut Option<Reporter>,
    ) -> Result<Teacher, TrainError> {
        let spec = self.spec();
        let asked = spec.teacher.as_ref().and_then(|teacher| teacher.outputs);
        let by_token = spec.objective.compares_hidden_states();
        let online = by_token
            || !self.encoder.task.teacher_is_cacheable()
            || asked == Some(TeacherOutputs::Online)
            || (asked.is_none() && train.len() * teacher.outputs() > MOST_CACHED);
        if online {
            return Ok(Teacher::Online(Box::new(teacher)));
        }
        if let Some(reporter) = reporter.as_mut() {
            reporter.stage("Asking the teacher");
        }
        let logits = self.logits(&teacher, &train.ids, reporter)?;
        self.job.process.timeline.mark("taught");
        Ok(Teacher::Cached(logits.to_device(self.device())))
    }

    /// The teacher on held-out rows, for the report and the gates; `None` without a teacher that the job learns from,
    /// and for tasks whose teacher answers at each step. `encoded` are the same rows in the student's tokens.
    ///
    /// # Errors
    /// See [`Online::load`].
    pub fn teacher_on(&self, rows: &[usize], encoded: &Encoded) -> Result<Option<Evaluation>, TrainError> {
        let spec = self.spec();
        let learns = spec.learns_from_teacher() && self.encoder.task.teacher_is_cacheable();
        let Some(folder) = self.prepared.teacher.as_ref().filter(|_| learns) else { return Ok(None) };
        let logits = self.logits(&self.load_teacher(folder, rows)?, &encoded.ids, &mut None)?;
        let (confidences, labels) = logits.softmax(-1, Kind::Float).max_dim(-1, false);
        let labels = Vec::<i64>::try_from(labels)?.into_iter().map(|label| label as usize).collect();
        let predictions = Predictions { labels, confidences: Vec::try_from(confidences)? };
        let truth = encoded.columns.classes().unwrap_or_default().to_vec();
        Ok(Some(Evaluation { sources: encoded.sources.clone(), results: Box::new(Classes { truth, predictions }) }))
    }

    /// The teacher, with the texts of `rows` of the dataset as it reads them.
    fn load_teacher(&self, folder: &Path, rows: &[usize]) -> Result<Online, TrainError> {
        let RowEncoder { labels, max_length, dataset, .. } = &self.encoder;
        let texts = rows.iter().map(|&row| dataset.rows.text(row));
        setup::load_teacher(self.spec(), folder, &self.prepared.parent, labels, *max_length, texts, self.device())
    }

    /// The teacher's logits [rows, L] for the rows that it holds, kept next to the output. `student_ids` are the rows
    /// in the student's tokens.
    fn logits(
        &self,
        teacher: &Online,
        student_ids: &TokenRows,
        reporter: &mut Option<Reporter>,
    ) -> Result<Tensor, TrainError> {
        let (JobContext { process, work, .. }, device) = (self.job, self.device());
        let (Some(folder), group) = (&self.prepared.teacher, self.group()) else {
            return Err(TrainError::Other("the teacher's folder is not there".into()));
        };
        let output = athanor_store::open(&self.spec().output.to)?;
        let place = cached_at(&output, folder, teacher.asked(student_ids), &(&self.encoder.labels, self.bf16))?;
        let shape = [student_ids.len(), teacher.outputs()];
        if let Some(kept) = read_kept(&place, shape, &process.runtime, group, device, work)? {
            return Ok(kept);
        }
        let mut last = Instant::now();
        let logits = teacher.all_logits(student_ids, group, device, self.bf16, |done| {
            self.job.beat();
            if let Some(reporter) = reporter.as_mut() {
                reporter.asked(done, student_ids.len());
            }
            if last.elapsed() > LOG_EVERY {
                last = Instant::now();
                tracing::info!(rows = done, of = student_ids.len(), "asking the teacher");
            }
        })?;
        process.watchdog.rest();
        if self.job.is_rank_0()
            && let Err(error) = process.runtime.block_on(write_cached(&place, &logits, work))
        {
            tracing::warn!(%error, "the teacher's answers are not kept: another run has to ask again");
        }
        Ok(logits)
    }
}

//! `athanor-trainer check`: what a job would do, and every mistake in it, without training.

use std::{
    collections::HashMap,
    fmt::{Display, Write as _},
    io::IsTerminal,
    path::Path,
    time::{Duration, Instant},
};

use athanor_contract::train::{DataSpec, EndpointAnnotator, Gate, TrainConfig, TrainSpec};
use athanor_data::annotate::Estimate;
use athanor_models::EncoderConfig;
use tch::Device;
use tokio::runtime::Handle;

use super::{search, setup};
use crate::{
    TrainError,
    curate::{annotate, select},
    data::{Dataset, Encoded, Parts, TaskTokenizer, batches::epoch_batches},
    network::Network,
    objectives::{Objective, Part, Teacher},
    report::{Reading, page},
    tasks::{self, Rows, Task},
    train::{count_steps, update},
};

/// Steps whose time is measured, after as many that warm up.
const MEASURED_STEPS: usize = 3;

/// What a job would do, as lines of text.
///
/// # Errors
/// All mistakes that were found, one a line.
pub fn check(config: &TrainConfig, device: Device, runtime: &Handle) -> Result<String, TrainError> {
    let work = tempfile::tempdir().map_err(TrainError::other)?;
    let mut mistakes = Vec::new();
    let (task, reading) = (tasks::of(config.spec.model.task), Reading::new(std::io::stderr().is_terminal()));
    let dataset = runtime.block_on(read(&config.spec.data, task, &reading, &mut mistakes));
    let model = work.path().join("model");
    let folder = runtime.block_on(fetch(&config.spec.model.from, &model));
    let folder = folder.map_err(|error| mistakes.push(error.to_string())).ok();
    let tokenizer = folder.and_then(|()| {
        setup::load_tokenizer(&config.spec, &model).map_err(|error| mistakes.push(error.to_string())).ok()
    });
    let teacher = match &config.spec.teacher {
        Some(teacher) => {
            let to = work.path().join("teacher");
            let fetched = runtime.block_on(fetch(&teacher.from, &to));
            fetched.map_err(|error| mistakes.push(format!("teacher.from: {error}"))).ok().map(|()| to)
        }
        None => None,
    };
    if let Some(baseline) = &config.spec.evaluate.baseline {
        let fetched = runtime.block_on(fetch(baseline, &work.path().join("baseline")));
        mistakes.extend(fetched.err().map(|error| format!("evaluate.baseline: {error}")));
    }
    let report = match (dataset, tokenizer) {
        // Without a teacher to label them rows have no labels, and its mistake is reported.
        (Some(mut dataset), Some((tokenizer, max_length)))
            if teacher.is_some() || !config.spec.data.teacher_annotates() =>
        {
            let teacher = teacher.as_deref();
            let report = plan_annotation(&mut dataset, &config.spec, teacher).and_then(|annotation| {
                Report { config, device, dataset, annotation, tokenizer, max_length, folder: &model, teacher }.text()
            });
            report.map_err(|error| mistakes.push(error.to_string())).ok()
        }
        _ => None,
    };
    match report {
        Some(report) if mistakes.is_empty() => Ok(report),
        _ => Err(TrainError::User(mistakes.join("\n"))),
    }
}

/// The dataset; or, where a source is wrong, the mistakes of all of them.
async fn read(spec: &DataSpec, task: &dyn Task, reading: &Reading, mistakes: &mut Vec<String>) -> Option<Dataset> {
    let error = match reading.read(spec, task.needs_labels()).await {
        Ok(dataset) => return Some(dataset),
        Err(error) => error,
    };
    for source in &spec.sources {
        let alone = DataSpec { sources: vec![source.clone()], ..spec.clone() };
        if let Err(error) = reading.read(&alone, task.needs_labels()).await {
            mistakes.push(error.to_string());
        }
    }
    if mistakes.is_empty() {
        mistakes.push(error.to_string());
    }
    None
}

async fn fetch(uri: &str, to: &Path) -> Result<(), TrainError> {
    athanor_store::artifact::download_model(&athanor_store::open(uri)?, to).await?;
    Ok(())
}

/// How rows would get labels.
struct Annotation {
    text: String,
    /// Whether the row has no label yet, for each row.
    open: Vec<bool>,
}

/// What annotation would do. Rows without a label get one of the labels here: which one changes nothing in the report.
fn plan_annotation(
    dataset: &mut Dataset,
    spec: &TrainSpec,
    teacher: Option<&Path>,
) -> Result<Option<Annotation>, TrainError> {
    let Some(annotate) = &spec.data.annotate else { return Ok(None) };
    let rows = annotate::open_rows(dataset);
    let (who, labels) = match (&annotate.endpoint, teacher) {
        (Some(endpoint), _) => {
            let labels = annotate::endpoint_labels(endpoint, spec.model.labels.as_ref())?;
            let texts: Vec<&str> = rows.iter().map(|&row| dataset.rows.text(row)).collect();
            let estimate = athanor_data::annotate::estimate(&texts, endpoint, labels)?;
            (describe_questions(endpoint, estimate), labels.to_vec())
        }
        (None, Some(folder)) => {
            annotate::check_labels(folder, spec.model.labels.as_deref())?;
            let minimum = annotate.teacher.unwrap_or_default().minimum_confidence;
            let labels = EncoderConfig::load(folder)?.labels().unwrap_or_default();
            (format!("the teacher labels those it is sure of by {minimum} or more"), labels)
        }
        (None, None) => return Err(TrainError::User("data.annotate: set exactly one of endpoint and teacher".into())),
    };
    let mut open = vec![false; dataset.rows.len()];
    for &row in &rows {
        open[row] = true;
        dataset.rows.set_label(row, labels.first().map_or("", String::as_str));
    }
    dataset.annotated.clone_from(&open);
    Ok(Some(Annotation { text: format!("{} of {} rows have no label: {who}", rows.len(), open.len()), open }))
}

fn describe_questions(endpoint: &EndpointAnnotator, estimate: Estimate) -> String {
    let Estimate { questions, input_tokens } = estimate;
    let cost = endpoint.input_token_price.map(|price| price.get() * input_tokens as f64 / 1e6);
    let cost = cost.map(|cost| format!(", whose prompts cost at most {cost:.4}")).unwrap_or_default();
    let limit = endpoint.maximum_cost.map(|limit| format!(", until {limit} is spent")).unwrap_or_default();
    format!("at most {questions} questions to {} at {}{cost}{limit}", endpoint.model, endpoint.url)
}

struct Report<'a> {
    config: &'a TrainConfig,
    device: Device,
    dataset: Dataset,
    annotation: Option<Annotation>,
    tokenizer: TaskTokenizer,
    /// Tokens that texts are cut to.
    max_length: usize,
    folder: &'a Path,
    teacher: Option<&'a Path>,
}

/// What a job trains on, as far as a check prepares it.
struct Plan {
    labels: Vec<String>,
    parts: Parts,
    /// Training rows whose texts are not cut.
    whole: Encoded,
    /// As many training rows as a selection keeps: which ones does not matter here.
    train: Encoded,
    /// Tokens that texts are cut to.
    max_length: usize,
    /// Rows of the training of each fold of a cross-validation.
    folds: Vec<usize>,
}

/// Lines of a name and a value.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, name: &str, value: impl Display) {
        // Writing to a String cannot fail.
        let _infallible = writeln!(self.0, "{name:<12}{value}");
    }
}

impl Report<'_> {
    fn text(&self) -> Result<String, TrainError> {
        let spec = &self.config.spec;
        let plan = self.plan()?;
        let mut model = setup::load_model(spec, self.folder, &plan.labels, self.device)?;
        let teacher = self.load_teacher(&plan)?;
        let seed = spec.hyperparameters.seed as u64;
        let objective =
            Objective::new(spec.objective_terms(), spec.model.task, &model, teacher.as_ref(), seed, self.device)?;
        let mut lines = Lines::default();
        self.describe_job(&mut lines, &model, &objective);
        self.describe_data(&mut lines, &plan);
        let steps = self.describe_steps(&mut lines, &plan)?;
        self.measure_time(&mut lines, &mut model, &objective, teacher.as_ref(), &plan, steps)?;
        lines.add("artifact", &self.config.artifact_to);
        Ok(lines.0)
    }

    fn plan(&self) -> Result<Plan, TrainError> {
        let (spec, dataset) = (&self.config.spec, &self.dataset);
        let labels = setup::choose_labels(spec, dataset, self.folder, self.teacher)?;
        let parts = dataset.split(&spec.data.split)?;
        setup::check_gates(&spec.evaluate.gates, dataset, &parts)?;
        let (tokenizer, max_length) = (&self.tokenizer, self.max_length);
        let (task, generation) = (tasks::of(spec.model.task), spec.evaluate.generation);
        let encode = |max_length: usize| {
            let (rows, labels) = (&parts.train[..], &labels[..]);
            task.encode(&Rows { dataset, rows, labels, tokenizer, max_length, generation, share: None })
        };
        let (whole, mut train) = (encode(usize::MAX)?, encode(max_length)?);
        if spec.hyperparameters.packing {
            train.pack(max_length);
        }
        train.select(&(0..self.kept(&parts.train, &labels)).collect::<Vec<_>>());
        let folds = self.fold_rows(&parts, &labels)?;
        Ok(Plan { labels, parts, whole, train, max_length, folds })
    }

    fn load_teacher(&self, plan: &Plan) -> Result<Option<Teacher>, TrainError> {
        let spec = &self.config.spec;
        let Some(folder) = self.teacher.filter(|_| spec.learns_from_teacher()) else { return Ok(None) };
        let rows = &plan.parts.train[..plan.train.len()];
        let texts = rows.iter().map(|&row| self.dataset.rows.text(row));
        let (labels, max_length) = (&plan.labels, plan.max_length);
        let teacher = setup::load_teacher(spec, folder, self.folder, labels, max_length, texts, self.device)?;
        teacher.check_tokens(&plan.train.ids, |place| self.dataset.rows.place(rows[place]))?;
        Ok(Some(Teacher::Online(Box::new(teacher))))
    }

    fn describe_job(&self, lines: &mut Lines, model: &Network, objective: &Objective) {
        let spec = &self.config.spec;
        lines.add("job", &self.config.name);
        lines.add("model", self.describe_model(model));
        if let Some(teacher) = &spec.teacher {
            lines.add("teacher", &teacher.from);
        }
        let terms = objective.terms().iter().map(|term| format!("{} x {}", term.weight, term.name()));
        lines.add("objective", terms.collect::<Vec<_>>().join(" + "));
    }

    fn describe_data(&self, lines: &mut Lines, plan: &Plan) {
        if let Some(annotation) = &self.annotation {
            lines.add("annotate", &annotation.text);
        }
        if !plan.labels.is_empty() {
            lines.add("labels", self.describe_labels(&plan.labels, &plan.parts));
        }
        for source in page::sources(&self.dataset, &plan.parts) {
            let rows = format!("{} train, {} validation, {} test", source.train, source.validation, source.test);
            lines.add("rows", format!("{}: {rows}", source.name));
        }
        if let Some(overlap) = plan.parts.overlap.as_ref().filter(|overlap| overlap.rows > 0) {
            let example = overlap.examples.first().map_or("", String::as_str);
            lines
                .add("left out", format!("{} rows that a source with a part has too, such as {example}", overlap.rows));
        }
        lines.add("tokens", describe_lengths(plan.whole.lengths(), plan.max_length));
    }

    /// Steps of all trainings together.
    fn describe_steps(&self, lines: &mut Lines, plan: &Plan) -> Result<u64, TrainError> {
        let spec = &self.config.spec;
        let h = &spec.hyperparameters;
        let rows = self.with_new(plan.train.len());
        let (steps_per_epoch, total_steps) = count_steps(rows, h);
        lines.add("steps", format!("{total_steps} of {} rows, {steps_per_epoch} an epoch", h.batch_size));
        let of_folds: u64 = plan.folds.iter().map(|&rows| count_steps(rows, h).1).sum();
        if let (Some(least), Some(most)) = (plan.folds.iter().min(), plan.folds.iter().max()) {
            let count = plan.folds.len();
            lines.add(
                "folds",
                format!("{count} trainings before, of {least} to {most} rows, {of_folds} steps together"),
            );
        }
        let of_search = search::steps(h, rows, &plan.folds)?;
        if let Some(search) = &h.search {
            lines.add("search", format!("{} trials before, {of_search} steps together", search.max_trials));
        }
        lines.add("precision", if setup::uses_bf16(h.precision, self.device) { "BF16" } else { "FP32" });
        for gate in &spec.evaluate.gates {
            lines.add("gate", describe_gate(gate));
        }
        if let Some(select) = &spec.data.select {
            // The teacher's answers decide how many rows are left.
            let most = if select.minimum_agreement.is_some() { "at most " } else { "" };
            let (kept, of) = (plan.train.len(), plan.parts.train.len());
            lines.add("selected", format!("{most}{kept} of {of} training rows by {:?}", select.method));
        }
        if let Some(augment) = &spec.data.augment {
            let new = rows - plan.train.len();
            lines.add("augmented", format!("{new} new texts for the teacher, {} of each training row", augment.copies));
        }
        Ok(total_steps + of_folds + of_search)
    }

    fn measure_time(
        &self,
        lines: &mut Lines,
        model: &mut Network,
        objective: &Objective,
        teacher: Option<&Teacher>,
        plan: &Plan,
        steps: u64,
    ) -> Result<(), TrainError> {
        let TrainSpec { hyperparameters: h, distributed, .. } = &self.config.spec;
        let ranks = (distributed.num_nodes * distributed.processes_per_node).max(1) as usize;
        let bf16 = setup::uses_bf16(h.precision, self.device);
        let seconds = self.measure(model, objective, teacher, &plan.train, ranks, bf16)?.as_secs_f64();
        lines.add("memory", format!("{:.1} GiB a process at the peak of {MEASURED_STEPS} steps", peak_memory_gib()));
        let (time, rate) = (in_words(seconds * steps as f64), h.batch_size as f64 / seconds);
        let processes = match ranks {
            1 => "1 process".to_owned(),
            // One process is measured, with its share of the rows.
            ranks => format!("{ranks} processes, if none waits for another"),
        };
        lines.add(
            "time",
            format!("about {time} of training: {rate:.0} rows a second with {processes}, measured on this machine"),
        );
        Ok(())
    }

    /// How many of some rows of the dataset a selection keeps; all without one.
    fn kept(&self, rows: &[usize], labels: &[String]) -> usize {
        let Some(select) = &self.config.spec.data.select else { return rows.len() };
        let index: HashMap<&str, usize> = labels.iter().map(String::as_str).zip(0..).collect();
        let class = |&row: &usize| index.get(self.dataset.rows.label(row)?).copied();
        select::kept(&rows.iter().map(class).collect::<Vec<_>>(), labels.len(), select.keep_percent)
    }

    /// Training rows with the new texts that are made from them.
    fn with_new(&self, rows: usize) -> usize {
        rows * (1 + self.config.spec.data.augment.as_ref().map_or(0, |augment| usize::from(augment.copies)))
    }

    /// Rows that the training of each fold of a cross-validation learns from; empty without one.
    fn fold_rows(&self, parts: &Parts, labels: &[String]) -> Result<Vec<usize>, TrainError> {
        let spec = &self.config.spec;
        let Some(wanted) = spec.hyperparameters.cross_validation else { return Ok(Vec::new()) };
        let folds = self.dataset.folds(&spec.data.split, &parts.train, wanted.folds as usize)?;
        Ok(folds.iter().map(|fold| self.with_new(self.kept(&fold.train, labels))).collect())
    }

    fn describe_model(&self, model: &Network) -> String {
        let fresh = match model {
            Network::Encoder(model) if !model.fresh_layers().is_empty() => {
                format!("; starts at random: {}", model.fresh_layers().join(", "))
            }
            _ => String::new(),
        };
        let from = &self.config.spec.model.from;
        let trained: usize = model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
        let adapters = match &self.config.spec.adapter {
            Some(adapter) => format!("; LoRA of rank {}: {:.2} M train", adapter.lora.rank, trained as f64 / 1e6),
            None => String::new(),
        };
        format!("{from}: {}, {:.1} M parameters{adapters}{fresh}", model.describe(), model.size() as f64 / 1e6)
    }

    fn describe_labels(&self, labels: &[String], parts: &Parts) -> String {
        let is_open = |row: usize| self.annotation.as_ref().is_some_and(|annotation| annotation.open[row]);
        let labelled: Vec<usize> = parts.train.iter().copied().filter(|&row| !is_open(row)).collect();
        let share = |label: &String| {
            let rows = labelled.iter().filter(|&&row| self.dataset.rows.label(row) == Some(label)).count();
            format!("{label} {:.1} %", rows as f64 * 100.0 / labelled.len().max(1) as f64)
        };
        let shown: Vec<String> = labels.iter().take(20).map(share).collect();
        let more = labels.len().saturating_sub(20);
        shown.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
    }

    /// Time of one step of one rank, with its share of the rows. A teacher is asked at each step, even if its answers
    /// would be kept.
    fn measure(
        &self,
        model: &mut Network,
        objective: &Objective,
        teacher: Option<&Teacher>,
        train: &Encoded,
        ranks: usize,
        bf16: bool,
    ) -> Result<Duration, TrainError> {
        let spec = &self.config.spec;
        let h = &spec.hyperparameters;
        model.set_trainable();
        let mut update = update::of_one_rank(model, objective, spec, self.device, ranks)?;
        let lengths = train.lengths();
        let rows = (h.batch_size as usize).div_ceil(ranks);
        let batches = epoch_batches(&lengths, rows, h.seed as u64, 0);
        let mut begun = Instant::now();
        let mut measured = 0;
        for (step, batch) in
            (0..batches.len()).cycle().map(|index| batches.get(index)).take(2 * MEASURED_STEPS).enumerate()
        {
            if step == MEASURED_STEPS {
                begun = Instant::now();
                measured = 0;
            }
            measured += 1;
            update.begin(model, train, &batch)?;
            let parts: Vec<&[usize]> = batch.chunks(batch.len().div_ceil(h.accumulate_steps as usize)).collect();
            for (index, part) in parts.iter().enumerate() {
                let seed = step as u64;
                let part = Part {
                    train,
                    rows: part,
                    batch: &batch,
                    weight: 1.0,
                    seed,
                    group: None,
                    device: self.device,
                    bf16,
                };
                let values = objective.values(&*model, teacher, &part)?;
                let weighted = values.iter().zip(objective.terms()).map(|(value, term)| value * term.weight);
                let sum = weighted.reduce(|sum, value| sum + value).unwrap_or_default();
                update.backward(&(sum / batch.len() as f64), index + 1 == parts.len())?;
            }
            update.finish(model, h.clip_norm)?;
            // Where the weights go does not matter: they are not kept.
            update.apply(h.learning_rate)?;
        }
        Ok(begun.elapsed() / measured)
    }
}

fn describe_gate(gate: &Gate) -> String {
    let place = gate.sources.as_ref().map_or("all test rows".to_owned(), |names| names.join(", "));
    let limits = [
        gate.minimum.map(|minimum| format!("at least {minimum}")),
        gate.maximum.map(|maximum| format!("at most {maximum}")),
        gate.minimum_gain.map(|gain| format!("better than the baseline's by at least {gain}")),
        gate.minimum_of_teacher.map(|share| format!("at least {share} of the teacher's")),
    ];
    let limit = limits.into_iter().flatten().next().unwrap_or_default();
    format!("{:?} on {place}: {limit}", gate.metric)
}

fn describe_lengths(mut lengths: Vec<usize>, max_length: usize) -> String {
    lengths.sort_unstable();
    let at = |share: f64| lengths[((lengths.len() - 1) as f64 * share) as usize];
    let cut = lengths.iter().filter(|&&length| length > max_length).count();
    let cut = match cut {
        0 => format!("none is cut at {max_length}"),
        cut => format!("{cut} texts ({:.1} %) are cut at {max_length}", cut as f64 * 100.0 / lengths.len() as f64),
    };
    format!("median {}, 95 % at most {}, longest {}; {cut}", at(0.5), at(0.95), at(1.0))
}

fn in_words(seconds: f64) -> String {
    match seconds {
        short if short < 90.0 => format!("{seconds:.0} s"),
        long if long < 5400.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

/// Peak memory of this process; 0 where the system does not report it.
fn peak_memory_gib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: f64 = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0.0);
    kib / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_times_read_well() {
        let lengths: Vec<usize> = (1..=100).collect();
        assert_eq!(
            describe_lengths(lengths.clone(), 90),
            "median 50, 95 % at most 95, longest 100; 10 texts (10.0 %) are cut at 90"
        );
        assert!(describe_lengths(lengths, 128).ends_with("none is cut at 128"));
        assert_eq!([5.0, 600.0, 9000.0].map(in_words), ["5 s", "10 min", "2.5 h"]);
        assert!(peak_memory_gib() > 0.001);
    }
}

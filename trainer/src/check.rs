//! `athanor-trainer check`: what a job would do, and everything that is wrong with it, without training it.

use std::{
    fmt::Write as _,
    io::IsTerminal,
    path::Path,
    time::{Duration, Instant},
};

use athanor_contract::train::{DataSpec, EndpointAnnotator, Task, TrainConfig, TrainSpec};
use athanor_data::annotate::Estimate;
use athanor_models::{EncoderConfig, Model, Tokenizer};
use athanor_torch::{Optimizer, Shard, backward, norm, zero_grad};
use tch::Device;
use tokio::runtime::Handle;

use crate::{
    TrainError, annotate,
    data::{self, Dataset, Encoded, Parts, batches::epoch_batches},
    objectives::{Objective, Part, Teacher},
    report::Reading,
    search, setup, training,
    words::Words,
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
    let (task, reading) = (config.spec.model.task, Reading::new(std::io::stderr().is_terminal()));
    let dataset = runtime.block_on(read(&config.spec.data, task, &reading, &mut mistakes));
    let model = work.path().join("model");
    let folder = runtime.block_on(fetch(&config.spec.model.from, &model));
    let folder = folder.map_err(|error| mistakes.push(error.to_string())).ok();
    let parent =
        folder.and_then(|()| EncoderConfig::load(&model).map_err(|error| mistakes.push(error.to_string())).ok());
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
    let report = match (dataset, parent) {
        // Without a teacher to label them rows have no labels, and its mistake is told.
        (Some(mut dataset), Some(parent)) if teacher.is_some() || !config.spec.data.teacher_annotates() => {
            let teacher = teacher.as_deref();
            let report = plan_annotation(&mut dataset, &config.spec, teacher).and_then(|annotation| {
                Report { config, device, dataset, annotation, parent, folder: &model, teacher }.text()
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
async fn read(spec: &DataSpec, task: Task, reading: &Reading, mistakes: &mut Vec<String>) -> Option<Dataset> {
    let error = match data::read(spec, task, reading).await {
        Ok(dataset) => return Some(dataset),
        Err(error) => error,
    };
    for source in &spec.sources {
        let alone = DataSpec { sources: vec![source.clone()], ..spec.clone() };
        if let Err(error) = data::read(&alone, task, reading).await {
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

/// Who would be asked for labels.
struct Annotation {
    /// In words.
    text: String,
    /// For each row whether it has none yet.
    open: Vec<bool>,
}

/// What annotation would do. Rows without a label get one of the labels here: which one changes nothing that is told.
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
    parent: EncoderConfig,
    folder: &'a Path,
    teacher: Option<&'a Path>,
}

impl Report<'_> {
    fn text(&self) -> Result<String, TrainError> {
        let (spec, dataset) = (&self.config.spec, &self.dataset);
        let h = &spec.hyperparameters;
        let task = spec.model.task;
        let labels = setup::choose_labels(spec, dataset, self.folder, self.teacher)?;
        let parts = dataset.split(&spec.data.split)?;
        setup::check_gates(&spec.evaluate.gates, dataset, &parts)?;
        let tokenizer = Tokenizer::load(self.folder)?;
        let max_length = setup::max_length(spec, &self.parent);
        let whole = Encoded::new(dataset, &parts.train, task, &labels, &tokenizer, usize::MAX)?;
        let mut train = Encoded::new(dataset, &parts.train, task, &labels, &tokenizer, max_length)?;
        let mut model = setup::load_model(spec, self.folder, &labels, self.device)?;
        // Which rows does not matter here, only how many.
        train.select(&(0..self.kept(train.len())).collect::<Vec<_>>());
        let teacher = match self.teacher {
            Some(folder) if spec.learns_from_teacher() => {
                let rows = parts.train.iter().take(train.len());
                let texts = rows.map(|&row| dataset.rows.text(row));
                let teacher = setup::load_teacher(spec, folder, self.folder, &labels, max_length, texts, self.device)?;
                teacher.check_tokens(&train.ids, |place| dataset.rows.place(parts.train[place]))?;
                Some(Teacher::Online(Box::new(teacher)))
            }
            _ => None,
        };
        let objective =
            Objective::new(spec.objective_terms(), task, &model, teacher.as_ref(), h.seed as u64, self.device)?;
        let rows = self.with_new(train.len());
        let (steps_per_epoch, total_steps) = training::count_steps(rows, h);
        let bf16 = setup::uses_bf16(h.precision, self.device);

        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a String cannot fail.
            let _infallible = writeln!(text, "{name:<12}{value}");
        };
        line("job", self.config.name.clone());
        line("model", self.describe_model(&model));
        if let Some(teacher) = &spec.teacher {
            line("teacher", teacher.from.clone());
        }
        let terms = objective.terms().iter().map(|term| format!("{} x {}", term.weight, term.name()));
        line("objective", terms.collect::<Vec<_>>().join(" + "));
        if let Some(annotation) = &self.annotation {
            line("annotate", annotation.text.clone());
        }
        if !labels.is_empty() {
            line("labels", self.describe_labels(&labels, &parts));
        }
        for source in crate::report::page::sources(dataset, &parts) {
            let rows = format!("{} train, {} validation, {} test", source.train, source.validation, source.test);
            line("rows", format!("{}: {rows}", source.name));
        }
        line("tokens", describe_lengths(&whole, max_length));
        line("steps", format!("{total_steps} of {} rows, {steps_per_epoch} an epoch", h.batch_size));
        let folds = self.fold_rows(&parts)?;
        let of_folds: u64 = folds.iter().map(|&rows| training::count_steps(rows, h).1).sum();
        if let (Some(least), Some(most)) = (folds.iter().min(), folds.iter().max()) {
            let count = folds.len();
            line("folds", format!("{count} trainings before, of {least} to {most} rows, {of_folds} steps together"));
        }
        let of_search = search::steps(h, rows, &folds)?;
        if let Some(search) = &h.search {
            line("search", format!("{} trials before, {of_search} steps together", search.max_trials));
        }
        line("precision", if bf16 { "BF16" } else { "FP32" }.to_owned());
        for gate in &spec.evaluate.gates {
            let place = gate.sources.as_ref().map_or("all test rows".to_owned(), |names| names.join(", "));
            let limit = match (&gate.minimum, &gate.minimum_gain, &gate.minimum_of_teacher) {
                (Some(minimum), ..) => format!("at least {minimum}"),
                (_, Some(gain), _) => format!("at least the baseline's plus {gain}"),
                (.., Some(share)) => format!("at least {share} of the teacher's"),
                _ => String::new(),
            };
            line("gate", format!("{:?} on {place}: {limit}", gate.metric));
        }
        let ranks = (spec.distributed.num_nodes * spec.distributed.processes_per_node).max(1) as usize;
        if let Some(select) = &spec.data.select {
            line("selected", format!("{} of {} training rows by {:?}", train.len(), parts.train.len(), select.method));
        }
        if let Some(augment) = &spec.data.augment {
            let new = rows - train.len();
            line("augmented", format!("{new} new texts for the teacher, {} of each training row", augment.copies));
        }
        let per_step = self.measure(&mut model, &objective, teacher.as_ref(), &train, ranks, bf16)?;
        line("memory", format!("{:.1} GiB a process at the peak of {MEASURED_STEPS} steps", peak_memory_gib()));
        let seconds = per_step.as_secs_f64();
        let rate = h.batch_size as f64 / seconds;
        line(
            "time",
            format!(
                "about {} of training: {rate:.0} rows a second with {ranks} {}, measured on this machine",
                in_words(seconds * (total_steps + of_folds + of_search) as f64),
                if ranks == 1 { "process" } else { "processes that share nothing" }
            ),
        );
        line("artifact", self.config.artifact_to.clone());
        Ok(text)
    }

    /// Rows that are left of `rows` by the selection, if there is one.
    fn kept(&self, rows: usize) -> usize {
        let percent = self.config.spec.data.select.as_ref().map_or(100, |select| usize::from(select.keep_percent));
        (rows * percent).div_ceil(100)
    }

    /// Training rows with the new texts that are made from them.
    fn with_new(&self, rows: usize) -> usize {
        rows * (1 + self.config.spec.data.augment.as_ref().map_or(0, |augment| usize::from(augment.copies)))
    }

    /// Rows that the training of each fold of a cross-validation learns from; empty without one.
    fn fold_rows(&self, parts: &Parts) -> Result<Vec<usize>, TrainError> {
        let spec = &self.config.spec;
        let Some(wanted) = spec.hyperparameters.cross_validation else { return Ok(Vec::new()) };
        let folds = self.dataset.folds(&spec.data.split, &parts.train, wanted.folds as usize)?;
        Ok(folds.iter().map(|fold| self.with_new(self.kept(fold.train.len()))).collect())
    }

    fn describe_model(&self, model: &Model) -> String {
        let count: usize = model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
        let fresh = match model.fresh_layers() {
            [] => String::new(),
            layers => format!("; starts at random: {}", layers.join(", ")),
        };
        let config = model.config();
        let (family, layers, size) = (config.model_type.name(), config.num_hidden_layers, config.hidden_size);
        let from = &self.config.spec.model.from;
        format!("{from}: {family}, {layers} layers of {size}, {:.1} M parameters{fresh}", count as f64 / 1e6)
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

    /// Time of one step of one rank, with its share of the rows. A teacher is asked at each step, even if its answers would be kept.
    fn measure(
        &self,
        model: &mut Model,
        objective: &Objective,
        teacher: Option<&Teacher>,
        train: &Encoded,
        ranks: usize,
        bf16: bool,
    ) -> Result<Duration, TrainError> {
        let h = &self.config.spec.hyperparameters;
        model.set_trainable();
        let mut parameters: Vec<_> = model.parameters().iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
        let mut words = None;
        let distributed = &self.config.spec.distributed;
        if !distributed.shard_optimizer {
            words = Words::new(model, self.config.spec.model.task, h, 0.0, self.device, String::new());
        }
        if words.is_some() {
            let table = model.word_embeddings().data_ptr();
            parameters.retain(|tensor| tensor.data_ptr() != table);
        }
        let shared = parameters.iter().map(tch::Tensor::shallow_clone).collect();
        // Ranks that share memory deal the optimizer's work out by themselves.
        let share_memory = self.device == Device::Cpu && distributed.num_nodes == 1;
        let world = if distributed.shard_optimizer || share_memory { ranks } else { 1 };
        let mut optimizer = Optimizer::new(training::rule(h), vec![(0.0, shared)], Shard { rank: 0, world })?;
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
            zero_grad(&parameters)?;
            if let Some(words) = &mut words {
                words.begin(model, train, &batch)?;
            }
            for part in batch.chunks(batch.len().div_ceil(h.accumulate_steps as usize)) {
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
                let values = objective.values(model, teacher, &part)?;
                let weighted = values.iter().zip(objective.terms()).map(|(value, term)| value * term.weight);
                let sum = weighted.reduce(|sum, value| sum + value).unwrap_or_default();
                backward(&(sum / batch.len() as f64))?;
            }
            let rows = words.as_ref().map(|words| words.end(model, None, 1.0)).transpose()?.flatten();
            let mut gradients = optimizer.gradients()?;
            gradients.extend(rows.map(|rows| rows.grad()));
            norm(&gradients)?;
            // Where weights go, and whether other ranks' parts of them go anywhere, does not matter here: nothing is kept.
            optimizer.step(1e-12)?;
            if let Some(words) = &mut words {
                words.step(1e-12)?;
            }
        }
        Ok(begun.elapsed() / measured)
    }
}

fn describe_lengths(rows: &Encoded, max_length: usize) -> String {
    let mut lengths = rows.lengths();
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

/// Most memory this process ever had; 0 where the system does not tell.
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
        let rows = Encoded { ids: (1..=100).map(|length| vec![0; length]).collect(), ..Encoded::blank(100) };
        assert_eq!(
            describe_lengths(&rows, 90),
            "median 50, 95 % at most 95, longest 100; 10 texts (10.0 %) are cut at 90"
        );
        assert!(describe_lengths(&rows, 128).ends_with("none is cut at 128"));
        assert_eq!([5.0, 600.0, 9000.0].map(in_words), ["5 s", "10 min", "2.5 h"]);
        assert!(peak_memory_gib() > 0.001);
    }
}

//! One rank from start to exit code: everything slow starts at once, training begins as soon as its parts are there.

use std::{
    collections::BTreeMap,
    fs::{File, TryLockError},
    path::Path,
    sync::{Arc, OnceLock},
    time::Instant,
};

use athanor_contract::{
    artifact::{Kind, Manifest},
    train::{Gate, TrainConfig, TrainResult},
};
use athanor_data::TopicReport;
use athanor_models::{EncoderConfig, Model};
use tch::Device;

use super::{
    context::{JobContext, Process},
    cross_validation::cross_validate,
    outcome::{Compared, Finished},
    prepare::prepare,
    setup,
    training_context::{RowEncoder, Training, TrainingContext},
    work::{Work, clear_abandoned},
};
use crate::{
    TrainError,
    curate::training_data::TrainingData,
    data::{Encoded, Parts},
    distributed::Topology,
    evaluate::{self, Evaluation, How},
    network::Network,
    objectives::Teacher,
    report::{Events, Reporter, Sender, Timeline},
    train::{
        self, Session, Trained,
        checkpoint::{self, Restored},
        count_steps,
    },
};

const LOCK: &str = "lock";

/// Runs this process's rank. Rank 0 returns the result; the others `None`.
pub fn run(config: &TrainConfig, topology: &Topology, process: &Process) -> Result<Option<TrainResult>, TrainError> {
    let temporary = std::env::temp_dir();
    clear_abandoned(&temporary);
    let _claim = (topology.rank() == 0).then(|| claim(config)).transpose()?;
    let work = Work::create(&temporary)?;
    let job = JobContext { config, topology, process, work: work.path() };
    let mut reporter = job.is_rank_0().then(|| reporter(job)).transpose()?;
    stage(&mut reporter, "Preparing");
    let result = train_and_measure(job, &mut reporter);
    if let Some(reporter) = reporter {
        process.runtime.block_on(reporter.finish());
    }
    result
}

/// Keeps a second run out of the same folder until this one ends. An object store has no such lock: there artifacts and
/// checkpoints are complete, whichever run is last.
pub(crate) fn claim(config: &TrainConfig) -> Result<Option<File>, TrainError> {
    let Some(folder) = athanor_store::open(&config.checkpoint_to)?.local_path() else { return Ok(None) };
    std::fs::create_dir_all(&folder).map_err(TrainError::at(&folder))?;
    let path = folder.join(LOCK);
    let file = File::options().create(true).append(true).open(&path).map_err(TrainError::at(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            Err(TrainError::Other(format!("{}: another process runs this job and writes here", folder.display())))
        }
        Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => Ok(None),
        Err(TryLockError::Error(error)) => Err(TrainError::at(&path)(error)),
    }
}

fn reporter(job: JobContext) -> Result<Reporter, TrainError> {
    let JobContext { config, process, .. } = job;
    let _inside = process.runtime.enter();
    let sender = config.progress_to.as_deref().map(Sender::start).transpose();
    let sender = sender.map_err(|error| TrainError::User(format!("progressTo: {error}")))?;
    let identity = (process.namespace.clone(), config.name.clone(), config.run_id.clone());
    Ok(Reporter::new(identity, sender, process.timeline.clone(), process.terminal))
}

fn stage(reporter: &mut Option<Reporter>, stage: &str) {
    if let Some(reporter) = reporter {
        reporter.stage(stage);
    }
}

fn train_and_measure(job: JobContext, reporter: &mut Option<Reporter>) -> Result<Option<TrainResult>, TrainError> {
    let mut prepared = prepare(job)?;
    let restored = prepared.restored.take();
    let context = TrainingContext::new(job, &prepared)?;
    let split = || prepared.dataset.split(&job.spec().data.split).map_err(TrainError::from);
    let parts = job.process.node.once("split", || job.beat(), split, |parts, to| parts.write(to), Parts::read)?;
    job.process.watchdog.rest();
    if let Some(overlap) = parts.overlap.as_ref().filter(|overlap| overlap.rows > 0) {
        tracing::info!(rows = overlap.rows, "left out: a source with a part has the same texts");
    }
    setup::check_gates(&job.spec().evaluate.gates, &prepared.dataset, &parts)?;
    let run = Run { held_out: HeldOut::new(&context.encoder, &parts), context: &context, parts: &parts };
    run.run(restored, reporter)
}

/// Validation and test rows, tokenized when they are first asked for: by a fold's validation or while the first steps
/// run.
struct HeldOut<'a> {
    encoder: &'a RowEncoder<'a>,
    parts: &'a Parts,
    encoded: OnceLock<Result<BothParts, String>>,
}

/// Validation and test rows.
type BothParts = (Arc<Encoded>, Arc<Encoded>);

impl<'a> HeldOut<'a> {
    fn new(encoder: &'a RowEncoder<'a>, parts: &'a Parts) -> Self {
        Self { encoder, parts, encoded: OnceLock::new() }
    }

    fn encode(&self) -> Result<BothParts, TrainError> {
        let encode = |rows: &[usize]| self.encoder.encode(rows).map(Arc::new).map_err(|error| error.to_string());
        let both = || Ok((encode(&self.parts.validation)?, encode(&self.parts.test)?));
        self.encoded.get_or_init(both).clone().map_err(TrainError::User)
    }

    fn validation(&self) -> Result<Arc<Encoded>, TrainError> {
        Ok(self.encode()?.0)
    }

    fn test(&self) -> Result<Arc<Encoded>, TrainError> {
        Ok(self.encode()?.1)
    }
}

/// A run whose data and models are there.
struct Run<'a> {
    context: &'a TrainingContext<'a>,
    parts: &'a Parts,
    held_out: HeldOut<'a>,
}

impl Run<'_> {
    fn run(
        &self,
        restored: Option<Restored>,
        reporter: &mut Option<Reporter>,
    ) -> Result<Option<TrainResult>, TrainError> {
        let (context, job) = (self.context, self.context.job);
        let timeline = &job.process.timeline;
        let validation = || self.held_out.validation();
        let cross_validation = cross_validate(context, self.parts, &validation, reporter)?;
        let mut model = context.load_model()?;
        let TrainingData { train, teacher, selection, augmented } =
            TrainingData::new(context, &self.parts.train, &model, reporter)?;
        timeline.mark("dataReady");
        let base = self.measure_base(&model, reporter)?;
        let manifest = self.manifest();
        let trained = self.train(&mut model, &train, teacher.as_ref(), restored, &manifest, reporter)?;
        timeline.mark("trained");
        drop(teacher);
        stage(reporter, "Evaluating");
        let (validation, test) = self.held_out.encode()?;
        let (found, compared) = self.measure(&mut model, &test, base)?;
        let compared_for_choice = self.compare_for_choice(&validation)?;
        timeline.mark("evaluated");
        if !job.is_rank_0() {
            job.process.watchdog.rest();
            return Ok(None);
        }
        stage(reporter, if job.spec().compress.is_empty() { "Writing" } else { "Compressing" });
        let chosen = self.chosen(&trained, &found, train.len());
        let finished = Finished {
            context,
            model: &model,
            parts: self.parts,
            train: &train,
            validation: &validation,
            test: &test,
            compared,
            compared_for_choice,
            trained,
            cross_validation,
            selection,
            augmented,
            chosen,
            manifest,
        };
        finished.write(found).map(Some)
    }

    /// The job's own training, from a checkpoint of the same data and specification if there is one.
    fn train(
        &self,
        model: &mut Network,
        train: &Encoded,
        teacher: Option<&Teacher>,
        restored: Option<Restored>,
        manifest: &Manifest,
        reporter: &mut Option<Reporter>,
    ) -> Result<Trained, TrainError> {
        let JobContext { config, process, work, .. } = self.context.job;
        let prepared = self.context.prepared;
        let h = &config.spec.hyperparameters;
        let (_, total_steps) = count_steps(train.len(), h);
        let restored = restored.filter(|restored| {
            let same = restored.state.fingerprint == prepared.fingerprint && restored.state.step <= total_steps;
            if !same {
                tracing::warn!("the checkpoint is of other data or another specification: training starts from step 0");
            }
            same
        });
        let (mut checkpoints, mut events) = (None, None);
        if self.context.job.is_rank_0() {
            let to = athanor_store::open(&config.events_to)?;
            let step = restored.as_ref().map_or(0, |restored| restored.state.step);
            events = Some(Events::new(to, work, step, h)?);
            let (folder, runtime) = (prepared.checkpoints.clone(), process.runtime.clone());
            checkpoints = Some(checkpoint::Writer::new(folder, manifest.clone(), work.to_owned(), runtime));
        }
        let validation = || self.held_out.validation();
        let (stage, reporter) = ("Training".to_owned(), reporter.as_mut());
        let training = Training { stage, model, train, teacher, validation: &validation, reporter };
        let session = Session {
            fingerprint: prepared.fingerprint.clone(),
            restored,
            checkpoints,
            events,
            loss_log: process.loss_log.clone(),
            ..self.context.session(training)?
        };
        let held_out = &self.held_out;
        std::thread::scope(|scope| {
            // An error is reported where the rows are used.
            scope.spawn(move || held_out.encode().map(drop));
            train::train(session)
        })
    }

    /// The model, the teacher and the baseline on the test rows.
    fn measure(
        &self,
        model: &mut Network,
        test: &Encoded,
        base: Option<Evaluation>,
    ) -> Result<(Evaluation, Compared), TrainError> {
        let (context, job) = (self.context, self.context.job);
        let found = evaluate::evaluate_as_served(model, test, context.group(), job.device(), || job.beat())?;
        let teacher = context.teacher_on(&self.parts.test, test)?;
        let baseline = self.measure_baseline(&self.parts.test)?;
        Ok((found, Compared { teacher, baseline: baseline.or(base) }))
    }

    /// The teacher and the baseline on the validation rows, which choose among compressed forms: as far as gates compare
    /// with them.
    fn compare_for_choice(&self, validation: &Encoded) -> Result<Compared, TrainError> {
        let (context, spec) = (self.context, self.context.spec());
        let compares = |wants: fn(&Gate) -> bool| !spec.compress.is_empty() && spec.evaluate.gates.iter().any(wants);
        let mut compared = Compared::default();
        if compares(|gate| gate.minimum_of_teacher.is_some()) {
            compared.teacher = context.teacher_on(&self.parts.validation, validation)?;
        }
        if compares(|gate| gate.minimum_gain.is_some()) {
            compared.baseline = self.measure_baseline(&self.parts.validation)?;
        }
        Ok(compared)
    }

    /// A language model before training, on the test rows: the baseline where the specification has none. It is the
    /// model that training begins with, so that no second copy of it is needed.
    fn measure_base(&self, model: &Network, reporter: &mut Option<Reporter>) -> Result<Option<Evaluation>, TrainError> {
        let (context, job) = (self.context, self.context.job);
        if !context.encoder.task.generates() || context.prepared.baseline.is_some() {
            return Ok(None);
        }
        stage(reporter, "Measuring the base model");
        let test = self.held_out.test()?;
        let how = How { group: context.group(), device: job.device(), bf16: false, generates: true };
        let found = evaluate::evaluate(model, &test, how, || job.beat())?;
        job.process.timeline.mark("baseMeasured");
        Ok(Some(found))
    }

    /// The baseline on some rows, with its own tokenizer and labels; `None` without a baseline.
    fn measure_baseline(&self, rows: &[usize]) -> Result<Option<Evaluation>, TrainError> {
        let (context, job) = (self.context, self.context.job);
        let Some(folder) = context.prepared.baseline.as_deref() else { return Ok(None) };
        let how = How { group: context.group(), device: job.device(), bf16: false, generates: true };
        let (tokenizer, max_length) = setup::load_tokenizer(job.spec(), folder)?;
        let (network, labels) = self.load_baseline(folder)?;
        let encoder = RowEncoder {
            dataset: &context.prepared.dataset,
            task: context.encoder.task,
            labels,
            tokenizer,
            max_length,
            generation: context.encoder.generation,
        };
        evaluate::evaluate(&network, &encoder.encode(rows)?, how, || job.beat()).map(Some)
    }

    /// The baseline as it is served, with its labels.
    fn load_baseline(&self, folder: &Path) -> Result<(Network, Vec<String>), TrainError> {
        let (task, device) = (self.context.encoder.task, self.context.job.device());
        if task.generates() {
            return Ok((setup::load_trained_decoder(folder, device)?.into(), Vec::new()));
        }
        let mut model = Model::load_trained(folder, device)?;
        let labels = match model.task() {
            athanor_models::Task::Classification(labels) => labels.clone(),
            _ => Vec::new(),
        };
        if labels.is_empty() == task.has_classes() || !task.accepts_teacher(model.task()) {
            return Err(TrainError::User(format!("evaluate.baseline is not a model for {:?}", task.kind())));
        }
        if device == Device::Cpu {
            let how = athanor_models::quantize::packing(&EncoderConfig::load(folder)?);
            model.pack_for_good(how)?;
        }
        Ok((model.into(), labels))
    }

    /// Everything of a manifest but its files.
    fn manifest(&self) -> Manifest {
        Manifest {
            kind: Kind::Checkpoint,
            job: self.context.job.config.name.clone(),
            model_digest: String::new(),
            data_digest: self.context.prepared.dataset.digest.clone(),
            parent: self.context.spec().model.from.clone(),
            code_version: env!("CARGO_PKG_VERSION").into(),
            step: 0,
            max_sequence_length: u32::try_from(self.context.encoder.max_length).ok(),
            files: BTreeMap::new(),
            metrics: BTreeMap::new(),
        }
    }

    /// What was chosen where the specification left it open.
    fn chosen(&self, trained: &Trained, found: &Evaluation, rows: usize) -> BTreeMap<String, String> {
        let topology = self.context.job.topology;
        let backend = match (topology.world(), topology.backend) {
            (1, _) => "none".to_owned(),
            (_, backend) => format!("{backend:?}"),
        };
        let (_, total_steps) = count_steps(rows, &self.context.spec().hyperparameters);
        let mut chosen = vec![
            ("labels", self.context.encoder.labels.join(", ")),
            ("trainedRows", rows.to_string()),
            ("precision", if self.context.bf16 { "BF16" } else { "FP32" }.to_owned()),
            ("steps", total_steps.to_string()),
            ("bestStep", trained.best.step.to_string()),
            ("ranks", topology.world().to_string()),
            ("backend", backend),
        ];
        if let Some(overlap) = &self.parts.overlap {
            chosen.push(("heldOutOverlap", overlap.rows.to_string()));
        }
        chosen.extend(found.results.limit());
        chosen.retain(|(name, value)| *name != "labels" || !value.is_empty());
        let left_out = left_out(&self.context.prepared.dataset.topics);
        chosen.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(left_out).collect()
    }
}

/// What is no row of the offset ranges of each Kafka source, if anything is not.
fn left_out(topics: &[TopicReport]) -> impl Iterator<Item = (String, String)> {
    let described = topics.iter().map(|topic| (format!("leftOut/{}", topic.source), topic.to_string()));
    described.filter(|(_, described)| !described.is_empty())
}

/// Sets the number of threads: `OMP_NUM_THREADS`, else the process's share of the machine's cores.
pub fn set_up_process(topology: &Topology) {
    let asked = std::env::var("OMP_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
    // Honours affinity and the container's CPU quota.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    athanor_torch::set_num_threads(asked.unwrap_or(cores / topology.processes_per_node));
}

/// The timeline of a process that has just started.
pub fn started_now() -> Timeline {
    Timeline::new(Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_has_what_each_source_left_out() {
        let topic = |source: &str, deleted, unsigned| TopicReport {
            source: source.into(),
            deleted,
            unsigned,
            ..TopicReport::default()
        };
        let found: Vec<_> = left_out(&[topic("a", 0, 0), topic("b", 3, 2)]).collect();
        let expected = "3 offsets deleted by retention, 2 events without a valid signature";
        assert_eq!(found, [("leftOut/b".to_owned(), expected.to_owned())]);
    }
}

//! One rank from start to exit code: everything slow starts at once, training begins as soon as its parts are there.

use std::{
    collections::BTreeMap,
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use athanor_contract::{
    artifact::{Kind, Manifest},
    train::{SelectSpec, Task, TeacherOutputs, TrainConfig, TrainResult},
};
use athanor_models::{EncoderConfig, Model, Tokenizer};
use athanor_torch::ProcessGroup;
use tch::{Device, Tensor};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    TrainError, checkpoint,
    data::{Dataset, Encoded, Parts},
    distributed::Topology,
    evaluate::{self, Evaluation},
    objectives::{
        self, Objective, Teacher,
        teacher::{MOST_CACHED, Online, cached_at, read_kept, write_cached},
    },
    outcome::Finished,
    prepare::{Prepared, prepare},
    report::{Events, Reporter, Sender, Timeline},
    select::{self, Selection},
    setup,
    training::{self, Session, count_steps},
    watchdog::Watchdog,
};

/// What surrounds a run.
pub struct Surroundings {
    pub runtime: Handle,
    pub timeline: Timeline,
    /// Asks the run to stop after a checkpoint.
    pub stop: CancellationToken,
    pub watchdog: Watchdog,
    /// Whether a person is watching.
    pub terminal: bool,
    /// For progress reports.
    pub namespace: String,
    pub loss_log: Option<PathBuf>,
}

const WORK: &str = "athanor-trainer-";
const LOCK: &str = "lock";

/// Removes the folders of processes that were killed.
fn clear_abandoned() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(WORK)
            && let Ok(lock) = File::open(entry.path().join(LOCK))
            && lock.try_lock().is_ok()
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Runs this process's rank. Rank 0 returns the result; the others `None`.
pub fn run(
    config: &TrainConfig,
    topology: &Topology,
    around: &Surroundings,
) -> Result<Option<TrainResult>, TrainError> {
    clear_abandoned();
    let _claim = (topology.rank() == 0).then(|| claim(config)).transpose()?;
    let work = tempfile::Builder::new().prefix(WORK).tempdir().map_err(TrainError::other)?;
    // Held as long as the folder is in use.
    let lock = File::create(work.path().join(LOCK)).map_err(TrainError::other)?;
    lock.lock().map_err(TrainError::other)?;
    let mut reporter = (topology.rank() == 0).then(|| reporter(config, around)).transpose()?;
    if let Some(reporter) = &mut reporter {
        reporter.stage("Preparing");
    }
    let result = Run { config, topology, around, work: work.path() }.run(&mut reporter);
    if let Some(reporter) = reporter {
        around.runtime.block_on(reporter.finish());
    }
    result
}

/// Keeps a second run out of the same folder until this one ends. An object store has no such lock: there artifacts and checkpoints
/// are whole, whoever is last.
fn claim(config: &TrainConfig) -> Result<Option<File>, TrainError> {
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

fn reporter(config: &TrainConfig, around: &Surroundings) -> Result<Reporter, TrainError> {
    let _inside = around.runtime.enter();
    let sender = config.progress_to.as_deref().map(Sender::start).transpose();
    let sender = sender.map_err(|error| TrainError::User(format!("progressTo: {error}")))?;
    let identity = (around.namespace.clone(), config.name.clone(), config.run_id.clone());
    Ok(Reporter::new(identity, sender, around.timeline.clone(), around.terminal))
}

struct Run<'a> {
    config: &'a TrainConfig,
    topology: &'a Topology,
    around: &'a Surroundings,
    work: &'a Path,
}

impl Run<'_> {
    fn run(&self, reporter: &mut Option<Reporter>) -> Result<Option<TrainResult>, TrainError> {
        let spec = &self.config.spec;
        let task = spec.model.task;
        let (device, runtime) = (self.topology.device(), &self.around.runtime);
        let prepared = prepare(self.config, self.topology, self.around, self.work)?;
        let group = prepared.group.as_ref();

        let dataset = &prepared.dataset;
        let labels = setup::choose_labels(spec, dataset, &prepared.parent, prepared.teacher.as_deref())?;
        let parts = dataset.split(&spec.data.split)?;
        setup::check_gates(&spec.evaluate.gates, dataset, &parts)?;
        let mut model = setup::load_model(spec, &prepared.parent, &labels, device)?;
        let tokenizer = Tokenizer::load(&prepared.parent)?;
        let max_length = setup::max_length(spec, model.config());
        let encode = |part: &[usize]| Encoded::new(dataset, part, task, &labels, &tokenizer, max_length);
        let mut train = encode(&parts.train)?;
        let bf16 = setup::uses_bf16(spec.hyperparameters.precision, device);
        let mut teacher = match &prepared.teacher {
            Some(folder) if setup::learns_from_teacher(spec) => {
                let texts: Vec<&str> = parts.train.iter().map(|&row| dataset.rows.text(row)).collect();
                let parent = &prepared.parent;
                Some(setup::load_teacher(spec, folder, parent, &labels, max_length, &texts, device)?)
            }
            _ => None,
        };
        let selection = match &spec.data.select {
            Some(select) => {
                if let Some(reporter) = reporter.as_mut() {
                    reporter.stage("Selecting");
                }
                let viewer = teacher.as_ref().map_or(&model, Online::model);
                let rows = teacher.as_ref().and_then(Online::own_rows).unwrap_or(&train.ids);
                let selection = self.select(select, viewer, rows, &train, &labels, group, bf16)?;
                train.select(&selection.rows);
                if let Some(teacher) = &mut teacher {
                    teacher.keep_rows(&selection.rows);
                }
                Some(selection.report)
            }
            None => None,
        };
        let teacher = match teacher {
            Some(teacher) => Some(self.teacher_outputs(teacher, &prepared, &train, &labels, bf16, reporter)?),
            None => None,
        };
        self.around.timeline.mark("dataReady");

        let (_, total_steps) = count_steps(train.len(), &spec.hyperparameters);
        let fingerprint = prepared.fingerprint;
        let restored = prepared.restored.filter(|restored| {
            let same = restored.state.fingerprint == fingerprint && restored.state.step <= total_steps;
            if !same {
                tracing::warn!("the checkpoint is of other data or another specification: training starts anew");
            }
            same
        });
        let manifest = Manifest {
            kind: Kind::Checkpoint,
            job: self.config.name.clone(),
            model_digest: String::new(),
            data_digest: dataset.digest.clone(),
            parent: spec.model.from.clone(),
            code_version: env!("CARGO_PKG_VERSION").into(),
            step: 0,
            max_sequence_length: u32::try_from(max_length).ok(),
            files: BTreeMap::new(),
            metrics: BTreeMap::new(),
        };
        let (checkpoints, events) = if self.topology.rank() == 0 {
            let to = athanor_store::open(&self.config.events_to)?;
            let step = restored.as_ref().map_or(0, |restored| restored.state.step);
            let work = self.work.to_owned();
            let events = Events::new(to, &work, step, &spec.hyperparameters)?;
            let writer = checkpoint::Writer::new(prepared.checkpoints, manifest.clone(), work, runtime.clone());
            (Some(writer), Some(events))
        } else {
            (None, None)
        };
        let objective = Objective::new(
            objectives::terms(&spec.objective, task, spec.teacher.as_ref()),
            task,
            &model,
            teacher.as_ref(),
            spec.hyperparameters.seed as u64,
            device,
        )?;

        // The other parts are tokenized while the first steps run.
        let held_out: OnceLock<Result<(Arc<Encoded>, Encoded), String>> = OnceLock::new();
        let encode_held_out = || {
            held_out.get_or_init(|| {
                let both =
                    encode(&parts.validation).and_then(|validation| Ok((Arc::new(validation), encode(&parts.test)?)));
                both.map_err(|error| error.to_string())
            })
        };
        let trained = std::thread::scope(|scope| {
            scope.spawn(encode_held_out);
            let session = Session {
                spec,
                device,
                bf16,
                group,
                model: &mut model,
                objective,
                teacher: teacher.as_ref(),
                train: &train,
                validation: Box::new(|| match encode_held_out() {
                    Ok((validation, _)) => Ok(validation.clone()),
                    Err(error) => Err(TrainError::User(error.clone())),
                }),
                fingerprint,
                restored,
                checkpoints,
                events,
                reporter: reporter.as_mut(),
                timeline: self.around.timeline.clone(),
                watchdog: self.around.watchdog.clone(),
                stop: self.around.stop.clone(),
                loss_log: self.around.loss_log.clone(),
            };
            training::train(session)
        })?;
        self.around.timeline.mark("trained");
        drop(teacher);
        let test = match encode_held_out() {
            Ok((_, test)) => test,
            Err(error) => return Err(TrainError::User(error.clone())),
        };
        if let Some(reporter) = reporter.as_mut() {
            reporter.stage("Evaluating");
        }
        let beat = || self.around.watchdog.beat();
        // In fp32, as a server computes.
        let found = evaluate::evaluate(&model, test, group, device, false, beat)?;
        let baseline = match &prepared.baseline {
            Some(folder) => Some(self.evaluate_baseline(folder, dataset, &parts, group)?),
            None => None,
        };
        self.around.timeline.mark("evaluated");
        if self.topology.rank() != 0 {
            self.around.watchdog.rest();
            return Ok(None);
        }
        if let Some(reporter) = reporter.as_mut() {
            reporter.stage(if spec.compress.is_empty() { "Writing" } else { "Compressing" });
        }
        let chosen = self.chosen(&labels, bf16, &trained.best, total_steps, train.len());
        let finished = Finished {
            config: self.config,
            around: self.around,
            work: self.work,
            model: &model,
            parent: &prepared.parent,
            labels: &labels,
            dataset,
            annotation: prepared.annotation.as_ref(),
            parts: &parts,
            train: &train,
            test,
            found,
            baseline,
            trained,
            selection,
            chosen,
            manifest,
        };
        finished.write().map(Some)
    }

    /// Chooses training rows on rank 0, for all ranks.
    #[expect(clippy::too_many_arguments, reason = "one call, of what a run has at hand")]
    fn select(
        &self,
        spec: &SelectSpec,
        viewer: &Model,
        rows: &[Vec<u32>],
        train: &Encoded,
        labels: &[String],
        group: Option<&ProcessGroup>,
        bf16: bool,
    ) -> Result<Selection, TrainError> {
        let device = self.topology.device();
        let beat = || self.around.watchdog.beat();
        let vectors = evaluate::embed(viewer, rows, group, device, bf16, beat)?.to_device(Device::Cpu);
        self.around.watchdog.rest();
        let mut selection = select::select(spec, &vectors, &train.labels, labels)?;
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

    /// The teacher's answers, computed once and kept beside the output where they are small and the objective needs no more.
    fn teacher_outputs(
        &self,
        teacher: Online,
        prepared: &Prepared,
        train: &Encoded,
        labels: &[String],
        bf16: bool,
        reporter: &mut Option<Reporter>,
    ) -> Result<Teacher, TrainError> {
        let (spec, runtime, device) = (&self.config.spec, &self.around.runtime, self.topology.device());
        let asked = spec.teacher.as_ref().and_then(|teacher| teacher.outputs);
        let by_token = spec.objective.terms.iter().any(|term| term.hidden_state.is_some());
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
        let (Some(folder), group) = (&prepared.teacher, prepared.group.as_ref()) else {
            return Err(TrainError::Other("the teacher's folder is not there".into()));
        };
        let output = athanor_store::open(&spec.output.to)?;
        let identity =
            (&prepared.dataset.digest, &spec.data.select, labels, spec.hyperparameters.max_sequence_length, bf16);
        let place = cached_at(&output, folder, &identity)?;
        let shape = [train.len(), teacher.outputs()];
        if let Some(kept) = read_kept(&place, shape, runtime, group, device, self.work)? {
            return Ok(Teacher::Cached(kept.to_device(device)));
        }
        let mut last = Instant::now();
        let logits = teacher.all_logits(&train.ids, group, device, bf16, |done| {
            self.around.watchdog.beat();
            if let Some(reporter) = reporter.as_mut() {
                reporter.asked(done, train.len());
            }
            if last.elapsed() > Duration::from_secs(10) {
                last = Instant::now();
                tracing::info!(rows = done, of = train.len(), "asking the teacher");
            }
        })?;
        self.around.watchdog.rest();
        self.around.timeline.mark("taught");
        if self.topology.rank() == 0 {
            runtime.block_on(write_cached(&place, &logits, self.work))?;
        }
        Ok(Teacher::Cached(logits))
    }

    /// The baseline on the test rows, with its own tokenizer and labels.
    fn evaluate_baseline(
        &self,
        folder: &Path,
        dataset: &Dataset,
        parts: &Parts,
        group: Option<&ProcessGroup>,
    ) -> Result<(Encoded, Evaluation), TrainError> {
        let device = self.topology.device();
        let spec = &self.config.spec;
        let mut model = Model::load_trained(folder, device)?;
        let labels = match model.task() {
            athanor_models::Task::Classification(labels) => labels.clone(),
            _ => Vec::new(),
        };
        if labels.is_empty() == (spec.model.task == Task::TextClassification) {
            return Err(TrainError::User(format!("evaluate.baseline is not a model for {:?}", spec.model.task)));
        }
        if device == Device::Cpu {
            let how = athanor_models::quantize::packing(&EncoderConfig::load(folder)?);
            model.pack(how)?;
        }
        let tokenizer = Tokenizer::load(folder)?;
        let max_length = setup::max_length(spec, model.config());
        let rows = Encoded::new(dataset, &parts.test, spec.model.task, &labels, &tokenizer, max_length)?;
        let beat = || self.around.watchdog.beat();
        let found = evaluate::evaluate(&model, &rows, group, device, false, beat)?;
        Ok((rows, found))
    }

    /// What the specification left open.
    fn chosen(
        &self,
        labels: &[String],
        bf16: bool,
        best: &checkpoint::Best,
        total_steps: u64,
        rows: usize,
    ) -> BTreeMap<String, String> {
        let backend = match (self.topology.world(), self.topology.backend) {
            (1, _) => "none".to_owned(),
            (_, backend) => format!("{backend:?}"),
        };
        let mut chosen = vec![
            ("labels", labels.join(", ")),
            ("trainedRows", rows.to_string()),
            ("precision", if bf16 { "BF16" } else { "FP32" }.to_owned()),
            ("steps", total_steps.to_string()),
            ("bestStep", best.step.to_string()),
            ("ranks", self.topology.world().to_string()),
            ("backend", backend),
        ];
        chosen.retain(|(name, value)| *name != "labels" || !value.is_empty());
        chosen.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Settings of the whole process, before the first tensor is made.
pub fn set_up_process(topology: &Topology) {
    athanor_torch::keep_freed_memory();
    // Honours affinity and the container's CPU quota.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    athanor_torch::set_num_threads(cores / topology.processes_per_node);
}

/// The clock of a process that has just begun.
pub fn started_now() -> Timeline {
    Timeline::new(Instant::now())
}

//! One rank from start to exit code: everything slow starts at once, training begins as soon as its parts are there.

use std::{
    collections::BTreeMap,
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Instant,
};

use athanor_contract::{
    artifact::{Kind, Manifest},
    train::{Task, TrainConfig, TrainResult},
};
use athanor_models::{EncoderConfig, Model, Tokenizer};
use athanor_torch::ProcessGroup;
use tch::Device;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    TrainError, checkpoint,
    cross_validation::cross_validate,
    data::{Dataset, Encoded, Parts},
    distributed::Topology,
    evaluate::{self, Evaluation},
    material::{Common, Material, RowEncoder},
    outcome::Finished,
    prepare::prepare,
    report::{Events, Reporter, Sender, Timeline},
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
        let device = self.topology.device();
        let mut prepared = prepare(self.config, self.topology, self.around, self.work)?;
        let restored = prepared.restored.take();
        let (prepared, dataset) = (&prepared, &prepared.dataset);
        let group = prepared.group.as_ref();

        let labels = setup::choose_labels(spec, dataset, &prepared.parent, prepared.teacher.as_deref())?;
        let parts = dataset.split(&spec.data.split)?;
        setup::check_gates(&spec.evaluate.gates, dataset, &parts)?;
        let common = Common {
            config: self.config,
            topology: self.topology,
            around: self.around,
            work: self.work,
            prepared,
            encoder: RowEncoder {
                dataset,
                task: spec.model.task,
                labels,
                tokenizer: Tokenizer::load(&prepared.parent)?,
                max_length: setup::max_length(spec, &EncoderConfig::load(&prepared.parent)?),
            },
            bf16: setup::uses_bf16(spec.hyperparameters.precision, device),
        };

        // Tokenized when they are first asked for, by a fold's validation or while the first steps run.
        let encoder = &common.encoder;
        let held_out: OnceLock<Result<(Arc<Encoded>, Encoded), String>> = OnceLock::new();
        let encode_held_out = || {
            held_out.get_or_init(|| {
                let validation = encoder.encode(&parts.validation);
                let both = validation.and_then(|validation| Ok((Arc::new(validation), encoder.encode(&parts.test)?)));
                both.map_err(|error| error.to_string())
            })
        };
        let validation = || match encode_held_out() {
            Ok((validation, _)) => Ok(validation.clone()),
            Err(error) => Err(TrainError::User(error.clone())),
        };
        let cross_validation = cross_validate(&common, &parts, &validation, reporter)?;

        let mut model = common.load_model()?;
        let Material { train, teacher, selection, augmented } = Material::new(&common, &parts.train, &model, reporter)?;
        self.around.timeline.mark("dataReady");

        let (_, total_steps) = count_steps(train.len(), &spec.hyperparameters);
        let restored = restored.filter(|restored| {
            let same = restored.state.fingerprint == prepared.fingerprint && restored.state.step <= total_steps;
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
            max_sequence_length: u32::try_from(encoder.max_length).ok(),
            files: BTreeMap::new(),
            metrics: BTreeMap::new(),
        };
        let (checkpoints, events) = if self.topology.rank() == 0 {
            let to = athanor_store::open(&self.config.events_to)?;
            let step = restored.as_ref().map_or(0, |restored| restored.state.step);
            let events = Events::new(to, self.work, step, &spec.hyperparameters)?;
            let (folder, runtime) = (prepared.checkpoints.clone(), self.around.runtime.clone());
            let writer = checkpoint::Writer::new(folder, manifest.clone(), self.work.to_owned(), runtime);
            (Some(writer), Some(events))
        } else {
            (None, None)
        };
        let objective = common.objective(&model, teacher.as_ref())?;
        let trained = std::thread::scope(|scope| {
            scope.spawn(encode_held_out);
            let session = Session {
                spec,
                stage: "Training".into(),
                device,
                bf16: common.bf16,
                group,
                model: &mut model,
                objective,
                teacher: teacher.as_ref(),
                train: &train,
                validation: Box::new(validation),
                fingerprint: prepared.fingerprint.clone(),
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
        let found = evaluate::evaluate_as_served(&mut model, test, group, device, beat)?;
        let teacher = common.teacher_on(&parts.test, test)?;
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
        let chosen = self.chosen(&common, &trained.best, total_steps, train.len());
        let finished = Finished {
            config: self.config,
            around: self.around,
            work: self.work,
            model: &model,
            parent: &prepared.parent,
            labels: &encoder.labels,
            dataset,
            annotation: prepared.annotation.as_ref(),
            parts: &parts,
            train: &train,
            test,
            found,
            baseline,
            teacher,
            trained,
            cross_validation,
            selection,
            augmented,
            chosen,
            manifest,
        };
        finished.write().map(Some)
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
            model.pack_for_good(how)?;
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
        common: &Common,
        best: &checkpoint::Best,
        total_steps: u64,
        rows: usize,
    ) -> BTreeMap<String, String> {
        let backend = match (self.topology.world(), self.topology.backend) {
            (1, _) => "none".to_owned(),
            (_, backend) => format!("{backend:?}"),
        };
        let mut chosen = vec![
            ("labels", common.encoder.labels.join(", ")),
            ("trainedRows", rows.to_string()),
            ("precision", if common.bf16 { "BF16" } else { "FP32" }.to_owned()),
            ("steps", total_steps.to_string()),
            ("bestStep", best.step.to_string()),
            ("ranks", self.topology.world().to_string()),
            ("backend", backend),
        ];
        chosen.retain(|(name, value)| *name != "labels" || !value.is_empty());
        chosen.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Settings of the whole process: its share of the machine's cores as threads, or what `OMP_NUM_THREADS` asks for.
pub fn set_up_process(topology: &Topology) {
    let asked = std::env::var("OMP_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
    // Honours affinity and the container's CPU quota.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    athanor_torch::set_num_threads(asked.unwrap_or(cores / topology.processes_per_node));
}

/// The clock of a process that has just begun.
pub fn started_now() -> Timeline {
    Timeline::new(Instant::now())
}

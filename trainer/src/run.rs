//! One rank from start to exit code: everything slow starts at once, training begins as soon as its parts are there.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use athanor_contract::{
    Decimal,
    artifact::{Kind, Manifest, sha256_hex},
    train::{Gate, Precision, TrainConfig, TrainResult, TrainSummary},
};
use athanor_models::{BertConfig, BertForSequenceClassification, Classifier, Tokenizer};
use athanor_torch::ProcessGroup;
use tch::{Device, Tensor};
use tokio::{runtime::Handle, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{
    TrainError, artifact, checkpoint,
    data::{self, Dataset, Encoded, Parts},
    distributed::{Topology, rendezvous},
    evaluate::{self, Predictions},
    report::{Reporter, Sender, Timeline, page},
    training::{self, Session, Trained, count_steps},
    watchdog::Watchdog,
};

/// What the ranks of a gang get to find each other; a pod may have to be scheduled and its image pulled meanwhile.
const RENDEZVOUS_PATIENCE: Duration = Duration::from_secs(300);

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
            && let Ok(lock) = std::fs::File::open(entry.path().join(LOCK))
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
    let work = tempfile::Builder::new().prefix(WORK).tempdir().map_err(TrainError::other)?;
    // Held as long as the folder is in use.
    let lock = std::fs::File::create(work.path().join(LOCK)).map_err(TrainError::other)?;
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

fn reporter(config: &TrainConfig, around: &Surroundings) -> Result<Reporter, TrainError> {
    let _inside = around.runtime.enter();
    let sender = config.progress_to.as_deref().map(Sender::start).transpose();
    let sender = sender.map_err(|error| TrainError::User(format!("progressTo: {error}")))?;
    let identity = (around.namespace.clone(), config.name.clone(), config.run_id.clone());
    Ok(Reporter::new(identity, sender, around.timeline.clone(), around.terminal))
}

/// The model folders on this machine.
struct Prepared {
    dataset: Dataset,
    parent: PathBuf,
    baseline: Option<PathBuf>,
    /// Of this run's data and specification.
    fingerprint: String,
    checkpoints: athanor_store::Location,
    restored: Option<checkpoint::Restored>,
    group: Option<ProcessGroup>,
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
        let (device, runtime) = (self.topology.device(), &self.around.runtime);
        let prepared = self.prepare()?;
        let group = prepared.group.as_ref();

        let dataset = &prepared.dataset;
        let parent_labels = BertConfig::load(&prepared.parent)?.labels();
        let labels = dataset.choose_labels(spec.model.labels.as_deref(), parent_labels.as_deref())?;
        let parts = dataset.split(&spec.data)?;
        check_gates(&spec.evaluate.gates, dataset, &parts)?;
        let mut model =
            BertForSequenceClassification::load(&prepared.parent, &labels, spec.hyperparameters.seed as u64, device)?;
        if let Some(dropout) = spec.model.head.as_ref().and_then(|head| head.dropout) {
            model.config_mut().classifier_dropout = Some(dropout);
        }
        let tokenizer = Tokenizer::load(&prepared.parent)?;
        let max_length =
            (spec.hyperparameters.max_sequence_length as usize).min(model.config().max_position_embeddings as usize);
        let encode = |part: &[usize]| Encoded::new(dataset, part, &labels, &tokenizer, max_length);
        let train = encode(&parts.train)?;
        self.around.timeline.mark("dataReady");

        let bf16 = uses_bf16(spec.hyperparameters.precision, device);
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
        let checkpoints = if self.topology.rank() == 0 {
            Some(checkpoint::Writer::new(prepared.checkpoints, manifest.clone(), self.work.to_owned(), runtime.clone()))
        } else {
            None
        };

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
                train: &train,
                validation: Box::new(|| match encode_held_out() {
                    Ok((validation, _)) => Ok(validation.clone()),
                    Err(error) => Err(TrainError::Other(error.clone())),
                }),
                fingerprint,
                restored,
                checkpoints,
                reporter: reporter.as_mut(),
                timeline: self.around.timeline.clone(),
                watchdog: self.around.watchdog.clone(),
                stop: self.around.stop.clone(),
                loss_log: self.around.loss_log.clone(),
            };
            training::train(session)
        })?;
        self.around.timeline.mark("trained");
        let test = match encode_held_out() {
            Ok((_, test)) => test,
            Err(error) => return Err(TrainError::Other(error.clone())),
        };
        if let Some(reporter) = reporter.as_mut() {
            reporter.stage("Evaluating");
        }
        let beat = || self.around.watchdog.beat();
        // In fp32, as a server computes.
        let predictions = evaluate::predict(&model, test, group, device, false, beat)?;
        let baseline = match &prepared.baseline {
            Some(folder) => Some(self.evaluate_baseline(folder, dataset, &parts, group)?),
            None => None,
        };
        self.around.watchdog.rest();
        self.around.timeline.mark("evaluated");
        if self.topology.rank() != 0 {
            return Ok(None);
        }

        if let Some(reporter) = reporter.as_mut() {
            reporter.stage("Writing");
        }
        let mut metrics = evaluate::report(test, &predictions, &dataset.sources);
        if let Some((rows, predictions)) = &baseline {
            let values = evaluate::report(rows, predictions, &dataset.sources);
            metrics.extend(values.into_iter().map(|(name, value)| (format!("baseline/{name}"), value)));
        }
        let metrics: BTreeMap<String, Decimal> =
            metrics.into_iter().filter_map(|(name, value)| Some((name, Decimal::new(value)?))).collect();
        let failed_gates = evaluate::failed_gates(
            &spec.evaluate.gates,
            &dataset.sources,
            (test, &predictions),
            baseline.as_ref().map(|(rows, predictions)| (rows, predictions)),
        );
        let Trained { steps, best, history, checkpoints } = trained;
        let folder = self.work.join("artifact");
        artifact::write(&folder, &model, &prepared.parent, &evaluate::reference(&labels, test, &predictions))?;
        let location = athanor_store::open(&self.config.artifact_to)?;
        let mut summary = TrainSummary {
            artifact: location.uri.clone(),
            model_digest: String::new(),
            data_digest: dataset.digest.clone(),
            steps,
            rows: parts.counts(),
            metrics: metrics.clone(),
            chosen: self.chosen(&labels, bf16, &best, total_steps),
            timeline: self.around.timeline.decimals(),
            failed_gates,
        };
        let report = page::Report {
            job: &self.config.name,
            created: jiff::Timestamp::now().round(jiff::Unit::Second).map_err(TrainError::other)?.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            parent: &spec.model.from,
            labels: &labels,
            summary: &summary,
            hyperparameters: &spec.hyperparameters,
            history: &history,
            sources: page::sources(dataset, &parts),
            confusion: page::confusion(&labels, test, &predictions),
            calibration: page::calibration(labels.len(), test, &predictions),
            mistakes: page::mistakes(&labels, dataset, &parts.test, test, &predictions),
        };
        page::write(&folder, &report)?;
        let manifest = Manifest { kind: Kind::Model, step: best.step, metrics, ..manifest };
        let manifest = runtime.block_on(athanor_store::artifact::upload(&folder, &location, manifest))?;
        if let Some(mut checkpoints) = checkpoints {
            checkpoints.finish()?;
        }
        self.around.timeline.mark("written");
        summary.model_digest = manifest.model_digest;
        summary.timeline = self.around.timeline.decimals();
        Ok(Some(if summary.failed_gates.is_empty() {
            TrainResult::Succeeded(summary)
        } else {
            TrainResult::GateFailed(summary)
        }))
    }

    /// Data, models, checkpoint and peers, all at the same time.
    fn prepare(&self) -> Result<Prepared, TrainError> {
        let (config, runtime) = (self.config, &self.around.runtime);
        let spec = &config.spec;
        let data = in_background(runtime, {
            let data = spec.data.clone();
            async move || data::read(&data).await
        });
        let parent = self.download(&spec.model.from, "parent");
        let baseline = spec.evaluate.baseline.as_ref().map(|uri| self.download(uri, "baseline"));
        let peers = std::thread::spawn({
            let topology = self.topology.clone();
            // A hung rank is its own watchdog's business first.
            let timeout = Duration::from_secs(u64::from(spec.failure_policy.hang_seconds) + 60);
            move || rendezvous(&topology, RENDEZVOUS_PATIENCE, timeout)
        });
        let dataset = joined(runtime, data)?;
        // Checkpoints of other data lie in another folder: they neither hide nor displace those of this run.
        let fingerprint = self.fingerprint(&dataset)?;
        let checkpoints = athanor_store::open(&config.checkpoint_to)?.child(&fingerprint[..16]);
        let newest = in_background(runtime, {
            let (folder, work) = (checkpoints.clone(), self.work.join("checkpoint"));
            async move || checkpoint::newest(&folder, &work).await
        });
        let parent = joined(runtime, parent)?;
        let baseline = baseline.map(|download| joined(runtime, download)).transpose()?;
        let restored = joined(runtime, newest)?;
        let group = peers.join().map_err(|_| TrainError::Other("the rendezvous panicked".into()))??;
        if group.is_some() {
            self.around.timeline.mark("rendezvous");
        }
        let restored = self.agree(group.as_ref(), &dataset, restored, &checkpoints)?;
        Ok(Prepared { dataset, parent, baseline, fingerprint, checkpoints, restored, group })
    }

    /// Fetches a model into a folder of its own.
    fn download(&self, uri: &str, name: &str) -> JoinHandle<Result<PathBuf, TrainError>> {
        let (uri, to) = (uri.to_owned(), self.work.join(name));
        in_background(&self.around.runtime, async move || {
            athanor_store::artifact::download_model(&athanor_store::open(&uri)?, &to).await?;
            Ok(to)
        })
    }

    /// All ranks train on rank 0's data from rank 0's checkpoint, or not at all.
    fn agree(
        &self,
        group: Option<&ProcessGroup>,
        dataset: &Dataset,
        restored: Option<checkpoint::Restored>,
        folder: &athanor_store::Location,
    ) -> Result<Option<checkpoint::Restored>, TrainError> {
        let Some(group) = group else { return Ok(restored) };
        let step = restored.as_ref().map_or(-1, |restored| restored.state.step as i64);
        let digest = i64::from_str_radix(&dataset.digest[..15], 16).map_err(TrainError::other)?;
        let shared = Tensor::from_slice(&[step, digest]).to_device(self.topology.device());
        group.broadcast(&shared, 0)?;
        let (step_of_0, digest_of_0) = (shared.int64_value(&[0]), shared.int64_value(&[1]));
        if digest != digest_of_0 {
            return Err(TrainError::Other("the data changed while the ranks read it".into()));
        }
        match u64::try_from(step_of_0) {
            Err(_) => Ok(None),
            Ok(_) if step == step_of_0 => Ok(restored),
            Ok(step) => {
                Ok(Some(self.around.runtime.block_on(checkpoint::fetch(folder, step, &self.work.join("agreed")))?))
            }
        }
    }

    /// The baseline on the test rows, with its own tokenizer and labels.
    fn evaluate_baseline(
        &self,
        folder: &Path,
        dataset: &Dataset,
        parts: &Parts,
        group: Option<&ProcessGroup>,
    ) -> Result<(Encoded, Predictions), TrainError> {
        let device = self.topology.device();
        let classifier = Classifier::load(folder, device)?;
        let tokenizer = Tokenizer::load(folder)?;
        let longest = self.config.spec.hyperparameters.max_sequence_length as usize;
        let max_length = longest.min(classifier.config().max_position_embeddings as usize);
        let rows = Encoded::new(dataset, &parts.test, classifier.labels(), &tokenizer, max_length)?;
        let beat = || self.around.watchdog.beat();
        let predictions = evaluate::predict(classifier.model(), &rows, group, device, false, beat)?;
        Ok((rows, predictions))
    }

    /// What a checkpoint must have been made for to be of use here. Ranks and output may differ.
    fn fingerprint(&self, dataset: &Dataset) -> Result<String, TrainError> {
        let spec = &self.config.spec;
        let identity = (&dataset.digest, &spec.model, &spec.hyperparameters);
        Ok(sha256_hex(&serde_json::to_vec(&identity).map_err(TrainError::other)?))
    }

    /// What the specification left open.
    fn chosen(
        &self,
        labels: &[String],
        bf16: bool,
        best: &checkpoint::Best,
        total_steps: u64,
    ) -> BTreeMap<String, String> {
        let backend = match (self.topology.world(), self.topology.backend) {
            (1, _) => "none".to_owned(),
            (_, backend) => format!("{backend:?}"),
        };
        [
            ("labels", labels.join(", ")),
            ("precision", if bf16 { "BF16" } else { "FP32" }.to_owned()),
            ("steps", total_steps.to_string()),
            ("bestStep", best.step.to_string()),
            ("ranks", self.topology.world().to_string()),
            ("backend", backend),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
    }
}

/// A gate over sources without test rows could only fail after all the work.
pub fn check_gates(gates: &[Gate], dataset: &Dataset, parts: &Parts) -> Result<(), TrainError> {
    for (index, gate) in gates.iter().enumerate() {
        let Some(names) = &gate.sources else { continue };
        let is_covered = parts.test.iter().any(|&row| names.contains(&dataset.sources[dataset.rows[row].0]));
        if !is_covered {
            return Err(TrainError::User(format!(
                "evaluate.gates[{index}]: none of the test rows comes from {}",
                names.join(", ")
            )));
        }
    }
    Ok(())
}

/// Runs async work on a thread of its own: it may compute between its waits.
fn in_background<T: Send + 'static>(
    runtime: &Handle,
    work: impl AsyncFnOnce() -> Result<T, TrainError> + Send + 'static,
) -> JoinHandle<Result<T, TrainError>> {
    let handle = runtime.clone();
    runtime.spawn_blocking(move || handle.block_on(work()))
}

fn joined<T>(runtime: &Handle, task: JoinHandle<Result<T, TrainError>>) -> Result<T, TrainError> {
    runtime.block_on(task).map_err(TrainError::other)?
}

/// Whether matrix products are in bfloat16.
pub fn uses_bf16(precision: Precision, device: Device) -> bool {
    match precision {
        Precision::FP32 => false,
        Precision::BF16 => true,
        Precision::Auto => computes_in_bf16(device),
    }
}

/// Whether bfloat16 products are the hardware's own.
fn computes_in_bf16(device: Device) -> bool {
    if device.is_cuda() {
        return true;
    }
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
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

//! Training state in folders `step-NNNNNNNN`, written in the background and complete once their manifest is there.
//!
//! A checkpoint holds weights, optimizer moments, the best weights so far and the step. Batches, learning rates and the
//! random state of a step are functions of seed and step, so nothing else is needed to go on exactly as if nothing had
//! happened.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use athanor_contract::artifact::{MANIFEST, Manifest};
use athanor_models::load::{self, Weights};
use athanor_store::{Location, StoreError, artifact};
use serde::{Deserialize, Serialize};
use tch::Device;
use tokio::{
    runtime::Handle,
    task::{JoinError, JoinHandle},
};

use super::named::Named;
use crate::{
    TrainError,
    report::{History, Upload},
};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const BEST: &str = "best.safetensors";
const STATE: &str = "state.json";
/// Complete checkpoints that are kept: the newest, and one more in case the newest is damaged.
const KEPT: usize = 2;

/// What a checkpoint says about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Optimizer steps taken.
    pub step: u64,
    /// Digest of data and specification: another one means that these weights belong to another run.
    pub fingerprint: String,
    pub best: Option<Best>,
    /// Steps, counted from 1, that are left out since a roll-back; those before `step` have been.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub skipped: BTreeSet<u64>,
    /// The history, for the report.
    #[serde(default)]
    pub history: History,
}

/// The best validation so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    /// The more the better; what it is depends on the task.
    pub score: f64,
    /// What else was measured then, by name.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
}

/// Copies, in the host's memory, of everything a checkpoint holds, so that training can go on while they are written.
pub struct Snapshot {
    pub state: State,
    pub model: Named,
    pub optimizer: Named,
    /// Rank 0's. They must not be changed in place: they are the only copy.
    pub best: Option<Named>,
}

impl Snapshot {
    /// The same snapshot once more, sharing memory: neither may be changed in place.
    pub fn share(&self) -> Self {
        let share = |named: &Named| named.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        Self {
            state: self.state.clone(),
            model: share(&self.model),
            optimizer: share(&self.optimizer),
            best: self.best.as_ref().map(share),
        }
    }
}

/// A downloaded checkpoint.
#[derive(Debug)]
pub struct Restored {
    pub state: State,
    folder: PathBuf,
}

impl Restored {
    pub fn model(&self, device: Device) -> Result<Weights, TrainError> {
        Ok(Weights::load(&self.folder.join(MODEL), device)?)
    }

    pub fn optimizer(&self, device: Device) -> Result<Weights, TrainError> {
        Ok(Weights::load(&self.folder.join(OPTIMIZER), device)?)
    }

    /// The best weights, where a validation had happened.
    pub fn best(&self, device: Device) -> Result<Option<Weights>, TrainError> {
        let path = self.folder.join(BEST);
        if self.state.best.is_none() {
            return Ok(None);
        }
        // Best and newest are the same file when the newest step was the best.
        let path = if path.exists() { path } else { self.folder.join(MODEL) };
        Ok(Some(Weights::load(&path, device)?))
    }
}

/// The newest checkpoint that is whole, fetched below `work`. A damaged one is passed over with a warning.
pub async fn newest(folder: &Location, work: &Path) -> Result<Option<Restored>, TrainError> {
    for step in complete_steps(&folder.list().await?).into_iter().rev() {
        match fetch(folder, step, work).await {
            Ok(restored) => return Ok(Some(restored)),
            Err(error) => tracing::warn!(step, %error, "a checkpoint cannot be used, the one before it is tried"),
        }
    }
    Ok(None)
}

/// The checkpoint of one step.
pub async fn fetch(folder: &Location, step: u64, work: &Path) -> Result<Restored, TrainError> {
    let to = work.join(name(step));
    artifact::download(&folder.child(&name(step)), &to).await?;
    let path = to.join(STATE);
    let text = tokio::fs::read(&path).await.map_err(TrainError::at(&path))?;
    let state: State = serde_json::from_slice(&text).map_err(TrainError::other)?;
    Ok(Restored { state, folder: to })
}

/// Writes checkpoints one at a time; rank 0 has one.
pub struct Writer {
    folder: Location,
    /// Everything of a manifest but step and files.
    template: Manifest,
    work: PathBuf,
    runtime: Handle,
    writing: Option<JoinHandle<Result<u64, TrainError>>>,
    newest: u64,
}

impl Writer {
    pub fn new(folder: Location, template: Manifest, work: PathBuf, runtime: Handle) -> Self {
        Self { folder, template, work, runtime, writing: None, newest: 0 }
    }

    /// Step of the newest checkpoint that is complete.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Whether a checkpoint is still being written.
    pub fn is_busy(&self) -> bool {
        self.writing.as_ref().is_some_and(|writing| !writing.is_finished())
    }

    /// Starts to write in the background, after waiting for the one before. `events` go first: the curves of a
    /// checkpoint are there.
    pub fn save(&mut self, snapshot: Snapshot, events: Option<Upload>) -> Result<(), TrainError> {
        self.finish()?;
        let manifest = Manifest { step: snapshot.state.step, ..self.template.clone() };
        let (folder, work, runtime) = (self.folder.clone(), self.work.clone(), self.runtime.clone());
        self.writing = Some(self.runtime.spawn_blocking(move || {
            runtime.block_on(async {
                if let Some(events) = events
                    && let Err(error) = events.send().await
                {
                    tracing::warn!(%error, "the curves could not be uploaded");
                }
                write(folder, manifest, work, snapshot).await
            })
        }));
        Ok(())
    }

    /// Waits for the checkpoint under way. A store that is away costs this checkpoint and a warning, no more: the next
    /// may do. One that refuses access or does not exist ends the run, whose artifact would not arrive either.
    pub fn finish(&mut self) -> Result<(), TrainError> {
        match self.writing.take() {
            Some(writing) => self.ended(self.runtime.block_on(writing)),
            None => Ok(()),
        }
    }

    /// Waits at most so long for the checkpoint under way; returns whether none is under way any more. Errors are those
    /// of [`Writer::finish`].
    pub fn wait(&mut self, most: Duration) -> Result<bool, TrainError> {
        let Some(writing) = &mut self.writing else { return Ok(true) };
        let Ok(ended) = self.runtime.block_on(async { tokio::time::timeout(most, writing).await }) else {
            return Ok(false);
        };
        self.writing = None;
        self.ended(ended)?;
        Ok(true)
    }

    fn ended(&mut self, written: Result<Result<u64, TrainError>, JoinError>) -> Result<(), TrainError> {
        match written.map_err(TrainError::other)? {
            Ok(step) => self.newest = step,
            Err(error @ TrainError::User(_)) => return Err(error),
            Err(error) => {
                metrics::counter!("athanor_train_checkpoint_failures_total").increment(1);
                tracing::warn!(%error, "a checkpoint could not be written");
            }
        }
        Ok(())
    }

    /// Takes note of a checkpoint that has been completed meanwhile.
    pub fn poll(&mut self) -> Result<(), TrainError> {
        if self.writing.as_ref().is_some_and(JoinHandle::is_finished) { self.finish() } else { Ok(()) }
    }
}

/// Runs on a thread of its own: hashing and copying take their time.
async fn write(folder: Location, manifest: Manifest, work: PathBuf, snapshot: Snapshot) -> Result<u64, TrainError> {
    let step = snapshot.state.step;
    let from = work.join(format!("saving-{step}"));
    // A local disk's trouble is not the user's error.
    let written = match write_files(&from, &snapshot).map_err(TrainError::other) {
        Ok(()) => {
            drop(snapshot);
            artifact::upload(&from, &folder.child(&name(step)), manifest).await.map_err(TrainError::from)
        }
        Err(error) => Err(error),
    };
    // Also of a checkpoint that failed: many of them would fill the disk.
    let _ = tokio::fs::remove_dir_all(&from).await;
    if let Err(error) = written {
        let _ = delete_half(&folder.child(&name(step))).await;
        return Err(error);
    }
    tracing::info!(step, "checkpoint written");
    if let Err(error) = delete_old(&folder, step).await {
        tracing::warn!(%error, "old checkpoints could not be deleted");
    }
    Ok(step)
}

/// Deletes what has arrived of a checkpoint that has no manifest.
async fn delete_half(folder: &Location) -> Result<(), StoreError> {
    if folder.child(MANIFEST).exists().await? {
        return Ok(());
    }
    for name in folder.list().await? {
        folder.child(&name).delete().await?;
    }
    Ok(())
}

fn write_files(to: &Path, snapshot: &Snapshot) -> Result<(), TrainError> {
    std::fs::create_dir_all(to).map_err(TrainError::at(to))?;
    load::save(&to.join(MODEL), &snapshot.model)?;
    load::save(&to.join(OPTIMIZER), &snapshot.optimizer)?;
    let best_is_newest = snapshot.state.best.as_ref().is_some_and(|best| best.step == snapshot.state.step);
    if let Some(best) = snapshot.best.as_ref().filter(|_| !best_is_newest) {
        load::save(&to.join(BEST), best)?;
    }
    let state = serde_json::to_vec_pretty(&snapshot.state).map_err(TrainError::other)?;
    let path = to.join(STATE);
    std::fs::write(&path, state).map_err(TrainError::at(&path))
}

/// Deletes this run's checkpoints before the newest [`KEPT`], each manifest first: what is half deleted is not there.
async fn delete_old(folder: &Location, newest: u64) -> Result<(), StoreError> {
    let names = folder.list().await?;
    let complete = complete_steps(&names);
    let oldest_kept = complete.iter().rev().nth(KEPT - 1).copied().unwrap_or(0).min(newest);
    let mut old: Vec<&String> =
        names.iter().filter(|name| step_of(name).is_some_and(|step| step < oldest_kept)).collect();
    old.sort_by_key(|name| !name.ends_with(MANIFEST));
    for name in old {
        folder.child(name).delete().await?;
    }
    Ok(())
}

fn name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step whose folder a file lies in.
fn step_of(file: &str) -> Option<u64> {
    file.split_once('/')?.0.strip_prefix("step-")?.parse().ok()
}

/// Steps whose folder has a manifest, ascending.
fn complete_steps(names: &[String]) -> Vec<u64> {
    let mut steps: Vec<u64> = names
        .iter()
        .filter(|name| name.split_once('/').is_some_and(|(_, file)| file == MANIFEST))
        .filter_map(|name| step_of(name))
        .collect();
    steps.sort_unstable();
    steps
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Instant};

    use athanor_contract::artifact::Kind;
    use tch::Tensor;

    use super::*;

    #[test]
    fn a_slow_upload_is_waited_for_in_parts() {
        let work = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let location = athanor_store::open(&format!("file://{}", work.path().display())).unwrap();
        let mut writer = Writer::new(location, template(), work.path().to_owned(), runtime.handle().clone());
        assert!(writer.wait(Duration::ZERO).unwrap(), "nothing is under way");
        let (uploaded, waits) = std::sync::mpsc::channel::<()>();
        writer.writing = Some(runtime.spawn_blocking(move || {
            waits.recv().unwrap();
            Ok(5)
        }));
        for _ in 0..3 {
            assert!(!writer.wait(Duration::from_millis(5)).unwrap() && writer.is_busy());
        }
        uploaded.send(()).unwrap();
        let begun = Instant::now();
        while !writer.wait(Duration::from_millis(5)).unwrap() {
            assert!(begun.elapsed() < Duration::from_secs(60));
        }
        assert_eq!((writer.newest(), writer.is_busy()), (5, false));
    }

    fn template() -> Manifest {
        Manifest {
            kind: Kind::Checkpoint,
            job: "job".into(),
            model_digest: String::new(),
            data_digest: "d".into(),
            parent: "p".into(),
            code_version: "0".into(),
            step: 0,
            max_sequence_length: None,
            files: BTreeMap::new(),
            metrics: BTreeMap::new(),
        }
    }

    #[test]
    fn the_newest_whole_checkpoint_is_found_and_two_are_kept() {
        let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let location =
            athanor_store::open(&format!("file://{}", folder.path().display())).unwrap().child("checkpoints");
        assert!(runtime.block_on(newest(&location, work.path())).unwrap().is_none());
        let mut writer = Writer::new(location.clone(), template(), work.path().to_owned(), runtime.handle().clone());
        for step in [5, 10, 15] {
            let named = |value: i64| vec![("w".to_owned(), Tensor::from_slice(&[value as f32]))];
            let best = Best { step: 10, score: 0.5, metrics: [("macroF1".to_owned(), 0.25)].into() };
            let snapshot = Snapshot {
                state: State {
                    step,
                    fingerprint: "f".into(),
                    best: (step >= 10).then_some(best),
                    skipped: [3, step].into(),
                    history: History::default(),
                },
                model: named(step as i64),
                optimizer: named(-(step as i64)),
                best: (step >= 10).then(|| named(10)),
            };
            writer.save(snapshot, None).unwrap();
        }
        writer.finish().unwrap();
        assert_eq!(writer.newest(), 15);
        let names = runtime.block_on(location.list()).unwrap();
        assert_eq!(complete_steps(&names), [10, 15]);
        assert!(names.iter().all(|name| step_of(name) != Some(5)), "{names:?}");

        let value = |weights: &mut Weights| f64::try_from(weights.take("w", &[1]).unwrap()).unwrap();
        let restored = runtime.block_on(newest(&location, work.path())).unwrap().unwrap();
        assert_eq!(restored.state.step, 15);
        assert_eq!(restored.state.skipped, [3, 15].into());
        assert_eq!(value(&mut restored.model(Device::Cpu).unwrap()), 15.0);
        assert_eq!(value(&mut restored.optimizer(Device::Cpu).unwrap()), -15.0);
        assert_eq!(value(&mut restored.best(Device::Cpu).unwrap().unwrap()), 10.0);

        let damaged = folder.path().join("checkpoints/step-00000015").join(MODEL);
        std::fs::write(damaged, b"half").unwrap();
        let restored = runtime.block_on(newest(&location, work.path())).unwrap().unwrap();
        assert_eq!(restored.state.step, 10);
        assert_eq!(value(&mut restored.best(Device::Cpu).unwrap().unwrap()), 10.0);
    }
}

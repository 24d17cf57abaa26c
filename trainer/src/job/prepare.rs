//! What a run requires before its first step, fetched at the same time: data, models, the newest checkpoint, and the
//! peers.

use std::{path::PathBuf, time::Duration};

use athanor_contract::{artifact::sha256_hex, train::TrainConfig};
use athanor_store::Location;
use athanor_torch::ProcessGroup;
use tch::{Device, Tensor};
use tokio::{runtime::Handle, task::JoinHandle};

use super::context::JobContext;
use crate::{
    TrainError,
    curate::annotate::{self, Annotation},
    data::Dataset,
    distributed::{Topology, rendezvous},
    report::Reading,
    tasks,
    train::checkpoint,
};

/// Folder next to the checkpoints with the rows that were read from topics.
const SNAPSHOTS: &str = "snapshots";

/// Time for the ranks of a gang to find each other; a pod may have to be scheduled and its image pulled meanwhile.
const RENDEZVOUS_PATIENCE: Duration = Duration::from_secs(300);

/// The rows, and the model folders on this machine.
pub struct Prepared {
    pub dataset: Dataset,
    /// Absent where no rows were annotated.
    pub annotation: Option<Annotation>,
    pub parent: PathBuf,
    pub teacher: Option<PathBuf>,
    pub baseline: Option<PathBuf>,
    /// Digest of this run's data and specification.
    pub fingerprint: String,
    pub checkpoints: athanor_store::Location,
    pub restored: Option<checkpoint::Restored>,
    pub group: Option<ProcessGroup>,
}

/// Fetches everything.
///
/// # Errors
/// A malformed row is a user error and names file, row and field; so is a source without rows, and a model that cannot
/// be read.
pub fn prepare(job: JobContext) -> Result<Prepared, TrainError> {
    let JobContext { config, topology, process, work } = job;
    let (spec, runtime) = (&config.spec, &process.runtime);
    let data = read_once(job, athanor_store::open(&config.checkpoint_to)?.child(SNAPSHOTS));
    let download = |uri: &str, name: &str| {
        let (uri, to) = (uri.to_owned(), work.join(name));
        in_background(runtime, async move || {
            athanor_store::artifact::download_model(&athanor_store::open(&uri)?, &to).await?;
            Ok(to)
        })
    };
    let parent = download(&spec.model.from, "parent");
    let teacher = spec.teacher.as_ref().map(|teacher| download(&teacher.from, "teacher"));
    let baseline = spec.evaluate.baseline.as_ref().map(|uri| download(uri, "baseline"));
    let peers = std::thread::spawn({
        let (topology, watchdog) = (topology.clone(), process.watchdog.clone());
        // The watchdog of a hung rank comes first.
        let timeout = Duration::from_secs(u64::from(spec.failure_policy.hang_seconds) + 60);
        move || rendezvous(&topology, RENDEZVOUS_PATIENCE, timeout, &watchdog)
    });
    let mut dataset = joined(runtime, data)?;
    let group = peers.join().map_err(|_| TrainError::Other("the rendezvous panicked".into()))??;
    if group.is_some() {
        process.timeline.mark("rendezvous");
    }
    let (annotator, teacher) = if spec.data.teacher_annotates() { (teacher, None) } else { (None, teacher) };
    let annotator = annotator.map(|download| joined(runtime, download)).transpose()?;
    let context = annotate::Context { job, group: group.as_ref(), teacher: annotator.as_deref() };
    // Labels are shared row by row.
    if let Some(group) = &group {
        same_data(group, topology.device(), &dataset.digest)?;
    }
    let annotation = annotate::complete(&mut dataset, &context)?;
    // Checkpoints of other data lie in another folder: they neither hide nor displace those of this run.
    let fingerprint = fingerprint(config, &dataset)?;
    let checkpoints = athanor_store::open(&config.checkpoint_to)?.child(&fingerprint[..16]);
    let newest = in_background(runtime, {
        let (folder, work) = (checkpoints.clone(), work.join("checkpoint"));
        async move || checkpoint::newest(&folder, &work).await
    });
    let parent = joined(runtime, parent)?;
    let teacher = teacher.map(|download| joined(runtime, download)).transpose()?.or(annotator);
    let baseline = baseline.map(|download| joined(runtime, download)).transpose()?;
    let restored = joined(runtime, newest)?;
    let restored = match &group {
        Some(group) => {
            let fetch = |step| runtime.block_on(checkpoint::fetch(&checkpoints, step, &work.join("agreed")));
            agree(group, topology, &dataset, restored, fetch)?
        }
        None => restored,
    };
    Ok(Prepared { dataset, annotation, parent, teacher, baseline, fingerprint, checkpoints, restored, group })
}

/// Reads, cleans and compares the rows on the first process of this machine, on a thread of its own; the others load
/// its result, without what the report alone has.
fn read_once(job: JobContext, snapshots: Location) -> JoinHandle<Result<Dataset, TrainError>> {
    let JobContext { config, process, .. } = job;
    let (data, task) = (config.spec.data.clone(), tasks::of(config.spec.model.task));
    let (reading, runtime) = (Reading::new(process.terminal), process.runtime.clone());
    let (node, watchdog) = (process.node.clone(), process.watchdog.clone());
    process.runtime.spawn_blocking(move || {
        let read = || runtime.block_on(reading.read_keeping(&data, task.needs_labels(), &snapshots));
        // The rendezvous, which may be watched at the same time, begins and ends the watch.
        node.once("rows", || watchdog.beat_while_watched(), read, |rows, to| rows.write(to), Dataset::read)
    })
}

/// Format of checkpoints; it changes with their tensors.
const FORMAT: u32 = 2;

/// What a checkpoint must have been made for to be of use here. Ranks and output may differ.
fn fingerprint(config: &TrainConfig, dataset: &Dataset) -> Result<String, TrainError> {
    let spec = &config.spec;
    let asked =
        (&spec.model, &spec.hyperparameters, &spec.teacher, &spec.objective, &spec.data.select, &spec.data.augment);
    let identity = (FORMAT, &dataset.digest, asked);
    Ok(sha256_hex(&serde_json::to_vec(&identity).map_err(TrainError::other)?))
}

/// Whether this rank's rows are those of rank 0, by their digest; all ranks have to call it alike.
fn same_data(group: &ProcessGroup, device: Device, digest: &str) -> Result<(), TrainError> {
    let digest = i64::from_str_radix(&digest[..15], 16).map_err(TrainError::other)?;
    let of_0 = Tensor::from_slice(&[digest]).to_device(device);
    group.broadcast(&of_0, 0)?;
    if of_0.int64_value(&[0]) == digest {
        Ok(())
    } else {
        Err(TrainError::Other("the data changed while the ranks read it".into()))
    }
}

/// All ranks train on rank 0's data from rank 0's checkpoint, or not at all.
fn agree(
    group: &ProcessGroup,
    topology: &Topology,
    dataset: &Dataset,
    restored: Option<checkpoint::Restored>,
    fetch: impl FnOnce(u64) -> Result<checkpoint::Restored, TrainError>,
) -> Result<Option<checkpoint::Restored>, TrainError> {
    same_data(group, topology.device(), &dataset.digest)?;
    let step = restored.as_ref().map_or(-1, |restored| restored.state.step as i64);
    let shared = Tensor::from_slice(&[step]).to_device(topology.device());
    group.broadcast(&shared, 0)?;
    let step_of_0 = shared.int64_value(&[0]);
    match u64::try_from(step_of_0) {
        Err(_) => Ok(None),
        Ok(_) if step == step_of_0 => Ok(restored),
        Ok(step) => Ok(Some(fetch(step)?)),
    }
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

#[cfg(test)]
mod tests {
    use athanor_torch::{Backend, Rendezvous};

    use super::*;

    #[test]
    fn a_rank_with_other_rows_is_refused() {
        let of_rank = |at: Rendezvous| {
            let rank = at.rank;
            let group = ProcessGroup::new(Backend::Gloo, at).unwrap();
            let same = same_data(&group, Device::Cpu, &"5".repeat(64));
            let other = same_data(&group, Device::Cpu, &rank.to_string().repeat(64));
            // Rank 0 has the store that the other is still using.
            group.barrier().unwrap();
            (same, other)
        };
        let ranks: [Rendezvous; 2] = Rendezvous::on_loopback(2).unwrap().try_into().unwrap();
        let [first, second] = std::thread::scope(|scope| {
            ranks.map(|at| scope.spawn(move || of_rank(at))).map(|rank| rank.join().unwrap())
        });
        assert!(first.0.is_ok() && second.0.is_ok() && first.1.is_ok());
        assert!(second.1.unwrap_err().to_string().contains("the data changed while the ranks read it"));
    }
}

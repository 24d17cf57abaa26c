//! What the processes of one machine compute once: the first of them makes it, the others load its file.
//!
//! The launcher gives its processes a common folder. There the first process writes a value, then gives the complete
//! file one name (hard link) for each other process, which removes its name once the file is open: the disk has the
//! bytes only until the last one has loaded them. Without such a folder, or with one process, each process makes the
//! value itself.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::Topology;
use crate::{
    TrainError,
    lock::{hold, is_held},
};

/// Between looks for a file, and between two beats.
const POLL: Duration = Duration::from_millis(20);
/// Held by the first process as long as it runs.
const ALIVE: &str = "first.lock";

/// The processes of this machine. Clones share their state.
#[derive(Clone, Default)]
pub struct Node(Option<Arc<Shared>>);

struct Shared {
    folder: PathBuf,
    local_rank: usize,
    processes: usize,
    /// Number of the next value: all processes ask for the same ones in the same order.
    next: AtomicUsize,
    _alive: Option<File>,
}

/// Why the first process has no value.
#[derive(Serialize, Deserialize)]
struct Failure {
    is_user_error: bool,
    message: String,
}

impl Node {
    /// `folder` is the launcher's.
    ///
    /// # Errors
    /// A folder that the first process cannot write to.
    pub fn join(topology: &Topology, folder: Option<PathBuf>) -> Result<Self, TrainError> {
        let (local_rank, processes) = (topology.local_rank, topology.processes_per_node);
        let Some(folder) = folder.filter(|_| processes > 1) else { return Ok(Self(None)) };
        let alive = (local_rank == 0).then(|| hold(&folder, ALIVE)).transpose()?;
        Ok(Self(Some(Arc::new(Shared { folder, local_rank, processes, next: AtomicUsize::new(0), _alive: alive }))))
    }

    /// A value that all processes of the machine require, by `make` of the first one. The others call `beat` while they
    /// wait. All processes call this in the same order.
    ///
    /// # Errors
    /// Those of `make`: a user error is that of all processes; after another one, or the end of the first process, the
    /// others lose a peer.
    pub fn once<T>(
        &self,
        what: &str,
        beat: impl Fn(),
        make: impl FnOnce() -> Result<T, TrainError>,
        write: impl FnOnce(&T, &mut BufWriter<File>) -> io::Result<()>,
        read: impl FnOnce(&mut BufReader<File>) -> io::Result<T>,
    ) -> Result<T, TrainError> {
        let Some(shared) = &self.0 else { return make() };
        let file = shared.folder.join(format!("{}-{what}", shared.next.fetch_add(1, Ordering::Relaxed)));
        if shared.local_rank > 0 {
            let ready = shared.wait(&file, what, beat)?;
            let value = read(&mut BufReader::new(ready)).map_err(TrainError::at(&file))?;
            tracing::info!("loaded the {what} that the first process of this machine prepared");
            return Ok(value);
        }
        let made = make().and_then(|value| {
            shared.publish(&file, |to| write(&value, to)).map_err(TrainError::at(&file))?;
            Ok(value)
        });
        if let Err(error) = &made {
            shared.tell_failure(&file, error);
        }
        made
    }
}

impl Shared {
    fn publish(&self, file: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
        let unnamed = file.with_extension("new");
        let mut to = BufWriter::new(File::create(&unnamed)?);
        write(&mut to)?;
        to.flush()?;
        (1..self.processes).try_for_each(|rank| std::fs::hard_link(&unnamed, named(file, rank)))?;
        std::fs::remove_file(&unnamed)
    }

    /// Ends the wait of the others; if that fails too, the end of this process does.
    fn tell_failure(&self, file: &Path, error: &TrainError) {
        let failure = Failure { is_user_error: matches!(error, TrainError::User(_)), message: error.to_string() };
        let unnamed = file.with_extension("new");
        let written = serde_json::to_vec(&failure)
            .map_err(io::Error::from)
            .and_then(|bytes| std::fs::write(&unnamed, bytes))
            .and_then(|()| std::fs::rename(&unnamed, file.with_extension("failed")));
        if let Err(error) = written {
            tracing::warn!(%error, "the other processes of this machine are not told of the failure");
        }
    }

    /// The first process's file, open.
    fn wait(&self, file: &Path, what: &str, beat: impl Fn()) -> Result<File, TrainError> {
        let name = named(file, self.local_rank);
        loop {
            // In this order: what the first process wrote last is found even if it has ended since.
            let has_ended = is_held(&self.folder, ALIVE) == Some(false);
            match File::open(&name) {
                Ok(ready) => {
                    let _ = std::fs::remove_file(&name);
                    return Ok(ready);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(TrainError::at(&name)(error)),
            }
            if let Ok(failure) = std::fs::read(file.with_extension("failed")) {
                let Failure { is_user_error, message } = serde_json::from_slice(&failure).map_err(TrainError::other)?;
                return Err(match is_user_error {
                    true => TrainError::User(message),
                    false => TrainError::LostPeer(format!("the first process of this machine failed: {message}")),
                });
            }
            if has_ended {
                return Err(TrainError::LostPeer(format!(
                    "the first process of this machine ended before it had prepared the {what}"
                )));
            }
            beat();
            std::thread::sleep(POLL);
        }
    }
}

/// The name under which a process finds the file.
fn named(file: &Path, local_rank: usize) -> PathBuf {
    file.with_extension(format!("of-{local_rank}"))
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, io::Read};

    use athanor_contract::train::{Backend, DistributedSpec};

    use super::*;

    fn node(folder: &Path, local_rank: usize) -> Node {
        let spec = DistributedSpec { processes_per_node: 3, backend: Backend::Gloo, ..DistributedSpec::default() };
        let topology =
            Topology::new(&spec, |name| name.ends_with("LOCAL_RANK").then(|| local_rank.to_string())).unwrap();
        Node::join(&topology, Some(folder.to_owned())).unwrap()
    }

    fn text(
        node: &Node,
        beat: impl Fn(),
        make: impl FnOnce() -> Result<String, TrainError>,
    ) -> Result<String, TrainError> {
        let read = |from: &mut BufReader<File>| {
            let mut text = String::new();
            from.read_to_string(&mut text).map(|_| text)
        };
        node.once("text", beat, make, |text, to| to.write_all(text.as_bytes()), read)
    }

    fn never() -> Result<String, TrainError> {
        panic!("only the first process makes the value")
    }

    #[test]
    fn the_first_process_makes_what_all_have() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let others = [1, 2].map(|rank| {
                let folder = folder.path();
                scope.spawn(move || {
                    // It may wait before the first process has started.
                    let (node, beats) = (node(folder, rank), Cell::new(0));
                    let first = text(&node, || beats.set(beats.get() + 1), never).unwrap();
                    (first, text(&node, || {}, never).unwrap(), beats.get())
                })
            });
            let first = node(folder.path(), 0);
            let slow = || {
                std::thread::sleep(10 * POLL);
                Ok("one".to_owned())
            };
            assert_eq!(text(&first, || panic!("the first process does not wait"), slow).unwrap(), "one");
            assert_eq!(text(&first, || {}, || Ok("two".into())).unwrap(), "two");
            for other in others {
                let (one, two, beats) = other.join().unwrap();
                assert_eq!((one.as_str(), two.as_str()), ("one", "two"));
                assert!(beats > 1, "a process that waits beats, {beats} times");
            }
        });
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [ALIVE], "files are removed once they are loaded");
    }

    #[test]
    fn the_others_end_with_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (node(folder.path(), 0), node(folder.path(), 1));
        let wrong = || Err(TrainError::User("a.csv row 2: wrong".into()));
        assert!(text(&first, || {}, wrong).is_err());
        let error = text(&second, || {}, never).unwrap_err();
        assert!(matches!(&error, TrainError::User(message) if message == "a.csv row 2: wrong"), "{error}");
        assert!(text(&first, || {}, || Err(TrainError::Other("no room".into()))).is_err());
        let error = text(&second, || {}, never).unwrap_err();
        assert_eq!(error.to_string(), "lost a peer: the first process of this machine failed: no room");
        drop(first);
        let error = text(&second, || {}, never).unwrap_err();
        assert!(error.to_string().ends_with("ended before it had prepared the text"), "{error}");
        assert!(matches!(error, TrainError::LostPeer(_)));
    }

    #[test]
    fn a_process_alone_needs_no_folder() {
        assert_eq!(text(&Node::default(), || {}, || Ok("alone".into())).unwrap(), "alone");
    }
}

//! Folders for what a process needs while it runs.

use std::{fs::File, path::Path};

use tempfile::TempDir;

use crate::{
    TrainError,
    lock::{hold, is_held},
};

const WORK: &str = "athanor-trainer-";
const LOCK: &str = "lock";

/// Removes the folders, below `folder`, of processes that were killed. A folder without a lock belongs to a process
/// that is starting.
pub fn clear_abandoned(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(WORK) && is_held(&entry.path(), LOCK) == Some(false) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// This process's own folder. Its lock is held as long as the folder is in use.
pub struct Work {
    folder: TempDir,
    _lock: File,
}

impl Work {
    /// # Errors
    /// A folder `below` that cannot be written to.
    pub fn create(below: &Path) -> Result<Self, TrainError> {
        let folder = tempfile::Builder::new().prefix(WORK).tempdir_in(below).map_err(TrainError::other)?;
        let lock = hold(folder.path(), LOCK)?;
        Ok(Self { folder, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_killed_processes_are_removed_and_no_others() {
        let below = tempfile::tempdir().unwrap();
        let running = Work::create(below.path()).unwrap();
        // A process that starts: its lock has no name yet, held or not.
        let starting = below.path().join(format!("{WORK}starting"));
        std::fs::create_dir(&starting).unwrap();
        File::create(starting.join("lock.new")).unwrap();
        let killed = below.path().join(format!("{WORK}killed"));
        std::fs::create_dir(&killed).unwrap();
        File::create(killed.join(LOCK)).unwrap();
        clear_abandoned(below.path());
        assert!(running.path().exists() && starting.exists() && !killed.exists());
    }
}
